import io
from dataclasses import replace

import pytest

from rung.observe import ConsoleConfig, Progress, StepMetrics, human_count, human_seconds

STEP = StepMetrics(
    step=120, loss=3.2104, grad_norm=0.84, lr=3e-4, tokens=491520, samples_digest="", step_seconds=1.0,
    tokens_per_second=4100.0, memory_gib={"max_allocated": 0.5, "max_reserved": 0.9},
)  # fmt: skip


def run(progress: Progress, first: int, last: int) -> None:
    for step in range(first, last + 1):
        progress.step(replace(STEP, step=step, tokens=4096 * step))


def test_plain_line():
    out = io.StringIO()
    progress = Progress(ConsoleConfig(), 600, stream=out)
    run(progress, 119, 120)
    assert out.getvalue().splitlines()[-1] == (
        "step 120/600  loss  3.2104  grad    0.84  lr 3.0e-04    4.1k tok/s  mfu     -  mem   0.9 GiB  eta 8m00s"
    )
    skipped = replace(STEP, step=7, mfu=0.412, grad_norm=float("nan"), loss=float("nan"), skipped_steps=2)
    assert progress.line(skipped) == (
        "step   7/600  loss     nan  grad     nan  lr 3.0e-04    4.1k tok/s  mfu 41.2%  mem   0.9 GiB"
        "  eta 9m53s  skipped 2"
    )


def test_the_first_steps_then_every_interval_then_the_last():
    out = io.StringIO()
    run(Progress(ConsoleConfig(interval=10, first_steps=2), 35, stream=out), 11, 35)
    assert [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()] == [11, 12, 20, 30, 35]


def test_header_and_summary():
    out = io.StringIO()
    progress = Progress(ConsoleConfig(interval=100), 4, stream=out)
    progress.header("rung pretrain", {"model": "tiny, 1.2M parameters", "run.dir": "/r"})
    run(progress, 3, 4)
    progress.evaluation(4, 2.5, 0.91)
    progress.finish("completed", {"run.dir": "/r"})
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["rung pretrain", "  model    tiny, 1.2M parameters", "  run.dir  /r"]
    summary = dict(line.split(maxsplit=1) for line in lines[lines.index("completed") + 1 :])
    assert summary["steps"] == "4 of 4 (2 in this session)" and summary["run.dir"] == "/r"
    assert summary["evaluation"] == "loss 2.5000, 0.9100 bits per byte"
    assert "eval  4/4  loss 2.5000  0.9100 bits per byte" in lines


@pytest.mark.parametrize("style", ["plain", "live"])
def test_other_ranks_print_nothing(style):
    out = io.StringIO()
    progress = Progress(ConsoleConfig(style=style), 4, is_main=False, stream=out)
    progress.header("x", {"y": "z"})
    run(progress, 1, 4)
    progress.evaluation(4, 1.0, None)
    progress.finish("done")
    assert out.getvalue() == ""


def test_live_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with Progress(ConsoleConfig(), 40, stream=out) as progress:
        run(progress, 1, 20)
        progress.message("a [message] above the bar")
    text = out.getvalue()
    assert "20/40" in text and "50%" in text and "a [message] above the bar" in text and "loss  3.2104" in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_numbers_for_people():
    assert [human_count(n) for n in (0, 950, 999.9, 4123, 12.3e6, 8.03e9, 1.2e12)] == [
        "0", "950", "1.0k", "4.1k", "12.3M", "8.03B", "1.20T",
    ]  # fmt: skip
    assert [human_seconds(s) for s in (-1, 8.4, 130, 11100, 187200)] == ["0s", "8s", "2m10s", "3h05m", "2d04h"]
