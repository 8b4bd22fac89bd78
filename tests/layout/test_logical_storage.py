"""Logical tensors against what FSDP stores of tensor-parallel parameters, rank by rank in one process.

``fully_shard`` sends nothing when it splits parameters, so a fake process group will do, of any number of ranks. Axes
are called by the rank as well: DTensor's caches know meshes by their names and would take one rank's for another's.
"""

from math import prod

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from rung.layout import Facts, LogicalTensor, Section, local_view, logical_tensors

HEADS, HEAD_DIM, HIDDEN = 8, 3, 2
SHAPES = {
    "norm": (7,),
    "embed": (13, HIDDEN),  # uneven over tp, then uneven over FSDP
    "tiny": (5, HIDDEN),  # some ranks have no row of it
    "out": (5, 16),
    "gate_up": (2 * 16, HIDDEN),
}


def take(whole: Tensor, parts: int, index: int, dim: int = 0) -> Tensor:
    step = -(-whole.shape[dim] // parts)
    first = min(index * step, whole.shape[dim])
    return whole.narrow(dim, first, min(step, whole.shape[dim] - first))


def spread_over_tp(name: str, whole: Tensor, sections: list[Section], mesh: DeviceMesh) -> tuple[DTensor, Facts]:
    """A parameter as a tensor-parallel plan stores it."""
    size, rank, axis = mesh.size(), mesh.get_local_rank(), mesh.mesh_dim_names[0]
    if name == "norm":
        return DTensor.from_local(whole, mesh, [Replicate()], run_check=False), {}
    if name in ("qkv", "gate_up"):
        parts = zip(sections, whole.split([section.size for section in sections]), strict=True)
        local = torch.cat([take(part, size // s.replicas, rank // s.replicas) for s, part in parts])
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False), {"sections": {axis: sections}}
    if name == "k":
        copies = sections[-1].replicas
        local = take(whole, size // copies, rank // copies)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False), {"replicas": {axis: copies}}
    dim = 1 if name == "out" else 0
    local = take(whole, size, rank, dim).contiguous()
    tensor = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride())
    return tensor, {"tied_to": "embed_of_another_stage"} if name == "tiny" else {}


def on_rank(rank: int, sizes: dict[str, int], kv_heads: int) -> dict[str, tuple[Tensor, Tensor, LogicalTensor]]:
    """By name: the whole tensor, what FSDP stores of it on this rank, and what that is logically."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(sizes.values()))
    try:
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(f"{axis}_{rank}" for axis in sizes))
        replicas = max(1, sizes["tp"] // kv_heads)
        qkv = [Section(HEADS * HEAD_DIM), *[Section(kv_heads * HEAD_DIM, replicas)] * 2]
        shapes = SHAPES | {"qkv": (sum(s.size for s in qkv), HIDDEN), "k": (kv_heads * HEAD_DIM, HIDDEN)}
        wholes = {name: torch.arange(1.0, 1 + prod(shape)).view(shape) for name, shape in shapes.items()}
        model, facts = nn.Module(), {}
        for name, whole in wholes.items():
            sections = qkv if name in ("qkv", "k") else [Section(16), Section(16)]
            spread, facts[name] = spread_over_tp(name, whole, sections, mesh[f"tp_{rank}"])
            model.register_parameter(name, nn.Parameter(spread))
        fully_shard(model, mesh=mesh[mesh.mesh_dim_names[:-1]])
        logical = logical_tensors(model, facts=facts)
        return {
            name: (wholes[name], local_view(p).detach().clone(), logical[name]) for name, p in model.named_parameters()
        }
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("sizes", "kv_heads"),
    [
        ({"fsdp": 3, "tp": 2}, 2),
        ({"fsdp": 3, "tp": 2}, 1),
        ({"fsdp": 5, "tp": 4}, 2),
        ({"dp_replicate": 2, "fsdp": 3, "tp": 2}, 1),
        ({"fsdp": 1, "tp": 8}, 2),
    ],
)
def test_boxes_are_what_fsdp_stores_of_tensor_parallel_parameters(sizes, kv_heads):
    owners: dict[str, Tensor] = {}
    for rank in range(prod(sizes.values())):
        for name, (whole, local, logical) in on_rank(rank, sizes, kv_heads).items():
            assert logical.shape == whole.shape and logical.local_shape == local.shape, name
            counts, covered = owners.setdefault(name, torch.zeros(whole.shape)), torch.zeros(local.shape)
            for box, place, owned in logical.pieces():
                assert torch.equal(local[place], whole[box.slices()]), name
                counts[box.slices()] += owned
                covered[place] += 1
            assert (covered == 1).all(), name
    for name, counts in owners.items():
        assert (counts == (name != "tiny")).all(), name  # which is an alias


def test_sections_that_do_not_fit_are_refused():
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        tensor = DTensor.from_local(torch.ones(3, 2), mesh, [Shard(0)], run_check=False)
        assert LogicalTensor.from_tensor("w", tensor, sections={"tp": [Section(2), Section(2, 2)]}).shape == (4, 2)
        for facts, says in (
            (
                {"sections": {"tp": [Section(2), Section(3)]}},
                r"are 5 with every copy, but dim 0 of shape \(6, 2\) has 6",
            ),
            ({"sections": {"cp": [Section(6)]}}, "not split"),
            ({"replicas": {"tp": 4}}, "not made of replicas=4"),
            ({"sections": {"tp": [Section(6)]}, "replicas": {"tp": 2}}, "leave out|every copy"),
        ):
            with pytest.raises(ValueError, match=says):
                LogicalTensor.from_tensor("w", tensor, **facts)
    finally:
        distributed.destroy_process_group()
