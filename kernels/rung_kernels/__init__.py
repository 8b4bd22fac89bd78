"""Operations of a language model, each with a plain torch reference in ``rung_kernels.reference``.

``rung_kernels.<op>`` is what a model calls. In these pages "fp32" means promote(dtype, float32): float64 stays float64.
Dimensions in names: B batch, T tokens, H heads, K key/value heads, E head size, N rows (tokens), V vocabulary.
"""

from rung_kernels import reference
from rung_kernels.block_attention import merge_lse
from rung_kernels.reference import attention, cross_entropy, rms_norm, rope, swiglu

__all__ = ["attention", "cross_entropy", "merge_lse", "reference", "rms_norm", "rope", "swiglu"]
