"""What travels between ranks while some code runs: every collective, who took part, and the bytes this rank sent.

Bytes are those of the usual ring algorithms, which are also the least that any algorithm can send where all ranks send
alike (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms"). With g ranks, and n bytes of the whole
tensor: all-gather and reduce-scatter n (g - 1)/g, all-reduce twice that, all-to-all what goes to others, send n.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rung.layout import Layout

__all__ = ["Message", "Sent", "Traffic"]


class Message(NamedTuple):
    """One call on a process group."""

    op: str
    """all_gather, reduce_scatter, all_reduce, all_to_all, broadcast, send, and whatever else there is, by its name."""
    ranks: tuple[int, ...]
    """Ranks of the world that took part; of a send this rank and the one it goes to."""
    sent_bytes: int
    """What this rank sent of it."""


class Sent(NamedTuple):
    """Messages of a kind together."""

    messages: int
    sent_bytes: int


class Traffic(TorchDispatchMode):
    """A context in which this rank's collectives are written down; backward passes on the CPU included.

    Groups of one rank are left out, and receives, which some other rank sends. ``messages`` keeps the order. Custom
    operations are looked into. Not seen is what is no torch operation: objects (gathered as tensors, those are seen), a
    store, or a graph that the compiler runs without Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Code is compiled as it would be without this mode, instead of being refused."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace in ("c10d", "_c10d_functional"):
            self._write_down(func, args, kwargs)
            return func(*args, **kwargs)
        if func.namespace == "rung":
            # What an operation of our own does inside would run without this mode. Its kernel is called as the
            # dispatcher would, with the mode in place.
            device = next(
                x.device.type for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)
            )
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU)
            with self:
                return func.redispatch(keys, *args, **kwargs)
        return func(*args, **kwargs)

    def by_group(self) -> dict[tuple[str, tuple[int, ...]], Sent]:
        """(op, ranks) -> how many messages, and bytes sent by this rank."""
        return self._together(lambda message: message.ranks)

    def by_axes(self, layout: Layout) -> dict[tuple[str, tuple[str, ...]], Sent]:
        """(op, axes) -> how many messages, and bytes sent by this rank.

        Axes are those of the layout along which the ranks of a message differ. Axes of one rank are never among them,
        so that a message to the world of a layout with tp alone counts as one of ("tp",).
        """

        def axes(message: Message) -> tuple[str, ...]:
            places = [layout.coordinate(rank) for rank in message.ranks]
            return tuple(axis for axis in layout.mesh if len({place[axis] for place in places}) > 1)

        return self._together(axes)

    def _together(self, key: Callable[[Message], Any]) -> dict[tuple[str, Any], Sent]:
        totals: dict[tuple[str, Any], list[int]] = defaultdict(lambda: [0, 0])
        for message in self.messages:
            total = totals[message.op, key(message)]
            total[0] += 1
            total[1] += message.sent_bytes
        return {kind: Sent(*total) for kind, total in totals.items()}

    def _write_down(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = func._schema.name.split("::")[1]
        if name not in _COUNTED:
            if name not in _SILENT:
                raise NotImplementedError(f"{func}: how many bytes a rank sends of this is not known here")
            return
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
        group = _group_of(named)
        if group.size() == 1:
            return
        op, count = _COUNTED[name]
        ranks = tuple(dist.get_process_group_ranks(group))
        if op == "send":
            if (peer := named["dst"]) == group.rank():
                return
            ranks = tuple(sorted((ranks[group.rank()], ranks[peer])))
        self.messages.append(Message(op, ranks, count(named, group.size(), group.rank())))


def _group_of(named: Mapping[str, Any]) -> dist.ProcessGroup:
    if "group_name" in named:
        from torch.distributed.distributed_c10d import _resolve_process_group

        name = named["group_name"]
        return name if isinstance(name, dist.ProcessGroup) else _resolve_process_group(name)
    group = named["process_group"]
    # Operations carry the C++ object in a box.
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _nbytes(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_nbytes, tensors))


_Count = Callable[[Mapping[str, Any], int, int], int]


def _of(name: str, factor: Callable[[int], float]) -> _Count:
    """``factor(group size)`` times the bytes of an argument."""
    return lambda named, size, rank: round(_nbytes(named[name]) * factor(size))


def _all_to_all_lists(named: Mapping[str, Any], size: int, rank: int) -> int:
    return sum(_nbytes(tensor) for peer, tensor in enumerate(named["input_tensors"]) if peer != rank)


def _all_to_all(named: Mapping[str, Any], size: int, rank: int) -> int:
    tensor: Tensor = named["input"]
    splits: Sequence[int] = named["input_split_sizes"]
    if not splits or not tensor.numel():
        return _nbytes(tensor) * (size - 1) // size
    return _nbytes(tensor) // tensor.shape[0] * (sum(splits) - splits[rank])


def _to_others(g: int) -> float:
    return g - 1


def _part(g: int) -> float:
    return (g - 1) / g


def _twice(g: int) -> float:
    return 2 * (g - 1) / g


_COUNTED: dict[str, tuple[str, _Count]] = {
    "allreduce_": ("all_reduce", _of("tensors", _twice)),
    "allreduce_coalesced_": ("all_reduce", _of("tensors", _twice)),
    "_allgather_base_": ("all_gather", _of("input_tensor", _to_others)),
    "allgather_": ("all_gather", _of("input_tensors", _to_others)),
    "allgather_coalesced_": ("all_gather", _of("input_list", _to_others)),
    "allgather_into_tensor_coalesced_": ("all_gather", _of("inputs", _to_others)),
    "_reduce_scatter_base_": ("reduce_scatter", _of("input_tensor", _part)),
    "reduce_scatter_": ("reduce_scatter", _of("input_tensors", _part)),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _of("inputs", _part)),
    "alltoall_base_": ("all_to_all", _all_to_all),
    "alltoall_": ("all_to_all", _all_to_all_lists),
    "broadcast_": ("broadcast", lambda n, g, _: round(_nbytes(n.get("tensors", n.get("input"))) * _part(g))),
    "broadcast": ("broadcast", _of("input", _part)),
    "send": ("send", _of("tensors", lambda g: 1)),
    "all_reduce": ("all_reduce", _of("input", _twice)),
    "all_reduce_": ("all_reduce", _of("input", _twice)),
    "all_reduce_coalesced": ("all_reduce", _of("inputs", _twice)),
    "all_reduce_coalesced_": ("all_reduce", _of("inputs", _twice)),
    "all_gather_into_tensor": ("all_gather", _of("input", _to_others)),
    "all_gather_into_tensor_out": ("all_gather", _of("input", _to_others)),
    "all_gather_into_tensor_coalesced": ("all_gather", _of("inputs", _to_others)),
    "reduce_scatter_tensor": ("reduce_scatter", _of("input", _part)),
    "reduce_scatter_tensor_out": ("reduce_scatter", _of("input", _part)),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _of("inputs", _part)),
    "all_to_all_single": ("all_to_all", _all_to_all),
    "isend": ("send", _of("tensor", lambda g: 1)),
}
"""Operation of torch -> its plain name and the bytes that a rank sends."""

_SILENT = {"barrier", "monitored_barrier_", "recv_", "recv_any_source_", "irecv", "wait_tensor", "check_for_nan"}
"""Nothing of note is sent in these."""
