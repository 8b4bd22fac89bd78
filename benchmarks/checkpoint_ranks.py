"""What a rank of checkpoint.py does: it holds a state spread as FSDP spreads it, and saves and loads it in every way.

Started as ``checkpoint_ranks.py SPEC``, a JSON file, with the environment that torchrun sets. Rank 0 writes what was
measured into the file that the spec names. Every figure of a turn is that of the slowest rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from measuring import Ticks, wait_for_quiet
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Along

from rung.checkpoint import CheckpointConfig, Checkpointer, Reader, load_state, open_storage
from rung.layout import LogicalTensor
from rung.layout.logical import Shard
from rung.optim import StateTensor
from rung.parallel import World

STEP_SECONDS = 0.02
"""Of the stand-in for training, about."""
SIDE = 512
"""Of the matrices that it multiplies."""


@dataclass
class Spec:
    """What the ranks measure."""

    part: str
    """saves or steps."""
    model: list[int]
    """hidden size, inner size, layers, vocabulary of the Llama whose state it is."""
    folder: str
    """A folder on the disk in question, empty."""
    facts: str
    """JSON file that rank 0 writes."""
    stand_in_steps: int
    """Between save and join."""
    rounds: int
    seconds: float
    """No round begins that would probably end later."""
    max_disturbance: float
    patience_seconds: float
    with_process: bool
    """Whether DCP's process takes part: it takes long to start."""
    fewer: dict[str, str]
    """Checkpoints of the same state that fewer ranks wrote, by who wrote them; may be empty."""

    def save(self, path: Path) -> str:
        path.write_text(json.dumps(asdict(self)))
        return str(path)


# --- the state


def shapes_of(model: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Parameters of a Llama, by name."""
    hidden, inner, layers, vocabulary = model
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocabulary, hidden), "norm.weight": (hidden,)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.{name}_norm.weight": (hidden,) for name in ("attention", "mlp")}
        shapes |= {f"layers.{layer}.attention.{name}.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"layers.{layer}.mlp.{name}.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"layers.{layer}.mlp.down.weight"] = (hidden, inner)
    return shapes


def state_bytes(model: Sequence[int]) -> int:
    """Of parameters and both moments in float32."""
    return sum(12 * torch.Size(shape).numel() for shape in shapes_of(model).values())


@dataclass
class State:
    """Parameters and moments as one rank holds them: the same memory for everybody who saves or loads it."""

    rung: dict[str, StateTensor]
    dcp: dict[str, Any]
    """DTensors."""

    @classmethod
    def of(cls, model: Sequence[int], world: World, dim: int, *, filled: bool, device: str = "cpu") -> State:
        """dim: along which matrices are split; vectors along their only one."""
        mesh = init_device_mesh(device, (world.size,)) if dist.is_initialized() else None
        rung, dtensors = {}, {}
        for number, (name, shape) in enumerate(shapes_of(model).items()):
            along = min(dim, len(shape) - 1)
            for kind, suffix in enumerate(("", "/exp_avg", "/exp_avg_sq")):
                full = name + suffix
                logical = LogicalTensor.from_spec(
                    full, shape, torch.float32, {"dp": Shard(along)}, {"dp": world.size}, {"dp": world.rank}
                )
                local = torch.zeros(logical.local_shape, device=device)
                if filled:
                    generator = torch.Generator(device).manual_seed(3 * number + kind + 10_000 * world.rank)
                    local.normal_(generator=generator)
                rung[full] = StateTensor(local, logical)
                if mesh is not None:
                    strides = (*[torch.Size(shape[place + 1 :]).numel() for place in range(len(shape))],)
                    dtensors[full] = DTensor.from_local(local, mesh, [Along(along)], shape=shape, stride=strides)
        return cls(rung, dtensors)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor, _ in self.rung.values()]

    @property
    def local_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def sums(self) -> dict[str, float]:
        """A number for each whole tensor, whichever way it is split: of its bits."""
        totals = torch.stack([tensor.view(torch.int32).sum(dtype=torch.int64) for tensor in self.tensors])
        if dist.is_initialized():
            dist.all_reduce(totals)
        return dict(zip(self.rung, totals.tolist(), strict=True))


# --- ways to save


class Rung:
    """Rung's checkpointer, called as the training loop calls it."""

    def __init__(self, world: World, state: State, folder: str, *, async_: bool) -> None:
        config = CheckpointConfig(interval=0, keep=0, async_=async_, dir=folder)
        self.checkpointer = Checkpointer(config, world, state.rung, run_config={}, fingerprints={}, saved_step=0)
        self._main, self._folder, self.is_async = world.is_main, folder, async_
        self._step = self._committed = 0

    def begin(self) -> None:
        self._step += 1
        self.checkpointer.save({"step": self._step, "consumed_samples": 0})

    def join(self) -> None:
        self.checkpointer.join()

    def done(self) -> bool:
        """Rank 0 knows."""
        for report in self.checkpointer.poll():
            if report.error:
                raise RuntimeError(report.error)
            self._committed = report.step
        return not self._main or self._committed == self._step

    def where(self) -> str:
        return f"{self._folder}/step-{self._step:08d}"


class Dcp:
    """torch.distributed.checkpoint with its defaults; stagers are kept from save to save, as torchtitan keeps them."""

    def __init__(self, world: World, state: State, folder: str, kind: AsyncCheckpointerType | None) -> None:
        self._state, self._folder, self._kind, self._number = state.dcp, folder, kind, 0
        self.is_async = kind is not None
        self._group = dist.new_group(backend="gloo") if kind else None
        shared = kind == AsyncCheckpointerType.PROCESS
        self._stager = DefaultStager(StagingOptions(False, shared, False, False)) if kind else None
        self._future: Any = None

    def begin(self) -> None:
        self._number += 1
        if self._kind is None:
            dcp.save(self._state, checkpoint_id=self.where())
            return
        self._future = dcp.async_save(
            self._state,
            checkpoint_id=self.where(),
            process_group=self._group,
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )

    def join(self) -> None:
        pass  # it has copied before it returned

    def done(self) -> bool:
        return bool(self._future.done()) and self._future.result() is not None

    def where(self) -> str:
        return f"{self._folder}/{self._number}"


# --- one rank


class Bench:
    """Turns in which all ranks take part."""

    def __init__(self, spec: Spec, world: World, progress: TextIO) -> None:
        self.spec, self.world, self.progress = spec, world, progress
        self.state = State.of(spec.model, world, 0, filled=True)
        self.begun = time.monotonic()
        self.pids = [int(pid) for pid in self.gathered(os.getpid())]
        with contextlib.suppress(OSError):
            if Path("/proc/2/comm").read_text().strip() == "kthreadd":
                self.pids.append(2)  # the kernel writes for us
        self._matrices = [torch.randn(SIDE, SIDE) for _ in range(3)]
        self._products = 1
        self._products = max(1, round(STEP_SECONDS / world.on_main(lambda: self._calibrated())))

    def gathered(self, mine: Any) -> list[Any]:
        everyone = [mine] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(everyone, mine)
        return everyone

    def _calibrated(self) -> float:
        """Seconds of a product, the others waiting."""
        seconds = []
        for _ in range(20):
            begun = time.perf_counter()
            self._multiply()
            seconds.append(time.perf_counter() - begun)
        return sorted(seconds)[10]

    def _multiply(self) -> None:
        a, b, out = self._matrices
        for _ in range(self._products):
            torch.mm(a, b, out=out)

    def stand_in(self) -> float:
        """Forward and backward of a step that is not there; seconds."""
        begun = time.perf_counter()
        for _ in range(self.spec.stand_in_steps):
            self._multiply()
        return time.perf_counter() - begun

    def turn(self, action: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Let all ranks do something together, after the disk is at rest; the slowest rank's figures."""
        if self.world.is_main:
            os.sync()
        self.world.barrier()
        before = Ticks.now(self.pids) if self.world.is_main else None
        self.world.barrier()
        figures = action()
        print(
            time.monotonic() - self.begun, figures, flush=True
        )  # into the rank's log, of which the end is shown should one of them fail
        self.world.barrier()
        disturbance = Ticks.now(self.pids).disturbance_since(before) if before else 0.0
        everyone = self.gathered(figures)
        slowest = {key: max(figures[key] for figures in everyone) for key in figures}
        return slowest | {"disturbance": disturbance}

    def rounds(self, turns: Mapping[str, Callable[[], dict[str, float]]]) -> dict[str, Any]:
        """Every turn once, uncounted; then rounds of all of them, the order rotating."""
        names = list(turns)
        done: list[dict[str, dict[str, float]]] = []
        patience, lasted = self.spec.patience_seconds, 0.0
        first = {name: self.turn(turns[name]) for name in names}
        self.tell("first", first)
        quiet = 0
        for attempt in range(2 * self.spec.rounds):
            late = attempt > 0 and time.monotonic() - self.begun + lasted > self.spec.seconds
            if self.world.any(self.world.is_main and (late or quiet == self.spec.rounds)):
                break
            if self.world.is_main:
                patience -= wait_for_quiet(self.spec.max_disturbance, patience, self.pids)
            start, shift = time.monotonic(), attempt % len(names)
            done.append({name: self.turn(turns[name]) for name in names[shift:] + names[:shift]})
            lasted = time.monotonic() - start
            quiet += all(turn["disturbance"] <= self.spec.max_disturbance for turn in done[-1].values())
            self.tell(f"round {attempt + 1}", done[-1])
        return {"first": first, "rounds": done}

    def tell(self, what: str, turns: Mapping[str, Mapping[str, float]]) -> None:
        if self.world.is_main:
            seconds = ", ".join(f"{name} {turn['seconds']:.2f} s" for name, turn in turns.items())
            print(f"{self.spec.part}, {self.world.size} ranks, {what}: {seconds}", file=self.progress, flush=True)

    # saves

    def saving(self, way: Rung | Dcp, *, keep_first: bool) -> Callable[[], dict[str, float]]:
        """A turn that saves and waits; stall is what training would wait, lost what it all took from it."""
        kept = not keep_first

        def turn() -> dict[str, float]:
            nonlocal kept
            begun = time.perf_counter()
            way.begin()
            stall = time.perf_counter() - begun
            if not way.is_async:
                figures = {"seconds": stall}
            else:
                self.stand_in()
                joining = time.perf_counter()
                way.join()
                joined = time.perf_counter()
                while not way.done():
                    time.sleep(0.002)
                self.world.barrier()
                figures = {
                    "stall": stall + joined - joining,
                    "until_joined": joined - begun,
                    "seconds": time.perf_counter() - begun,
                }
            self.world.barrier()
            if self.world.is_main and kept:
                shutil.rmtree(way.where())
            kept = True
            return figures

        return turn

    def torch_save(self) -> dict[str, float]:
        """What a rank has, in a file of its own."""
        tensors = {name: tensor for name, (tensor, _) in self.state.rung.items()}
        path = f"{self.spec.folder}/torch_save_{self.world.rank}.pt"
        begun = time.perf_counter()
        with open(path, "wb") as file:
            torch.save(tensors, file)
            file.flush()
            written = time.perf_counter()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begun
        os.unlink(path)
        return {"seconds": seconds, "unsynced": written - begun}

    def memcpy(self) -> Callable[[], dict[str, float]]:
        copies = [tensor.clone() for tensor in self.state.tensors]

        def turn() -> dict[str, float]:
            begun = time.perf_counter()
            for copy, tensor in zip(copies, self.state.tensors, strict=True):
                copy.copy_(tensor)
            return {"seconds": time.perf_counter() - begun}

        return turn

    def footprint(self) -> dict[str, Any]:
        """Memory that a save takes, and the bytes that it writes; before anything else was saved. Sums over ranks."""
        own = _pss(os.getpid())
        peaks = {"extra": 0, "trainer": 0, "flush": 0, "flush_process_itself": 0}
        over = threading.Event()
        way = Rung(self.world, self.state, f"{self.spec.folder}/footprint", async_=True)

        def watch() -> None:
            while not over.wait(0.02):
                trainer = sum(_pss(os.getpid()).values()) - sum(own.values())
                parts = [_pss(pid) for pid in _flush_processes()]
                flush = sum(sum(part.values()) for part in parts)
                itself = sum(sum(part.values()) - part["Shmem"] for part in parts)
                found = {"extra": trainer + flush, "trainer": trainer, "flush": flush, "flush_process_itself": itself}
                for key, value in found.items():
                    peaks[key] = max(peaks[key], value)

        watcher = threading.Thread(target=watch)
        watcher.start()
        way.begin()
        self.stand_in()
        way.join()
        while not way.done():
            time.sleep(0.02)
        self.world.barrier()
        over.set()
        watcher.join()
        written = sum(_io(pid, "wchar") for pid in _flush_processes())
        way.checkpointer.close()
        everyone = self.gathered(peaks | {"written": written, "local": self.state.local_bytes})
        totals = {key: sum(rank[key] for rank in everyone) for key in everyone[0]}
        files = [path for path in Path(way.where()).rglob("*") if path.is_file()]
        totals["stored"] = sum(path.stat().st_size for path in files)
        self.world.barrier()
        if self.world.is_main:
            shutil.rmtree(way.where())
        return totals

    # loads

    def loading(self, who: str, path: str, state: State, expected: Mapping[str, float], *, cold: bool) -> Any:
        checked = False

        def turn() -> dict[str, float]:
            nonlocal checked
            if cold and self.world.is_main:
                _forget(path)
            self.world.barrier()
            if not checked:
                for tensor in state.tensors:
                    tensor.zero_()
            read, figures = _io(os.getpid(), "rchar"), dict[str, float]()
            begun = time.perf_counter()
            if who == "rung":
                folder, step = os.path.split(path)
                with Reader(open_storage(folder), int(step.removeprefix("step-"))) as reader:
                    report = load_state(reader, state.rung, self.world)
                figures["read_over_touched"] = report.bytes_read_total / report.bytes_touched
            else:
                dcp.load(state.dcp, checkpoint_id=path)
            self.world.barrier()
            figures["seconds"] = time.perf_counter() - begun
            figures["read"] = sum(self.gathered(_io(os.getpid(), "rchar") - read))
            if not checked and state.sums() != expected:
                raise RuntimeError(f"{who} loaded from {path} what was not saved")
            checked = True
            return figures

        return turn

    def saves(self) -> dict[str, Any]:
        footprint = self.footprint()
        ways = self._ways()
        turns = {name: self.saving(way, keep_first=name in ("rung", "dcp")) for name, way in ways.items()}
        alone = lambda: {"seconds": self.stand_in()}  # noqa: E731
        others = {"torch.save": self.torch_save, "memcpy": self.memcpy(), "alone": alone}
        expected = self.state.sums()
        saved = {"rung": f"{self.spec.folder}/rung/step-00000001", "dcp": f"{self.spec.folder}/dcp/1"}
        loads = {}
        sources = {"same": (0, saved, False), "columns": (1, saved, False), "same, cold": (0, saved, True)}
        if self.spec.fewer:
            sources["fewer"] = (0, self.spec.fewer, False)
        targets = [State.of(self.spec.model, self.world, dim, filled=False) for dim in (0, 1)]
        for layout, (dim, paths, cold) in sources.items():
            # What fewer ranks wrote holds other numbers.
            mine = expected if paths is saved else json.loads(Path(self.spec.fewer["sums"]).read_text())
            for who in ("rung", "dcp"):
                turn = self.loading(who, paths[who], targets[dim], mine, cold=cold)
                loads[f"load {who}, {layout}"] = turn
        sums = f"{self.spec.folder}/sums.json"
        if self.world.is_main:
            Path(sums).write_text(json.dumps(expected))
        found = self.rounds({**turns, **others, **loads})
        self._close(ways)
        return {"footprint": footprint, "saved": saved | {"sums": sums}, **found}

    def _ways(self) -> dict[str, Rung | Dcp]:
        world, state, folder = self.world, self.state, self.spec.folder
        ways: dict[str, Rung | Dcp] = {
            "rung": Rung(world, state, f"{folder}/rung", async_=False),
            "rung async": Rung(world, state, f"{folder}/rung_async", async_=True),
            "dcp": Dcp(world, state, f"{folder}/dcp", None),
            "dcp thread": Dcp(world, state, f"{folder}/dcp_thread", AsyncCheckpointerType.THREAD),
        }
        if self.spec.with_process:
            ways["dcp process"] = Dcp(world, state, f"{folder}/dcp_process", AsyncCheckpointerType.PROCESS)
        return ways

    def _close(self, ways: Mapping[str, Rung | Dcp]) -> None:
        for way in ways.values():
            if isinstance(way, Rung):
                way.checkpointer.close()

    # steps while a checkpoint is written

    def steps(self) -> dict[str, Any]:
        ways = {name: way for name, way in self._ways().items() if name not in ("rung", "dcp")}
        found = self.rounds({name: self._stepping(way) for name, way in ways.items()})
        self._close(ways)
        return found

    def _stepping(self, way: Rung | Dcp) -> Callable[[], dict[str, float]]:
        def some(number: int, go_on: Callable[[], bool]) -> Iterator[float]:
            """Seconds of steps, up to so many; every rank begins every step."""
            for _ in range(number):
                begun = time.perf_counter()
                self._multiply()
                more = self.world.any(go_on())
                yield time.perf_counter() - begun
                if not more:
                    return

        def turn() -> dict[str, float]:
            before = list(some(self.spec.stand_in_steps, lambda: True))
            way.begin()
            way.join()  # at once: only the writing is of interest
            begun = time.perf_counter()
            during = list(some(100_000, lambda: not way.done()))
            lasted = time.perf_counter() - begun
            after = list(some(self.spec.stand_in_steps, lambda: True))
            self.world.barrier()
            if self.world.is_main:
                shutil.rmtree(way.where())
            alone = sum(before + after) / len(before + after)
            slower = sum(during) / len(during) / alone
            return {"seconds": lasted, "alone": alone, "slower": slower, "steps": len(during)}

        return turn


def _flush_processes() -> list[int]:
    """Of this rank; not what is about to become one, and has all of this process's memory until then."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended
            mine = int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid()
            if mine and b"rung.checkpoint.writer" in path.with_name("cmdline").read_bytes():
                found.append(int(path.parent.name))
    return found


def _pss(pid: int) -> dict[str, int]:
    """Bytes of a process, pages that several have divided among them: by what they are."""
    found = dict.fromkeys(("Anon", "File", "Shmem"), 0)
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key = line.partition(":")[0].removeprefix("Pss_")
            if line.startswith("Pss_") and key in found:
                found[key] = int(line.split()[1]) * 1024
    return found


def _io(pid: int, key: str) -> int:
    """Bytes that a process read or wrote with system calls so far, from the disk or not."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise KeyError(key)


def _forget(folder: str) -> None:
    """Have the page cache let go of the files of a folder."""
    os.sync()
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(spec_path: str) -> None:
    spec = Spec(**json.loads(Path(spec_path).read_text()))
    progress = os.fdopen(os.dup(sys.stderr.fileno()), "w")
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())  # DCP's process tells a lot
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with World.join("cpu") as world:
        bench = Bench(spec, world, progress)
        found = bench.saves() if spec.part == "saves" else bench.steps()
        if world.is_main:
            tensors = len(bench.state.rung)
            Path(spec.facts).write_text(json.dumps({"tensors": tensors, **found}))
        world.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
    # Threads of communication libraries can abort a process that is being torn down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
