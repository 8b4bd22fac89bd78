import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from rung.observe import LoggingConfig, MetricsLog, StepMetrics, WandbConfig, read_metrics

STEP = StepMetrics(
    step=1, loss=1 / 3, grad_norm=2.0, lr=1e-3, tokens=64, samples_digest="ab", step_seconds=0.5,
    tokens_per_second=128.0, memory_gib={"max_resident": 1.5}, phase_seconds={"data": 0.1},
    extra={"balance_loss": 0.01},
)  # fmt: skip


def plain(**changes) -> LoggingConfig:
    return LoggingConfig(**({"tensorboard": False} | changes))


def raw_lines(run_dir) -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_have_the_contracts_names_and_full_precision(tmp_path):
    log = MetricsLog(tmp_path, plain())
    log.log_step(STEP)
    log.log_evaluation(1, 2.5, 0.75, documents=3)
    step, evaluation = raw_lines(tmp_path)  # readable before close: nothing is buffered
    contract = "step loss grad_norm lr tokens samples_digest step_seconds tokens_per_second mfu"
    assert set(contract.split()) <= step.keys()
    assert step["loss"] == 1 / 3 and step["mfu"] is None and step["balance_loss"] == 0.01
    assert step["phase_seconds"] == {"data": 0.1} and step["skipped_steps"] == 0
    assert evaluation == {"step": 1, "eval_loss": 2.5, "bits_per_byte": 0.75, "documents": 3}


def test_not_finite_is_null_and_named(tmp_path):
    log = MetricsLog(tmp_path, plain())
    log.log_step(replace(STEP, loss=torch.tensor(math.nan), grad_norm=math.inf, memory_gib={"a": np.float64("-inf")}))
    (line,) = raw_lines(tmp_path)
    assert line["loss"] is None and line["grad_norm"] is None
    assert line["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "memory_gib.a": "-inf"}


def test_truncating_drops_later_steps_and_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path, plain())
    for step in (1, 2, 3):
        log.log_step(replace(STEP, step=step))
        log.log_evaluation(step, 1.0, None)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    log = MetricsLog(tmp_path, plain())
    log.truncate_to(2)
    log.log_step(replace(STEP, step=3, loss=9.0))
    log.close()
    lines = raw_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3] and lines[-1]["loss"] == 9.0
    assert list(read_metrics(tmp_path)) == lines
    log.truncate_to(0)
    assert not raw_lines(tmp_path) and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_the_main_rank_writes(tmp_path):
    log = MetricsLog(tmp_path / "run", LoggingConfig(), is_main=False)
    log.log_step(STEP)
    log.truncate_to(0)
    log.close()
    assert not (tmp_path / "run").exists()


def test_a_failing_logger_warns_once_and_ends_nothing(tmp_path, caplog):
    class Broken:
        def log(self, step, values):
            raise OSError("no route to host")

        def close(self):
            raise AssertionError("must not be called any more")

    seen = []

    class Good(Broken):
        def log(self, step, values):
            seen.append((step, dict(values)))

        def close(self):
            seen.append("closed")

    log = MetricsLog(tmp_path, plain(), loggers=[Broken(), Good()])
    log.log_step(replace(STEP, grad_norm=math.nan))
    log.log_evaluation(1, 2.0, 0.5)
    log.close()
    assert [record.getMessage().count("no route to host") for record in caplog.records] == [1]
    (_, train), (_, evaluation), closed = seen
    assert train["train/loss"] == 1 / 3 and train["phase_seconds/data"] == 0.1 and "train/grad_norm" not in train
    assert evaluation == {"eval/loss": 2.0, "eval/bits_per_byte": 0.5} and closed == "closed"


def test_a_full_disk_ends_nothing(tmp_path, caplog, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    log = MetricsLog(tmp_path, plain())
    log.log_step(STEP)
    file, log._file = log._file, Full()
    log.log_step(replace(STEP, step=2))
    log.log_step(replace(STEP, step=3))
    file.write(b'{"step": 3, "lo')  # as much as fitted
    log._file = file
    log.log_step(replace(STEP, step=4))
    assert len(caplog.records) == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 4]


def test_tensorboard_hides_the_steps_that_are_run_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 4), (3, 4)):
        log = MetricsLog(tmp_path, LoggingConfig())
        log.truncate_to(first - 1)
        for step in range(first, last + 1):
            log.log_step(replace(STEP, step=step, loss=float(10 * first + step)))
        log.close()
        time.sleep(1.0)  # a run that goes on begins seconds later: files are read in the order of their names
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 11), (2, 12), (3, 33), (4, 34)]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_without_a_key_is_offline_and_keeps_its_id(tmp_path, mode, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values["train/loss"]))

        def finish(self):
            calls.append("finished")

    import wandb

    monkeypatch.setattr(wandb, "init", lambda **arguments: calls.append(arguments) or Run())
    for _ in range(2):
        log = MetricsLog(tmp_path, plain(wandb=WandbConfig(enabled=True, mode=mode)), run_settings={"seed": 1})
        log.log_step(STEP)
        log.close()
    first, logged, finished, second, *_ = calls
    assert first["mode"] == "offline" and first["config"] == {"seed": 1} and first["name"] == tmp_path.name
    assert first["id"] == second["id"] and logged == (1, 1 / 3) and finished == "finished"


def test_settings_problems_name_the_key():
    config = LoggingConfig()
    assert config.validate() == []
    config.wandb.mode, config.console.interval, config.console.style = "cloud", 0, "pretty"
    assert [problem.split("=")[0] for problem in config.validate()] == [
        "logging.console.interval", "logging.console.style", "logging.wandb.mode",
    ]  # fmt: skip
