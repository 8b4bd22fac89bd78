"""Exact counts of the floating-point operations of a Decoder's matrix products.

A multiplication and an addition are two operations. Only matrix products are counted; norms, rotations, the softmax and
the loss are not. Attention is counted for the pairs of tokens that see each other: ``causal=True``, the default, counts
the triangle (and the sliding window inside it); ``causal=False`` counts the full square, as most published figures and
``torch.utils.flop_counter`` do.
"""

from __future__ import annotations

from rung.models.config import ModelConfig

__all__ = ["forward_flops", "train_flops_per_token"]


def _visible_pairs(seq_len: int, window: int | None, causal: bool) -> int:
    """Number of (query, key) pairs of one sequence."""
    if not causal:
        return seq_len * seq_len
    full = min(seq_len, window) if window is not None else seq_len
    # The first `full` queries see 1, 2 .. full tokens, the others `full` each.
    return full * (full + 1) // 2 + (seq_len - full) * full


def forward_flops(config: ModelConfig, batch_size: int, seq_len: int, causal: bool = True) -> int:
    """Operations of one forward pass over batch_size sequences of seq_len tokens, logits included."""
    width, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layer_weights = width * (2 * queries + 2 * keys) + 3 * width * config.intermediate_size
    weights = config.num_hidden_layers * layer_weights + config.vocab_size * width
    pairs = _visible_pairs(seq_len, config.sliding_window, causal)
    attention = config.num_hidden_layers * 4 * queries * pairs  # scores and the weighted sum, 2 operations each
    return batch_size * (2 * seq_len * weights + attention)


def train_flops_per_token(config: ModelConfig, seq_len: int, causal: bool = True) -> float:
    """Operations per token of forward and backward without recomputation: every product appears three times."""
    return 3 * forward_flops(config, 1, seq_len, causal) / seq_len
