"""What the ranks of layouts.py run: Rung's loop on one layout, in turns with what it is compared with.

Started as ``layout_ranks.py SPEC COMMANDS REPLIES``, a JSON file and two open file numbers. This process is rank 0, and
starts the others as ``layout_ranks.py follow SPEC RANK PORT``. All ranks begin and end a turn together: rank 0 asks for
the turn when the others have arrived, and its clock runs from the answer until all have arrived again. Measured is
``rung.loop.train``, from reading a batch to the optimizer's update; there are no metrics, console or heartbeat.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import Turns

LISTENED_STEP = 2
"""In the first one a pipeline also tells its neighbours what it will send."""


@dataclass
class Spec:
    """What one program runs."""

    runs: list[list[str]]
    """Settings, of one run after another."""
    ranks: int
    apart: bool
    """The ranks are separate runs that do not know of each other, side by side."""
    warmup: int
    """Steps of the first turn, at least LISTENED_STEP."""
    steps: int
    """Steps of every other turn."""
    facts: str
    """JSON file that rank 0 writes: what each rank sent in a step, by run."""

    def save(self, path: Path) -> str:
        path.write_text(json.dumps(asdict(self)))
        return str(path)


class Together:
    """Ranks wait for each other at the ends of turns, over a store, without taking part in a process group."""

    def __init__(self, rank: int, ranks: int, port: int = 0) -> None:
        from torch.distributed import TCPStore

        self._rank, self._ranks, self._turn = rank, ranks, 0
        self._patience = datetime.timedelta(hours=2)  # others may have their turns meanwhile
        self.store = TCPStore("127.0.0.1", port, None, rank == 0, self._patience, wait_for_workers=False)
        self._children: list[subprocess.Popen[bytes]] = []

    def start_others(self, spec_path: str) -> list[subprocess.Popen[bytes]]:
        """Rank 0 starts the others, which end when it does."""
        for rank in range(1, self._ranks):
            command = [sys.executable, __file__, "follow", spec_path, str(rank), str(self.store.port)]
            self._children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        return self._children

    def arrived(self) -> None:
        """This rank is at the end of a turn."""
        self._turn += 1
        if self.store.add(f"arrived/{self._turn}", 1) == self._ranks:
            self.store.set(f"all/{self._turn}", "")
        if self._rank == 0:
            self.wait(f"all/{self._turn}")

    def go(self, on: bool) -> None:
        """Rank 0 says whether there is another turn."""
        self.store.set(f"go/{self._turn}", "on" if on else "end")

    def gone(self) -> bool:
        """The others hear it."""
        return bool(self.wait(f"go/{self._turn}") == b"on")

    def wait(self, key: str) -> Any:
        """The value of a key, once it is set. RuntimeError when a rank has ended meanwhile."""
        while self._rank == 0:
            try:
                self.store.wait([key], datetime.timedelta(seconds=10))
                break
            except Exception:  # not there yet; torch's error for it changes from version to version
                if failed := [child.args for child in self._children if child.poll() is not None]:
                    raise RuntimeError(f"ranks ended: {failed}") from None
        return self.store.get(key)


class Meter:
    """Stands where the monitor stands: takes turns, and listens to one step."""

    def __init__(self, spec: Spec, rank: int, together: Together, turns: Turns | None) -> None:
        self._spec, self._rank, self._together, self._turns = spec, rank, together, turns
        self._layout: Any = None
        self._traffic: Any = None
        self.stop_requested = False
        self.sent: list[Any] = []
        """[op, axes, messages, bytes] of each rank, by run; on rank 0."""

    def listens(self, layout: Any) -> None:
        """Write down what is sent in LISTENED_STEP of this run."""
        self._layout = layout

    def begin(self, step: int) -> None:
        after_warmup = step - 1 - self._spec.warmup
        if step == 1 or (after_warmup >= 0 and after_warmup % self._spec.steps == 0):
            self._together.arrived()
            if self._turns is None:
                on = self._together.gone()
            else:
                on = self._turns.next()
                self._together.go(on)
            self.stop_requested = not on
        elif self._turns is not None:
            self._turns.next()
        if step == LISTENED_STEP and self._layout is not None:
            from rung.observe.traffic import Traffic

            self._traffic = Traffic()
            self._traffic.__enter__()

    def end(self, step: int, _batch: Any, _lr: float, loss: Any, *_: Any) -> None:
        if self._turns is not None:
            self._turns.loss = loss
        if self._traffic is not None:
            self._traffic.__exit__(None, None, None)
            sent = [
                [op, list(axes), total.messages, total.sent_bytes]
                for (op, axes), total in self._traffic.by_axes(self._layout).items()
            ]
            self._traffic = None
            run = len(self.sent)
            self._together.store.set(f"sent/{run}/{self._rank}", json.dumps(sent))
            ranks = range(self._spec.ranks) if self._rank == 0 else ()
            self.sent.append([json.loads(self._together.wait(f"sent/{run}/{rank}")) for rank in ranks])

    def evaluated(self, *_: Any) -> None:
        pass

    @contextlib.contextmanager
    def clock(self, _name: str) -> Iterator[None]:
        yield


def run(spec: Spec, rank: int, together: Together, turns: Turns | None) -> None:
    """Join, put the run together as the recipe does, train until no further turn is wanted."""
    import torch

    from rung.data import open_data
    from rung.loop import train
    from rung.parallel import World
    from rung.recipes.config import load_config
    from rung.recipes.pretrain import assemble, set_numerics

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not spec.apart:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(spec.ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(together.store.port),
            # The store is there already, and serves the process group too.
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
        )
    with World.join("cpu") as world:
        meter = Meter(spec, rank, together, turns)
        for overrides in spec.runs:
            config, layout = load_config(overrides, world.size)
            set_numerics(config)
            if world.size > 1:
                meter.listens(layout)
            training = assemble(config, layout, world, open_data(config.data, config.run.seed), meter)  # type: ignore[arg-type]
            world.set_timeout(config.train.first_timeout_seconds)
            train(training)
            if rank == 0:
                Path(spec.facts).write_text(json.dumps({"sent": meter.sent}))
        if turns is not None and not meter.stop_requested:
            turns.next()  # tells of the last turn


def follow(spec_path: str, rank: str, port: str) -> None:
    """Any rank but the first."""
    spec = Spec(**json.loads(Path(spec_path).read_text()))
    run(spec, int(rank), Together(int(rank), spec.ranks, int(port)), None)


def lead(spec_path: str, commands: str, replies: str) -> None:
    """Rank 0."""
    spec = Spec(**json.loads(Path(spec_path).read_text()))
    turns = Turns(os.fdopen(int(commands)), os.fdopen(int(replies), "w"), "cpu")
    children = []
    try:
        together = Together(0, spec.ranks)
        children = together.start_others(spec_path)
        run(spec, 0, together, turns)
        for child in children:
            child.wait(60)
    except BaseException as error:
        with contextlib.suppress(BrokenPipeError):
            turns.send({"error": f"{type(error).__name__}: {error}".strip()})
        raise
    finally:
        for child in children:
            child.kill()


if __name__ == "__main__":
    if sys.argv[1] == "follow":
        follow(*sys.argv[2:])
    else:
        lead(*sys.argv[1:])
    # Threads of communication libraries can abort a process that is being torn down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
