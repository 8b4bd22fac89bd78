"""What one GPU can tell of layouts: `python benchmarks/layouts.py --gpu`.

- Every path of a spread model with groups of one rank, so that FSDP2, copies, tensor parallelism, the schedule of a
  pipeline and ring attention all run over NCCL: time of forward and backward passes over those of the plain model, and
  that the loss is the same.
- Ring attention rank by rank: kernel time of every step of every rank, as if the ring were there; the busiest rank in
  each step makes the time, so what counts is its time over the mean. Zigzag, and contiguous for contrast.
- One layer at the shapes that a rank has under tensor parallelism: tp times its time, over that of the whole layer.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from measuring import RESULTS, commit, machine, print_table, spread, write
from torch import Tensor

from rung.data import Batch
from rung.layout import Layout
from rung.layout.context import Zigzag
from rung.models import ModelConfig
from rung.objectives import CausalLM
from rung.parallel import Groups, ParallelConfig, SpreadModel, World, dtypes, initialize, parallelize
from rung_kernels.block_attention import attention_backward, attention_forward

LLAMA3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
}
AXES = {"fsdp": ("dp_shard", "cp"), "copies": ("dp_replicate",), "tp": ("tp",), "pp": ("pp",)}
PATHS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "fsdp": ("fsdp",),
    "fsdp × copies": ("fsdp", "copies"),
    "tp": ("tp",),
    "tp, whole stream": ("tp",),
    "ring": ("cp",),
    "gpipe": ("pp",),
    "1f1b": ("pp",),
    "all": ("fsdp", "copies", "tp", "cp", "pp"),
}


class OneRank(Groups):
    """Groups that are made although they have one rank."""

    def __init__(self, layout: Layout, device_type: str, forced: tuple[str, ...]) -> None:
        super().__init__(layout, 0, device_type)
        self._forced = {AXES[name] for name in forced if name in AXES}

    def group(self, *axes: str) -> Any:
        return dist.group.WORLD if axes in self._forced else None


def main(args: argparse.Namespace) -> None:
    """All three parts; JSON in benchmarks/results/layouts_gpu.json."""
    if args.tiny:
        args.device = "cpu"
    elif not args.output:
        args.output = RESULTS / "layouts_gpu.json"
    torch.manual_seed(args.seed)
    clock = Clock(args.device, rounds=2 if args.tiny else 10)
    result = {
        "benchmark": "layouts_gpu",
        "tiny": args.tiny,
        "commit": commit(),
        "machine": machine(),
        "settings": {"seed": args.seed, "rounds": clock.rounds, "precision": "bf16"},
        "paths": paths(clock, args),
        "ring": ring(clock, args.tiny),
        "shapes": shapes(clock, args.tiny),
    }
    print_table(
        ("one rank", "ms", "÷ plain", "difference of losses"),
        [
            (
                name,
                f"{1000 * row['seconds']['median']:.1f}",
                f"{row['over_plain']:.3f}",
                f"{row['loss_difference']:.1e}",
            )
            for name, row in result["paths"]["rows"].items()
        ],
    )
    print_table(
        ("ring", "ms of a rank", "max ÷ mean", "contiguous"),
        [
            (name, f"{1000 * row['seconds']:.2f}", f"{row['balance']:.3f}", row["contiguous_balance"] or "")
            for name, row in result["ring"]["rows"].items()
        ],
    )
    print_table(
        ("layer", "ms", "tp × ms ÷ whole layer"),
        [
            (f"tp {tp}", f"{1000 * row['seconds']['median']:.2f}", f"{row['over_whole']:.3f}")
            for tp, row in result["shapes"]["rows"].items()
        ],
    )
    write(result, args.output)


class Clock:
    """Times what is queued on the device."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = torch.device(device), rounds

    def once(self, work: Callable[[], object]) -> float:
        """Seconds: CUDA events around the work, the processor's clock on the CPU."""
        if self.device.type != "cuda":
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1000

    def interleaved(self, works: Mapping[Any, Callable[[], object]]) -> dict[Any, list[float]]:
        """Seconds of each in every round, after one that warms up."""
        seconds: dict[Any, list[float]] = {name: [] for name in works}
        for turn in range(self.rounds + 1):
            for name, work in works.items():
                seconds[name].append(self.once(work))
            if turn == 0:
                seconds = {name: [] for name in works}
        return seconds


# --- every path with one rank


def paths(clock: Clock, args: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward passes of a step, path by path; each model is alone on the device."""
    if args.tiny:
        model, seq_len, sequences = ModelConfig(311, 32, 64, 2, 4, num_key_value_heads=2), 16, 4
    else:
        model, seq_len, sequences = ModelConfig(32000, 1024, 2736, 24, 16), 2048, 4
    rows: dict[str, dict[str, Any]] = {}
    with World.join(clock.device.type) as world:
        for name, forced in PATHS.items():
            seconds, loss = _path(clock, name, forced, world, model, seq_len, sequences, args.seed)
            rows[name] = {"seconds": spread(seconds), "loss": loss}
    plain = rows["plain"]
    for row in rows.values():
        row["over_plain"] = row["seconds"]["median"] / plain["seconds"]["median"]
        row["loss_difference"] = abs(row["loss"] / plain["loss"] - 1)
    shape = {key: getattr(model, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    return {"model": shape, "seq_len": seq_len, "sequences": sequences, "rows": rows}


def _path(
    clock: Clock,
    name: str,
    forced: tuple[str, ...],
    world: World,
    config: ModelConfig,
    seq_len: int,
    sequences: int,
    seed: int,
) -> tuple[list[float], float]:
    from rung.models import build

    layout = Layout(dp_shard=1)
    settings = ParallelConfig(
        dp_shard=1, sequence_parallel=name != "tp, whole stream", pp_schedule="1f1b" if name != "gpipe" else name
    )
    # Parameters in the dtype of computation where there is no FSDP to cast them.
    types = dtypes("bf16")
    if "fsdp" not in forced:
        types = types._replace(parameters=types.compute)
    micro_batches = 2
    with torch.device("meta"):
        whole = build(config).to(types.parameters)
    groups = OneRank(layout, clock.device.type, forced)
    model = parallelize(whole, groups, settings, types, seq_len=seq_len, num_micro_batches=micro_batches)
    if "cp" in forced:
        _spread_context(model)
    initialize(model, clock.device, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (sequences, seq_len + 1), generator=generator)
    batches = [
        Batch(
            tokens_BT=part[:, :-1].contiguous(),
            labels_BT=part[:, 1:].contiguous(),
            positions_BT=torch.arange(seq_len).expand(len(part), -1).contiguous(),
            sample_ids_B=torch.arange(len(part)),
            document_ids_BT=None,
        ).to(clock.device)
        for part in tokens.chunk(micro_batches)
    ]
    objective, step = CausalLM(model.cross_entropy), torch.ones((), dtype=torch.int64, device=clock.device)
    parameters = model.local_parameters()
    losses: list[Tensor] = []

    def loss_of(outputs: Tensor, batch: Batch) -> Tensor:
        (loss,) = objective.sums(outputs, batch).values()
        losses.append(loss.detach())
        return loss / (sequences * seq_len)

    def work() -> None:
        losses.clear()
        model.forward_backward(batches, step, loss_of)
        model.finish_gradients(parameters)
        model.zero_grad()

    seconds = clock.interleaved({name: work})[name]
    return seconds, float(sum(losses)) / (sequences * seq_len)


def _spread_context(model: SpreadModel) -> None:
    """Ring attention over one rank."""
    from rung.parallel.context import ContextAttention, ContextMask

    group = dist.group.WORLD
    assert group is not None
    for part in model.parts:
        part.attention_mask = ContextMask(group)  # type: ignore[assignment]
        for block in part.blocks():
            block.self_attn.inner = ContextAttention(group)  # type: ignore[union-attr]


# --- the ring, rank by rank


def ring(clock: Clock, tiny: bool) -> dict[str, Any]:
    """Kernel time of forward and backward passes of each (rank, step) of a ring; llama3_8b's heads."""
    ranks, seq_len = (2, 64) if tiny else (8, 65536)
    heads, kv_heads, size = (4, 2, 8) if tiny else (32, 8, 128)
    tokens = seq_len // ranks
    dtype = torch.float32 if tiny else torch.bfloat16

    def random(count: int) -> Tensor:
        return torch.randn(1, tokens, count, size, device=clock.device, dtype=dtype)

    q, k, v = random(heads), random(kv_heads), random(kv_heads)
    work = functools.partial(_blocks, q, k, v)
    rows = {}
    for name, window in (("causal", None), ("window of an eighth", seq_len // 8)):
        zigzag = Zigzag(seq_len, ranks)
        dealt = {
            (rank, step): functools.partial(work, list(_zigzag_blocks(zigzag, rank, step, window, clock.device)))
            for rank in range(ranks)
            for step in range(ranks)
        }
        seconds = _matrix(clock.interleaved(dealt), ranks)
        row: dict[str, float | None] = {"seconds": float(seconds.sum(1).mean()), "balance": _balance(seconds)}
        row["contiguous_balance"] = None
        if window is None:
            pieces = {
                (rank, step): functools.partial(work, list(_contiguous_blocks(tokens, rank, step)))
                for rank in range(ranks)
                for step in range(ranks)
            }
            row["contiguous_balance"] = _balance(_matrix(clock.interleaved(pieces), ranks))
        rows[name] = row
    return {"ranks": ranks, "seq_len": seq_len, "heads": heads, "kv_heads": kv_heads, "head_dim": size, "rows": rows}


_Piece = tuple[slice, slice, Tensor | None, bool]


def _zigzag_blocks(zigzag: Zigzag, rank: int, step: int, window: int | None, device: torch.device) -> Iterator[_Piece]:
    source = zigzag.source(rank, step)
    positions = [torch.from_numpy(zigzag.positions(place)).to(device) for place in (rank, source)]
    for block in zigzag.blocks(rank, source, window, max_rows=max(1, 2**27 // (zigzag.seq_len // zigzag.ranks))):
        mask = None
        if block.compare_positions:
            assert window is not None
            distance = positions[0][block.rows].unsqueeze(-1) - positions[1][block.columns]
            mask = ((distance >= 0) & (distance < window)).view(1, 1, *distance.shape)
        yield block.rows, block.columns, mask, block.causal


def _contiguous_blocks(tokens: int, rank: int, step: int) -> Iterator[_Piece]:
    """Of earlier ranks everything, of later ones nothing."""
    if step <= rank:
        yield slice(0, tokens), slice(0, tokens), None, step == 0


def _blocks(q: Tensor, k: Tensor, v: Tensor, pieces: list[_Piece]) -> None:
    for rows, columns, mask, causal in pieces:
        out, lse = attention_forward(q[:, rows], k[:, columns], v[:, columns], mask, causal)
        attention_backward(out, q[:, rows], k[:, columns], v[:, columns], out, lse, mask, causal)


def _matrix(seconds: Mapping[tuple[int, int], list[float]], ranks: int) -> Tensor:
    """[ranks, steps] of medians."""
    return torch.tensor([[statistics.median(seconds[r, s]) for s in range(ranks)] for r in range(ranks)])


def _balance(work: Tensor) -> float:
    """[ranks, steps]: ranks meet in every step, so the busiest in each makes the time."""
    return float(work.max(dim=0).values.sum() / work.mean(dim=0).sum())


# --- a layer at the shapes of a rank


def shapes(clock: Clock, tiny: bool) -> dict[str, Any]:
    """Forward and backward passes of one layer of llama3_8b with 1/tp of its heads and feed-forward."""
    from rung.models.decoder import Block, rotary_tables

    seq_len = 16 if tiny else 8192
    works: dict[int, Callable[[], object]] = {}
    for tp in (1, 2) if tiny else (1, 2, 4, 8):
        values = LLAMA3_8B | ({"hidden_size": 64, "intermediate_size": 128, "head_dim": 8} if tiny else {})
        for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
            values[key] //= tp
        config = ModelConfig(**values, num_hidden_layers=1)
        with torch.device(clock.device):
            block = Block(config).to(torch.bfloat16)
        x = torch.randn(1, seq_len, config.hidden_size, device=clock.device, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = rotary_tables(config, torch.arange(seq_len, device=clock.device).unsqueeze(0), torch.bfloat16)
        works[tp] = functools.partial(_layer, block, x, cos, sin)
    seconds = clock.interleaved(works)
    whole = statistics.median(seconds[1])
    rows = {
        str(tp): {"seconds": spread(these), "over_whole": tp * statistics.median(these) / whole}
        for tp, these in seconds.items()
    }
    return {"model": "llama3_8b", "seq_len": seq_len, "rows": rows}


def _layer(block: torch.nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    block(x, cos, sin, None).backward(x)
    block.zero_grad()
    x.grad = None
