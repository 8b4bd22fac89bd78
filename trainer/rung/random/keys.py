"""Keys of random streams: one per (seed, name), and from it one per step."""

from __future__ import annotations

from hashlib import blake2b
from typing import overload

from torch import Tensor

from rung.random.philox import Key, philox_torch, rounds


def name_key(seed: int, name: str) -> Key:
    """Two 32-bit words, little-endian, from BLAKE2b-64 of the UTF-8 text ``{seed}/{name}``."""
    digest = blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@overload
def step_key(key: Key, step: int) -> Key: ...
@overload
def step_key(key: tuple[Tensor | int, Tensor | int], step: Tensor) -> tuple[Tensor, Tensor]: ...
def step_key(key: tuple[Tensor | int, Tensor | int], step: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    """The key of one step: the first two words of counter (low 32 bits of step, high 32 bits, 0, 1) under ``key``.

    ``step`` is an int, or a 0-dim int64 tensor, which gives 0-dim int64 tensors of the same values on its device and
    is traceable by torch.compile. The last counter word keeps these draws apart from the normals of the same key.
    """
    if isinstance(step, Tensor):
        return philox_torch(step, step >> 32, 0, 1, *key)[:2]
    first, second, _, _ = rounds(step & 0xFFFFFFFF, step >> 32 & 0xFFFFFFFF, 0, 1, *key)
    return first, second
