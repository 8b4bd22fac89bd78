"""Plain torch references: the maths each kernel is held against, and what runs where no kernel does."""

from rung_kernels.reference.attention import attention
from rung_kernels.reference.cross_entropy import cross_entropy
from rung_kernels.reference.grouped_mm import grouped_mm
from rung_kernels.reference.linear_cross_entropy import linear_cross_entropy
from rung_kernels.reference.merge_lse import merge_lse
from rung_kernels.reference.norm import add_rms_norm, rms_norm
from rung_kernels.reference.optimizer import Factor, adamw_step, spam_step
from rung_kernels.reference.permute import permute, unpermute
from rung_kernels.reference.rope import rope
from rung_kernels.reference.router import router
from rung_kernels.reference.swiglu import swiglu

__all__ = [
    "Factor",
    "adamw_step",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "grouped_mm",
    "linear_cross_entropy",
    "merge_lse",
    "permute",
    "rms_norm",
    "rope",
    "router",
    "spam_step",
    "swiglu",
    "unpermute",
]
