"""Operations of a language model, each with a plain torch reference in ``rung_kernels.reference``.

``rung_kernels.<op>`` is what a model calls; ``rung_kernels.dispatch`` says when it runs a Triton kernel. In these pages
"fp32" means promote(dtype, float32): float64 stays float64, and always runs the reference.
Dimensions in names: B batch, T tokens, H heads, K key/value heads, E head size, N rows (tokens), V vocabulary.
"""

from rung_kernels import reference
from rung_kernels.attention import attention, attention_engine
from rung_kernels.cross_entropy import cross_entropy
from rung_kernels.dispatch import backend, set_backend, use_backend
from rung_kernels.grouped_mm import grouped_mm
from rung_kernels.linear_cross_entropy import linear_cross_entropy
from rung_kernels.merge_lse import merge_lse
from rung_kernels.norm import add_rms_norm, rms_norm
from rung_kernels.optimizer import adamw_step, spam_step
from rung_kernels.permute import permute, unpermute
from rung_kernels.rope import rope
from rung_kernels.router import router
from rung_kernels.swiglu import swiglu

__all__ = [
    "adamw_step",
    "add_rms_norm",
    "attention",
    "attention_engine",
    "backend",
    "cross_entropy",
    "grouped_mm",
    "linear_cross_entropy",
    "merge_lse",
    "permute",
    "reference",
    "rms_norm",
    "rope",
    "router",
    "set_backend",
    "spam_step",
    "swiglu",
    "unpermute",
    "use_backend",
]
