"""What one rank does in test_sharded.py: many shardings of one optimizer run, on subgroups of one process group."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from rung.layout import Box, LogicalTensor, Shard
from rung.optim import (
    AdamWConfig,
    LocalParameter,
    MuonConfig,
    OptimConfig,
    Packed,
    SpamConfig,
    StableSpamConfig,
    build_optimizer,
)

SHAPES = {
    "embed_tokens.weight": (21, 9),
    "layers.0.self_attn.q_proj.weight": (13, 9),
    "layers.0.self_attn.k_proj.weight": (2, 9),
    "layers.0.self_attn.o_proj.weight": (9, 13),
    "layers.0.mlp.up_proj.weight": (31, 9),
    "layers.0.mlp.down_proj.weight": (9, 31),
    "layers.1.self_attn.q_proj.weight": (13, 9),
    "layers.1.self_attn.o_proj.weight": (9, 13),
    "layers.1.mlp.up_proj.weight": (131, 70),
    "norm.weight": (9,),
}
STEPS = 4
SKIPPED = 2  # this step's gradients are not finite


def rows(shape: tuple[int, ...], cuts: list[int], rank: int) -> list[Box]:
    """Rows cuts[rank] to cuts[rank + 1]."""
    return [Box((cuts[rank], *(0 for _ in shape[1:])), (cuts[rank + 1] - cuts[rank], *shape[1:]))]


def chunked(shape: tuple[int, ...], rank: int, size: int) -> list[Box]:
    """The rule of torch.chunk, and of FSDP2: the last ranks may have less, or nothing."""
    step = -(-shape[0] // size)
    return rows(shape, [min(step * r, shape[0]) for r in range(size + 1)], rank)


def ragged(shape: tuple[int, ...], rank: int, size: int) -> list[Box]:
    """Nothing for the first rank, one row for each next, the rest for the last."""
    return rows(shape, [0, *(min(r, shape[0]) for r in range(size - 1)), shape[0]], rank)


def striped(shape: tuple[int, ...], rank: int, size: int) -> list[Box]:
    """Every size-th row, so several boxes, stacked in the local tensor."""
    return [Box((row, *(0 for _ in shape[1:])), (1, *shape[1:])) for row in range(rank, shape[0], size)]


def columns(shape: tuple[int, ...], rank: int, size: int) -> list[Box]:
    """The last dim is split."""
    last = chunked((shape[-1],), rank, size)[0]
    return [Box((*(0 for _ in shape[1:]), *last.offsets), (*shape[:-1], *last.sizes))]


def doubled(shape: tuple[int, ...], rank: int, size: int) -> list[Box]:
    """Halves, each held by every other rank."""
    return chunked(shape, rank % 2, 2) if size > 1 else [Box((0,) * len(shape), shape)]


Sharding = Callable[[tuple[int, ...], int, int], list[Box]]
SHARDINGS: dict[str, Sharding] = {f.__name__: f for f in (chunked, ragged, striped, columns, doubled)}
CASES = [(name, size) for name in SHARDINGS for size in (1, 2, 3, 4) if size > 1 or name == "chunked"]
SHORT = {"betas": [0.9, 0.95], "spike_threshold": 20.0, "reset_interval": 2, "warmup_steps": 2, "grace_steps": 1}
CONFIGS: dict[str, OptimConfig] = {
    "muon": MuonConfig(lr=0.02),
    "adamw": AdamWConfig(),
    "spam": SpamConfig(**SHORT),  # type: ignore[arg-type]
    "sparse_spam": SpamConfig(**SHORT, density=0.4),  # type: ignore[arg-type]
    "stable_spam": StableSpamConfig(gamma3=0.9, reset_interval=2, total_steps=2),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def whole(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def take(tensor: torch.Tensor, boxes: list[Box]) -> torch.Tensor:
    """The boxes, stacked in the first dim."""
    parts = [tensor[box.slices()] for box in boxes] or [tensor[:0]]
    return torch.cat(parts).clone()


def local_parameters(
    sharding: Sharding, dtype: torch.dtype, rank: int, size: int, group: object
) -> list[LocalParameter]:
    found = []
    for seed, (name, shape) in enumerate(SHAPES.items()):
        boxes = sharding(shape, rank, size)
        starts = [sum(box.sizes[0] for box in boxes[:i]) for i in range(len(boxes))]
        local_boxes = [
            Box((start, *(0 for _ in box.sizes[1:])), box.sizes) for start, box in zip(starts, boxes, strict=True)
        ]
        logical = LogicalTensor.from_spec(name, shape, dtype, {"axis": Shard(0)}, {"axis": size}, {"axis": rank})
        if sharding is not chunked:
            logical = replace(logical, boxes=tuple(boxes), owned=(True,) * len(boxes), local_boxes=tuple(local_boxes))
        found.append(LocalParameter(name, take(whole(shape, dtype, seed), boxes), logical, group))  # type: ignore[arg-type]
    return found


def run(
    config: OptimConfig, sharding: Sharding, dtype: torch.dtype, rank: int, size: int, group: object
) -> list[tuple]:
    """Train a little; every (name, box, owned, values) of the weights and of their state, and what was counted."""
    parameters = local_parameters(sharding, dtype, rank, size, group)
    optimizer = build_optimizer(config, parameters, seed=3)
    counts = []
    for step in range(STEPS):
        for seed, p in enumerate(parameters):
            gradient = take(
                whole(SHAPES[p.name], dtype, 1000 * step + seed + 500), sharding(SHAPES[p.name], rank, size)
            )
            p.local.grad = gradient * float("nan") if step == SKIPPED else gradient
        skip = torch.tensor(float(step == SKIPPED), dtype=torch.float64)
        optimizer.step(0.01, grad_scale=torch.tensor(1.25, dtype=torch.float64), skip=skip)
        if events := optimizer.events():
            counts.append([int(events.spikes), int(events.resets)])
    tensors = {p.name: (p.local, p.logical) for p in parameters} | {
        name: (tensor.dense() if isinstance(tensor, Packed) else tensor, logical)
        for name, (tensor, logical) in optimizer.named_state().items()
    }
    return [
        ("events", Box((0,), (2 * len(counts),)), True, torch.tensor(counts).view(-1)),
        *(
            (name, box, owned, tensor[local_box.slices()].clone())
            for name, (tensor, logical) in tensors.items()
            for box, owned, local_box in zip(logical.boxes, logical.owned, logical.local_boxes, strict=True)
        ),
    ]


def every_case() -> dict[str, Any]:
    """All cases that this rank takes part in, arrays for tensors, and the number of messages; four ranks call it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world_size + 1)}
    results = {}
    with (
        mock.patch.object(dist, "all_to_all_single", side_effect=dist.all_to_all_single) as send,
        mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as reduce,
    ):
        for sharding, size in CASES:
            for optimizer, config in CONFIGS.items():
                for dtype in DTYPES:
                    if rank < size:
                        case = run(config, SHARDINGS[sharding], DTYPES[dtype], rank, size, groups[size])
                        results[sharding, size, optimizer, dtype] = [(*what, tensor.numpy()) for *what, tensor in case]
    return {"cases": results, "messages": send.call_count, "reductions": reduce.call_count}
