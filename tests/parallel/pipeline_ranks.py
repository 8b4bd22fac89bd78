"""What the ranks of test_pipeline.py run. Every rank computes the answer of one process itself and compares.

Four ranks, the pipeline outermost as in ``Layout``: with pp=2, ranks (0, 2) and (1, 3) are pipelines of their own that
read the same batches, or share parameters by FSDP2 and read batches of their own.

Legend: B batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rung.data import IGNORED, Batch
from rung.layout import local_view
from rung.layout.stages import (
    SINGLE_STAGE_SCHEDULES,
    default_virtual_stages,
    layers_of_stages,
    num_boundary_buffers,
    rank_of_stage,
    split_layers,
    stages_of,
)
from rung.models import Decoder
from rung.models.config import ModelConfig
from rung.parallel.pipeline import Pipeline, stage_part, sum_tied_gradients
from rung.parallel.spread import run_model

CPU = torch.device("cpu")
LAYERS = 8
V, D = 29, 16


@dataclass(frozen=True)
class Case:
    """A pipeline, and what is done inside its parts."""

    schedule: str
    pp: int
    micro_batches: int
    virtual: int = 0
    layers: tuple[int, ...] = ()
    split_backward: bool = True
    tied: bool = False
    recompute: bool = False
    compile: bool = False
    data: str = ""
    """fsdp or hsdp: the ranks that hold the same stages share their parameters and read batches of their own."""
    reshard: bool = False
    steps: int = 1
    lengths: tuple[int, ...] = (8,)
    """Tokens per sequence, step after step."""

    @property
    def stages_per_rank(self) -> int:
        return self.virtual or default_virtual_stages(self.schedule)


@functools.cache
def mesh(pp: int) -> DeviceMesh:
    return init_device_mesh("cpu", (pp, 4 // pp), mesh_dim_names=("pp", "data"))


@functools.cache
def replicas(pp: int) -> DeviceMesh:
    return init_device_mesh("cpu", (pp, 4 // pp, 1), mesh_dim_names=("pp", "copies", "shards"))["copies", "shards"]


def whole_model(tied: bool) -> Decoder:
    config = ModelConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, dropout=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(3)
    model = Decoder(config, draws_seed=5).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batches_of(step: int, data_rank: int, count: int, length: int, documents: bool = True) -> list[Batch]:
    """Micro-batches of two sequences: labels missing here and there, and in one whole sequence of each step."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 * step + 100 * data_rank + number)
        tokens = torch.randint(V, (2, length), generator=generator)
        labels = torch.randint(V, (2, length), generator=generator)
        labels[torch.rand(2, length, generator=generator) < 0.3 * (number % 3)] = IGNORED
        if number == count - 1:
            labels[0] = IGNORED
        ids = torch.tensor([2 * number, 2 * number + 1]) + 64 * data_rank + 1024 * step
        positions = torch.arange(length).expand(2, length)
        breaks = torch.tensor([[3], [5]])
        made.append(Batch(tokens, labels, ids, positions, (positions >= breaks).long() if documents else None))
    return made


def loss_of(outputs: Tensor, batch: Batch, count: int) -> Tensor:
    losses = nn.functional.cross_entropy(
        outputs.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return losses / count


def count_of(batches: list[Batch]) -> int:
    return sum(int((batch.labels_BT != IGNORED).sum()) for batch in batches)


@functools.cache
def answer(tied: bool, micro_batches: int, data_ranks: int, steps: int, lengths: tuple[int, ...]) -> list[dict]:
    """Step by step: the loss and gradients of one process, which then moves against them. Ends with the model."""
    model = whole_model(tied)
    found: list[dict] = []
    for step in range(steps):
        length = lengths[step % len(lengths)]
        batches = [b for rank in range(data_ranks) for b in batches_of(step, rank, micro_batches, length)]
        count, total = count_of(batches), 0.0
        for batch in batches:
            loss = loss_of(run_model(model, batch, torch.tensor(step)), batch, count)
            loss.backward()
            total += float(loss.detach())
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        update(dict(model.named_parameters()))
        found.append({"loss": total, "grads": grads, "model": copy.deepcopy(model).eval()})
    return found


@torch.no_grad()
def update(parameters: dict[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.sub_(0.01 * parameter.grad)
        parameter.grad = None


@torch.no_grad()
def rescale(parameters: list[nn.Parameter], factor: float) -> None:
    for parameter in parameters:
        parameter.mul_(factor)


@dataclass
class Run:
    """A case on this rank."""

    case: Case
    pipeline: Pipeline
    parts: list[nn.Module]
    parameters: list[nn.Parameter]
    """Those of the parts, as an optimizer holds them: sharded, whatever FSDP has gathered since."""
    calls: list[int]
    """Forward passes of blocks, recomputed ones included."""


def start(case: Case) -> Run:
    place = mesh(case.pp)
    group, rank = place.get_group("pp"), place.get_local_rank("pp")
    virtual = case.stages_per_rank
    num_stages = case.pp * virtual
    counts = case.layers or split_layers([1.0] * LAYERS, 0.2, 1.3, num_stages)
    split = layers_of_stages(counts)
    stages = stages_of(case.schedule, case.pp, virtual, rank)
    whole = whole_model(case.tied)
    parts = [stage_part(whole, split[s], s == 0, s == num_stages - 1) for s in stages]
    calls = [0]
    for part in parts:
        for block in part.blocks():
            if not case.compile:
                block.forward = counted(block.forward, calls)
            if case.recompute:
                block.forward = functools.partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
            if case.compile:  # forward and backward are a graph each, as inductor's are, and quickly made
                block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=False)
        if case.data:
            shards = replicas(case.pp) if case.data == "hsdp" else place["data"]
            for block in part.blocks():
                fully_shard(block, mesh=shards, reshard_after_forward=case.reshard)
            fully_shard(part, mesh=shards, reshard_after_forward=False)
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)
    pipeline = Pipeline(
        parts, stages, num_stages, group, case.schedule, case.micro_batches, CPU, boundary, logits,
        split_backward=case.split_backward,
    )  # fmt: skip
    return Run(case, pipeline, parts, [p for part in parts for p in part.parameters()], calls)


def boundary(batch: Batch) -> tuple[Tensor, ...]:
    return (torch.empty(*batch.tokens_BT.shape, D, dtype=torch.float64, device="meta"),)


def logits(batch: Batch) -> Tensor:
    return torch.empty(*batch.tokens_BT.shape, V, dtype=torch.float64, device="meta")


def counted(forward: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(*args, **kwargs)

    return call


def train(case: Case) -> dict[str, Any]:
    """Errors against one process over all steps, with an evaluation between steps; and what was counted."""
    run = start(case)
    place = mesh(case.pp)
    data_ranks = 4 // case.pp if case.data else 1
    data_rank = place.get_local_rank("data") if case.data else 0
    last_rank = rank_of_stage(case.schedule, case.pp, case.stages_per_rank, case.pp * case.stages_per_rank - 1)
    expected = answer(case.tied, case.micro_batches, data_ranks, case.steps, case.lengths)
    worst: dict[str, float] = {}
    loss_error, eval_error, reductions, tied_bits, calls = 0.0, 0.0, set(), [], []
    for step in range(case.steps):
        length = case.lengths[step % len(case.lengths)]
        everything = [batches_of(step, rank, case.micro_batches, length) for rank in range(data_ranks)]
        count = count_of([batch for batches in everything for batch in batches])
        losses: list[Tensor] = []
        seen: list[Batch] = []

        def loss(outputs: Tensor, batch: Batch, count: int = count, losses=losses, seen=seen) -> Tensor:
            value = loss_of(outputs, batch, count)
            losses.append(value.detach())
            seen.append(batch)
            return value

        run.calls[0] = 0
        batches = everything[data_rank]
        with Reductions() as reductions_of_step:
            run.pipeline.forward_backward(batches, torch.tensor(step), loss)
        calls.append(run.calls[0])
        reductions.add(reductions_of_step.count)
        total = torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64)
        assert [id(b) for b in seen] == [id(b) for b in batches] * run.pipeline.has_last, "batches out of order"
        if case.data:
            dist.all_reduce(total, group=place.get_group("data"))
        if run.pipeline.has_last:
            loss_error = max(loss_error, abs(float(total) - expected[step]["loss"]))
        named = [(name, p) for part in run.parts for name, p in part.named_parameters()]
        if case.tied:
            ends = dict(named)
            first, last = (ends.get(name) for name in ("embed_tokens.weight", "lm_head.weight"))
            both = [None if p is None else local_view(p.grad) for p in (first, last)]
            sum_tied_gradients(both[0], both[1], place.get_group("pp"), last_rank)
            tied_bits.append([t.numpy().tobytes() for t in both if t is not None])
        norm = torch.stack([g.norm() for g in expected[step]["grads"].values()]).norm()
        for name, parameter in named:
            wanted = expected[step]["grads"]["embed_tokens.weight" if case.tied and name == "lm_head.weight" else name]
            assert parameter.grad is not None, f"{name} has no gradient"
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            error = float((grad - wanted).norm() / max(wanted.norm(), 1e-3 * norm))
            worst[name] = max(worst.get(name, 0.0), error)
        for part in run.parts:
            update(dict(part.named_parameters()))
        eval_error = max(eval_error, evaluate(run, expected[step]["model"]))
        # Parameters that change after an evaluation, as where a checkpoint is loaded, are seen by the next one.
        for factor in (0.5, 2.0) if step == 0 else ():
            rescale([*run.parameters, *expected[step]["model"].parameters()], factor)
            eval_error = max(eval_error, evaluate(run, expected[step]["model"]))
    return {
        "gradients": worst,
        "loss": loss_error,
        "evaluation": eval_error,
        "reductions": reductions,
        "tied": tied_bits,
        "calls": calls,
        "blocks": sum(len(part.blocks()) for part in run.parts),
    }


class Reductions(TorchDispatchMode):
    """Counts the messages by which FSDP adds up gradients."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def evaluate(run: Run, whole: Decoder) -> float:
    """The largest difference from one process, over numbers of batches and shapes that training has not."""
    for part in run.parts:
        part.eval()
    worst = 0.0
    # One batch; fewer than there are stages; more, and of different lengths; without documents.
    for lengths in ([5], [3, 3], [4, 6, 6, 1, 9, 4, 3]):
        batches = [batches_of(50, 7, 1, length, documents=length > 4)[0] for length in lengths]
        seen: list[Batch] = []

        def consume(outputs: Tensor, batch: Batch, seen=seen) -> None:
            nonlocal worst
            seen.append(batch)
            with torch.no_grad():
                worst = max(worst, float((outputs - run_model(whole, batch)).abs().max()))
            assert not outputs.requires_grad

        run.pipeline.forward(batches, consume)
        assert [id(b) for b in seen] == [id(b) for b in batches] * run.pipeline.has_last, "batches out of order"
    run.pipeline.forward([], lambda outputs, batch: None)
    for part in run.parts:
        part.train()
    return worst


# Order: a toy whose tensors carry the time


@dataclass
class Clock:
    """Time on this rank in slots: a pass starts when the rank is free and what it needs has arrived."""

    now: int = 0
    working: int = 0
    live: int = 0
    peak: int = 0
    log: Any = None

    def tick(self, arrived: Tensor, kind: str, key: tuple[int, int]) -> Tensor:
        self.now = max(self.now, int(arrived.max())) + 1
        self.working += 1
        self.log.append((kind, *key))
        if kind == "F":
            self.live += 1
            self.peak = max(self.peak, self.live)
        elif {("I", *key), ("W", *key)} <= set(self.log):
            self.live -= 1
        return torch.full_like(arrived, self.now)


class _Inputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock, key):
        ctx.clock, ctx.key = clock, key
        return clock.tick(x, "F", key)

    @staticmethod
    def backward(ctx, grad):
        return ctx.clock.tick(grad, "I", ctx.key), None, None


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, clock, key):
        ctx.clock, ctx.key = clock, key
        return torch.zeros_like(weight)

    @staticmethod
    def backward(ctx, grad):
        return ctx.clock.tick(grad, "W", ctx.key), None, None


class Timed(nn.Module):
    """A stage that does nothing but say, in its output and in the gradient of its input, when each was ready."""

    def __init__(self, stage: int, clock: Clock) -> None:
        super().__init__()
        self.stage, self.clock = stage, clock
        self.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        self.entry = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64)) if stage == 0 else None

    def forward(self, x: Tensor, *, sample_ids_B: Tensor, **_: Any) -> Tensor:
        key = (self.stage, int(sample_ids_B[0]))
        x = x if self.entry is None else self.entry + 0
        # Backward runs later functions first: with both at once the input's gradient is ready after the weight's.
        through = _Inputs.apply(x, self.clock, key)
        return through + _Weights.apply(self.weight, self.clock, key)


def times(schedule: str, pp: int, virtual: int, micro_batches: int, split_backward: bool) -> dict[str, Any]:
    """Peak of live micro-batches and slots of a real run, on this rank."""
    place = mesh(pp)
    rank = place.get_local_rank("pp")
    stages = stages_of(schedule, pp, virtual, rank)
    clock = Clock(log=[])
    column = torch.zeros(1, 1, dtype=torch.long)
    batches = [Batch(column, column, torch.tensor([number]), column) for number in range(micro_batches)]

    def meta(_: Batch) -> Tensor:
        return torch.empty(1, 1, dtype=torch.float64, device="meta")

    pipeline = Pipeline(
        [Timed(stage, clock) for stage in stages], stages, pp * virtual, place.get_group("pp"), schedule,
        micro_batches, CPU, lambda batch: (meta(batch),), meta, split_backward=split_backward,
    )  # fmt: skip
    pipeline.forward_backward(batches, torch.tensor(0), lambda outputs, batch: outputs.sum())
    end = torch.tensor(clock.now)
    dist.all_reduce(end, op=dist.ReduceOp.MAX, group=place.get_group("pp"))
    kinds = [kind for kind, _, _ in clock.log]
    assert len(set(clock.log)) == len(clock.log) == 3 * micro_batches * virtual, "a pass was run twice or not at all"
    assert all(kinds.count(kind) == micro_batches * virtual for kind in "FIW")
    made = (
        pipeline._schedule._stages
        if virtual > 1 or schedule not in SINGLE_STAGE_SCHEDULES
        else [pipeline._schedule._stage]
    )
    kept = [
        info.buffer
        for stage in made
        for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values())
        for info in infos
        if info.buffer is not None
    ]
    assert len(kept) == num_boundary_buffers(schedule, pp, virtual, micro_batches, rank)
    return {"idle": int(end) - clock.working, "peak": clock.peak}


# Several tensors at a boundary


class Pair(nn.Module):
    """A stage with two tensors in and out, one of which it returns as a view and one not contiguous."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, dtype=torch.float64) if first else None
        self.left = nn.Linear(D, D, dtype=torch.float64)
        self.right = nn.Linear(D, D, dtype=torch.float64)
        self.last = last

    def forward(self, x_BTD: Tensor, y_BTD: Tensor | None = None, **_: Any) -> Any:
        if self.embed is not None:
            x_BTD = self.embed(x_BTD)
        y_BTD = x_BTD if y_BTD is None else y_BTD
        y_BTD = y_BTD + self.left(x_BTD).tanh()
        x_BTD = x_BTD + self.right(y_BTD)
        if self.last:
            return x_BTD @ y_BTD.mT
        batch, tokens, _ = x_BTD.shape
        return x_BTD.flatten(0, 1).view(batch, tokens, D), y_BTD.mT.contiguous().mT


def several(schedule: str, split_backward: bool) -> float:
    """The largest error of gradients with two tensors at each boundary."""
    place = mesh(2)
    virtual = default_virtual_stages(schedule)
    num_stages = 2 * virtual
    torch.manual_seed(11)
    whole = [Pair(s == 0, s == num_stages - 1) for s in range(num_stages)]
    stages = stages_of(schedule, 2, virtual, place.get_local_rank("pp"))
    parts = [copy.deepcopy(whole[s]) for s in stages]
    batches = batches_of(0, 0, 4, 6)

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs.tanh() ** 2).sum().view(1).squeeze()  # a view, as a loss may be one

    def two(batch: Batch) -> tuple[Tensor, ...]:
        return boundary(batch) * 2

    def square(batch: Batch) -> Tensor:
        return torch.empty(2, 6, 6, dtype=torch.float64, device="meta")

    pipeline = Pipeline(
        parts, stages, num_stages, place.get_group("pp"), schedule, 4, CPU, two, square, split_backward=split_backward
    )
    pipeline.forward_backward(batches, torch.tensor(0), loss)
    total = 0.0
    for batch in batches:
        x: Any = (batch.tokens_BT,)
        for part in whole:
            x = part(*x)
            x = x if isinstance(x, tuple) else (x,)
        loss(x[0], batch).backward()
        total += float(x[0].sum())
    outputs: list[Tensor] = []
    pipeline.forward(batches, lambda out, batch: outputs.append(out))
    worst = abs(float(sum(out.sum() for out in outputs)) - total) / abs(total) if pipeline.has_last else 0.0
    for stage, part in zip(stages, parts, strict=True):
        for mine, wanted in zip(part.parameters(), whole[stage].parameters(), strict=True):
            worst = max(worst, float((mine.grad - wanted.grad).norm() / wanted.grad.norm()))
    return worst


def wrong_calls() -> list[str]:
    """What a pipeline says to calls that cannot be right."""
    run = start(Case("1f1b", 2, 2))
    group, rank = mesh(2).get_group("pp"), mesh(2).get_local_rank("pp")
    said = []
    for call in (
        lambda: run.pipeline.forward_backward(batches_of(0, 0, 3, 4), torch.tensor(0), lambda out, batch: out.sum()),
        lambda: Pipeline(run.parts, [1 - rank], 2, group, "1f1b", 2, CPU, boundary, logits, split_backward=True),
        lambda: sum_tied_gradients(None, None, group, rank),
        lambda: stage_part(whole_model(False), range(7, 9), False, True),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said
