"""The logical tensor: which part of a parameter or state this rank holds, and whether it speaks for it.

Initialisation, gradient norm, optimizers, checkpoints, digests and exports read it; nothing else interprets placements.
Importing this needs no torch: only ``from_tensor``, ``logical_tensors`` and ``local_view`` look at tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from rung.layout.boxes import Box, Run, Section, split_sections

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed.tensor import DTensor, Placement

__all__ = ["Facts", "LogicalTensor", "Piece", "Section", "Shard", "clean_name", "local_view", "logical_tensors"]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Shard(NamedTuple):
    """A dim split over an axis by the rule of torch.chunk: all of it at once, or section by section.

    Sections are for fused projections: in query, key and value rows one after another, each rank gets its rows of each,
    and of few key and value heads several ranks get the same rows::

        Shard(0, (Section(num_heads * head_dim), *[Section(num_kv_heads * head_dim, replicas=tp // num_kv_heads)] * 2))
    """

    dim: int
    sections: tuple[Section, ...] = ()
    """What lies one after another along the stored dim, all of it; empty: the dim is one section."""


class Piece(NamedTuple):
    """A box that this rank holds."""

    box: Box
    """Where it lies in the logical tensor."""
    local: tuple[slice, ...]
    """What to index the local tensor with to get it."""
    owned: bool
    """Whether this rank, among those that hold the same elements, is the one that counts, writes and digests them."""


class Facts(TypedDict, total=False):
    """What a DTensor does not say about itself; see ``LogicalTensor.from_tensor``."""

    shape: Sequence[int]
    replicas: Mapping[str, int]
    sections: Mapping[str, Sequence[Section]]
    tied_to: str | None


@dataclass(frozen=True)
class _Spread:
    """How a tensor is spread over a mesh, and the place on it that is looked at."""

    stored_shape: tuple[int, ...]
    splits: tuple[tuple[str, Shard], ...]
    """Every Shard with its sections."""
    sizes: Mapping[str, int]
    coordinates: Mapping[str, int]
    stages: tuple[int, ...] | None


@dataclass(frozen=True)
class LogicalTensor:
    """One parameter or state as the layout-free thing it stands for, and the boxes of it that this rank holds."""

    name: str
    shape: tuple[int, ...]
    """Logical shape: without padding, without copies of heads."""
    dtype: torch.dtype | str
    boxes: tuple[Box, ...]
    """What this rank holds, in logical coordinates. No box is empty or reaches into padding."""
    owned: tuple[bool, ...]
    """Per box, whether this rank owns it. On all ranks together, owned boxes tile the tensor exactly once."""
    replicated_over: tuple[str, ...]
    """Axes along which other ranks hold boxes of the same elements: all of them, or those of a replicated section."""
    local_boxes: tuple[Box, ...]
    """Per box, where it sits in the local tensor."""
    local_shape: tuple[int, ...]
    """Shape of the local tensor, padding included; zeros where the rank holds nothing."""
    tied_to: str | None
    """Name of the tensor of which this is an alias, which holds boxes and owns none."""
    _spread: _Spread = field(repr=False, compare=False)

    @property
    def source(self) -> str:
        """The name that random draws are keyed by: its own, or that of the tensor it is tied to."""
        return self.tied_to or self.name

    def pieces(self) -> Iterator[Piece]:
        """The boxes that this rank holds, each with its place in the local tensor and whether it is owned."""
        for box, local, owned in zip(self.boxes, self.local_boxes, self.owned, strict=True):
            yield Piece(box, local.slices(), owned)

    def at(self, **coordinates: int) -> LogicalTensor:
        """The same tensor as another rank of its mesh holds it; an axis that is not named keeps its coordinate."""
        spread = replace(self._spread, coordinates={**self._spread.coordinates, **coordinates})
        return _place(self.name, self.shape, self.dtype, spread, self.tied_to)

    def everywhere(self) -> Iterator[LogicalTensor]:
        """The same tensor as each rank of its mesh holds it, in the order of ``DeviceMesh.mesh.flatten()``."""
        sizes = self._spread.sizes
        for place in product(*map(range, sizes.values())):
            yield self.at(**dict(zip(sizes, place, strict=True)))

    @classmethod
    def from_spec(
        cls,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype | str,
        placements: Mapping[str, Shard | None],
        sizes: Mapping[str, int],
        coordinates: Mapping[str, int],
        *,
        padded_shape: Sequence[int] | None = None,
        replicas: Mapping[str, int] | None = None,
        stage: int | Sequence[int] | None = None,
        tied_to: str | None = None,
    ) -> LogicalTensor:
        """A tensor by arithmetic alone.

        Args:
            placements: axis to ``Shard``, in the order in which the splits are made. Axes in the order of the mesh are
                DTensor's plain Shards; {"tp": Shard(0), "dp_shard": Shard(0)} is FSDP on top of tensor parallelism,
                where each rank's tp part is split again. An axis with None, or not named, holds copies.
            sizes: sizes of the axes of the mesh, outermost first.
            coordinates: this rank's place on them.
            padded_shape: the shape that is stored and split, where it is larger than ``shape``. Padding follows the
                elements in its dim and lies in no box.
            replicas: sharded axis to the number of neighbours on it that hold one part together, short for one Section
                with as many. 2 K/V heads on tp=8 are {"tp": 4}: rank r holds head r // 4, and ranks 0 and 4 own them.
                ``shape`` stays that of 2 heads.
            stage: the place on axis "pp" that holds the tensor, or all places that do, the owner first. None: "pp" is
                an axis like any other.
            tied_to: name of the tensor of which this is an alias.

        Raises:
            ValueError: no tensor can be spread like this; says all that is wrong.
        """
        stored_shape = tuple(shape if padded_shape is None else padded_shape)
        splits = {axis: shard for axis, shard in placements.items() if shard is not None}
        problems = _problems(tuple(shape), stored_shape, splits, sizes, coordinates, replicas or {}, stage)
        if problems:
            raise ValueError(f"{name}: {'; '.join(problems)}")
        for axis, (dim, sections) in splits.items():
            whole = (Section(stored_shape[dim], (replicas or {}).get(axis, 1)),)
            splits[axis] = Shard(dim, tuple(sections) or whole)
        spread = _Spread(
            stored_shape=stored_shape,
            splits=tuple(splits.items()),
            sizes=dict(sizes),
            coordinates=dict(coordinates),
            stages=None if stage is None else (stage,) if isinstance(stage, int) else tuple(stage),
        )
        return _place(name, tuple(shape), dtype, spread, tied_to)

    @classmethod
    def from_tensor(
        cls,
        name: str,
        tensor: Tensor,
        *,
        holders: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        replicas: Mapping[str, int] | None = None,
        sections: Mapping[str, Sequence[Section]] | None = None,
        tied_to: str | None = None,
    ) -> LogicalTensor:
        """A tensor as it is: a DTensor by its mesh and placements, any other as a copy that ``holders`` hold alike.

        A DTensor whose plain Shard over an axis holds, on each rank, its part of every section one after another says
        so with ``sections``. FSDP may have split these rows again.

        Args:
            holders: global ranks that hold a plain tensor, the owner first; None: every rank.
            shape: the logical shape, where the tensor is stored with padding.
            replicas: as in ``from_spec``, where the DTensor's shape counts every copy.
            sections: sharded axis to what ``Shard.sections`` says; the DTensor's shape counts every copy.
            tied_to: as in ``from_spec``.

        Raises:
            ValueError: a DTensor is a partial sum, or its shape or local tensor is not what its placements, replicas
                and sections say; or replicas or sections are given for a tensor that is no DTensor.
        """
        from torch import distributed
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            return _from_dtensor(name, tensor, shape, replicas or {}, sections or {}, tied_to)
        if replicas or sections:
            raise ValueError(f"{name}: replicas and sections are parts of a sharded tensor, and this is no DTensor")
        alone = not (distributed.is_available() and distributed.is_initialized())
        holders = holders or range(1 if alone else distributed.get_world_size())
        sizes = {"world": len(holders)}
        coordinates = {"world": holders.index(0 if alone else distributed.get_rank())}
        logical = tuple(tensor.shape if shape is None else shape)
        return cls.from_spec(
            name, logical, tensor.dtype, {}, sizes, coordinates, padded_shape=tensor.shape, tied_to=tied_to
        )


def logical_tensors(
    model: nn.Module, *, holders: Sequence[int] | None = None, facts: Mapping[str, Facts] | None = None
) -> dict[str, LogicalTensor]:
    """The parameters of a model by clean name, in the model's order; of tied names only the first.

    ``holders`` and, by clean name, ``facts`` are passed on to ``LogicalTensor.from_tensor``.
    """
    tensors: dict[str, LogicalTensor] = {}
    for wrapped_name, parameter in model.named_parameters():
        name = clean_name(wrapped_name)
        if name in tensors:
            raise ValueError(f"two parameters are called {name!r} when wrapper prefixes are stripped")
        tensors[name] = LogicalTensor.from_tensor(name, parameter, holders=holders, **(facts or {}).get(name, {}))
    if unknown := (facts or {}).keys() - tensors.keys():
        raise ValueError(f"facts about parameters that the model does not have: {sorted(unknown)}")
    return tensors


def clean_name(name: str) -> str:
    """A name without what torch.compile, FSDP and activation checkpointing (anywhere) and DDP (in front) add to it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def local_view(tensor: Tensor) -> Tensor:
    """The plain local tensor of a DTensor, sharing its memory and outside autograd; any other tensor as it is."""
    import torch
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def _place(
    name: str, shape: tuple[int, ...], dtype: torch.dtype | str, spread: _Spread, tied_to: str | None
) -> LogicalTensor:
    """The tensor as the rank at ``spread.coordinates`` holds it."""
    if problems := _misplaced(spread.sizes, spread.coordinates):
        raise ValueError(f"{name}: {'; '.join(problems)}")
    copies = _copies(spread)
    here = spread.stages is None or spread.coordinates["pp"] in spread.stages
    runs = _runs(spread) if here else [[] for _ in shape]
    boxes, local_boxes, first = _boxes(runs, shape) if here else ((), (), ())
    owns = tied_to is None and all(index == 0 for index, _ in copies.values())
    replicated = {axis for axis, (_, number) in copies.items() if number > 1}
    replicated |= {axis for axis, shard in spread.splits if any(section.replicas > 1 for section in shard.sections)}
    return LogicalTensor(
        name=name,
        shape=shape,
        dtype=dtype,
        boxes=boxes,
        owned=tuple(owns and box_first for box_first in first),
        replicated_over=tuple(axis for axis in spread.sizes if axis in replicated),
        local_boxes=local_boxes,
        local_shape=tuple(sum(run.length for run in dim_runs) for dim_runs in runs),
        tied_to=tied_to,
        _spread=spread,
    )


def _copies(spread: _Spread) -> dict[str, tuple[int, int]]:
    """Per axis that does not shard the tensor: which copy this rank holds, and how many there are along the axis."""
    copies = {}
    sharded = dict(spread.splits)
    for axis, size in spread.sizes.items():
        place = spread.coordinates[axis]
        if axis == "pp" and spread.stages is not None:
            copies[axis] = (spread.stages.index(place) if place in spread.stages else -1, len(spread.stages))
        elif axis not in sharded:
            copies[axis] = (place, size)
    return copies


def _runs(spread: _Spread) -> list[list[Run]]:
    """Per dim: the stored indices that this rank holds, in the order of its local tensor."""
    runs = [[Run(0, size)] for size in spread.stored_shape]
    for axis, (dim, sections) in spread.splits:
        runs[dim] = split_sections(runs[dim], sections, spread.sizes[axis], spread.coordinates[axis])
    return runs


def _boxes(runs: list[list[Run]], shape: tuple[int, ...]) -> tuple[tuple[Box, ...], tuple[Box, ...], tuple[bool, ...]]:
    """The boxes that runs of stored indices make up, without padding: in the logical and in the local tensor.

    And per box whether every run of it is owned.
    """
    dims = []
    for dim_runs, size in zip(runs, shape, strict=True):
        position, kept = 0, []
        for run in dim_runs:
            if run.start < size:
                kept.append((run.start, position, min(run.length, size - run.start), run.owned))
            position += run.length
        dims.append(kept)
    boxes, local_boxes, first = [], [], []
    for choice in product(*dims):
        starts, positions, sizes, owned = zip(*choice, strict=True) if choice else ((), (), (), ())
        boxes.append(Box(starts, sizes))
        local_boxes.append(Box(positions, sizes))
        first.append(all(owned))
    return tuple(boxes), tuple(local_boxes), tuple(first)


def _misplaced(sizes: Mapping[str, int], coordinates: Mapping[str, int]) -> list[str]:
    return [f"axis {axis!r} is not one of {tuple(sizes)}" for axis in coordinates if axis not in sizes] + [
        f"coordinate {coordinates.get(axis)} on {axis!r} is not in range({size})"
        for axis, size in sizes.items()
        if coordinates.get(axis, -1) not in range(size)
    ]


def _problems(
    shape: tuple[int, ...],
    stored: tuple[int, ...],
    splits: Mapping[str, Shard],
    sizes: Mapping[str, int],
    coordinates: Mapping[str, int],
    replicas: Mapping[str, int],
    stage: int | Sequence[int] | None,
) -> list[str]:
    """All that is wrong with how a tensor is said to be spread."""
    problems = _misplaced(sizes, coordinates)
    problems += [
        f"axis {axis!r} is not one of {tuple(sizes)}"
        for axis in [*splits, *replicas, *(["pp"] if stage is not None else [])]
        if axis not in sizes
    ]
    problems += [
        f"{axis!r} shards dim {shard.dim} of {len(shape)}"
        for axis, shard in splits.items()
        if shard.dim not in range(len(shape))
    ]
    problems += [
        f"replicas={number} on {axis!r}, which must be a sharded axis whose size it divides"
        for axis, number in replicas.items()
        if axis not in splits or not _divides(number, sizes.get(axis, 0))
    ]
    for axis, (dim, sections) in splits.items():
        if not sections or dim not in range(len(stored)):
            continue
        if axis in replicas:
            problems.append(f"{axis!r} has sections, which say their own replicas: leave out replicas={replicas[axis]}")
        if any(section.size < 0 for section in sections) or sum(section.size for section in sections) != stored[dim]:
            sizes_given = [section.size for section in sections]
            problems.append(f"sections of {sizes_given} on {axis!r} do not make up dim {dim} of stored shape {stored}")
        problems += [
            f"a section with replicas={section.replicas} on {axis!r}, whose size {sizes.get(axis, 0)} it must divide"
            for section in sections
            if not _divides(section.replicas, sizes.get(axis, 0))
        ]
    if len(stored) != len(shape) or any(mine < logical for mine, logical in zip(stored, shape, strict=False)):
        problems.append(f"padded shape {stored} does not hold shape {shape}")
    return problems


def _divides(number: int, size: int) -> bool:
    return number > 0 and size % number == 0


def _from_dtensor(
    name: str,
    tensor: DTensor,
    shape: Sequence[int] | None,
    replicas: Mapping[str, int],
    sections: Mapping[str, Sequence[Section]],
    tied_to: str | None,
) -> LogicalTensor:
    mesh = tensor.device_mesh
    axes = mesh.mesh_dim_names or tuple(f"axis{index}" for index in range(mesh.ndim))
    sizes = dict(zip(axes, mesh.shape, strict=True))
    splits = _splits(name, dict(zip(axes, tensor.placements, strict=True)), sizes)
    stored = list(tensor.shape)
    if unknown := sorted({*replicas, *sections} - splits.keys()):
        raise ValueError(
            f"{name}: replicas or sections on {unknown}, where {tensor.placements} on {sizes} is not split"
        )
    for axis, number in replicas.items():
        dim = splits[axis].dim
        if number < 1 or stored[dim] % number:
            raise ValueError(f"{name}: dim {dim} of shape {tuple(tensor.shape)} is not made of replicas={number}")
        stored[dim] //= number
    for axis, parts in sections.items():
        dim = splits[axis].dim
        rows = sum(section.size * section.replicas for section in parts)
        if stored[dim] != rows:
            raise ValueError(
                f"{name}: sections {list(parts)} on {axis!r} are {rows} with every copy, but dim {dim} of shape "
                f"{tuple(tensor.shape)} has {stored[dim]}"
            )
        stored[dim] = sum(section.size for section in parts)
        splits[axis] = Shard(dim, tuple(parts))
    place = mesh.get_coordinate()
    coordinates = dict(zip(axes, place or [0] * mesh.ndim, strict=True))
    logical = LogicalTensor.from_spec(
        name,
        stored if shape is None else shape,
        tensor.dtype,
        splits,
        sizes,
        coordinates,
        padded_shape=stored,
        replicas=replicas,
        tied_to=tied_to,
    )
    if place is None:  # this rank is not in the mesh
        return replace(logical, boxes=(), owned=(), local_boxes=(), local_shape=(0,) * len(stored))
    local_shape = tuple(local_view(tensor).shape)
    if local_shape != logical.local_shape:
        raise ValueError(
            f"{name}: {tensor.placements} of shape {tuple(tensor.shape)} on {sizes} leave {logical.local_shape} at "
            f"{coordinates}, but the local tensor is {local_shape}"
        )
    return logical


def _splits(name: str, placements: Mapping[str, Placement], sizes: Mapping[str, int]) -> dict[str, Shard]:
    """DTensor's placements, in mesh order, as splits in the order in which they were made.

    A ``_StridedShard`` whose split factor is the number of parts that axes to its right make of the dim was made after
    them: FSDP splits what tensor parallelism left. Where the dim is uneven, DTensor's own reading (``full_tensor``,
    say) is not what FSDP stores; this is. Any other split factor belongs to no split that is made here.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as TorchShard
    from torch.distributed.tensor.placement_types import _StridedShard

    order: list[tuple[str, Shard]] = []
    for axis, placement in reversed(list(placements.items())):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, TorchShard | _StridedShard):
            raise ValueError(
                f"{name}: {placement} on {axis!r} has no boxes; redistribute it to Shard or Replicate first"
            )
        dim, factor = placement.dim, int(getattr(placement, "split_factor", 1))
        parts, position = 1, 0
        for earlier, (earlier_axis, shard) in enumerate(order):
            if parts == factor:
                break
            if shard.dim == dim:
                parts, position = parts * sizes[earlier_axis], earlier + 1
        if parts != factor:
            raise ValueError(
                f"{name}: {placement} on {axis!r} has split factor {factor}, but axes to its right make {parts} parts "
                f"of dim {dim}; a fused projection is a plain Shard with sections"
            )
        order.insert(position, (axis, Shard(dim)))
    return dict(order)
