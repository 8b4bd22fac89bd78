"""What rank 0 shows of a run: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rung.observe.metrics import StepMetrics

__all__ = ["ConsoleConfig", "Progress", "human_count", "human_seconds"]


@dataclass
class ConsoleConfig:
    """What rank 0 prints."""

    interval: int = 10
    """Steps between two lines where there is no terminal."""
    first_steps: int = 3
    """Steps at the start of a run that have a line each, whatever the interval."""
    style: str = "auto"
    """`live` (a bar that is redrawn), `plain` (lines), or `auto`: live on a terminal, plain elsewhere."""

    def validate(self) -> list[str]:
        """Problems a person can fix."""
        problems = []
        if self.interval < 1:
            problems.append(f"logging.console.interval={self.interval} must be at least 1")
        if self.style not in ("auto", "live", "plain"):
            problems.append(f"logging.console.style={self.style!r}; legal values: auto, live, plain")
        return problems


class Progress:
    """Header, progress and summary of a run. On any rank but the main one it prints nothing.

    `total_steps` is the step the run ends at, which a resumed run starts closer to. Use it as a context manager (or
    call `close`), so that a live bar gives the terminal back when the run raises.
    """

    def __init__(
        self, config: ConsoleConfig, total_steps: int, is_main: bool = True, *, stream: TextIO | None = None
    ) -> None:
        self._config = config
        self._total_steps = total_steps
        self._is_main = is_main
        self._stream = stream or sys.stdout
        self._started = time.monotonic()
        self._first_step: int | None = None
        self._first_tokens = 0
        self._first_time = self._started
        self._smoothed_seconds: float | None = None
        self._last: StepMetrics | None = None
        self._last_evaluation: tuple[int, float, float | None] | None = None
        self._live: Any = None
        self._console: Any = None
        if is_main and config.style != "plain":
            from rich.console import Console

            console = Console(file=self._stream, highlight=False, force_terminal=config.style == "live" or None)
            if console.is_terminal and not console.is_dumb_terminal:
                self._console = console

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def header(self, title: str, facts: Mapping[str, str]) -> None:
        """Say what is trained: a title and aligned `name  value` lines (model, layout, device, run folder, ...)."""
        self._block(title, facts)

    def step(self, metrics: StepMetrics) -> None:
        """Show a step: the bar moves, or a line is printed if it is this step's turn."""
        if not self._is_main:
            return
        first = self._first_step is None
        if first:
            self._first_step = metrics.step
            self._first_tokens, self._first_time = metrics.tokens, time.monotonic()
        else:
            self._smooth(metrics.step_seconds)
        self._last = metrics
        assert self._first_step is not None
        if self._console is not None:
            self._draw(metrics)
        elif (
            metrics.step - self._first_step < self._config.first_steps
            or metrics.step % self._config.interval == 0
            or metrics.step == self._total_steps
        ):
            self._print(self.line(metrics))

    def evaluation(self, step: int, eval_loss: float, bits_per_byte: float | None) -> None:
        """Show an evaluation made after `step`; it stays on the screen."""
        self._last_evaluation = (step, eval_loss, bits_per_byte)
        facts = [f"eval  {self._step_of(step)}", f"loss {eval_loss:.4f}"]
        if bits_per_byte is not None:
            facts.append(f"{bits_per_byte:.4f} bits per byte")
        self._print("  ".join(facts), "cyan")

    def message(self, text: str) -> None:
        """Print a line (above the live bar, if there is one)."""
        self._print(text)

    def finish(self, title: str, facts: Mapping[str, str] | None = None) -> None:
        """Close the bar and sum the run up: what was seen here, then `facts`."""
        self.close()
        if not self._is_main:
            return
        rows = {}
        last = self._last
        if last is not None:
            assert self._first_step is not None
            rows["steps"] = f"{last.step} of {self._total_steps}"
            if self._first_step > 1:
                rows["steps"] += f" ({last.step - self._first_step + 1} in this session)"
            rows["tokens"] = human_count(last.tokens)
            rows["loss"] = f"{last.loss:.4f}"
        if self._last_evaluation is not None:
            step, eval_loss, bits_per_byte = self._last_evaluation
            rows["evaluation"] = f"loss {eval_loss:.4f}"
            if bits_per_byte is not None:
                rows["evaluation"] += f", {bits_per_byte:.4f} bits per byte"
            if last is None or step != last.step:
                rows["evaluation"] += f" (after step {step})"
        if last is not None:
            elapsed = time.monotonic() - self._first_time
            if last.tokens > self._first_tokens and elapsed > 0:
                rate = human_count((last.tokens - self._first_tokens) / elapsed)
                rows["speed"] = f"{rate} tok/s on average, everything included, after the first step"
            if last.skipped_steps:
                rows["skipped"] = f"{last.skipped_steps} updates, because a gradient was not finite"
        rows["time"] = human_seconds(time.monotonic() - self._started)
        self._block(title, rows | dict(facts or {}))

    def close(self) -> None:
        """Leave the live bar as it is and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, metrics: StepMetrics) -> str:
        """The plain line of a step, columns aligned over the run."""
        return "  ".join([f"step {self._step_of(metrics.step)}", *self._facts(metrics)])

    def _step_of(self, step: int) -> str:
        total = str(self._total_steps)
        return f"{step:>{len(total)}}/{total}"

    def _facts(self, metrics: StepMetrics) -> list[str]:
        mfu = "-" if metrics.mfu is None else f"{metrics.mfu:.1%}"
        memory = max(metrics.memory_gib.values(), default=math.nan)
        facts = [
            f"loss {metrics.loss:7.4f}",
            f"grad {_short(metrics.grad_norm):>7}",
            f"lr {metrics.lr:.1e}",
            f"{human_count(metrics.tokens_per_second):>6} tok/s",
            f"mfu {mfu:>5}",
            f"mem {'-' if math.isnan(memory) else f'{memory:.1f} GiB':>9}",
            f"eta {self._eta(metrics.step)}",
        ]
        if metrics.skipped_steps:
            facts.append(f"skipped {metrics.skipped_steps}")
        return facts

    def _smooth(self, seconds: float) -> None:
        # The session's first step is left out: it compiles, allocates and tunes.
        if self._smoothed_seconds is None:
            self._smoothed_seconds = seconds
        else:
            self._smoothed_seconds += 0.1 * (seconds - self._smoothed_seconds)

    def _eta(self, step: int) -> str:
        if self._smoothed_seconds is None:
            return "-"
        return human_seconds((self._total_steps - step) * self._smoothed_seconds)

    def _draw(self, metrics: StepMetrics) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {self._step_of(metrics.step)}", style="bold"),
            ProgressBar(total=max(self._total_steps, 1), completed=metrics.step, width=40),
            f"{metrics.step / max(self._total_steps, 1):.0%}",
            f"eta {self._eta(metrics.step)}",
        )
        facts = Text("  ".join(fact for fact in self._facts(metrics) if not fact.startswith("eta")))
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        self._live.update(Group(bar, facts))

    def _block(self, title: str, facts: Mapping[str, str]) -> None:
        width = max((len(name) for name in facts), default=0)
        self._print(title, "bold")
        for name, value in facts.items():
            self._print(f"  {name:<{width}}  {value}")

    def _print(self, text: str, style: str = "") -> None:
        if not self._is_main:
            return
        if self._console is not None:
            from rich.text import Text

            self._console.print(Text(text, style=style), soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


def human_count(number: float) -> str:
    """`950`, `4.1k`, `12.3M`, `8.03B`, `1.2T`: a number as people say it."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.2f}{unit}" if unit in "BT" else f"{number / size:.1f}{unit}"
    return f"{number:.0f}" if abs(number) >= 10 or number == int(number) else f"{number:.1f}"


def human_seconds(seconds: float) -> str:
    """`8s`, `2m10s`, `3h05m`, `2d04h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def _short(number: float) -> str:
    """Two decimals, or a power of ten where they would show nothing."""
    readable = number == 0 or 0.01 <= abs(number) < 10000 or not math.isfinite(number)
    return f"{number:.2f}" if readable else f"{number:.1e}"
