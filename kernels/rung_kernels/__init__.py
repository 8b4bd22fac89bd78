"""Operations of a language model, each with a plain torch reference in ``rung_kernels.reference``.

``rung_kernels.<op>`` is what a model calls; ``rung_kernels.dispatch`` says when it runs a Triton kernel. In these pages
"fp32" means promote(dtype, float32): float64 stays float64, and always runs the reference.
Dimensions in names: B batch, T tokens, H heads, K key/value heads, E head size, N rows (tokens), V vocabulary.
"""

from rung_kernels import reference
from rung_kernels.block_attention import merge_lse
from rung_kernels.dispatch import backend, set_backend, use_backend
from rung_kernels.norm import add_rms_norm, rms_norm
from rung_kernels.reference import adamw_step, attention, cross_entropy, rope, spam_step, swiglu

__all__ = [
    "adamw_step",
    "add_rms_norm",
    "attention",
    "backend",
    "cross_entropy",
    "merge_lse",
    "reference",
    "rms_norm",
    "rope",
    "set_backend",
    "spam_step",
    "swiglu",
    "use_backend",
]
