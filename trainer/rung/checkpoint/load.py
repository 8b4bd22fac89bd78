"""Loading: every rank fills its tensors from a checkpoint that any layout wrote.

Each block that a node needs is read and verified once, by one of its ranks, into memory that its ranks share; from
there each copies the elements that are its own. Blocks are shared a window at a time, so that the host memory this
takes does not grow with the model.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rung.checkpoint import faults
from rung.checkpoint.format import BLOCK_BYTES, Manifest, StoredFile, StoredTensor, block_digest, item_bytes
from rung.checkpoint.reader import Reader
from rung.checkpoint.scatter import scatter
from rung.errors import CheckpointError, UserError
from rung.layout import Box, LogicalTensor
from rung.optim import Packed, StateTensor

if TYPE_CHECKING:
    from rung.parallel import World

__all__ = ["LoadReport", "load_state"]

_READS_AT_ONCE = 8
"""Per rank. Local files need one or two; each request to an object store waits a long time for its first byte."""
_NAMES_SHOWN = 8
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Elements travel as words of their size, whatever they mean."""

T = TypeVar("T")


@dataclass(frozen=True)
class LoadReport:
    """What a load read."""

    bytes_read: int
    """By this rank."""
    bytes_read_total: int
    """By all ranks."""
    bytes_touched: int
    """In the blocks that hold an element that a node wants, summed over nodes."""
    seconds: float
    windows: int
    """Most on any node."""
    unused: tuple[str, ...]
    """Tensors of the checkpoint that no rank asked for."""
    not_shared: str
    """Why every rank read for itself alone; empty: ranks of a node read for each other."""


def load_state(
    reader: Reader,
    targets: Mapping[str, StateTensor],
    world: World,
    *,
    window_bytes: int = 64 * 2**20,
    node: str | None = None,
) -> LoadReport:
    """Fill every piece of every target, owned or not, with its elements. Collective.

    Args:
        reader: of the same checkpoint on every rank.
        targets: by name, each rank's own tensors, written in place; an alias is read under the name it is tied to.
        window_bytes: bounds the blocks that a node holds in memory at once; one block at least. To get new memory takes
            as long as to read into it, so that a load with windows of 256 MB is slower than with these.
        node: ranks with one name share blocks. By default those of one machine that see each other's processes.

    Raises:
        CheckpointError: on every rank the same. Either names, shapes or dtypes do not fit: all that do not are listed,
            and no target was written. Or files are damaged, missing or unreadable, named with blocks and tensors: what
            was read before them stands in the targets, but nothing that was not verified.
    """
    begun = time.perf_counter()
    unpacked, stored_later = _unpacked(targets)
    together = _Together(world, f"cannot load {reader.where()}")
    line = _Line(reader.manifest.files)
    copies: list[_Copy] = []
    with together.trying():
        faults.reach("load.begin", world.rank)
        for name, target in unpacked.items():
            stored, problems = _match(name, target, reader.manifest)
            together.problems += problems
            if stored is not None and not problems:
                copies += _copies(stored, target, line)
    together.agree()
    wanted = {_source(name, target) for name, target in unpacked.items()}
    share = _share_out(reader.manifest, line, copies, wanted, together, max(1, window_bytes // BLOCK_BYTES), node)

    bytes_read = 0
    extents = np.array([copy.extent for copy in copies], np.int64).reshape(-1, 2)
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for window in range(share.windows):
            blocks = share.blocks[window * share.window_blocks : (window + 1) * share.window_blocks]
            with together.trying():
                bytes_read += _read(reader, line, blocks, share, together.problems, pool)
                faults.reach("load.window", world.rank)
            together.agree()
            with together.trying():
                for index in _touching(extents, blocks):
                    copies[index].take(share.memory, blocks)
            together.agree()  # nobody needs this window when the next overwrites it
    with together.trying():
        for packed, dense in stored_later:
            packed.store(dense)
        faults.reach("load.done", world.rank)
    together.agree()
    total = torch.tensor(bytes_read)
    if world.size > 1:
        dist.all_reduce(total)
    return LoadReport(
        bytes_read=bytes_read,
        bytes_read_total=int(total),
        bytes_touched=share.bytes_touched,
        seconds=time.perf_counter() - begun,
        windows=share.windows,
        unused=share.unused,
        not_shared=share.not_shared,
    )


class _Together:
    """What goes wrong on this rank, until all ranks stop because of it."""

    def __init__(self, world: World, what: str) -> None:
        self.world, self.what = world, what
        self.problems: list[str] = []
        self._cause: Exception | None = None

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Note an error instead of leaving with it: the other ranks would wait for this one."""
        try:
            yield
        except Exception as error:
            self._cause = error
            self.problems.append(f"rank {self.world.rank}: {type(error).__name__}: {error}")

    def agree(self) -> None:
        """Raise the problems of all ranks on all ranks, if there are any. Collective."""
        if not self.world.any(bool(self.problems)):
            return
        everyone = self.exchange(self.problems)
        texts = list(dict.fromkeys(text for texts in everyone for text in texts))
        raise CheckpointError(f"{self.what}: {UserError.one_text(texts)}") from self._cause

    def exchange(self, mine: T) -> list[T]:
        """What each rank brings, by rank. Collective."""
        everyone = [mine] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(everyone, mine)  # over gloo, which the default group has on CUDA too
        return everyone


class _Line:
    """All blocks of a checkpoint in one line, file after file: numbered, and addressed as if each were full."""

    def __init__(self, files: Mapping[str, StoredFile]) -> None:
        self._names = sorted(files)
        counts = [len(files[name].blocks) for name in self._names]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._first = dict(zip(self._names, (self._ends - counts).tolist(), strict=True))
        self.sizes = np.full(sum(counts), BLOCK_BYTES, np.int64)
        """Bytes of each block: the last of a file may be short."""
        for name, end, count in zip(self._names, self._ends, counts, strict=True):
            if count:
                self.sizes[end - 1] = files[name].size - (count - 1) * BLOCK_BYTES

    def address(self, file: str, offset: int) -> int:
        """Of a byte of a file."""
        return self._first[file] * BLOCK_BYTES + offset

    def place(self, block: int) -> tuple[str, int]:
        """The file of a block, and its number there."""
        name = self._names[int(np.searchsorted(self._ends, block, side="right"))]
        return name, block - self._first[name]

    def union(self, ranges: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
        """The numbers, ascending, of the blocks in any of the ranges [first, last)."""
        touched = np.zeros(len(self.sizes), bool)
        for first, last in ranges:
            touched[first:last] = True
        return np.flatnonzero(touched)


def _runs(blocks: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ranges [first, last) of places in ``blocks``, each as long as the numbers there follow one another."""
    cuts = [0, *(np.flatnonzero(np.diff(blocks) != 1) + 1).tolist(), len(blocks)]
    return list(pairwise(cuts)) if len(blocks) else []


@dataclass(frozen=True)
class _Copy:
    """Elements that a stored box and a piece of a target have in common."""

    target: Tensor
    """The piece, as words."""
    place: tuple[int, ...]
    """Where the elements begin in it."""
    start: int
    """Address of the stored box."""
    sizes: tuple[int, ...]
    """Of the stored box."""
    wanted: Box
    """The elements, counted from the corner of the stored box; not empty."""

    @cached_property
    def _spans(self) -> tuple[list[int], int]:
        """Where the elements lie: addresses, ascending, and how many bytes from each of them on.

        Gaps that are too small to hold a whole block are left in: the blocks of the spans are those of the elements.
        """
        length = stride = self.target.itemsize
        starts = [self.start]
        for size, offset, count in zip(
            self.sizes[::-1], self.wanted.offsets[::-1], self.wanted.sizes[::-1], strict=True
        ):
            if len(starts) == 1 and stride - length < BLOCK_BYTES:
                starts = [starts[0] + offset * stride]
                length += (count - 1) * stride
            else:
                starts = [start + index * stride for index in range(offset, offset + count) for start in starts]
            stride *= size
        return starts, length

    @property
    def extent(self) -> tuple[int, int]:
        """Addresses of the first byte, and after the last."""
        starts, length = self._spans
        return starts[0], starts[-1] + length

    @property
    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of the blocks that hold an element."""
        starts, length = self._spans
        return ((start // BLOCK_BYTES, (start + length - 1) // BLOCK_BYTES + 1) for start in starts)

    def take(self, memory: mmap.mmap, blocks: NDArray[np.int64]) -> None:
        """Copy the elements that are in ``blocks``, which lie in memory one after another."""
        begin, end = self.extent
        item = self.target.itemsize
        destination = self.target[Box(self.place, self.wanted.sizes).slices()]
        low, high = np.searchsorted(blocks, (begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1)).tolist()
        for run, stop in _runs(blocks[low:high]):
            run_begin = int(blocks[low + run]) * BLOCK_BYTES
            first, last = max(begin, run_begin), min(end, run_begin + (stop - run) * BLOCK_BYTES)
            items = torch.frombuffer(
                memory,
                dtype=destination.dtype,
                count=(last - first) // item,
                offset=(low + run) * BLOCK_BYTES + first - run_begin,
            )
            scatter(items, (first - self.start) // item, self.sizes, self.wanted, destination)


class _Target(NamedTuple):
    """A tensor to be filled, and what it is logically."""

    tensor: Tensor
    logical: LogicalTensor


def _unpacked(targets: Mapping[str, StateTensor]) -> tuple[dict[str, _Target], list[tuple[Packed, Tensor]]]:
    """Targets with host memory in the place of packed ones, and which memory is to be packed in the end."""
    unpacked, packed = {}, []
    for name, (tensor, logical) in targets.items():
        if isinstance(tensor, Packed):
            dense = torch.zeros(tensor.shape, dtype=tensor.dtype)
            packed.append((tensor, dense))
            tensor = dense
        unpacked[name] = _Target(tensor, logical)
    return unpacked, packed


def _source(name: str, target: _Target) -> str:
    """The name under which a target is stored."""
    return target.logical.tied_to or name


def _match(name: str, target: _Target, manifest: Manifest) -> tuple[StoredTensor | None, list[str]]:
    """What is stored of a target, and everything about it that does not fit."""
    tensor, logical = target
    source = _source(name, target)
    label = name if source == name else f"{name}, which is stored as {source},"
    if name.partition("/")[2] != source.partition("/")[2]:
        return None, [f"{label} is another state than that"]  # of shape and dtype alike, as parameter and moment
    stored = manifest.tensors.get(source)
    if stored is None:
        has_elements = 0 not in logical.shape  # what has none is not stored
        return None, [f"{label} is missing from the checkpoint"] * has_elements
    problems = []
    if stored.shape != tuple(logical.shape):
        problems.append(f"{label} has shape {list(stored.shape)} in the checkpoint, {list(logical.shape)} here")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if stored.dtype != dtype:
        problems.append(f"{label} is {stored.dtype} in the checkpoint, {dtype} here")
    problems += [
        f"{label} has a local tensor of shape {list(tensor.shape)}, in which {box} has no place at {local}"
        for box, local, _ in logical.pieces()
        if tensor.dim() != len(local) or tensor[local].shape != box.sizes
    ]
    return stored, problems


def _copies(stored: StoredTensor, target: _Target, line: _Line) -> Iterator[_Copy]:
    """All that the boxes of a stored tensor and the pieces of a target have in common."""
    words = target.tensor.detach().view(_WORDS[item_bytes(stored.dtype)])
    table = len(stored.boxes), len(stored.shape)
    starts = np.array([box.offsets for box, _, _ in stored.boxes], np.int64).reshape(table)
    stops = starts + np.array([box.sizes for box, _, _ in stored.boxes], np.int64).reshape(table)
    for piece, local, _ in target.logical.pieces():
        corner = np.array(piece.offsets, np.int64)
        first = np.maximum(starts, corner)
        sizes = np.minimum(stops, corner + np.array(piece.sizes, np.int64)) - first
        here = words[local]
        for index in np.flatnonzero((sizes > 0).all(axis=1)):
            box, file, offset = stored.boxes[index]
            yield _Copy(
                target=here,
                place=tuple((first[index] - corner).tolist()),
                start=line.address(file, offset),
                sizes=box.sizes,
                wanted=Box(tuple((first[index] - starts[index]).tolist()), tuple(sizes[index].tolist())),
            )


def _touching(extents: NDArray[np.int64], blocks: NDArray[np.int64]) -> list[int]:
    """Which of the copies with ``extents`` (begin, end) may have elements in the blocks."""
    if not len(blocks):
        return []
    begin, end = blocks[0] * BLOCK_BYTES, (blocks[-1] + 1) * BLOCK_BYTES
    return np.flatnonzero((extents[:, 0] < end) & (extents[:, 1] > begin)).tolist()


class _Offer(NamedTuple):
    """What a rank tells the others before anything is read."""

    node: str
    memory: tuple[str, str]
    """A file in memory that the ranks of its node may use: path and name."""
    checkpoint: str
    """Digest of what it is about to read."""
    blocks: list[tuple[int, int]]
    """Ranges of blocks that it needs."""
    wanted: bytes
    """A bit for each name of the checkpoint, sorted."""


class _Node(NamedTuple):
    ranks: list[int]
    blocks: NDArray[np.int64]
    """All that one of them needs."""


@dataclass(frozen=True)
class _Share:
    """A rank's part in reading."""

    blocks: NDArray[np.int64]
    """All that its node needs."""
    place: int
    """Of this rank among those of its node."""
    num_ranks: int
    """On its node."""
    memory: mmap.mmap
    """Room for a window."""
    window_blocks: int
    windows: int
    bytes_touched: int
    unused: tuple[str, ...]
    not_shared: str
    """See LoadReport."""


def _share_out(
    manifest: Manifest,
    line: _Line,
    copies: Sequence[_Copy],
    wanted: set[str],
    together: _Together,
    window_blocks: int,
    node: str | None,
) -> _Share:
    """Agree on who reads what, and find the memory for it. Collective."""
    rank, names = together.world.rank, sorted(manifest.tensors)
    needed = line.union(blocks for copy in copies for blocks in copy.blocks)
    memory, trouble = None, ""
    with _memory_file() as file:
        offer = _Offer(
            node=_this_node() if node is None else node,
            memory=file,
            checkpoint=manifest.digest,
            blocks=[(int(needed[first]), int(needed[last - 1]) + 1) for first, last in _runs(needed)],
            wanted=np.packbits([name in wanted for name in names]).tobytes(),
        )
        offers = together.exchange(offer)
        if len({offer.checkpoint for offer in offers}) > 1:
            raise CheckpointError(f"{together.what}: ranks find different checkpoints there")
        nodes = _nodes([offer.node for offer in offers], offers, line)
        mine = next(node for node in nodes if rank in node.ranks)
        bytes_touched = sum(int(line.sizes[node.blocks].sum()) for node in nodes)
        room = max(1, min(window_blocks, len(mine.blocks))) * BLOCK_BYTES
        if len(mine.ranks) > 1:
            try:
                memory = _shared_memory(*offers[mine.ranks[0]].memory, room)
            except OSError as error:
                trouble = f"rank {rank} cannot use the memory of rank {mine.ranks[0]}: {error}"
        not_shared = next(filter(None, together.exchange(trouble)), "")  # until all have opened it, the file stays
    if not_shared:
        nodes = _nodes([str(other) for other in range(len(offers))], offers, line)
        mine = nodes[rank]
        memory = None
    asked = np.bitwise_or.reduce([np.frombuffer(offer.wanted, np.uint8) for offer in offers])
    return _Share(
        blocks=mine.blocks,
        place=mine.ranks.index(rank),
        num_ranks=len(mine.ranks),
        memory=mmap.mmap(-1, room) if memory is None else memory,
        window_blocks=window_blocks,
        windows=max(-(-len(node.blocks) // window_blocks) for node in nodes),
        bytes_touched=bytes_touched,
        unused=tuple(name for name, bit in zip(names, np.unpackbits(asked), strict=False) if not bit),
        not_shared=not_shared,
    )


def _nodes(node_of_rank: Sequence[str], offers: Sequence[_Offer], line: _Line) -> list[_Node]:
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(node_of_rank):
        ranks.setdefault(node, []).append(rank)
    return [
        _Node(members, line.union(blocks for member in members for blocks in offers[member].blocks))
        for members in ranks.values()
    ]


def _this_node() -> str:
    """A name that processes share if they can open each other's files in /proc, as a rule."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        kernel = "", ""
    return " ".join((socket.gethostname(), *kernel))


@contextmanager
def _memory_file() -> Iterator[tuple[str, str]]:
    """A file in memory and in no folder: the path by which other processes open it, and a name to know it by.

    Nothing is left of it when the last process that has it ends; /dev/shm is 64 MB in many containers, and files stay.
    """
    name = f"rung-load-{secrets.token_hex(8)}"
    try:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    except (AttributeError, OSError):  # not this system, or not allowed
        descriptor = -1
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}", name
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _shared_memory(path: str, name: str, num_bytes: int) -> mmap.mmap:
    """Memory of a file that another process, or this one, has made."""
    if name not in os.readlink(path):  # the process of this number may be another one here
        raise OSError(f"{path} is not {name}")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, num_bytes)  # all who map it say the same
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def _read(
    reader: Reader,
    line: _Line,
    blocks: NDArray[np.int64],
    share: _Share,
    problems: list[str],
    pool: ThreadPoolExecutor,
) -> int:
    """Read this rank's part of a window into memory and verify it; bytes. Blocks that are no good become problems."""
    first, last = (len(blocks) * place // share.num_ranks for place in (share.place, share.place + 1))
    memory = memoryview(share.memory)

    def read(place: int) -> str:
        file, index = line.place(int(blocks[place]))
        data = memory[place * BLOCK_BYTES :][: line.sizes[blocks[place]]]
        try:
            reader.storage.read_into(reader.storage.step_path(reader.step, file), index * BLOCK_BYTES, data)
        except Exception as error:
            return f"cannot be read ({error})"
        intact = block_digest(data) == reader.manifest.files[file].blocks[index]
        return "" if intact else "is damaged: it does not match its digest"

    outcomes = list(pool.map(read, range(first, last)))
    bad: dict[str, tuple[str, list[int]]] = {}
    for place, outcome in enumerate(outcomes, first):
        if outcome:
            file, index = line.place(int(blocks[place]))
            bad.setdefault(file, (outcome, []))[1].append(index)
    problems += [_describe(reader, file, np.array(indices), outcome) for file, (outcome, indices) in bad.items()]
    return int(line.sizes[blocks[first:last]].sum())


def _describe(reader: Reader, file: str, blocks: NDArray[np.int64], outcome: str) -> str:
    """What is wrong with some blocks of a file, and whose elements they hold."""
    names = []
    for name, tensor in reader.manifest.tensors.items():
        for box, lies_in, offset in tensor.boxes:
            first, last = offset // BLOCK_BYTES, (offset + box.numel * item_bytes(tensor.dtype) - 1) // BLOCK_BYTES
            if lies_in == file and ((first <= blocks) & (blocks <= last)).any():
                names.append(name)
                break
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    ranges = ((blocks[start], blocks[stop - 1]) for start, stop in _runs(blocks))
    numbers = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in ranges)
    return (
        f"{reader.where(file)}: block {numbers} (of {BLOCK_BYTES:,} bytes each) {outcome}; "
        f"there are elements of {', '.join(names[:_NAMES_SHOWN])}{more}"
    )
