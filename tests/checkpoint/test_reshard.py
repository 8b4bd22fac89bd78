"""A checkpoint written again from another layout is the same state, and nothing of it is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoint.load_ranks import this_world
from law.workers import Workers

Rung = Callable[..., Any]
ZBV = ["parallel.tp=2", "parallel.pp=2", "parallel.pp_schedule=zbv"]


@pytest.fixture
def run(rung: Rung, tiny: list[str], tmp_path: Path) -> Path:
    """A run of one rank whose embedding is tied across the stages of a pipeline, with an optimizer of mixed state."""
    options = ["train.steps=1", "model.tie_word_embeddings=true", "optim=muon", "export.huggingface=false"]
    assert rung("train", *tiny, *options).status == 0
    return tmp_path / "run"


def reshard_here(*arguments: Any, **options: Any) -> list[str]:
    from rung.recipes.reshard import reshard_in

    return reshard_in(this_world(), *arguments, **options)


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "step-00000001" / "manifest.json").read_bytes())
    return found


def test_there_and_back(run: Path, rung: Rung, tiny: list[str], tmp_path: Path, workers: Workers) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    told = workers.run(4, reshard_here, str(run), str(there), ZBV)
    assert "on tp 2 × pp 2" in told[0][-1] and told[1:] == [[], [], []]
    assert rung("ckpt", "reshard", there, back).status == 0
    assert len({rung("ckpt", "digest", folder).out for folder in (run, there, back)}) == 1
    assert rung("ckpt", "verify", there).status == 0 and rung("ckpt", "diff", run, back).status == 0

    old, new = manifest(run / "checkpoints"), manifest(there)
    assert len(old["files"]) == 1 and len(new["files"]) == 4
    parallel = new["config"].pop("parallel")
    assert (parallel["tp"], parallel["pp"], parallel["dp_shard"], parallel["pp_schedule"]) == (2, 2, 1, "zbv")
    assert old["config"].pop("parallel")["tp"] == 1 and old["config"] == new["config"]
    assert all(old[key] == new[key] for key in ("progress", "fingerprints"))

    # Training goes on from there as from the run's own.
    more = ["train.steps=2", "model.tie_word_embeddings=true", "optim=muon", "export.huggingface=false"]
    for name, begin in (("a", run), ("b", there)):
        extra = [f"run.dir={tmp_path / name}", f"run.resume={begin}"]
        assert rung("train", *tiny, *more, *extra).status == 0
    assert rung("ckpt", "digest", tmp_path / "a").out == rung("ckpt", "digest", tmp_path / "b").out


def test_ranks_are_started(run: Path, rung: Rung, tmp_path: Path) -> None:
    """Outside a launcher; with an option between the settings, and a batch that this layout could not train on."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "rung.ckpt", "reshard", str(run), str(tmp_path / "new")]
    done = subprocess.run(
        [*command, "--model-only", "parallel.dp_shard=3"],
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    note, _, wrote = done.stdout.splitlines()
    assert note.startswith("note: ") and "global_batch_size=4 does not divide" in note
    assert f"wrote {tmp_path}/new/step-00000001" in wrote and wrote.endswith("on dp_shard 3")
    written = manifest(tmp_path / "new")
    assert len(written["files"]) == 3 and not any("/" in name for name in written["tensors"])
    model = [rung("ckpt", "digest", folder, "--model-only").out for folder in (run, tmp_path / "new")]
    assert model[0] == model[1]
    assert rung("ckpt", "reshard", tmp_path / "new", tmp_path / "again").status == 0  # holds no optimizer to miss
    assert rung("ckpt", "digest", tmp_path / "again").out == rung("ckpt", "digest", tmp_path / "new").out


def test_refusals(run: Path, rung: Rung, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    new = tmp_path / "new"
    cases: list[tuple[list[object], list[str]]] = [
        ([run, new, "model.dropout=0.1", "optim.lr=1"], ["model.dropout=0.1, optim.lr=1", "begin with parallel."]),
        ([run, new, "parallel.tq=2"], ["unknown key 'parallel.tq'", "parallel.tp"]),
        ([run, new, "parallel.tp=3", "parallel.pp=9"], ["tp=3 does not divide num_attention_heads", "pp=9"]),
        ([run, new, "parallel.tp=0"], ["tp=0"]),
        ([run, run / "checkpoints"], ["already holds step-00000001"]),
        ([run, run / "checkpoints", "parallel.tp=2"], ["already holds step-00000001"]),
        ([run, new / "step-00000001"], ["give the folder of checkpoints"]),
        ([run, tmp_path / "file"], ["is no folder"]),
        ([tmp_path / "nothing", new], ["holds no checkpoint"]),
    ]
    for arguments, parts in cases:
        result = rung("ckpt", "reshard", *arguments)
        assert result.status == 2 and result.err.count("rung: error: ") == 1, (arguments, result)
        assert all(part in result.err for part in parts), (arguments, result.err)
    assert not new.exists()


def test_nothing_is_lost_in_silence(run: Path, rung: Rung, tmp_path: Path) -> None:
    from rung.checkpoint import Reader, open_storage
    from rung.checkpoint.writer import BoxValues, Head, write_alone
    from rung.layout import Box

    def write(folder: str, extra: dict[str, str], config: dict[str, Any]) -> Path:
        """The run's checkpoint with copies of tensors under other names, and further settings."""
        with Reader.open(str(run)) as reader:
            known = reader.manifest
            sources = {name: name for name in known.tensors} | extra
            tensors = {name: known.tensors[source] for name, source in sources.items()}
            boxes = (
                BoxValues(name, one.shape, one.dtype, Box((0,) * len(one.shape), one.shape), reader.tensor(one.name))
                for name, one in tensors.items()
            )
            head = Head(known.progress, {**known.config, **config}, known.fingerprints, known.versions, 0)
            write_alone(open_storage(str(tmp_path / folder)), boxes, head)
            return tmp_path / folder

    same = write("same", {}, {})
    assert rung("ckpt", "verify", same).status == 0
    assert rung("ckpt", "digest", same).out == rung("ckpt", "digest", run).out
    more = write("more", {"router.weight": "norm.weight", "norm.weight/third": "norm.weight"}, {})
    for flags, lost in (([], "norm.weight/third, router.weight"), (["--model-only"], "router.weight")):
        result = rung("ckpt", "reshard", more, tmp_path / "new", *flags)
        assert result.status == 1 and result.err.endswith(f"nothing may be lost: {lost}\n")
        dist.destroy_process_group()  # a failure leaves it
    newer = write("newer", {}, {"magic": {"level": 3}})
    result = rung("ckpt", "reshard", newer, tmp_path / "new")
    assert result.status == 2 and "magic={'level': 3} is no setting" in result.err
    assert not (tmp_path / "new").exists()
