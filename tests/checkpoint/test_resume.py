"""Going on: on the same layout bit for bit, on any other with the same state, samples, losses and gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint.resume_ranks import keep_more, take_steps
from law.covering import Case
from law.harness import (
    NEUTRAL,
    SEQ_LEN,
    STEPS,
    TOLERANCE,
    Record,
    compare_steps,
    global_batch_size,
    legal,
    one_process,
    world_size,
)
from law.test_law import random_case
from law.workers import Workers

from rung.checkpoint import open_storage
from rung.data import DataConfig, open_data

LAYOUT = (
    *("dp_shard", "dp_replicate", "tensor", "pipeline", "context", "micro_batch_size", "accumulation"),
    *("recompute", "reshard", "defer_sync"),
)
"""Factors that may change between two parts of a run."""


def another_layout(case: Case, generator: random.Random) -> Case:
    """The same computation, spread otherwise."""
    while True:
        other = random_case(generator.randrange(10**9))
        other |= {name: case[name] for name in case if name not in LAYOUT} | {"compile": False}
        if legal(other) and global_batch_size(other) == global_batch_size(case):
            return other


def follow(cases: list[Case], corpus: Path, folder: Path, workers: Workers) -> tuple[Record, list[str], list[str]]:
    """One step on each layout; all that was done, digests of what was loaded and of what was saved."""
    whole, loaded, saved = Record(), [], []
    for step, case in enumerate(cases, 1):
        part, before, after = workers.run(world_size(case), take_steps, case, str(corpus), str(folder), step, step)[0]
        assert not part.problems
        whole.losses += part.losses
        whole.norms += part.norms
        whole.samples += part.samples
        whole.gradients += part.gradients
        whole.events += part.events
        loaded.append(before)
        saved.append(after)
    return whole, loaded, saved


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 200))])
def test_any_layout_goes_on_from_any_other(seed: int, corpus: Path, workers: Workers, tmp_path: Path) -> None:
    generator = random.Random(seed)
    first = random_case(generator.randrange(10**9)) | {"compile": False}
    cases = [first, another_layout(first, generator), another_layout(first, generator)]
    record, loaded, saved = follow(cases, corpus, tmp_path, workers)
    assert loaded[1:] == saved[:-1], "what a layout loads is not what another saved"
    truth = one_process(first, str(corpus))
    assert record.samples == truth.samples
    compare_steps(record, truth, TOLERANCE, STEPS)


def test_samples_are_read_exactly_once_when_the_data_ranks_change(
    corpus: Path, workers: Workers, tmp_path: Path
) -> None:
    base = NEUTRAL | {"micro_batch_size": 1, "dropout": 0.25}
    cases = [base | {"dp_shard": size, "accumulation": 24 // size} for size in (4, 2, 8, 3)]
    record, loaded, saved = follow(cases, corpus, tmp_path, workers)
    assert loaded[1:] == saved[:-1]
    order = open_data(DataConfig(name="corpus", paths=[str(corpus)], seq_len=SEQ_LEN), 7)
    assert record.samples == [sorted(order.sample_ids(24 * step, 24).tolist()) for step in range(4)]


def test_buffers_and_a_recipes_state_go_along(corpus: Path, workers: Workers, tmp_path: Path) -> None:
    first = NEUTRAL | {"dp_shard": 2}
    second = NEUTRAL | {"pipeline": "interleaved-2", "tensor": "2", "accumulation": 8}
    workers.run(2, keep_more, first, str(corpus), str(tmp_path), 1)
    found = workers.run(4, keep_more, second, str(corpus), str(tmp_path), 2)
    assert [rollouts for _, rollouts in found] == [7] * 4
    assert sorted(found[0][0] + found[-1][0]) == [0, 1, 2, 3, 4]


def test_on_an_object_store(rung: Callable[..., Any], tiny: list[str], s3_folder: str, tmp_path: Path) -> None:
    settings = [*tiny, f"checkpoint.dir={s3_folder}", "checkpoint.interval=1", "checkpoint.keep=2"]
    whole = rung("train", *settings, "export.huggingface=false")
    assert whole.status == 0, whole.err
    digest = rung("ckpt", "digest", s3_folder).out
    open_storage(s3_folder).retire(3)
    again = rung("train", *settings, "export.huggingface=false")
    assert again.status == 0 and "going on after step 2" in again.out, again.err
    assert rung("ckpt", "digest", s3_folder).out == digest
    assert open_storage(s3_folder).steps() == [2, 3]


@pytest.mark.parametrize("optim", ["spam", "stable_spam"])
def test_moments_of_subsets_and_averages_go_along(optim: str, corpus: Path, workers: Workers, tmp_path: Path) -> None:
    base = NEUTRAL | {"optim": optim, "fused_qkv": True, "micro_batch_size": 1}
    cases = [
        base | {"dp_shard": 3, "accumulation": 4},
        base | {"tensor": "4", "kv_heads": 12, "accumulation": 12},
        base | {"pipeline": "1f1b-2", "dp_shard": 2, "accumulation": 6},
    ]
    record, loaded, saved = follow(cases, corpus, tmp_path, workers)
    assert loaded[1:] == saved[:-1]
    truth = one_process(base | {"accumulation": 12}, str(corpus))
    compare_steps(record, truth, TOLERANCE, STEPS)
    assert record.events == truth.events


@pytest.mark.parametrize("optim", ["adamw", "muon", "spam", "stable_spam"])
def test_the_same_layout_goes_on_bit_for_bit(optim: str, corpus: Path, workers: Workers, tmp_path: Path) -> None:
    case = NEUTRAL | {"dp_shard": 2, "micro_batch_size": 1, "dropout": 0.25, "optim": optim, "tied": True}

    def run(folder: str, *parts: tuple[int, int]) -> tuple[list[Any], str]:
        done: list[Any] = []
        for first, last in parts:
            arguments = (case, str(corpus), str(tmp_path / folder), first, last)
            record, _, digest = workers.run(2, take_steps, *arguments)[0]
            done += zip(record.losses, record.norms, record.samples, strict=True)
        return done, digest

    whole = run("whole", (1, 4))
    assert run("parts", (1, 1), (2, 3), (4, 4)) == whole
