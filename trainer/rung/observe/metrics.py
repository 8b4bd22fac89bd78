"""`metrics.jsonl`: one JSON line a step, and the same numbers to TensorBoard, W&B and whoever else listens."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rung.observe.console import ConsoleConfig

__all__ = ["Logger", "LoggingConfig", "MetricsLog", "StepMetrics", "WandbConfig", "read_metrics"]

_log = logging.getLogger("rung")


@dataclass
class WandbConfig:
    """Weights & Biases."""

    enabled: bool = False
    """Whether metrics go to W&B as well."""
    project: str = "rung"
    """The W&B project."""
    entity: str = ""
    """The W&B user or team; empty means the key's own."""
    name: str = ""
    """The name shown for the run; empty means the name of the run's folder."""
    mode: str = "online"
    """`online`, or `offline` (send it later with `wandb sync`). Without an API key a run is offline."""


@dataclass
class LoggingConfig:
    """What a run tells about itself, and where."""

    console: ConsoleConfig = field(default_factory=ConsoleConfig)
    """What rank 0 prints."""
    tensorboard: bool = True
    """Whether to write event files for TensorBoard, to `tensorboard/` in the run's folder."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""

    def validate(self) -> list[str]:
        """Problems a person can fix."""
        problems = self.console.validate()
        if self.wandb.mode not in ("online", "offline"):
            problems.append(f"logging.wandb.mode={self.wandb.mode!r}; legal values: online, offline")
        return problems


@dataclass
class StepMetrics:
    """What is known about one step. The field names are the names in `metrics.jsonl`."""

    step: int
    """1-based."""
    loss: float
    """Sum over count of the global batch, in full precision."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """The learning rate of this step."""
    tokens: int
    """Tokens consumed up to and including this step."""
    samples_digest: str
    """Hex digest of the sorted sample ids of this step."""
    step_seconds: float
    """Wall-clock seconds of this step."""
    tokens_per_second: float
    """Tokens of the whole job per second."""
    mfu: float | None = None
    """Model FLOP/s utilisation in 0..1; None where the device's peak is unknown."""
    memory_gib: dict[str, float] = field(default_factory=dict)
    """Peak memory of rank 0, as `throughput.memory_gib` reads it."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Host seconds by phase (data, forward_backward, optimizer, ...)."""
    skipped_steps: int = 0
    """Updates skipped so far in the run because a gradient was not finite."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further numbers (loss components, rewards, ...); they stand beside the others in the line."""

    def as_dict(self) -> dict[str, Any]:
        """The line's content, `extra` spread among it."""
        values = {name: value for name, value in vars(self).items() if name != "extra"}
        clash = sorted(values.keys() & self.extra.keys())
        assert not clash, f"extra metrics must not be called {clash}"
        return values | self.extra


class Logger(Protocol):
    """Where metrics go besides `metrics.jsonl`. It may fail: it is then reported once and no longer called."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name (`train/loss`, `eval/bits_per_byte`, `phase_seconds/data`, ...) at a 1-based step."""

    def close(self) -> None:
        """Send what is left."""


class MetricsLog:
    """Writes a run's metrics; on any rank but the main one it does nothing.

    A line is one unbuffered write, so a killed process loses at most the line it was writing. JSON knows neither NaN
    nor infinity: such a value is written as null and named under `nonfinite`. Nothing here ends a run: a full disk or
    an unreachable server is reported once.

    `run_settings` is shown in W&B beside the curves. `loggers` are further ones, called like TensorBoard's.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: LoggingConfig,
        is_main: bool = True,
        *,
        run_settings: Mapping[str, Any] | None = None,
        loggers: Iterable[Logger] = (),
    ) -> None:
        self._run_dir = Path(run_dir)
        self._path = self._run_dir / "metrics.jsonl"
        self._is_main = is_main
        self._file: Any = None
        self._write_failed = False
        self._first_step = 1
        self._loggers: list[_GuardedLogger] = []
        if not is_main:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        if config.tensorboard:
            self._loggers.append(_GuardedLogger("TensorBoard", lambda: _TensorBoard(self._run_dir, self._first_step)))
        if config.wandb.enabled:
            self._loggers.append(
                _GuardedLogger("W&B", lambda: _Wandb(self._run_dir, config.wandb, dict(run_settings or {})))
            )
        for logger in loggers:
            self._loggers.append(_GuardedLogger(type(logger).__name__, partial(_same, logger)))

    def log_step(self, metrics: StepMetrics) -> None:
        """Write the line of a training step."""
        self._write(metrics.step, metrics.as_dict(), "train")

    def log_evaluation(self, step: int, eval_loss: float, bits_per_byte: float | None, **extra: float) -> None:
        """Write the line of an evaluation made after `step`."""
        self._write(step, {"step": step, "eval_loss": eval_loss, "bits_per_byte": bits_per_byte, **extra}, "eval")

    def truncate_to(self, step: int) -> None:
        """Drop every line after `step`, and a last line that was cut short: a run resumed there writes them again.

        Call it before the first line is logged. The file is replaced in one rename.
        """
        if not self._is_main:
            return
        self._close_file()
        self._first_step = step + 1
        if not self._path.exists():
            return
        temporary = self._path.with_name("metrics.jsonl.tmp")
        with open(self._path, "rb") as old, open(temporary, "wb") as new:
            for line in old:
                values = _parse(line)
                if values is not None and values["step"] <= step:
                    new.write(line.rstrip(b"\n") + b"\n")
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self._path)

    def close(self) -> None:
        """Close the file and let the loggers send what is left."""
        self._close_file()
        for logger in self._loggers:
            logger.close()
        self._loggers = []

    def _write(self, step: int, values: Mapping[str, Any], family: str) -> None:
        if not self._is_main:
            return
        values = {name: _plain(value) for name, value in values.items()}
        line = (_json_line(values) + "\n").encode()
        try:
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
            # What a failed write left of its line must not swallow this one.
            self._file.write(b"\n" + line if self._write_failed else line)
            self._write_failed = False
        except OSError as error:
            if not self._write_failed:
                _log.warning("cannot write %s (%s); the run goes on and keeps trying", self._path, error)
            self._write_failed = True
        if self._loggers:
            numbers = dict(_numbers(values, family))
            for logger in self._loggers:
                logger.log(step, numbers)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` (none where there is no file), without any that was cut short."""
    path = Path(run_dir) / "metrics.jsonl"
    if path.exists():
        with open(path, "rb") as lines:
            for line in lines:
                values = _parse(line)
                if values is not None:
                    yield values


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _plain(value: Any) -> Any:
    """Numbers of torch and numpy as Python's."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return value.item() if hasattr(value, "item") else value


def _json_line(values: Mapping[str, Any]) -> str:
    nonfinite: dict[str, str] = {}

    def clean(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(f"{name}.{key}", inner) for key, inner in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite[name] = repr(value)
            return None
        return value

    cleaned = {name: clean(name, value) for name, value in values.items()}
    return json.dumps(cleaned | ({"nonfinite": nonfinite} if nonfinite else {}), allow_nan=False)


def _numbers(values: Mapping[str, Any], family: str) -> Iterator[tuple[str, float]]:
    """Flat names for loggers: `train/loss`, `eval/loss`, `memory_gib/max_reserved`; finite numbers only."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, name)
        elif isinstance(value, int | float) and name != "step" and math.isfinite(value):
            yield f"{family}/{name.removeprefix('eval_')}", value


def _same(logger: Logger) -> Logger:
    return logger


class _GuardedLogger:
    """A logger that is made when first used, and dropped with one warning when it fails."""

    def __init__(self, name: str, make: Callable[[], Logger]) -> None:
        self._name = name
        self._make = make
        self._logger: Logger | None = None
        self._failed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._attempt(lambda: self._made().log(step, values))

    def close(self) -> None:
        if self._logger is not None:
            self._attempt(self._logger.close)

    def _made(self) -> Logger:
        if self._logger is None:
            self._logger = self._make()
        return self._logger

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # whatever a logger raises, training matters more
            self._failed = True
            _log.warning(
                "%s failed and is off for the rest of this run (metrics.jsonl has everything): %s: %s",
                self._name, type(error).__name__, error,
            )  # fmt: skip


class _TensorBoard:
    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier attempt wrote for steps that are run again.
        purge_step = first_step if first_step > 1 else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, config: WandbConfig, run_settings: dict[str, Any]) -> None:
        import wandb

        mode: Any = config.mode
        if mode == "online" and not _has_wandb_key():
            _log.warning(
                "no W&B API key found: W&B is offline; send it later with `wandb sync %s/wandb/offline-run-*`", run_dir
            )
            mode = "offline"
        # The id is kept, so that a resumed run continues its curves. Steps that are run again are ignored by W&B, and
        # hold the same values.
        id_file = run_dir / "wandb_run_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=config.project,
            entity=config.entity or None,
            name=config.name or run_dir.resolve().name,
            id=id_file.read_text().strip(),
            resume="allow" if mode == "online" else None,
            dir=str(run_dir),
            config=run_settings,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _has_wandb_key() -> bool:
    """Whether wandb would find a key. Asking wandb itself would open a prompt, and a run must not wait for one."""
    import netrc
    from urllib.parse import urlparse

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
