"""The settings of a model and the arithmetic that follows from them alone (no torch).

Field names are Hugging Face's. Legend: V vocab_size, D hidden_size, F intermediate_size, L num_hidden_layers,
H num_attention_heads, K num_key_value_heads, E head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rung.layout.values import divisors, listed

__all__ = ["InitRule", "ModelConfig", "RopeScaling", "init_rules", "num_parameters", "parameter_shapes"]

RESIDUALS = ("standard",)


@dataclass
class RopeScaling:
    """Llama 3.1's stretching of slow rotary frequencies (``rope_type: llama3``); ``factor`` 1.0 turns it off."""

    factor: float = 1.0
    """How many times longer the context becomes; frequencies below the slow threshold are divided by it."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_max_position_embeddings / low_freq_factor are stretched by the full factor."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_max_position_embeddings / high_freq_factor stay as they are."""
    original_max_position_embeddings: int = 8192
    """The context, in tokens, that the frequencies were made for."""


@dataclass
class ModelConfig:
    """A Llama-style decoder. ``num_key_value_heads`` and ``head_dim`` are concrete after construction."""

    vocab_size: int = 32000
    """Rows of the embedding table, in token ids."""
    hidden_size: int = 512
    """Width D of the residual stream, in features."""
    intermediate_size: int = 1376
    """Width F inside the SwiGLU feed-forward, in features."""
    num_hidden_layers: int = 8
    """Number of decoder blocks."""
    num_attention_heads: int = 8
    """Number of query heads."""
    num_key_value_heads: int = 0
    """Number of key/value heads (grouped-query attention); must divide num_attention_heads; 0 means as many."""
    head_dim: int = 0
    """Features per head, even; 0 means hidden_size / num_attention_heads."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """Llama 3.1 scaling of the rotary frequencies; off while rope_scaling.factor is 1.0."""
    tie_word_embeddings: bool = False
    """Whether the output projection is the embedding table."""
    fused_qkv: bool = False
    """One projection makes queries, keys and values: one matrix product, and one matrix to Muon."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation, as in Qwen3."""
    sliding_window: int | None = None
    """A token sees itself and the sliding_window - 1 tokens before it; null sees all before it."""
    dropout: float = 0.0
    """Probability of dropping a feature of the embedding output and of each sublayer output, in training only.
    Attention probabilities are never dropped."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; projections into the residual stream use it / sqrt(2L)."""
    max_position_embeddings: int = 2048
    """Longest sequence the model is meant for, in tokens."""
    residual: str = "standard"
    """How sublayers join the residual stream: standard."""

    def __post_init__(self) -> None:
        if self.num_key_value_heads == 0:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim == 0 and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads

    def validate(self) -> list[str]:
        """All that is wrong with these settings, one message with the values and the fix each; empty when nothing."""
        problems: list[str] = []

        def check(ok: bool, problem: str) -> None:
            if not ok:
                problems.append(problem)

        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings")  # fmt: skip
        for name in sizes:
            check(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads >= 1 and kv_heads >= 1:
            check(
                heads % kv_heads == 0,
                f"model.num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; "
                f"legal values: {listed(divisors(heads))}",
            )
        if heads >= 1 and self.head_dim == self.hidden_size // heads:
            # Otherwise head_dim was chosen on its own, as in Qwen3, and owes nothing to hidden_size.
            check(
                self.hidden_size % heads == 0,
                f"model.num_attention_heads={heads} does not divide hidden_size={self.hidden_size}; "
                "change one of them or set model.head_dim",
            )
        check(
            self.head_dim >= 2 and self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim} must be even and at least 2: rotary embeddings turn pairs of features",
        )
        check(self.rms_norm_eps >= 0, f"model.rms_norm_eps={self.rms_norm_eps} must not be negative")
        check(self.rope_theta > 1, f"model.rope_theta={self.rope_theta} must be above 1 (10000.0 is usual)")
        check(0 <= self.dropout < 1, f"model.dropout={self.dropout} must be in [0, 1)")
        check(self.initializer_range >= 0, f"model.initializer_range={self.initializer_range} must not be negative")
        check(
            self.sliding_window is None or self.sliding_window >= 1,
            f"model.sliding_window={self.sliding_window} must be at least 1, or null for full attention",
        )
        check(
            self.residual in RESIDUALS,
            f"model.residual={self.residual!r} is unknown; legal values: {', '.join(RESIDUALS)}",
        )
        scaling = self.rope_scaling
        check(scaling.factor >= 1, f"model.rope_scaling.factor={scaling.factor} must be at least 1.0 (1.0 is off)")
        if scaling.factor != 1:
            check(
                0 < scaling.low_freq_factor < scaling.high_freq_factor,
                f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be positive and below "
                f"high_freq_factor={scaling.high_freq_factor}",
            )
            check(
                scaling.original_max_position_embeddings >= 1,
                "model.rope_scaling.original_max_position_embeddings="
                f"{scaling.original_max_position_embeddings} must be at least 1",
            )
        return problems


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the whole model, in model order; a tied lm_head.weight is not listed."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, width)}
    if config.fused_qkv:
        projections = {"self_attn.qkv_proj": (queries + 2 * keys, width)}
    else:
        projections = {
            f"self_attn.{name}_proj": (rows, width) for name, rows in zip("qkv", (queries, keys, keys), strict=True)
        }
    for layer in range(config.num_hidden_layers):
        block = {
            **projections,
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        if config.qk_norm:
            block |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters of the whole model; a tied output projection counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


@dataclass(frozen=True)
class InitRule:
    """How a parameter starts: ``kind`` "normal" (mean 0, standard deviation ``std``) or "ones"."""

    kind: str
    std: float = 0.0


def init_rules(config: ModelConfig) -> dict[str, InitRule]:
    """Name -> rule for every parameter of the whole model.

    Projections into the residual stream start smaller by sqrt(2L), so that its variance does not grow with depth
    (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3).
    """
    residual_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    rules = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            rules[name] = InitRule("ones")
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            rules[name] = InitRule("normal", residual_std)
        else:
            rules[name] = InitRule("normal", config.initializer_range)
    return rules
