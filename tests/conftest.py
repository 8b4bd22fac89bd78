"""Shared fixtures: a small corpus, and the command line called in this process."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from law.workers import Workers

WORDS = ["def", "return", "layout", "answer", "rank", "(x)", ":", "\n", "    ", "=", "sum", "count", "never", "ε"]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short text files."""
    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(5)
    for index in range(60):
        text = " ".join(generator.choice(WORDS) for _ in range(generator.randint(2, 60)))
        (folder / f"{index:03}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of many short documents, with a held-out split and its uneven tail; 300 tokens at most."""
    from rung.data import build_corpus

    out = tmp_path_factory.mktemp("corpus") / "small"
    build_corpus([text_folder], out, vocab_size=300, valid_fraction=0.08, quiet=True)
    return out


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """One pool of ranks for all tests: starting processes that import torch takes longer than most cases."""
    pool = Workers()
    yield pool
    pool.close()


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> list[str]:
    """Overrides of a run that takes a second."""
    return [
        "model=tiny",
        "data=corpus",
        f"data.paths=[{corpus}]",
        "data.seq_len=16",
        "train.steps=3",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "schedule=constant",
        "device=cpu",
        f"run.dir={tmp_path / 'run'}",
    ]


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A run that failed leaves its process group, as it must where other ranks may be gone; tests go on."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@dataclass
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def rung(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call ``rung`` with arguments in this process."""
    from rung.cli import main

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(status, out, err)

    return call
