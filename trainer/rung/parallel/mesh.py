"""Process groups of a layout, each made once, and the mesh that parameters are spread over."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from rung.layout import Layout

__all__ = ["Groups"]

FSDP = ("dp_shard", "cp")
"""Parameters are sharded over the ranks that see other samples and those that see other tokens of the same samples."""

_MADE: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]]
_MADE = weakref.WeakKeyDictionary()
"""Per world, its groups by their ranks. Groups die with the world that they were made in."""


class Groups:
    """The groups of ranks that a layout needs. Axes that span the same ranks share one; a rank alone needs none."""

    def __init__(self, layout: Layout, rank: int, device_type: str) -> None:
        self.layout, self.rank, self.device_type = layout, rank, device_type
        self.place = layout.coordinate(rank)
        self._groups: dict[tuple[str, ...], dist.ProcessGroup | None] = {}

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along ``axes`` only; None where that is this rank alone.

        Collective over the world when these ranks are asked for the first time.
        """
        if axes not in self._groups:
            self._groups[axes] = self._find(*axes)
        return self._groups[axes]

    def _find(self, *axes: str) -> dist.ProcessGroup | None:
        lists = self.layout.groups(*axes)
        if len(lists[0]) == 1:
            return None
        if len(lists) == 1:
            return dist.group.WORLD
        found = None
        for ranks in lists:
            group = self._make(tuple(ranks))
            found = group if self.rank in ranks else found
        return found

    def name(self, *axes: str) -> str:
        """The name under which torch knows the group of ``axes``, which must span several ranks."""
        group = self.group(*axes)
        assert group is not None, axes
        name: str = group.group_name
        return name

    def mesh(self, *, sharded: bool) -> DeviceMesh | None:
        """The mesh of this rank's parameters: (dp_replicate, fsdp, tp), without axes of one rank.

        With ``sharded``, "fsdp" is there even if it is one rank: FSDP2 also casts and sums over copies. None where
        nothing is left. Pipeline stages are apart: a rank's mesh spans the ranks that hold the same layers.
        """
        axes = {"dp_replicate": ("dp_replicate",), "fsdp": FSDP, "tp": ("tp",)}
        groups = {name: self.group(*these) for name, these in axes.items()}
        if sharded and groups["fsdp"] is None:
            groups["fsdp"] = self._make((self.rank,))
        kept = {name: group for name, group in groups.items() if group is not None}
        if not kept:
            return None
        layout = self.layout
        ranks = torch.arange(layout.world_size).view(layout.pp, -1)[self.place["pp"]]
        ranks = ranks.view([group.size() for group in kept.values()])
        if len(kept) == 1:
            (name, group), *_ = kept.items()
            return DeviceMesh.from_group(group, self.device_type, mesh_dim_names=(name,))
        return DeviceMesh.from_group(list(kept.values()), self.device_type, mesh=ranks, mesh_dim_names=tuple(kept))

    def _make(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        world = dist.group.WORLD
        assert world is not None
        made = _MADE.setdefault(world, {})
        if ranks not in made:
            backend = "nccl" if self.device_type == "cuda" else "gloo"
            # A group of this rank alone is its own business.
            made[ranks] = dist.new_group(list(ranks), backend=backend, use_local_synchronization=len(ranks) == 1)
        return made[ranks]
