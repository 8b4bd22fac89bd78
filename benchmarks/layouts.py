"""What each way of spreading a model costs: step time, bytes, balance of the ring, start-up.

    python benchmarks/layouts.py            # on the CPU, over gloo
    python benchmarks/layouts.py --gpu      # on one GPU: see layout_gpu.py

Step time of a layout on N ranks is held against a plain run of the work that one rank has: one process with 1/N of the
sequences (data and context parallelism: a context rank has 1/N of the tokens and of the visible pairs of every
sequence), with 1/N of the heads, of the feed-forward and of the vocabulary (tensor parallelism), or with 1/N of the
layers and of the vocabulary (pipelines: the mean of the ranks). Every rank and every plain process has one thread, all
take turns (see measuring.py), and ratios are made within a round. N plain processes side by side, which do not know of
each other, tell what the machine makes of N busy cores from what spreading costs. Data ranks that shard update 1/N of
the parameters, the plain process all of them. Sampled once: what the ranks send in a step, over the least that the axis
must send by the formulas in ``least_bytes``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import contenders
import numpy as np
from layout_ranks import LISTENED_STEP, Spec
from measuring import (
    RESULTS,
    Contest,
    Program,
    Ticks,
    Turn,
    commit,
    interleave,
    machine,
    print_table,
    spread,
    wait_for_quiet,
    write,
)
from overhead import loss_difference, ratio

if TYPE_CHECKING:
    from rung.layout.context import Zigzag
    from rung.recipes.config import Config

HERE = Path(__file__).resolve().parent
PARTS = ("steps", "bytes", "ring", "startup")
MICRO_BATCHES = 4
"""Of a pipeline, in a step."""


@dataclass(frozen=True)
class Size:
    """A model and a batch."""

    model: tuple[str, ...]
    sequences: int
    seq_len: int
    steps: int
    """Of a turn."""


SIZES = {
    "tiny": Size(("model=tiny",), 8, 32, 20),
    "small": Size(
        (
            "model=tiny",
            "model.hidden_size=256",
            "model.intermediate_size=768",
            "model.num_hidden_layers=8",
            "model.num_attention_heads=8",
        ),
        8,
        256,
        2,
    ),
}
TOY = Size(("model=tiny", "model.vocab_size=256", "model.hidden_size=32"), 4, 16, 1)


@dataclass(frozen=True)
class Case:
    """A layout; ``{n}`` is the number of ranks."""

    settings: tuple[str, ...]
    share: str
    """What of the work a rank has: the name of a plain run."""


CASES = {
    "dp_shard": Case(("dp_shard={n}",), "sequences"),
    "dp_shard, kept": Case(("dp_shard={n}", "reshard_after_forward=false"), "sequences"),
    "dp_replicate": Case(("dp_replicate={n}",), "sequences"),
    "ring": Case(("cp={n}",), "sequences"),
    "ulysses": Case(("cp={n}", "cp_method=ulysses"), "sequences"),
    "tp": Case(("tp={n}",), "width"),
    "tp, whole stream": Case(("tp={n}", "sequence_parallel=false"), "width"),
    "1f1b": Case(("pp={n}",), "layers"),
    "zbv": Case(("pp={n}", "pp_schedule=zbv"), "layers"),
}
SHARES = ("sequences", "width", "layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="what one GPU can tell, instead of all else")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=tuple(CASES), help="layouts")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the step times")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=tuple(SIZES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--start-ranks", type=int, default=8, help="ranks of the start-up")
    parser.add_argument("--starts", type=int, default=5, help="how often the start-up is measured")
    parser.add_argument(
        "--max-disturbance", type=float, default=0.1, help="share of the processors others may have in a counted round"
    )
    parser.add_argument("--patience", type=float, default=20, help="minutes to wait in all for others to be quiet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="with --gpu; cpu only with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a toy size that shows only that the script works")
    parser.add_argument("--output", help="JSON file; default: in benchmarks/results/, with --tiny the terminal")
    args = parser.parse_args()
    if args.gpu:
        import layout_gpu

        layout_gpu.main(args)
        return
    if args.tiny:
        args.rounds, args.start_ranks, args.starts, args.max_disturbance, args.patience = 1, 2, 1, 1.0, 0
        args.sizes = ("toy",)
    elif not args.output and (tuple(args.parts), tuple(args.cases)) == (PARTS, tuple(CASES)):
        args.output = RESULTS / "layouts.json"
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    _show(result)
    write(result, args.output)
    if errors := _errors(result):
        sys.exit("\n".join(errors))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All parts, one after another."""
    facts = machine() | {"threads": 1}
    result: dict[str, Any] = {
        "benchmark": "layouts",
        "tiny": args.tiny,
        "commit": commit(),
        "machine": facts,
        "settings": {
            "ranks": args.ranks,
            "oversubscribed": args.ranks > facts["cores"],
            "pipeline_micro_batches": MICRO_BATCHES,
            "precision": "float32",
            "optimizer": "adamw",
            "seed": args.seed,
            "max_disturbance": args.max_disturbance,
        },
    }
    if "steps" in args.parts:
        result["steps"] = {name: step_times(name, args, folder / name) for name in args.sizes}
    if "bytes" in args.parts:
        result["bytes"] = {
            str(ranks): traffic(ranks, args, folder / f"bytes_{ranks}") for ranks in ((2,) if args.tiny else (2, 4))
        }
    if "ring" in args.parts:
        result["ring"] = ring_balance(args.seed, (1024,) if args.tiny else (8192, 65536))
    if "startup" in args.parts:
        result["startup"] = start_up(args, folder)
    return result


# --- step times


def size_of(name: str) -> Size:
    return TOY if name == "toy" else SIZES[name]


def step_times(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every layout and the plain runs of its share, a contest for each kind of share."""
    size = size_of(name)
    rows: dict[str, dict[str, Any]] = {}
    plain: dict[str, dict[str, Any]] = {}
    disturbance: list[float] = []
    left_out, counted = 0, args.rounds
    losses: dict[str, list[Turn]] = {}
    for share in SHARES:
        cases = [case for case in args.cases if CASES[case].share == share]
        if not cases:
            continue
        prepared = Prepared(size, args.ranks, args.seed, folder / share, rounds=args.rounds)
        programs = [prepared.program(case) for case in cases]
        programs += [prepared.plain(share, copies) for copies in (1, args.ranks)]
        contest = prepared.compete(programs, args)
        turns = contest.turns
        one, beside = (f"{share}/{copies}" for copies in (1, args.ranks))
        plain[share] = {
            "one": _seconds(turns[one], size.steps),
            "side_by_side": _seconds(turns[beside], size.steps),
            "errors": [program.error for program in programs[-2:] if program.error],
        }
        for program in programs[:-2]:
            case = program.name
            row: dict[str, Any] = {"error": program.error, "share": share}
            if turns[case] and turns[one] and turns[beside]:
                row |= {
                    "seconds": _seconds(turns[case], size.steps),
                    "over_one": ratio(turns, one, case),
                    "over_side_by_side": ratio(turns, beside, case),
                    "expected": prepared.expected(case),
                    "loss": turns[case][-1].loss,
                }
            rows[case] = row
            losses[case] = turns[case]
        disturbance += [turn.disturbance for these in turns.values() for turn in these]
        left_out += max(len(these) for these in contest.disturbed.values())
        counted = min(counted, max(len(these) for these in turns.values()))
    return {
        "model": list(size.model),
        "parameters": Prepared(size, args.ranks, args.seed, folder / "all", rounds=0).num_parameters(),
        "sequences": size.sequences,
        "seq_len": size.seq_len,
        "steps_per_turn": size.steps,
        "rounds": counted,
        "rows": rows,
        "plain": plain,
        "relative_loss_difference": loss_difference(losses),
        "disturbed_rounds": {"number": left_out},
        "disturbance": spread(disturbance or [0.0]),
    }


def _seconds(turns: Sequence[Turn], steps: int) -> dict[str, Any] | None:
    """Of one step."""
    return spread([turn.seconds / steps for turn in turns]) if turns else None


class Prepared:
    """A corpus and settings for one size, and the programs that run on them."""

    def __init__(self, size: Size, ranks: int, seed: int, folder: Path, *, rounds: int) -> None:
        from rung.recipes.config import load_config

        folder.mkdir(parents=True)
        self.size, self.ranks, self.folder = size, ranks, folder
        self.warmup = max(LISTENED_STEP, size.steps)
        self._common = [
            *size.model,
            f"model.max_position_embeddings={size.seq_len}",
            f"data.seq_len={size.seq_len}",
            f"train.steps={self.warmup + 2 * rounds * size.steps + 1}",
            "train.first_timeout_seconds=7200",
            "train.timeout_seconds=7200",
            f"run.seed={seed}",
            "device=cpu",
        ]
        self.whole, _ = load_config(self._overrides([], size.sequences, 1), 1)
        whole = self.whole.model.vocab_size
        for name, vocabulary in (("whole", whole), (str(whole // ranks), whole // ranks)):
            # Some hundred windows, over and over.
            contenders.write_corpus(folder / f"corpus_{name}", vocabulary, 256 * size.seq_len + 1, seed)

    def _overrides(self, settings: Sequence[str], sequences: int, micro_batch: int, vocabulary: int = 0) -> list[str]:
        corpus = self.folder / f"corpus_{vocabulary or 'whole'}"
        sizes = [f"train.global_batch_size={sequences}", f"train.micro_batch_size={micro_batch}"]
        return contenders.overrides(corpus, self.folder / "run", [*self._common, *sizes, *settings])

    def num_parameters(self) -> int:
        from rung.models import num_parameters

        return num_parameters(self.whole.model)

    def settings(self, case: str) -> list[str]:
        """Overrides of a layout; the whole share of a rank is one micro-batch, but in a pipeline."""
        layout = [f"parallel.{setting.format(n=self.ranks)}" for setting in CASES[case].settings]
        sequences = self.size.sequences
        micro = {"sequences": sequences // self.ranks, "width": sequences, "layers": sequences // MICRO_BATCHES}
        if case in ("ring", "ulysses"):
            micro["sequences"] = sequences
        return self._overrides(layout, sequences, micro[CASES[case].share])

    def program(self, case: str) -> Program:
        return self._program(case, self.settings(case), self.ranks, apart=False)

    def plain(self, share: str, copies: int) -> Program:
        """What one rank has to do, as a run by itself."""
        model, n, sequences = self.whole.model, self.ranks, self.size.sequences
        vocabulary = model.vocab_size // n
        if share == "sequences":
            overrides = self._overrides([], sequences // n, sequences // n)
        elif share == "width":
            narrow = [
                f"model.num_attention_heads={model.num_attention_heads // n}",
                f"model.num_key_value_heads={max(1, model.num_key_value_heads // n)}",
                f"model.head_dim={model.head_dim}",
                f"model.intermediate_size={model.intermediate_size // n}",
                f"model.vocab_size={vocabulary}",
            ]
            overrides = self._overrides(narrow, sequences, sequences, vocabulary)
        else:
            shallow = [f"model.num_hidden_layers={model.num_hidden_layers // n}", f"model.vocab_size={vocabulary}"]
            overrides = self._overrides(shallow, sequences, sequences // MICRO_BATCHES, vocabulary)
        return self._program(f"{share}/{copies}", overrides, copies, apart=True)

    def listener(self, cases: Sequence[str]) -> Program:
        """Two steps of each layout in turn, in the same processes; ``facts`` then has what they sent."""
        self.facts = self.folder / "facts.json"
        runs = [[*self.settings(case), f"train.steps={LISTENED_STEP}"] for case in cases]
        spec = Spec(runs, self.ranks, False, LISTENED_STEP, 1, str(self.facts))
        argv = [sys.executable, str(HERE / "layout_ranks.py"), spec.save(self.folder / "listener.json")]
        return Program("listener", argv, {"OMP_NUM_THREADS": "1"}, self.folder / "listener.log")

    def _program(self, name: str, overrides: list[str], ranks: int, *, apart: bool) -> Program:
        stem = name.replace("/", "_").replace(", ", "_").replace(" ", "_")
        spec = Spec(
            runs=[overrides],
            ranks=ranks,
            apart=apart,
            warmup=self.warmup,
            steps=self.size.steps,
            facts=str(self.folder / f"{stem}_facts.json"),
        )
        argv = [sys.executable, str(HERE / "layout_ranks.py"), spec.save(self.folder / f"{stem}.json")]
        return Program(name, argv, {"OMP_NUM_THREADS": "1"}, self.folder / f"{stem}.log")

    def compete(self, programs: Sequence[Program], args: argparse.Namespace) -> Contest:
        return interleave(
            programs,
            rounds=args.rounds,
            attempts=2 * args.rounds,
            steps=self.size.steps,
            warmup_steps=self.warmup,
            max_disturbance=args.max_disturbance,
            patience_seconds=60 * args.patience,
            together=args.tiny,
        )

    def expected(self, case: str) -> float:
        """What the ratio would be if nothing cost anything: of a pipeline, its busiest rank and its bubble."""
        from rung.cli.doctor_layout import report_of
        from rung.recipes.config import load_config

        report = report_of(*load_config(self.settings(case), self.ranks))
        return report.flops_balance / (1 - report.bubble_share)


# --- bytes


def traffic(ranks: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What all ranks together sent in one step of each layout, and the least that they had to."""
    from rung.recipes.config import load_config

    size = size_of("toy" if args.tiny else "tiny")
    deep = Size((*size.model, "model.num_hidden_layers=8"), 8, size.seq_len, 1)  # the V of four ranks has eight stages
    prepared = Prepared(deep, ranks, args.seed, folder, rounds=0)
    program = prepared.listener(args.cases)
    contest = interleave(
        [program], rounds=0, attempts=0, steps=1, warmup_steps=LISTENED_STEP * len(args.cases), max_disturbance=1.0
    )
    assert not any(contest.turns.values())
    rows: dict[str, Any] = {}
    facts = json.loads(prepared.facts.read_text())["sent"] if prepared.facts.exists() else []
    for case, by_rank in zip(args.cases, facts, strict=False):
        config, _ = load_config(prepared.settings(case), ranks)
        least = least_bytes(config, case, ranks)
        sent: dict[str, int] = {}
        for rank in by_rank:
            for op, _axes, _messages, num_bytes in rank:
                sent[op] = sent.get(op, 0) + num_bytes
        rows[case] = {"sent": sent, "least": least, "ratio": sum(sent.values()) / sum(least.values())}
    rows = {case: rows.get(case, {}) | {"error": None if case in rows else program.error} for case in args.cases}
    return {"model": list(deep.model), "sequences": deep.sequences, "seq_len": deep.seq_len, "rows": rows}


def least_bytes(config: Config, case: str, n: int) -> dict[str, int]:
    """The least that n ranks together send in a step of one micro-batch a rank (of a pipeline: several).

    Each collective at its bound: all-gather and reduce-scatter of x bytes make n ranks send (n - 1) x, an all-reduce
    2 (n - 1) x, an all-to-all of x on each rank (n - 1) x (Patarasuk and Yuan 2009).

    - data: parameters are gathered for the forward pass and, but for the last layer and what is outside of layers, once
      more for the backward pass, since they are freed between (kept: once); gradients are reduced and scattered once.
      Copies: gradients are all-reduced once.
    - tensor: 4 gathers or scatters of the residual stream in a layer's forward pass and 4 in its backward pass
      (Megatron with sequence parallelism; without, 2 and 2 all-reduces: the same bytes), and 2 each for embedding and
      head.
    - pipeline: activations cross every boundary between stages of different ranks once, their gradients once back.
    - context: parameters as in data; keys and values go round twice, their gradients once in float32 (ring); or
      queries, keys, values and outputs are exchanged, and their gradients back (ulysses).
    """
    from rung.models import num_parameters

    model, size = config.model, 4
    h, layers = model.hidden_size, model.num_hidden_layers
    keys, queries = model.num_key_value_heads * model.head_dim, model.num_attention_heads * model.head_dim
    tokens = config.train.global_batch_size * config.data.seq_len
    total = num_parameters(model)
    layer = h * (2 * queries + 2 * keys) + 3 * h * model.intermediate_size + 2 * h
    freed = 0 if case == "dp_shard, kept" else (layers - 1) * layer
    data = {"parameters": (n - 1) * (total + freed) * size, "gradients": (n - 1) * total * size}
    stream = tokens * h * size
    if case == "dp_replicate":
        return {"gradients": 2 * (n - 1) * total * size}
    if case.startswith("dp_shard"):
        return data
    if case.startswith("tp"):
        return {"residual stream": (n - 1) * stream * (8 * layers + 4)}
    if case == "ring":
        pair = 2 * (n - 1) * tokens * keys * layers
        return data | {"keys and values": 2 * pair * size, "their gradients": pair * 4}
    if case == "ulysses":
        return data | {"heads for tokens": 2 * (2 * queries + 2 * keys) * tokens * (n - 1) // n * layers * size}
    crossings = 2 * (n - 1) if case == "zbv" else n - 1
    return {"activations": crossings * stream, "their gradients": crossings * stream}


# --- balance of the ring


def document_mixes(seq_len: int, seed: int) -> dict[str, list[int] | None]:
    """Ways to fill a window with documents, by name; None: attention crosses documents."""
    generator = np.random.default_rng(seed)

    def lengths(draw: Any) -> list[int]:
        found: list[int] = []
        while sum(found) < seq_len:
            found.append(max(1, int(draw())))
        found[-1] -= sum(found) - seq_len
        return found

    return {
        "one document": None,
        "a half and two quarters": [seq_len // 2, seq_len // 4, seq_len - seq_len // 2 - seq_len // 4],
        "eight alike": [seq_len // 8] * 8,
        "exponential, mean a quarter": lengths(lambda: generator.exponential(seq_len / 4)),
        "log-normal, median 350, as Wikipedia": lengths(lambda: generator.lognormal(np.log(350), 1.45)),
    }


def ring_balance(seed: int, seq_lens: Sequence[int]) -> list[dict[str, Any]]:
    """Work of the busiest rank over the mean, step by step of the ring, zigzag and contiguous.

    ``computed`` counts the pairs that a kernel spends its time on, ``visible`` those that see each other.
    """
    from rung.layout.context import Zigzag

    rows = []
    for seq_len in seq_lens:
        for ranks in (2, 4, 8):
            for mix, documents in document_mixes(seq_len, seed).items():
                zigzag = Zigzag(seq_len, ranks)
                visible = zigzag.work(None, documents)
                rows.append(
                    {
                        "seq_len": seq_len,
                        "ranks": ranks,
                        "documents": mix,
                        "number": len(documents or [0]),
                        "computed": balance(zigzag.computed(None, documents is not None)),
                        "visible": balance(visible),
                        "contiguous_visible": balance(contiguous(zigzag, documents)),
                        "computed_over_visible": float(
                            zigzag.computed(None, documents is not None).sum() / visible.sum()
                        ),
                    }
                )
    return rows


def balance(work: np.ndarray) -> float:
    """[ranks, steps]: ranks meet in every step, so the busiest in each makes the time."""
    return float(work.max(axis=0).sum() / work.mean(axis=0).sum())


def contiguous(zigzag: Zigzag, documents: Sequence[int] | None) -> np.ndarray:
    """Visible pairs [ranks, steps] if each rank had one piece of the window, in order."""
    ranks, width = zigzag.ranks, zigzag.seq_len // zigzag.ranks
    lengths = [zigzag.seq_len] if documents is None else documents
    first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    queries = np.arange(zigzag.seq_len)
    counts = np.zeros((ranks, ranks), dtype=np.int64)
    for source in range(ranks):
        seen = np.minimum(queries + 1, (source + 1) * width) - np.maximum(first, source * width)
        by_rank = np.maximum(seen, 0).reshape(ranks, width).sum(axis=1)
        for rank in range(ranks):
            counts[rank, (rank - source) % ranks] = by_rank[rank]
    return counts


# --- start-up


def start_up(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds from `rung launch local` to the first line of metrics.jsonl, which is written when a step is done."""
    n = args.start_ranks
    layouts = {
        "all axes": [f"parallel.{axis}=2" for axis in ("tp", "pp", "cp")] if n == 8 else [f"parallel.tp={n}"],
        "dp_shard": [f"parallel.dp_shard={n}"],
    }
    if args.tiny:
        del layouts["dp_shard"]
    contenders.write_corpus(folder / "start", 4096, 64 * 64 + 1, args.seed)
    counted: dict[str, list[float]] = {name: [] for name in layouts}
    disturbance: list[float] = []
    left_out, patience = 0, 60 * args.patience
    for attempt in range(2 * args.starts + 1):
        patience -= wait_for_quiet(args.max_disturbance, patience)
        times, worst = {}, 0.0
        for name, layout in layouts.items():
            sizes = ["model=tiny", "data.seq_len=64", "train.steps=1", f"train.global_batch_size={2 * n}"]
            more = ["train.micro_batch_size=1", "eval.final_batches=1", "export.huggingface=false", "device=cpu"]
            run = folder / f"start_{attempt}_{name.replace(' ', '_')}"
            overrides = contenders.overrides(folder / "start", run, [*sizes, *more, *layout])
            times[name], others = _start(n, overrides, run)
            worst = max(worst, others)
        if attempt == 0 and not args.tiny:
            continue  # fills the disk cache
        if worst <= args.max_disturbance:
            disturbance.append(worst)
            for name, seconds in times.items():
                counted[name].append(seconds)
            if len(disturbance) == args.starts:
                break
        else:
            left_out += 1
    return {
        "ranks": n,
        "rounds": len(disturbance),
        "layouts": layouts,
        "seconds": {name: spread(seconds) if seconds else None for name, seconds in counted.items()},
        "disturbed_rounds": {"number": left_out},
        "disturbance": spread(disturbance or [1.0]),
    }


def _start(ranks: int, overrides: Sequence[str], run: Path) -> tuple[float, float]:
    """Seconds to the first finished step, and what share of the processors others had meanwhile."""
    command = [sys.executable, "-m", "rung", "launch", "local", "--nproc", str(ranks), "--", *overrides]
    metrics, log = run / "metrics.jsonl", run.with_suffix(".log")
    before, started = Ticks.now([]), time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.perf_counter() - started > 600:
                raise RuntimeError("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
            time.sleep(0.01)
        seconds, after = time.perf_counter() - started, Ticks.now([process.pid])
        process.wait(120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return seconds, after.disturbance_since(before)


# --- what a person sees


def _show(result: Mapping[str, Any]) -> None:
    for size, part in result.get("steps", {}).items():
        rows = [
            (
                name,
                f"{1000 * row['seconds']['median']:.1f}",
                *(f"{row[key]['median']:.2f} ({row[key]['min']:.2f} to {row[key]['max']:.2f})" for key in OVER),
                f"{row['expected']:.2f}",
            )
            for name, row in part["rows"].items()
            if "seconds" in row
        ]
        print_table((size, "ms a step", "÷ one process", "÷ processes side by side", "expected"), rows)
        print(f"largest relative difference between losses: {part['relative_loss_difference']:.1e}")
    for ranks, part in result.get("bytes", {}).items():
        sums = {name: sum(row["sent"].values()) for name, row in part["rows"].items() if "sent" in row}
        rows = [(name, total, f"{part['rows'][name]['ratio']:.4f}") for name, total in sums.items()]
        print_table((f"{ranks} ranks", "bytes sent", "÷ least"), rows)
    if ring := result.get("ring", []):
        cells = [[f"{cell:.3f}" if isinstance(cell, float) else cell for cell in row.values()] for row in ring]
        print_table(tuple(ring[0]), cells)
    for name, seconds in result.get("startup", {}).get("seconds", {}).items():
        if seconds:
            print(f"{result['startup']['ranks']} ranks, {name}: first step after {seconds['median']:.1f} s")


OVER = ("over_one", "over_side_by_side")


def _errors(result: Mapping[str, Any]) -> list[str]:
    tables = [*result.get("steps", {}).values(), *result.get("bytes", {}).values()]
    found = [f"{name}: {row['error']}" for table in tables for name, row in table["rows"].items() if row["error"]]
    for table in result.get("steps", {}).values():
        found += [error for plain in table["plain"].values() for error in plain["errors"]]
    return found


if __name__ == "__main__":
    main()
