"""Exact counts of the floating-point operations of a Decoder's matrix products.

A multiplication and an addition are two operations. Only matrix products are counted; norms, rotations, the softmax and
the loss are not. Attention is counted for the pairs of tokens that see each other: ``causal=True``, the default, counts
the triangle (and the sliding window inside it); ``causal=False`` counts the full square, as most published figures and
``torch.utils.flop_counter`` do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from rung.models.config import ModelConfig, parameter_shapes

__all__ = ["StageCosts", "forward_flops", "stage_costs", "train_flops_per_token"]


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


class StageCosts(NamedTuple):
    """What a pipeline stage can hold, and what each costs: operations of one forward pass, and parameters."""

    layers: list[int]
    embedding: int
    """A lookup has no operations."""
    head: int
    layer_parameters: int
    table_parameters: int
    """Of the embedding, and of the output head too: across stages each has a table of its own."""


def stage_costs(config: ModelConfig, seq_len: int) -> StageCosts:
    """What each layer, the embedding and the output head cost, for one sequence."""
    table = config.vocab_size * config.hidden_size
    head, layers = 2 * seq_len * table, config.num_hidden_layers
    in_layer = sum(math.prod(s) for name, s in parameter_shapes(config).items() if name.startswith("layers.0."))
    return StageCosts([(forward_flops(config, 1, seq_len) - head) // layers] * layers, 0, head, in_layer, table)


def train_flops_per_token(config: ModelConfig, seq_len: int, causal: bool = True) -> float:
    """Operations per token of forward and backward without recomputation: every product appears three times."""
    return 3 * forward_flops(config, 1, seq_len, causal) / seq_len
