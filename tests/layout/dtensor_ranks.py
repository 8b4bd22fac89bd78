"""What one rank does in test_dtensor.py: ``from_tensor`` held against torch's own DTensors."""

from collections import OrderedDict

import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from rung.layout import LogicalTensor, local_view, logical_tensors

WORLD_SIZE = 4
COPY = Replicate()


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def distributed_tensors(line: DeviceMesh, square: DeviceMesh) -> dict[str, DTensor]:
    cases = [
        (line, (5, 3), [Shard(0)]),
        (line, (5,), [Shard(0)]),
        (line, (1, 2), [Shard(0)]),
        (line, (3, 6), [Shard(1)]),
        (line, (3, 2), [COPY]),
        (square, (5, 7), [Shard(0), Shard(1)]),
        (square, (7, 2), [Shard(0), Shard(0)]),
        (square, (1, 3), [Shard(0), Shard(0)]),
        (square, (3, 5), [Shard(1), COPY]),
        (square, (3, 5), [COPY, Shard(0)]),
        (square, (3, 2, 5), [Shard(0), Shard(2)]),  # experts stacked
        (square, (7, 3), [_StridedShard(0, split_factor=2), Shard(0)]),
    ]
    return {
        f"{shape} {placements}": distribute_tensor(numbered(shape), mesh, placements, src_data_rank=None)
        for mesh, shape, placements in cases
    }


def fully_sharded_model(mesh: DeviceMesh, tp: DeviceMesh | None) -> nn.Module:
    """Two blocks with uneven sizes, one wrapped for recomputation; columns, rows and copies over tp."""

    def block() -> nn.Module:
        return nn.Sequential(OrderedDict(up=nn.Linear(3, 7), down=nn.Linear(6, 5)))

    model = nn.Sequential(OrderedDict(a=block(), b=block(), norm=nn.LayerNorm(3)))
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            parameter.copy_(numbered(parameter.shape))
            if tp is not None:
                placement = COPY if "norm" in name or "down.bias" in name else Shard(1 if "down" in name else 0)
                owner, _, leaf = name.rpartition(".")
                sharded = nn.Parameter(distribute_tensor(parameter.detach(), tp, [placement]))
                setattr(model.get_submodule(owner), leaf, sharded)
    model.a = checkpoint_wrapper(model.a)
    fully_shard(model.a, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check(name: str, tensor: DTensor, logical: LogicalTensor) -> None:
    whole, local = numbered(tensor.shape), local_view(tensor)
    torch.testing.assert_close(tensor.detach().full_tensor(), whole, rtol=0, atol=0)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert logical.local_shape == shape == tuple(local.shape), name
    assert sum(box.numel for box in logical.boxes) == local.numel(), name
    assert not logical.boxes or logical.boxes[0].offsets == offset, name
    for box, where, _ in logical.pieces():
        torch.testing.assert_close(local[where], whole[box.slices()], rtol=0, atol=0)

    everyone: list[LogicalTensor | None] = [None] * WORLD_SIZE
    distributed.all_gather_object(everyone, logical)
    by_rank = dict(zip(tensor.device_mesh.mesh.flatten().tolist(), logical.everywhere(), strict=True))
    assert [by_rank[rank] for rank in range(WORLD_SIZE)] == everyone, name
    owners = torch.zeros(tensor.shape)
    for other in by_rank.values():
        for box, _, owned in other.pieces():
            owners[box.slices()] += owned
    assert (owners == 1).all(), name


def check_everything() -> None:
    """``from_tensor`` and ``logical_tensors`` on this rank; four ranks call it."""
    rank = distributed.get_rank()
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    for name, tensor in distributed_tensors(line, square).items():
        check(name, tensor, LogicalTensor.from_tensor(name, tensor))

    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    for mesh, tp in ((line, None), (hybrid, None), (square["dp_shard"], square["tp"])):
        model = fully_sharded_model(mesh, tp)
        tensors = logical_tensors(model)
        assert list(tensors)[:2] == ["a.up.weight", "a.up.bias"]
        for (_, parameter), (name, logical) in zip(model.named_parameters(), tensors.items(), strict=True):
            check(name, parameter, logical)

    padded = LogicalTensor.from_tensor("embed", distribute_tensor(numbered((8, 2)), line, [Shard(0)]), shape=(5, 2))
    assert [box.sizes for box in padded.boxes] == [[(2, 2)], [(2, 2)], [(1, 2)], []][rank]

    # Two K/V heads of 3 rows on four ranks: the DTensor's shape counts a copy for every rank.
    heads = DTensor.from_local(numbered((6, 1)).chunk(2)[rank // 2], line, [Shard(0)])
    logical = LogicalTensor.from_tensor("k_proj", heads, replicas={"dp_shard": 2})
    assert logical.shape == (6, 1) and logical.boxes[0].offsets == (rank // 2 * 3, 0)
    assert logical.owned == (rank % 2 == 0,)

    plain = LogicalTensor.from_tensor("plain", torch.ones(3))
    assert plain.owned == (rank == 0,) and plain.replicated_over == ("world",)
    assert LogicalTensor.from_tensor("plain", torch.ones(3), holders=range(rank, rank + 1)).owned == (True,)

    elsewhere = DeviceMesh("cpu", [0, 1], mesh_dim_names=("tp",))
    assert LogicalTensor.from_tensor("w", distribute_tensor(numbered((4,)), elsewhere, [Shard(0)])).owned == (True,) * (
        rank < 2
    )

    partial = DTensor.from_local(torch.ones(2), line, [Partial()])
    wrong = DTensor.from_local(torch.ones(rank), line, [Shard(0)], shape=torch.Size([6]), stride=(1,))
    for tensor, says in ((partial, "redistribute"), (wrong, "the local tensor is")):
        try:
            LogicalTensor.from_tensor("w", tensor)
        except ValueError as error:
            assert says in str(error)
        else:
            assert tensor is wrong and rank == 2  # 0 + 1 + 2 + 3 rows: only the third rank's two are what chunk gives
