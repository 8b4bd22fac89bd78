"""A layout: how many ways each kind of parallelism splits the world, as arithmetic. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import gcd, prod

from rung.errors import UserError
from rung.layout.values import divisors, listed, nearest_multiples

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; their product (without ``ep``, which borrows ranks) is ``world_size``.

    Ranks count row-major over the axes pp, dp_replicate, dp_shard, cp, tp, so that neighbours share a tp group. For the
    experts, the dp_shard*cp ranks are seen as dp_mod_ep*ep. All that is wrong with the numbers is one UserError.
    """

    dp_replicate: int = 1
    """Copies of the sharded model, each fed with other samples."""
    dp_shard: int = -1
    """Ranks that share one copy of the parameters (FSDP), each fed with other samples; -1 takes what is left."""
    tp: int = 1
    """Ranks that share each matrix product."""
    pp: int = 1
    """Ranks that share the layers."""
    cp: int = 1
    """Ranks that share the tokens of a sample; they share the parameters like dp_shard."""
    ep: int = 1
    """Ranks that share the experts of a layer; divides dp_shard*cp."""
    world_size: int = 1
    """Number of processes."""

    def __post_init__(self) -> None:
        UserError.raise_all(self._wrong_numbers() or self._wrong_products())
        if self.dp_shard == -1:
            object.__setattr__(self, "dp_shard", self.world_size // -prod(self.mesh.values()))

    @classmethod
    def auto(
        cls, world_size: int, *, dp_replicate: int = 1, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1
    ) -> Layout:
        """The layout for whatever world there is: tp, pp, cp and ep as asked, data parallelism picked to fill it.

        Of ``dp_replicate`` stays the largest divisor for which there are ranks.
        """
        room = cls(tp=tp, pp=pp, cp=cp, world_size=world_size).dp_shard
        return cls(gcd(dp_replicate, room), tp=tp, pp=pp, cp=cp, ep=ep, world_size=world_size)

    @property
    def data_size(self) -> int:
        """Number of data ranks, each of which reads samples of its own."""
        return self.dp_replicate * self.dp_shard

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of the axes, outermost first."""
        return {axis: getattr(self, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}

    @property
    def expert_mesh(self) -> dict[str, int]:
        """Sizes of the axes, outermost first, over which the experts' parameters are spread."""
        inside = {"dp_mod_ep": self.dp_shard * self.cp // self.ep, "ep": self.ep}
        return {"pp": self.pp, "dp_replicate": self.dp_replicate, **inside, "tp": self.tp}

    def coordinate(self, rank: int) -> dict[str, int]:
        """Place of a rank on every axis of ``mesh``."""
        return _coordinate(rank, self.mesh)

    def expert_coordinate(self, rank: int) -> dict[str, int]:
        """Place of a rank on every axis of ``expert_mesh``."""
        return _coordinate(rank, self.expert_mesh)

    def rank(self, **coordinates: int) -> int:
        """The rank at a place on ``mesh``; an axis that is not named counts as 0."""
        return _rank(coordinates, self.mesh)

    def data_rank(self, rank: int) -> int:
        """Which of the ``data_size`` slices of a batch a rank reads."""
        place = self.coordinate(rank)
        return place["dp_replicate"] * self.dp_shard + place["dp_shard"]

    def counts_samples(self, rank: int) -> bool:
        """Whether this rank, of those that read the same samples, is the one that counts them."""
        return self.counts_tokens(rank) and self.coordinate(rank)["cp"] == 0

    def counts_tokens(self, rank: int) -> bool:
        """Whether this rank, of those that read the same tokens, is the one that counts them."""
        place = self.coordinate(rank)
        return place["tp"] == 0 and place["pp"] == 0

    def groups(self, *axes: str) -> list[list[int]]:
        """The groups of ranks that differ along these axes only, in order; axes of ``mesh`` or of ``expert_mesh``."""
        mesh = self.mesh if set(axes) <= self.mesh.keys() else self.expert_mesh
        outer = {axis: size for axis, size in mesh.items() if axis not in axes}
        inner = {axis: mesh[axis] for axis in mesh if axis in axes}
        if len(inner) != len(axes):
            raise ValueError(f"{axes} are not different axes of {tuple(self.mesh)} or of {tuple(self.expert_mesh)}")
        return [[_rank(group | place, mesh) for place in _places(inner)] for group in _places(outer)]

    def check_batch(self, global_batch_size: int, micro_batch_size: int) -> list[str]:
        """What is wrong with these sizes, in sequences, on this layout: one message per problem."""
        sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
        if problems := [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]:
            return problems
        share, rest = divmod(global_batch_size, self.data_size)
        who = f"dp_replicate={self.dp_replicate} × dp_shard={self.dp_shard} = {self.data_size} data ranks"
        if rest:
            fix = nearest_multiples(global_batch_size, self.data_size)
            return [f"global_batch_size={global_batch_size} does not divide among {who}; use {fix}"]
        if share % micro_batch_size:
            return [
                f"micro_batch_size={micro_batch_size} does not divide the {share} sequences that each of {who} has of "
                f"global_batch_size={global_batch_size}; legal values: {listed(divisors(share))}"
            ]
        return []

    def accumulation(self, global_batch_size: int, micro_batch_size: int) -> int:
        """Number of micro-batches that a data rank runs in a step."""
        UserError.raise_all(self.check_batch(global_batch_size, micro_batch_size))
        return global_batch_size // (self.data_size * micro_batch_size)

    def _wrong_numbers(self) -> list[str]:
        values = {**self.mesh, "ep": self.ep, "world_size": self.world_size}
        return [
            f"{name}={value!r} must be a whole number, 1 or more{' (or -1: what is left)' * (name == 'dp_shard')}"
            for name, value in values.items()
            if type(value) is not int or (value < 1 and (name, value) != ("dp_shard", -1))
        ]

    def _wrong_products(self) -> list[str]:
        problems = []
        left = self.dp_shard == -1
        fixed = {axis: size for axis, size in self.mesh.items() if size != -1}
        need = prod(fixed.values())
        fits = self.world_size % need == 0 if left else self.world_size == need
        if not fits:
            fixes = [f"start {'a multiple of ' * left}{need} processes"]
            for axis, size in fixed.items():
                room, rest = divmod(self.world_size, need // size)
                if not rest and (size > 1 or axis == "dp_shard"):
                    fixes.append(f"set {axis} to {listed(divisors(room)) if left else room}")
            given = " × ".join(f"{axis}={size}" for axis, size in fixed.items())
            relation = "does not divide" if left else "is not"
            problems.append(f"{given} = {need} {relation} world_size={self.world_size}; {', or '.join(fixes)}")
        if fits or not left:
            lenders = (self.world_size // need if left else self.dp_shard) * self.cp
            if lenders % self.ep:
                problems.append(
                    f"ep={self.ep} does not divide dp_shard × cp = {lenders}; legal values: {listed(divisors(lenders))}"
                )
        return problems


def _places(mesh: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """All places on a mesh, row-major."""
    for place in product(*map(range, mesh.values())):
        yield dict(zip(mesh, place, strict=True))


def _coordinate(rank: int, mesh: Mapping[str, int]) -> dict[str, int]:
    if not 0 <= rank < prod(mesh.values()):
        raise ValueError(f"rank={rank} is not in a world of {prod(mesh.values())}")
    place = {}
    for axis, size in reversed(list(mesh.items())):
        rank, place[axis] = divmod(rank, size)
    return {axis: place[axis] for axis in mesh}


def _rank(place: Mapping[str, int], mesh: Mapping[str, int]) -> int:
    rank = 0
    for axis, size in mesh.items():
        if not 0 <= place.get(axis, 0) < size:
            raise ValueError(f"{axis}={place[axis]} is not on an axis of size {size}")
        rank = rank * size + place.get(axis, 0)
    if not place.keys() <= mesh.keys():
        raise ValueError(f"unknown axes {sorted(place.keys() - mesh.keys())}; known: {tuple(mesh)}")
    return rank
