"""What one rank does in test_load.py, and the checkpoints it loads: written by arithmetic, on layouts of their own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rung.checkpoint import faults, load
from rung.checkpoint.digest import box_lanes
from rung.checkpoint.format import ALIGNMENT, Manifest, Part, PartTensor, StoredBox, StoredFile, block_digest, merge
from rung.checkpoint.load import LoadReport, load_state
from rung.checkpoint.reader import Reader
from rung.checkpoint.storage import open_storage
from rung.errors import CheckpointError
from rung.layout import LogicalTensor
from rung.layout.logical import Section, Shard
from rung.optim import StateTensor
from rung.parallel import World

STEP = 10
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
SHAPES = [(), (1,), (7,), (130,), (0, 3), (5, 9), (3, 64), (40, 3), (4, 5, 7), (2, 3, 70)]
UNTOUCHED = 0x5A


def this_world() -> World:
    if not dist.is_initialized():
        return World(0, 0, 1, torch.device("cpu"))
    return World(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def raw(tensor: Tensor) -> np.ndarray:
    """The bytes of each element: [..., bytes]."""
    words = tensor.view(load._WORDS[tensor.itemsize])  # as a bool, 0x5A is copied as 1
    return words.contiguous().view(-1).view(torch.uint8).numpy().reshape(*tensor.shape, tensor.itemsize)


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    high = 2 if dtype == torch.bool else 256
    words = np.random.default_rng(seed).integers(0, high, (int(np.prod(shape)), dtype.itemsize), np.uint8)
    return torch.from_numpy(words).reshape(-1).view(dtype).view(tuple(shape))


def random_spread(
    rng: random.Random, name: str, whole: Tensor, sizes: Mapping[str, int], tied_to: str | None = None
) -> list[LogicalTensor]:
    """A tensor as each rank of a mesh holds it: split, copied, padded, in sections, or all of these."""
    shape = tuple(whole.shape)
    options: dict = {"padded_shape": [size + rng.choice([0, 0, 3]) for size in shape], "tied_to": tied_to}
    dims = range(len(shape))
    placements = {axis: Shard(rng.choice(dims)) if dims and rng.random() < 0.7 else None for axis in sizes}
    if dims and rng.random() < 0.4:
        axis, dim = rng.choice(list(sizes)), rng.choice(dims)
        first = rng.randint(0, shape[dim])
        copies = rng.choice([1, sizes[axis]])
        placements[axis] = Shard(dim, (Section(first), Section(shape[dim] - first, copies)))
        options["padded_shape"] = None
    places = [dict(zip(sizes, place, strict=True)) for place in product(*map(range, sizes.values()))]
    return [LogicalTensor.from_spec(name, shape, whole.dtype, placements, sizes, at, **options) for at in places]


def write_checkpoint(
    folder: Path, state: Mapping[str, Tensor], layout: Mapping[str, Sequence[LogicalTensor]], block_bytes: int
) -> None:
    """A committed checkpoint, of as many files as the layout has ranks."""
    step = folder / f"step-{STEP:08d}"
    step.mkdir(parents=True)
    parts = []
    for rank in range(max(len(ranks) for ranks in layout.values())):
        data, tensors, file = bytearray(), {}, f"data-{rank:05d}.bin"
        for name, whole in state.items():
            boxes, lanes = [], (0, 0)
            for box, _, owned in layout[name][rank].pieces():
                if not owned:
                    continue
                data += bytes(-len(data) % ALIGNMENT)
                boxes.append(StoredBox(box, file, len(data)))
                content = raw(whole[box.slices()]).reshape(-1)
                found = box_lanes(content, whole.itemsize, whole.shape, box)
                lanes = (lanes[0] + found[0], lanes[1] + found[1])
                data += content.tobytes()
            dtype = str(whole.dtype).removeprefix("torch.")
            tensors[name] = PartTensor(tuple(whole.shape), dtype, lanes, tuple(boxes))
        (step / file).write_bytes(data)
        blocks = [block_digest(data[start : start + block_bytes]) for start in range(0, len(data), block_bytes)]
        parts.append(Part({file: StoredFile(len(data), tuple(blocks))}, tensors))
    manifest = merge(parts, progress={"step": STEP}, config={}, fingerprints={}, versions={})
    (step / "manifest.json").write_bytes(manifest.to_json())


def empty_target(rng: random.Random, logical: LogicalTensor) -> StateTensor:
    """Local memory in which every byte is UNTOUCHED, sometimes with strides of its own."""
    shape = logical.local_shape
    numel = int(np.prod(shape)) * logical.dtype.itemsize
    flat = torch.full((numel,), UNTOUCHED, dtype=torch.uint8).view(logical.dtype)
    backwards = rng.random() < 0.3
    tensor = flat.view(shape[::-1]).permute(tuple(reversed(range(len(shape))))) if backwards else flat.view(shape)
    return StateTensor(tensor.requires_grad_(tensor.is_floating_point() and rng.random() < 0.3), logical)


def check(target: StateTensor, whole: Tensor) -> None:
    """Every piece holds its elements, and nothing else was written."""
    expected = np.full((*target.tensor.shape, whole.itemsize), UNTOUCHED, np.uint8)
    for box, local, _ in target.logical.pieces():
        expected[local] = raw(whole)[box.slices()]
    assert np.array_equal(raw(target.tensor.detach()), expected), target.logical


def touched(
    manifest: Manifest, logicals: Sequence[tuple[str, LogicalTensor]], block_bytes: int
) -> set[tuple[str, int]]:
    """The blocks with a wanted element, element by element."""
    found = set()
    for source, logical in logicals:
        stored = manifest.tensors[source]
        for theirs, file, offset in stored.boxes:
            places = offset + logical.dtype.itemsize * np.arange(theirs.numel).reshape(theirs.sizes)
            for box, _, _ in logical.pieces():
                both = box.intersect(theirs)
                if both.numel:
                    wanted = places[both.within(theirs).slices()]
                    found |= {(file, int(block)) for block in np.unique(wanted // block_bytes)}
    return found


def num_bytes(manifest: Manifest, blocks: set[tuple[str, int]], block_bytes: int) -> int:
    return sum(min(block_bytes, manifest.files[file].size - block * block_bytes) for file, block in blocks)


class Case:
    """A random checkpoint, and a random layout to load it on; the same on every rank for one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.world, self.folder = this_world(), folder / f"{seed}-{this_world().size}"
        self.block_bytes = rng.choice([64, 128, 256])
        shapes = rng.choices(SHAPES, k=8)
        self.state = {
            f"layers.{i}.w" + rng.choice(["", "/exp_avg"]): random_bits(shape, rng.choice(DTYPES), 100 * seed + i)
            for i, shape in enumerate(shapes)
        }
        writers = {"a": rng.randint(1, 3), "b": rng.randint(1, 2)}
        self.layout = {name: random_spread(rng, name, whole, writers) for name, whole in self.state.items()}
        inner = rng.choice([size for size in (1, 2, 4) if size <= self.world.size])
        sizes = {"x": self.world.size // inner, "y": inner}
        self.skipped = set(rng.sample(list(self.state), rng.choice([0, 3])))
        wanted = {name: name for name in self.state if name not in self.skipped}
        wanted |= {f"tied.{name}": name for name in wanted if rng.random() < 0.2}
        self.wanted = {  # per target, what each rank holds of it; some are on some ranks only
            name: (source, random_spread(rng, name, self.state[source], sizes, None if name == source else source))
            for name, source in wanted.items()
        }
        self.holders = {
            name: set(range(self.world.size)) if rng.random() < 0.7 else {rng.randrange(self.world.size)}
            for name in self.wanted
        }
        self.window_blocks = rng.choice([1, 2, 5, 100])
        if self.world.is_main:
            write_checkpoint(self.folder, self.state, self.layout, self.block_bytes)
        self.world.barrier()
        own = random.Random(f"{seed} {self.world.rank}")
        self.targets = {
            name: empty_target(own, ranks[self.world.rank])
            for name, (_, ranks) in self.wanted.items()
            if self.world.rank in self.holders[name]
        }

    def logicals(self, ranks: Sequence[int]) -> list[tuple[str, LogicalTensor]]:
        """What some ranks want."""
        return [
            (source, spread[rank])
            for name, (source, spread) in self.wanted.items()
            for rank in ranks
            if rank in self.holders[name]
        ]

    def load(self, node: str | None = None) -> LoadReport:
        with mock.patch.object(load, "BLOCK_BYTES", self.block_bytes), self.reader() as reader:
            return load_state(
                reader, self.targets, self.world, window_bytes=self.window_blocks * self.block_bytes, node=node
            )

    def reader(self) -> Reader:
        return Reader(open_storage(str(self.folder)), STEP)

    def check(self, report: LoadReport, nodes: Sequence[Sequence[int]], *, shared: bool = True) -> None:
        """Every bit, and every byte that was read."""
        for name, target in self.targets.items():
            check(target, self.state[self.wanted[name][0]])
        manifest = self.reader().manifest
        blocks = [touched(manifest, self.logicals(ranks), self.block_bytes) for ranks in nodes]
        assert report.bytes_touched == sum(num_bytes(manifest, found, self.block_bytes) for found in blocks)
        if not shared:
            everyone = range(self.world.size)
            blocks = [touched(manifest, self.logicals([rank]), self.block_bytes) for rank in everyone]
        assert report.bytes_read_total == sum(num_bytes(manifest, found, self.block_bytes) for found in blocks)
        assert report.windows == max(-(-len(found) // self.window_blocks) for found in blocks)
        asked = {source for source, _ in self.logicals(range(self.world.size))}
        assert report.unused == tuple(sorted(name for name in manifest.tensors if name not in asked))
        assert bool(report.not_shared) != shared


def everyones(value: object) -> list:
    values = [value] * this_world().size
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def check_layouts(folder: Path, seeds: Sequence[int]) -> None:
    """Any layout's checkpoint fills any other, and a node reads each block once."""
    for seed in seeds:
        case = Case(folder, seed)
        size, rank = case.world.size, case.world.rank
        nodes = [[r for r in range(size) if r % 2 == half] for half in range(2)] if seed % 3 == 0 else [range(size)]
        report = case.load(f"node {rank % 2}" if seed % 3 == 0 else None)
        case.check(report, [ranks for ranks in nodes if ranks])
        reads = everyones(report.bytes_read)
        assert sum(reads) == report.bytes_read_total
        for ranks in nodes:  # a window is read in equal numbers of blocks, of which a file's last may be short
            of_node = [reads[r] for r in ranks] or [0]
            assert max(of_node) - min(of_node) <= (report.windows + 6) * case.block_bytes


def check_unshared(folder: Path, seed: int) -> None:
    """A rank that cannot see another's memory makes every rank read for itself; another file is never taken for it."""
    case = Case(folder, seed)
    mistaken = load._shared_memory

    def another_file(path: str, name: str, size: int):
        return mistaken(path, f"{name}?", size)

    with mock.patch.object(load, "_shared_memory", another_file if case.world.rank == 1 else mistaken):
        report = case.load()
    case.check(report, [range(case.world.size)], shared=False)
    assert report.not_shared.startswith("rank 1 cannot use the memory of rank 0")


def check_full_blocks(folder: Path) -> None:
    """The blocks that there really are, and two windows of them."""
    world, whole = this_world(), random_bits((1500, 1501), torch.float32, 1)
    row, column = ([
        LogicalTensor.from_spec("w", whole.shape, whole.dtype, {"x": Shard(dim)}, {"x": parts}, {"x": at})
        for at in range(parts)
    ] for dim, parts in ((0, 3), (1, world.size)))  # fmt: skip
    if world.is_main:
        write_checkpoint(folder, {"w": whole}, {"w": row}, load.BLOCK_BYTES)
    world.barrier()
    target = empty_target(random.Random(0), column[world.rank])
    with Reader(open_storage(str(folder)), STEP) as reader:
        report = load_state(reader, {"w": target}, world, window_bytes=load.BLOCK_BYTES * 2)
    check(target, whole)
    assert (report.windows, report.bytes_touched) == (2, report.bytes_read_total)
    assert sum(file.size for file in reader.manifest.files.values()) == report.bytes_touched


@contextmanager
def refused(world: World):
    """Every rank gets one and the same error; its text is in the list that is given."""
    text: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        yield text
    text.append(str(caught.value))
    assert set(everyones(text[0])) == set(text)


def check_failures(folder: Path, seed: int) -> None:
    """Damage, on whichever rank it shows, stops all of them; what nobody reads harms nobody."""
    case = Case(folder, seed)
    world, manifest = case.world, case.reader().manifest
    used = touched(manifest, case.logicals(range(world.size)), case.block_bytes)
    file, block = case.rng.choice(sorted(used))
    names = [name for name in manifest.tensors if (file, block) in holding(manifest, name, case.block_bytes)]
    path = case.folder / f"step-{STEP:08d}" / file
    intact = path.read_bytes()

    def spoil(data: bytes | None) -> None:
        world.barrier()
        if world.is_main:
            path.unlink() if data is None else path.write_bytes(data)
        world.barrier()

    place = block * case.block_bytes
    for data in (flipped(intact, 8 * place + 3), intact[: place + 1], None):
        spoil(data)
        with refused(world) as text:
            case.load()
        assert str(path) in text[0] and any(name in text[0] for name in manifest.tensors)
        if data is not None and len(data) == len(intact):
            says = f"{path}: block {block} (of {case.block_bytes} bytes each) is damaged: it does not match its digest"
            assert says in text[0] and all(name in text[0].partition(says)[2] for name in names)
        spoil(intact)
    unused = [(f, b) for f in manifest.files for b in range(len(manifest.files[f].blocks)) if (f, b) not in used]
    for other, number in unused[:1]:
        path = case.folder / f"step-{STEP:08d}" / other
        data = path.read_bytes()
        spoil(flipped(data, 8 * number * case.block_bytes))
        case.check(case.load(), [range(world.size)])
        spoil(data)

    for point in ("load.begin", "load.window", "load.done"):
        faults._passed.clear()
        with mock.patch.dict("os.environ", RUNG_FAULT=f"{point}:{world.size - 1}:1:EIO"), refused(world) as text:
            case.load()
        assert f"rank {world.size - 1}: OSError: [Errno 5]" in text[0]
    case.check(case.load(), [range(world.size)])


def holding(manifest: Manifest, name: str, block_bytes: int) -> set[tuple[str, int]]:
    """The blocks with an element of a tensor."""
    tensor = manifest.tensors[name]
    whole = LogicalTensor.from_spec(name, tensor.shape, getattr(torch, tensor.dtype), {}, {"x": 1}, {"x": 0})
    return touched(manifest, [(name, whole)], block_bytes)


def flipped(data: bytes, bit: int) -> bytes:
    spoilt = bytearray(data)
    spoilt[bit // 8] ^= 1 << bit % 8
    return bytes(spoilt)


def check_strictness(folder: Path) -> None:
    """Everything that does not fit is listed on every rank, and nothing is written."""
    world = this_world()
    state = {name: random_bits((6, 2), torch.float32, i) for i, name in enumerate(["a", "b", "c", "d", "d/m"])}
    alone = {name: [LogicalTensor.from_spec(name, (6, 2), torch.float32, {}, {"x": 1}, {"x": 0})] for name in state}
    if world.is_main:
        write_checkpoint(folder, state, alone, load.BLOCK_BYTES)
    world.barrier()

    def target(name: str, shape=(6, 2), dtype=torch.float32, tied_to=None, local_shape=None) -> StateTensor:
        at = LogicalTensor.from_spec(name, shape, dtype, {}, {"x": 1}, {"x": 0}, tied_to=tied_to)
        return StateTensor(torch.zeros(local_shape or shape, dtype=dtype), at)

    targets = {"a": target("a"), "empty": target("empty", (0, 4))}
    with Reader(open_storage(str(folder)), STEP) as reader:
        wrong = {
            "b": target("b", (2, 6)),
            "c": target("c", dtype=torch.bfloat16),
            "x.y": target("x.y", tied_to="y"),
            "e/m": target("e/m", tied_to="d"),
            "d": target("d", local_shape=(5, 2)),
            "d/m": target("d/m", local_shape=(12,)),
        }
        mine = {name: target for i, (name, target) in enumerate(wrong.items()) if i % world.size == world.rank}
        with refused(world) as text:
            load_state(reader, targets | mine, world)
        assert "6 problems" in text[0] and str(folder) in text[0]
        for problem in (
            "b has shape [6, 2] in the checkpoint, [2, 6] here",
            "c is float32 in the checkpoint, bfloat16 here",
            "x.y, which is stored as y, is missing from the checkpoint",
            "e/m, which is stored as d, is another state than that",
            "d has a local tensor of shape [5, 2]",
            "d/m has a local tensor of shape [12]",
        ):
            assert problem in text[0], text[0]
        assert not targets["a"].tensor.any()
        report = load_state(reader, targets, world)
    assert torch.equal(targets["a"].tensor, state["a"]) and report.unused == ("b", "c", "d", "d/m")
