"""Counts the bytes that are alive while a function runs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes of each dtype that were alive at once among the results of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[torch.dtype, int] = {}
        self.peak: dict[torch.dtype, int] = {}
        self.seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage, dtype = tensor.untyped_storage(), tensor.dtype
                self.seen[storage] = None
                self.alive[dtype] = self.alive.get(dtype, 0) + storage.nbytes()
                self.peak[dtype] = max(self.peak.get(dtype, 0), self.alive[dtype])
                weakref.finalize(storage, self.release, dtype, storage.nbytes())
        return result

    def release(self, dtype: torch.dtype, num_bytes: int) -> None:
        self.alive[dtype] -= num_bytes
