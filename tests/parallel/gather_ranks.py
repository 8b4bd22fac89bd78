"""What one rank does in test_gather.py: whole tensors out of every layout, bit for bit."""

from collections.abc import Iterator, Mapping
from math import prod

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from rung.checkpoint import gathered_tensors
from rung.layout import LogicalTensor, Section, local_view, logical_tensors

SHAPES = {
    "embed.weight": (13, 4),
    "layers.0.norm.weight": (7,),
    "layers.0.qkv.weight": (12, 3),
    "layers.0.k.weight": (3, 5),
    "layers.1.out.weight": (3, 7),
    "layers.1.scale.weight": (1,),
    "layers.1.empty.weight": (0, 3),
    "head.weight": (9, 4),
}


def value(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bits of their own for every element of every tensor."""
    start = 1000 * list(SHAPES).index(name)
    return (torch.arange(prod(SHAPES[name]), dtype=torch.float64) + start).view(SHAPES[name]).to(dtype)


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Make what is missing on the way to the name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.register_parameter(leaf, nn.Parameter(value))


def chunk(tensor: Tensor, parts: int, index: int, dim: int = 0) -> Tensor:
    step = -(-tensor.shape[dim] // parts)
    first = min(index * step, tensor.shape[dim])
    return tensor.narrow(dim, first, min(step, tensor.shape[dim] - first))


def tensor_parallel(name: str, whole: Tensor, mesh: DeviceMesh) -> tuple[DTensor, dict]:
    """A parameter as tensor parallelism leaves it, and the facts about it."""
    size, rank = mesh.size(), mesh.get_local_rank()
    if "norm" in name or "scale" in name:
        return DTensor.from_local(whole.clone(), mesh, [Replicate()], run_check=False), {}
    if "qkv" in name:  # 8 query rows, 2 heads of keys and of values; each of these on ``size // 2`` ranks
        sections = [Section(8), Section(2, max(1, size // 2)), Section(2, max(1, size // 2))]
        parts = [
            chunk(part, size // section.replicas, rank // section.replicas)
            for part, section in zip(whole.split([8, 2, 2]), sections, strict=True)
        ]
        return DTensor.from_local(torch.cat(parts), mesh, [Shard(0)], run_check=False), {"sections": {"tp": sections}}
    if ".k." in name:  # one head on all ranks
        return DTensor.from_local(whole.clone(), mesh, [Shard(0)], run_check=False), {"replicas": {"tp": size}}
    dim = 1 if "out" in name else 0
    local = chunk(whole, size, rank, dim).contiguous()
    spread = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride())
    return spread, {}


def part_of_model(
    names: list[str], fsdp: DeviceMesh | None, tp: DeviceMesh | None, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, tuple[LogicalTensor, Tensor]]]:
    """Some of the tensors, spread over tp and then by FSDP; every parameter is what FSDP itself stores."""
    model, facts = nn.Module(), {}
    for name in names:
        spread = value(name, dtype)
        if tp is not None:
            spread, facts[name] = tensor_parallel(name, spread, tp)
        set_parameter(model, name, spread)
    if fsdp is not None:
        fully_shard(model, mesh=fsdp)
    alone = None if fsdp is not None or tp is not None else [distributed.get_rank()]
    logical = logical_tensors(model, facts=facts, holders=alone)
    return model, {name: (logical[name], local_view(p)) for name, p in model.named_parameters()}


def gathered(parameters, *, keep: bool | None = None, order=None) -> dict[str, Tensor]:
    """What came, on rank 0; elsewhere checks that nothing but names did. The order of names is every rank's."""
    rank = distributed.get_rank()
    keep = rank == 0 if keep is None else keep
    found = {}
    for name, tensor in gathered_tensors(parameters, keep=keep, order=order):
        assert tensor.device.type == "cpu" and (keep or tensor.numel() == 0)
        found[name] = tensor
    names: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(names, [(name, tensor.dtype) for name, tensor in found.items()])
    assert all(other == names[0] for other in names)
    return found


def check(found: Mapping[str, Tensor], names: list[str], dtype: torch.dtype = torch.float32) -> None:
    assert list(found) == names
    if distributed.get_rank() == 0:
        for name, tensor in found.items():
            assert torch.equal(tensor, value(name, dtype)) and tensor.dtype == dtype, name


def refused(parameters: Mapping, says: str) -> None:
    """Every rank gets the error."""
    with pytest.raises(ValueError, match=says):
        for _ in gathered_tensors(parameters, keep=distributed.get_rank() == 0):
            pass


def layouts(world_size: int) -> Iterator[tuple[DeviceMesh | None, DeviceMesh | None]]:
    yield init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",)), None
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("fsdp", "tp"))
    yield mesh["fsdp"], mesh["tp"]  # with eight ranks 9 rows, which DTensor and FSDP see differently
    if world_size == 4:
        hybrid = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp_replicate", "fsdp", "tp"))
        yield hybrid["dp_replicate", "fsdp"], hybrid["tp"]
        yield None, init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))  # two key/value heads on four ranks


def check_stages(rank: int, world_size: int) -> None:
    """Two stages, each spread over half of the ranks; the second has an alias of the first one's embedding."""
    half = world_size // 2
    meshes = [
        DeviceMesh("cpu", range(stage * half, (stage + 1) * half), mesh_dim_names=("fsdp",)) for stage in range(2)
    ]
    second = ["layers.1.out.weight", "layers.1.scale.weight", "layers.1.empty.weight", "head.weight"]
    first = [name for name in SHAPES if name not in second]
    stage = rank // half
    _, mine = part_of_model([first, second][stage], meshes[stage], None)
    check(gathered(mine), list(SHAPES))
    if stage == 1:  # an alias, by the facts
        model, _ = part_of_model(["embed.weight"], meshes[1], None)
        tied = logical_tensors(model, facts={"embed.weight": {"tied_to": "tok.weight"}})["embed.weight"]
        assert tied.boxes and not any(tied.owned) and tied.source == "tok.weight"
        mine = mine | {"out.weight": (tied, local_view(model.embed.weight))}
    check(gathered(mine), list(SHAPES))
    if stage == 1:
        mine = {"out.weight": mine["out.weight"]}
    check(gathered(mine), first)  # nothing but an alias there

    _, alone = part_of_model([name for i, name in enumerate(SHAPES) if i % world_size == rank], None, None)
    check(gathered(alone, order=list(SHAPES)), list(SHAPES))


def check_everything() -> None:
    """Every layout of this world, then everything that is refused."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    for fsdp, tp in layouts(world_size):
        for dtype in (torch.float32, torch.bfloat16):
            model, parameters = part_of_model(list(SHAPES), fsdp, tp, dtype)
            check(gathered(parameters), list(SHAPES), dtype)
        if tp is None:
            check(gathered(model), list(SHAPES), torch.bfloat16)
    assert not any(tensor.numel() for tensor in gathered(parameters, keep=False).values())
    check_stages(rank, world_size)

    plain = nn.Linear(3, 2)
    with torch.no_grad():
        plain.weight.fill_(rank)
    found = gathered(plain)
    if rank == 0:
        assert torch.equal(found["weight"], torch.zeros(2, 3))
        found["weight"].add_(1)
        assert not plain.weight.any()  # what came is the caller's own

    twice = LogicalTensor.from_tensor("w", plain.weight, holders=[rank])
    refused({"w": (twice, plain.weight.data)}, "ranks own")
    other = torch.ones(2 + rank)
    refused({"w": (LogicalTensor.from_tensor("w", other, holders=[rank]), other)}, "on another")
