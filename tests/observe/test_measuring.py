"""Throughput, memory, profiles, garbage, phases; and that all of it is imported lazily."""

import gc
import gzip
import json
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from rung.observe import (
    GarbageCollector,
    GarbageConfig,
    HeartbeatConfig,
    LoggingConfig,
    MemoryConfig,
    MemorySettings,
    ProfileConfig,
    Profiler,
    Stopwatch,
    explain_out_of_memory,
    memory_gib,
    model_flops_utilization,
    peak_flops,
    suggest,
)


def test_importing_is_light():
    code = "import sys, rung.observe; print(sorted({'torch','rich','matplotlib','wandb','numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("config", [LoggingConfig, ProfileConfig, MemoryConfig, GarbageConfig, HeartbeatConfig])
def test_settings_are_structured_configs(config):
    assert OmegaConf.to_object(OmegaConf.structured(config)) == config()


def test_peak_flops_by_device_name():
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA B200": 2250e12,
        "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA A30": 165e12, "NVIDIA GeForce RTX 4090": None, "cpu": None,
    }  # fmt: skip
    assert {name: peak_flops(name) for name in names} == names
    assert peak_flops("NVIDIA H100 PCIe", "float32") is None


def test_utilization():
    assert model_flops_utilization(1e4, 6e9, 8, 1e12) == pytest.approx(6e13 / 8e12)
    assert model_flops_utilization(1e4, 6e9, 8, None) is None


def test_resident_memory_is_in_gib():
    assert 0.05 < memory_gib()["max_resident"] < 64
    assert memory_gib(torch.device("cpu")).keys() == {"max_resident"}


def test_one_suggestion_and_the_cheapest_first():
    s = MemorySettings(micro_batch_size=3, dp_replicate=2, dp_shard=4, pp_schedule="gpipe", world_size=16)
    seen = []
    for change in (
        {"pp_schedule": "1f1b"},
        {"activation_checkpointing": "selective"}, {"micro_batch_size": 1}, {"activation_checkpointing": "full"},
        {"dp_replicate": 1, "dp_shard": 8},
    ):  # fmt: skip
        seen.append(suggest(s).split(" (")[0])
        s = MemorySettings(**(vars(s) | change))
    assert seen == [
        "parallel.pp_schedule=1f1b",
        "parallel.activation_checkpointing=selective", "train.micro_batch_size=1",
        "parallel.activation_checkpointing=full", "parallel.dp_replicate=1 parallel.dp_shard=8",
    ]  # fmt: skip
    assert suggest(s).startswith("more ranks")


def test_out_of_memory_is_explained(tmp_path):
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"(?s)tried 5 GiB.*rank 3 .*activation_checkpointing=selective"),
        explain_out_of_memory(MemoryConfig(), MemorySettings(), tmp_path, rank=3),
    ):
        raise torch.OutOfMemoryError("tried 5 GiB")
    with (
        pytest.raises(RuntimeError, match=r"^other$"),
        explain_out_of_memory(MemoryConfig(), MemorySettings(), tmp_path),
    ):
        raise RuntimeError("other")


def profiled_steps(path) -> set[str]:
    with gzip.open(path) as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    return {name for name in names if name.startswith("work")}


def run_profiled(config, folder, steps) -> dict[str, set[str]]:
    with Profiler(config, folder) as profiler:
        for step in steps:
            profiler.before(step)
            with torch.profiler.record_function(f"work{step}"):
                torch.ones(4).sum()
            profiler.after(step)
    return {path.name: profiled_steps(path) for path in (folder / "profile").glob("*.json.gz")}


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_profile_holds_the_window_and_nothing_else(tmp_path):
    config = ProfileConfig(start_step=3, num_steps=2)
    assert run_profiled(config, tmp_path / "whole", range(1, 7)) == {"rank0-steps3-4.json.gz": {"work3", "work4"}}
    assert run_profiled(config, tmp_path / "resumed", range(4, 7)) == {"rank0-steps4-4.json.gz": {"work4"}}
    assert run_profiled(config, tmp_path / "short", range(1, 4)) == {"rank0-steps3-3.json.gz": {"work3"}}
    assert run_profiled(config, tmp_path / "late", range(9, 11)) == {}
    assert run_profiled(ProfileConfig(), tmp_path / "off", range(1, 4)) == {}
    assert "aten::sum" in (tmp_path / "whole" / "profile" / "rank0-steps3-4.txt").read_text()


def test_garbage_is_collected_on_schedule_only(monkeypatch):
    collections = []
    with GarbageCollector(GarbageConfig(interval=2)) as collector:
        collector.step(1)
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        monkeypatch.setattr(gc, "collect", collections.append)
        for step in (2, 3, 4):
            collector.step(step)
    assert collections == [1, 1] and gc.isenabled() and gc.get_freeze_count() == 0


def test_stopwatch_adds_phases_up(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr("rung.observe.clock.time.perf_counter", lambda: next(times))
    clock = Stopwatch()
    for _ in range(2):
        with clock("data"):
            pass
    assert clock.lap() == (20.0, {"data": 6.0})
    assert clock.lap() == (1.0, {})
