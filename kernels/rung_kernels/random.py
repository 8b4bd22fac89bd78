"""Random words, normals and dropout masks as functions of a key and a counter: the same bits from every backend.

Legend: B batch, T tokens, F features, C counters, N numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rung_kernels.dispatch import runs_on
from rung_kernels.op import is_plain
from rung_kernels.reference import random as plain
from rung_kernels.reference.random import Key

__all__ = ["dropout_mask", "normals", "philox_words"]


def philox_words(
    key: Key,
    start: int,
    count: int,
    c2: Tensor | int = 0,
    c3: Tensor | int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Philox4x32-10 words of counters (low and high 32 bits of i, c2, c3), i from ``start``: int64 [count, 4].

    Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3". ``key``: two words, ints or int64 [] on the
    device. i is counted modulo 2^64. Writes 32 bytes a counter and reads nothing.
    """
    device = torch.device(device or "cpu")
    if not runs_on("philox_words", device):
        return plain.words(key, start, count, c2, c3, device)
    k0, k1, c2, c3 = (_on(device, x) for x in (*key, c2, c3))
    fill = _words if is_plain(k0, k1, c2, c3) else _words_op
    return fill(k0, k1, c2, c3, (start + 2**63) % 2**64 - 2**63, count)


def normals(key: Key, start: int, count: int, table: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normals number ``start`` to ``start + count`` of the stream ``key`` -> [count] on the table's device.

    Normal i is made of word i % 4 of the Philox counter (low and high 32 bits of i // 4, 0, 0) and a table of the
    inverse distribution, int64 [3, 2048] (see ``reference.random.normals``); start in [0, 2^63). Exact in float64;
    other dtypes are rounded once, bfloat16 and float16 from float32.
    """
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[0] != 3:
        raise ValueError(f"the table must be int64 [3, segments], not {table.dtype} {list(table.shape)}")
    if not 0 <= start < 2**63:
        raise ValueError(f"start={start} must be a number from 0 to 2^63 - 1")
    if not runs_on("normals", table.device):
        return plain.normals(key, start, count, table, dtype)
    k0, k1 = (_on(table.device, x) for x in key)
    fill = _normals if is_plain(k0, k1, table) else _normals_op
    return fill(k0, k1, table, start, count, dtype)


def dropout_mask(
    key: Key, sample_ids_B: Tensor, positions_BT: Tensor, features: int, first_feature: int, p: float
) -> Tensor:
    """What dropout with probability ``p`` keeps of features first_feature to first_feature + features: bool [B, T, F].

    Feature f is dropped where word f % 4 of the Philox counter (f // 4, position, low and high 32 bits of the sample
    id) is below floor(p 2^32). ``key``: two words, ints or int64 [] on the device; ids and positions are int64.
    ``first_feature``, a multiple of 4, lets a rank that holds some of the features draw its own part. Writes a byte an
    element.
    """
    if first_feature % 4:
        raise ValueError(f"first_feature={first_feature} must be a multiple of 4: four features share a counter")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p} must be a probability, from 0 to 1")
    if not runs_on("dropout_mask", sample_ids_B.device):
        return plain.dropout_mask(key, sample_ids_B, positions_BT, features, first_feature, p)
    k0, k1 = (_on(sample_ids_B.device, x) for x in key)
    draw = _mask if is_plain(k0, k1, sample_ids_B, positions_BT) else _mask_op
    return draw(k0, k1, sample_ids_B, positions_BT, features, first_feature, int(p * 2**32))


def _on(device: torch.device, word: Tensor | int) -> Tensor:
    """int64 [], filled on the device: a copy from the host would make it wait."""
    if isinstance(word, Tensor):
        return word
    return torch.full((), word & 0xFFFFFFFF, dtype=torch.int64, device=device)


def _words(k0: Tensor, k1: Tensor, c2: Tensor, c3: Tensor, start: int, count: int) -> Tensor:
    from rung_kernels.triton_kernels import philox

    out_C4 = k0.new_empty(count, 4)
    philox.words(start, c2, c3, k0, k1, out_C4)
    return out_C4


def _normals(k0: Tensor, k1: Tensor, table: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    from rung_kernels.triton_kernels import philox

    out_N = table.new_empty(count, dtype=dtype)
    philox.normals(start, k0, k1, table.contiguous(), out_N)
    return out_N


def _mask(
    k0: Tensor,
    k1: Tensor,
    sample_ids_B: Tensor,
    positions_BT: Tensor,
    features: int,
    first_feature: int,
    threshold: int,
) -> Tensor:
    from rung_kernels.triton_kernels import philox

    out_BTF = positions_BT.new_empty((*positions_BT.shape, features), dtype=torch.bool)
    philox.dropout_mask(k0, k1, sample_ids_B, positions_BT, first_feature, threshold, out_BTF.view(torch.uint8))
    return out_BTF


# What torch.compile sees.
_words_op = torch.library.custom_op("rung::philox_words", _words, mutates_args=())
_normals_op = torch.library.custom_op("rung::normals", _normals, mutates_args=())
_mask_op = torch.library.custom_op("rung::dropout_mask", _mask, mutates_args=())


@_words_op.register_fake
def _fake_words(k0: Tensor, k1: Tensor, c2: Tensor, c3: Tensor, start: int, count: int) -> Tensor:
    return k0.new_empty(count, 4)


@_normals_op.register_fake
def _fake_normals(k0: Tensor, k1: Tensor, table: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    return table.new_empty(count, dtype=dtype)


@_mask_op.register_fake
def _fake_mask(
    k0: Tensor,
    k1: Tensor,
    sample_ids_B: Tensor,
    positions_BT: Tensor,
    features: int,
    first_feature: int,
    threshold: int,
) -> Tensor:
    return positions_BT.new_empty((*positions_BT.shape, features), dtype=torch.bool)
