"""The law as a program: run a case on a layout, run the same case in one plain process, compare everything.

To extend the law, add a factor to ``FACTORS`` and its overrides to ``overrides``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from law.covering import Case
from torch import Tensor, nn

TOLERANCE = 1e-10
STEPS = 3
SEQ_LEN = 24

PIPELINES: dict[str, dict[str, Any]] = {
    "none": {"pp_schedule": "zbv"},  # how a pipeline would run says nothing where there is none
    "gpipe-2": {"pp": 2, "pp_schedule": "gpipe"},
    "1f1b-2": {"pp": 2, "pp_schedule": "1f1b", "pp_layers": [3, 2]},
    "interleaved-2": {"pp": 2, "pp_schedule": "interleaved_1f1b"},
    "zero_bubble-2": {"pp": 2, "pp_schedule": "interleaved_zero_bubble"},
    "zbv-2": {"pp": 2, "pp_schedule": "zbv"},
}
TENSORS: dict[str, dict[str, Any]] = {
    "none": {},
    "2": {"tp": 2},
    "2-whole-stream": {"tp": 2, "sequence_parallel": False},
    "4": {"tp": 4},
}
CONTEXTS: dict[str, dict[str, Any]] = {
    "none": {"cp_method": "ulysses"},
    "ring-2": {"cp": 2},
    "ulysses-2": {"cp": 2, "cp_method": "ulysses"},
}
RARE_TENSORS: dict[str, dict[str, Any]] = {
    "3": {"tp": 3},
    "3-whole-stream": {"tp": 3, "sequence_parallel": False},
}
RARE_PIPELINES: dict[str, dict[str, Any]] = {
    "1f1b-3": {"pp": 3, "pp_schedule": "1f1b"},
    "zero_bubble-3x1": {"pp": 3, "pp_schedule": "interleaved_zero_bubble", "pp_virtual_stages": 1},
    "1f1b-4": {"pp": 4, "pp_schedule": "1f1b"},
    "zero_bubble-4x1": {"pp": 4, "pp_schedule": "interleaved_zero_bubble", "pp_virtual_stages": 1},
    "zero_bubble-2-by-hand": {"pp": 2, "pp_schedule": "interleaved_zero_bubble", "pp_layers": [1, 2, 1, 1]},
    "zbv-2-by-hand": {"pp": 2, "pp_schedule": "zbv", "pp_layers": [2, 1, 1, 1]},
}
RARE_CONTEXTS: dict[str, dict[str, Any]] = {
    "ring-3": {"cp": 3},
    "ulysses-3": {"cp": 3, "cp_method": "ulysses"},
    "ring-4": {"cp": 4},
    "ulysses-4": {"cp": 4, "cp_method": "ulysses"},
    "both-4": {"cp": 4, "cp_ulysses_degree": 2},
}
RARE: dict[str, list[Any]] = {
    "dp_shard": [3],
    "dp_replicate": [3],
    "tensor": list(RARE_TENSORS),
    "pipeline": list(RARE_PIPELINES),
    "context": list(RARE_CONTEXTS),
    "accumulation": [3],
    "kv_heads": [3, 4],
}
"""Choices that meet others in random cases only: among them all that a power of two would hide."""
FACTORS: dict[str, list[Any]] = {
    "dp_shard": [1, 2, 4],
    "dp_replicate": [1, 2],
    "tensor": list(TENSORS),
    "pipeline": list(PIPELINES),
    "context": list(CONTEXTS),
    "micro_batch_size": [1, 2],
    "accumulation": [1, 2, 4],
    "recompute": ["none", "selective", "full"],
    "compile": [False, True],
    "dropout": [0.0, 0.25],
    "packed": [False, True],
    "tied": [False, True],
    "kv_heads": [1, 2, 12],
    "fused_qkv": [False, True],
    "qk_norm": [False, True],
    "window": [None, 5],
    "optim": ["adamw", "muon", "spam", "stable_spam"],
    "reshard": [None, True, False],
    "defer_sync": [False, True],
    "clip": [0.0, 0.5, 1000.0],
}
OPTIMIZERS: dict[str, list[str]] = {
    "spam": [
        "optim.betas=[0.9,0.95]",
        "optim.spike_threshold=20.0",  # β2·v after one step is g²/20: what grew is a spike
        "optim.reset_interval=2",
        "optim.warmup_steps=2",
        "optim.grace_steps=1",
        "optim.density=0.5",
    ],
    "stable_spam": ["optim.betas=[0.9,0.95]", "optim.gamma3=0.5", "optim.reset_interval=2", "optim.total_steps=2"],
}
"""Settings with which three steps are enough to clip, to reset and to rise again."""
NEUTRAL: Case = {
    "dp_shard": 1,
    "dp_replicate": 1,
    "tensor": "none",
    "pipeline": "none",
    "context": "none",
    "micro_batch_size": 2,
    "accumulation": 4,
    "recompute": "none",
    "compile": False,
    "dropout": 0.0,
    "packed": False,
    "tied": False,
    "kv_heads": 12,
    "fused_qkv": False,
    "qk_norm": False,
    "window": None,
    "optim": "adamw",
    "reshard": None,
    "defer_sync": False,
    "clip": 0.5,
}
"""Choices that go with any other."""
MODEL = {
    "vocab_size": 311,
    "hidden_size": 16,
    "intermediate_size": 36,
    "num_hidden_layers": 5,
    "num_attention_heads": 12,
    "head_dim": 4,
}
"""Sizes of which few divide evenly: 311 rows by any tp, 36 features by tp 2 × dp_shard 4, 16 of a row by 3, 5 layers by
any pp; heads by 2, 3 and 4."""
MOST_RANKS = 8
MOST_COMPILING_RANKS = 2
"""Every rank compiles for itself, which takes many times as long as a step."""


def spread(case: Case) -> dict[str, Any]:
    """The settings of ``parallel`` that say how the model is spread."""
    degrees = {"dp_shard": case["dp_shard"], "dp_replicate": case["dp_replicate"]}
    tensor = (TENSORS | RARE_TENSORS)[case["tensor"]]
    pipeline = (PIPELINES | RARE_PIPELINES)[case["pipeline"]]
    return degrees | tensor | pipeline | (CONTEXTS | RARE_CONTEXTS)[case["context"]]


def world_size(case: Case) -> int:
    """Ranks that the case runs on."""
    degrees = spread(case)
    return int(np.prod([degrees.get(axis, 1) for axis in ("dp_shard", "dp_replicate", "tp", "pp", "cp")]))


def global_batch_size(case: Case) -> int:
    """Sequences per step: follows from the case, so that micro-batch and accumulation are free factors."""
    size: int = case["dp_shard"] * case["dp_replicate"] * case["micro_batch_size"] * case["accumulation"]
    return size


def legal(case: Case) -> bool:
    """A world that fits here, and a layout that is not refused."""
    from rung.layout import Layout
    from rung.models import ModelConfig
    from rung.parallel import ParallelConfig
    from rung.parallel.legal import layout_problems

    ranks = world_size(case)
    if ranks > (MOST_COMPILING_RANKS if case["compile"] else MOST_RANKS):
        return False
    parallel = ParallelConfig(
        **spread(case),
        activation_checkpointing=case["recompute"],
        reshard_after_forward=case["reshard"],
        defer_gradient_sync=case["defer_sync"],
    )
    axes = ("dp_replicate", "dp_shard", "tp", "pp", "cp")
    layout = Layout(**{axis: getattr(parallel, axis) for axis in axes}, world_size=ranks)
    return not layout_problems(
        parallel,
        ModelConfig(**MODEL, num_key_value_heads=case["kv_heads"]),
        layout,
        seq_len=SEQ_LEN,
        num_micro_batches=case["accumulation"],
        compile=case["compile"],
        device="cpu",
        precision="float64",
    )


def overrides(case: Case, corpus: str) -> list[str]:
    """The case as the overrides a user would write."""
    return [
        "run.seed=7",
        f"train.steps={STEPS}",
        f"train.global_batch_size={global_batch_size(case)}",
        f"train.micro_batch_size={case['micro_batch_size']}",
        f"train.clip_grad_norm={case['clip']}",
        "data=corpus",
        f"data.paths=[{corpus}]",
        f"data.seq_len={SEQ_LEN}",
        f"data.document_mask={_word(case['packed'])}",
        "model=tiny",
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        f"model.num_key_value_heads={case['kv_heads']}",
        "model.initializer_range=0.2",
        f"model.dropout={case['dropout']}",
        f"model.tie_word_embeddings={_word(case['tied'])}",
        f"model.fused_qkv={_word(case['fused_qkv'])}",
        f"model.qk_norm={_word(case['qk_norm'])}",
        f"model.sliding_window={_word(case['window'])}",
        f"optim={case['optim']}",
        *OPTIMIZERS.get(case["optim"], ()),
        "optim.lr=0.01",
        "optim.weight_decay=0.1",
        "schedule=linear",
        "schedule.warmup_steps=2",
        "eval.interval=1",
        "eval.batches=1",
        *(f"parallel.{key}={_word(value)}" for key, value in spread(case).items()),
        f"parallel.activation_checkpointing={case['recompute']}",
        f"parallel.reshard_after_forward={_word(case['reshard'])}",
        f"parallel.defer_gradient_sync={_word(case['defer_sync'])}",
        f"compile={_word(case['compile'])}",
        f"precision={case.get('precision', 'float64')}",
        "device=cpu",
    ]


def _word(value: Any) -> str:
    """A value as it is written in an override."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


@dataclass
class Record:
    """What a run did, as logical values."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)
    initial: dict[str, np.ndarray] = field(default_factory=dict)
    gradients: list[dict[str, np.ndarray]] = field(default_factory=list)
    final: dict[str, np.ndarray] = field(default_factory=dict)
    events: list[dict[str, int]] = field(default_factory=list)
    """What the optimizer counted."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """After every step on part of the held-out windows, after the last on all of them."""
    problems: list[str] = field(default_factory=list)
    """What no run may do."""


class LawBrokenError(AssertionError):
    """The layout changed the answer."""


def compare(found: Record, truth: Record) -> None:
    """Raise LawBrokenError naming the first thing that differs, over all steps and at the end, in float64."""
    compare_start(found, truth)
    compare_steps(found, truth, TOLERANCE, STEPS)
    for name, value in truth.final.items():
        error = float(np.linalg.norm(found.final[name] - value))
        # Adam divides by √v, which magnifies the rounding of a gradient that is nearly zero.
        if not error <= 1e4 * TOLERANCE * float(np.linalg.norm(value)):
            raise LawBrokenError(f"{name} after {STEPS} steps: error {error:.3e}")
    for step, (mine, true) in enumerate(zip(found.evaluations, truth.evaluations, strict=True)):
        for name, true_value in true.items():
            if not abs(mine[name] - true_value) <= 1e4 * TOLERANCE * abs(true_value):
                raise LawBrokenError(f"{name} after step {step + 1}: {mine[name]!r} against {true_value!r}")

    if found.events != truth.events:
        raise LawBrokenError(f"the optimizer counts {found.events}, not {truth.events}")


def compare_start(found: Record, truth: Record) -> None:
    """What every precision promises: the same samples, and the same start bit for bit."""
    if found.problems:
        raise LawBrokenError("; ".join(found.problems[:3]))
    if found.samples != truth.samples:
        raise LawBrokenError(f"samples differ: {found.samples} against {truth.samples}")
    if found.initial.keys() != truth.initial.keys():
        raise LawBrokenError(f"names differ: {found.initial.keys() ^ truth.initial.keys()}")
    for name, value in truth.initial.items():
        if not np.array_equal(found.initial[name], value):
            raise LawBrokenError(f"initial {name} is not bit-identical")


def compare_steps(found: Record, truth: Record, tolerance: float, steps: int) -> None:
    """Loss, norm and ‖Δg‖ ≤ τ·max(‖g‖, 10⁻³·‖g_all‖) over the first ``steps`` steps."""
    for step, gradients in enumerate(truth.gradients[:steps]):
        for what, mine, true in (("loss", found.losses, truth.losses), ("norm", found.norms, truth.norms)):
            if not abs(mine[step] - true[step]) <= tolerance * abs(true[step]):
                raise LawBrokenError(f"{what} of step {step + 1}: {mine[step]!r} against {true[step]!r}")
        whole = np.sqrt(sum(float(np.sum(g**2)) for g in gradients.values()))
        for name, gradient in gradients.items():
            error = float(np.linalg.norm(found.gradients[step][name] - gradient))
            if not error <= tolerance * max(float(np.linalg.norm(gradient)), 1e-3 * whole):
                raise LawBrokenError(f"gradient of {name} at step {step + 1}: error {error:.3e}")


def ignored(sample_ids: np.ndarray, seq_len: int) -> np.ndarray:
    """Labels that count for nothing, [B, T]: unevenly many per sample, all of them in some samples."""
    positions = np.arange(seq_len)[None]
    ids = (sample_ids & ((1 << 40) - 1))[:, None]
    return ((ids * 7 + positions * 3) % 5 < ids % 4) | (ids % 6 == 2)


def perturbed(name: str, size: int) -> np.ndarray:
    """Values for a norm's weight: no two alike, so that no gradient is zero, and no error invisible, by accident."""
    return 1.0 + 0.3 * np.sin(np.arange(size) * 0.7 + len(name))


def perturb_norms(model: Any) -> None:
    """Give every vector of a spread model its ``perturbed`` values."""
    from rung.layout import local_view

    logical = model.logical_tensors()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            values = torch.from_numpy(perturbed(name, parameter.numel()))
            for box, place, _ in logical[name].pieces():
                local_view(parameter).data[place] = values[box.slices()]


class UnevenLabels:
    """A data source whose labels are ignored by ``ignored``, so that micro-batches and ranks count differently."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, sample_ids: np.ndarray) -> Any:
        batch = self._source.read(sample_ids)
        mask = torch.from_numpy(ignored(np.asarray(sample_ids), batch.tokens_BT.shape[1]))
        return dataclasses.replace(batch, labels_BT=batch.labels_BT.masked_fill(mask, -100))


class Recorder:
    """Stands where the monitor stands, and keeps what the loop says."""

    stop_requested = False

    def __init__(self) -> None:
        self.record = Record()

    def begin(self, step: int) -> None:
        del step

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        del name
        yield

    def end(
        self,
        step: int,
        batch: Any,
        lr: float,
        loss: Tensor,
        norm: Tensor,
        skipped: Tensor,
        events: dict[str, Tensor],
    ) -> None:
        del lr
        if bool(skipped):
            self.record.problems.append(f"step {step} was skipped")
        self.record.losses.append(loss.item())
        self.record.norms.append(float(norm))
        self.record.samples.append(sorted(int(i) for i in batch.sample_ids))
        if events:
            self.record.events.append({name: int(count) for name, count in events.items()})

    def evaluated(self, step: int, results: dict[str, float]) -> None:
        del step
        self.record.evaluations.append(results)


class RecordingOptimizer:
    """Keeps every logical gradient as it was summed, then lets the real optimizer step."""

    def __init__(self, optimizer: Any, parameters: list[Any], record: Record) -> None:
        self._optimizer, self._parameters, self._record = optimizer, parameters, record

    def step(self, lr: float, **kwargs: Any) -> None:
        held = {p.name: (p.logical, p.gradient()) for p in self._parameters}
        self._record.gradients.append(assembled(held, self._record.problems))
        self._optimizer.step(lr, **kwargs)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def events(self) -> Any:
        return self._optimizer.events()


def gradient(parameter: nn.Parameter) -> np.ndarray:
    """The gradient of a plain parameter; a missing one is zero."""
    return np.zeros(parameter.shape) if parameter.grad is None else whole(parameter.grad)


def whole(tensor: Tensor) -> np.ndarray:
    """The values of a plain tensor."""
    result: np.ndarray = tensor.detach().clone().numpy()
    return result


def assembled(held: dict[str, tuple[Any, Tensor]], problems: list[str]) -> dict[str, np.ndarray]:
    """Whole tensors, on rank 0, from what each rank holds: by name the logical tensor and the local values.

    Owned boxes must tile each tensor exactly once, and every copy of an element must have the bits of the owned one;
    what does not goes to ``problems``.
    """
    sent = {
        name: (
            logical.shape,
            logical.tied_to,
            [(box, owned, whole(local[place])) for box, place, owned in logical.pieces()],
        )
        for name, (logical, local) in held.items()
    }
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, sent)
    if dist.get_rank() != 0:
        return {}
    values: dict[str, np.ndarray] = {}
    times: dict[str, np.ndarray] = {}
    pieces = [(name, *entry) for entries in by_rank for name, entry in entries.items()]
    for name, shape, _, boxes in pieces:
        for box, owned, part in boxes:
            if owned:
                values.setdefault(name, np.full(shape, np.nan, part.dtype))[box.slices()] = part
                times.setdefault(name, np.zeros(shape, np.int64))[box.slices()] += 1
    for name, shape, tied_to, boxes in pieces:
        if tied_to is None and not (times.get(name, np.zeros(shape)) == 1).all():
            problems.append(f"{name}: owned boxes do not tile it exactly once")
        for box, _, part in boxes:
            if not np.array_equal(values[tied_to or name][box.slices()], part):
                problems.append(f"{name}: a copy of {box} differs from its owner's")
    return values


def parameters_of(model: Any, problems: list[str]) -> dict[str, np.ndarray]:
    """Whole parameters of a spread model, on rank 0."""
    from rung.layout import local_view

    logical = model.logical_tensors()
    return assembled({name: (logical[name], local_view(p)) for name, p in model.named_parameters()}, problems)


def run_case(case: Case, corpus: str, mutant: str | None = None, thorough: bool = False) -> Record | None:
    """Run the case on this rank's process group with the real loop; the record on rank 0."""
    from law.mutants import MUTANTS

    from rung.data import open_data
    from rung.loop import train
    from rung.parallel import World
    from rung.recipes.pretrain import assemble

    # Composed once: Hydra takes as long as two steps.
    size = dist.get_world_size()
    composed = [composed_once(tuple(overrides(case, corpus)), size) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(composed)
    config, layout = copy.deepcopy(composed[0])
    world = World(dist.get_rank(), dist.get_rank(), size, torch.device("cpu"))
    recorder = Recorder()
    torch._dynamo.reset()  # one process runs more models here than a run ever has
    with MUTANTS[mutant]() if mutant else contextlib.nullcontext(), compiler(case, everywhere=thorough):
        run = assemble(config, layout, world, UnevenLabels(open_data(config.data, config.run.seed)), recorder)
        recorder.record.initial = parameters_of(run.model, recorder.record.problems)
        perturb_norms(run.model)
        run.optimizer = RecordingOptimizer(run.optimizer, run.parameters, recorder.record)
        train(run)
        recorder.record.final = parameters_of(run.model, recorder.record.problems)
    return recorder.record if dist.get_rank() == 0 else None


@functools.cache
def composed_once(settings: tuple[str, ...], world_size: int) -> Any:
    """The configuration and the layout: a mutant has those of the case that it breaks."""
    from rung.recipes.config import load_config

    return load_config(settings, world_size)


def compiler(case: Case, *, everywhere: bool) -> contextlib.AbstractContextManager[Any]:
    """inductor where only the data is spread, or ``everywhere``; elsewhere the same graphs without code generation,
    which takes a minute when ranks generate C++ side by side."""
    if everywhere or {case["tensor"], case["pipeline"], case["context"]} == {"none"}:
        return contextlib.nullcontext()
    return mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def one_process(case: Case, corpus: str) -> Record:
    """The same case with nothing but the model, autograd and the optimizer: nothing is spread, and no loop of ours.

    Samples are cut from the token file here, the batch is one batch, the loss one sum over one count.
    """
    from rung.data import Corpus, open_data
    from rung.layout import LogicalTensor
    from rung.models import build
    from rung.optim import LocalParameter, build_optimizer, lr_at
    from rung.parallel import dtypes
    from rung.random import name_key, normals_numpy
    from rung.recipes.config import load_config

    size = global_batch_size(case)
    plain = {**case, "dp_shard": 1, "dp_replicate": 1, "micro_batch_size": size, "accumulation": 1}
    plain |= {"tensor": "none", "pipeline": "none", "context": "none"}
    plain |= {"recompute": "none", "compile": False, "reshard": None, "defer_sync": False}
    config, _ = load_config(overrides(plain, corpus), 1)
    model = build(config.model, draws_seed=config.run.seed).to(dtypes(config.precision).parameters)
    rules = model.init_rules()
    record = Record()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if rules[name].kind == "ones":
                parameter.fill_(1.0)
            else:
                values = normals_numpy(name_key(config.run.seed, f"init/{name}"), 0, parameter.numel())
                parameter.copy_(torch.from_numpy(values * rules[name].std).view(parameter.shape))
        record.initial = {name: whole(p) for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.from_numpy(perturbed(name, parameter.numel())))
    locals_ = [
        LocalParameter(name, p.detach(), LogicalTensor.from_tensor(name, p.detach()), None)
        for name, p in model.named_parameters()
    ]
    optimizer = build_optimizer(config.optim, locals_, seed=config.run.seed)
    order = open_data(config.data, config.run.seed)
    token_bytes = order.token_bytes.tolist()
    folder = Corpus(Path(corpus))
    for step in range(1, STEPS + 1):
        ids = order.sample_ids(size * (step - 1), size)
        batch, labels = cut(folder.train.dataset, ids & ((1 << 40) - 1), ids, case["packed"])
        labels[torch.from_numpy(ignored(ids, SEQ_LEN))] = -100
        loss = nll(model(**batch, step=torch.tensor(step)), labels) / max(1, int((labels != -100).sum()))
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))  # type: ignore[union-attr, arg-type]
        record.losses.append(loss.item())
        record.norms.append(float(norm))
        record.samples.append(sorted(int(i) for i in ids))
        record.gradients.append({name: gradient(p) for name, p in model.named_parameters()})
        for local, parameter in zip(locals_, model.parameters(), strict=True):
            local.local.grad = parameter.grad
        scale = torch.clamp(norm / case["clip"], min=1.0) if case["clip"] else None
        lr = lr_at(config.schedule, step, STEPS, config.optim.lr)
        optimizer.step(lr, grad_scale=scale, skip=torch.zeros((), dtype=torch.float64))
        if events := optimizer.events():
            record.events.append({"spikes": int(events.spikes), "optimizer_resets": int(events.resets)})
        model.zero_grad()
        windows = size if step < STEPS else None
        record.evaluations.append(evaluate_plainly(model, folder.valid.dataset, token_bytes, case["packed"], windows))
    record.final = {name: whole(p) for name, p in model.named_parameters()}
    return record


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy as torch computes it."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def cut(tokens: Any, windows: np.ndarray, sample_ids: np.ndarray, packed: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Windows of SEQ_LEN tokens and their labels, straight from the token stream."""
    stream = torch.from_numpy(np.asarray(tokens.tokens(0, tokens.num_tokens)).astype(np.int64))
    documents = torch.from_numpy(np.repeat(np.arange(tokens.num_documents), tokens.document_lengths()))
    inputs, labels, ids = [], [], []
    for window in windows:
        first, last = SEQ_LEN * window, SEQ_LEN * (window + 1)
        inputs.append(stream[first:last])
        labels.append(stream[first + 1 : last + 1])
        ids.append(documents[first:last])
    fields = {
        "tokens_BT": torch.stack(inputs),
        "sample_ids_B": torch.from_numpy(np.asarray(sample_ids)),
        "positions_BT": torch.arange(SEQ_LEN).expand(len(inputs), SEQ_LEN),
    }
    return fields | ({"document_ids_BT": torch.stack(ids)} if packed else {}), torch.stack(labels)


def evaluate_plainly(
    model: nn.Module, valid: Any, lengths: list[int], packed: bool, windows: int | None
) -> dict[str, float]:
    """Held-out loss and bits per byte, one window at a time, the short last window at its own length.

    ``windows`` of them, evenly spread, or all.
    """
    stream = torch.from_numpy(np.asarray(valid.tokens(0, valid.num_tokens)).astype(np.int64))
    documents = torch.from_numpy(np.repeat(np.arange(valid.num_documents), valid.document_lengths()))
    total, count, size = 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        starts = range(0, len(stream) - 1, SEQ_LEN)
        number = min(windows or len(starts), len(starts))
        for start in [starts[index * len(starts) // number] for index in range(number)]:
            part = stream[start : start + SEQ_LEN + 1]
            fields = {"tokens_BT": part[None, :-1]} | (
                {"document_ids_BT": documents[None, start : start + len(part) - 1]} if packed else {}
            )
            total += float(nll(model(**fields), part[None, 1:]))
            count += len(part) - 1
            size += int(sum(lengths[int(token)] for token in part[1:]))
    model.train()
    return {"eval_loss": total / count, "bits_per_byte": total / np.log(2) / size}
