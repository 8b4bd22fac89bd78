"""Checkpoints become Hugging Face folders and the other way round, to the bit and in little memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rung.checkpoint import Reader, load_huggingface, open_storage
from rung.checkpoint.writer import BoxValues, Head, write_alone
from rung.config import flatten, nested
from rung.layout import Box
from rung.models import Decoder, ModelConfig, build
from rung.recipes.config import Config, config_from, load_config

Rung = Callable[..., Any]

LLAMA = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, head_dim=12, rope_theta=1e6)
CONFIGS = {
    "llama": LLAMA,
    "llama tied fused": dataclasses.replace(LLAMA, tie_word_embeddings=True, fused_qkv=True),
    "qwen3 tied": dataclasses.replace(QWEN3, tie_word_embeddings=True),
    "qwen3 fused": dataclasses.replace(QWEN3, fused_qkv=True),
}


def write(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32, **more: Any) -> Decoder:
    """A checkpoint of a model alone; the model."""
    torch.manual_seed(3)
    model = build(config).to(dtype)
    name = str(dtype).removeprefix("torch.")
    boxes = [
        BoxValues(key, tuple(p.shape), name, Box((0,) * p.ndim, tuple(p.shape)), p.detach().numpy())
        for key, p in model.named_parameters()
    ]
    head = Head({"step": 0}, {**nested(Config(model=config)), **more}, {"corpus": None, "tokenizer": None}, {}, 0)
    write_alone(open_storage(str(folder)), boxes, head)
    return model


def digest(rung: Rung, folder: Path) -> str:
    result = rung("ckpt", "digest", "--model-only", folder)
    assert result.status == 0 and rung("ckpt", "verify", folder).status == 0
    text: str = result.out
    return text


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_out_and_in(config: ModelConfig, rung: Rung, tmp_path: Path) -> None:
    """transformers computes the same logits from an export, and an import has every bit of the checkpoint."""
    from transformers import AutoModelForCausalLM

    model = write(tmp_path / "a", config)
    told = rung("ckpt", "export", tmp_path / "a", tmp_path / "hf", "--max-shard-size", "20KB")
    assert told.status == 0 and "shards, from" in told.out and "no tokenizer.json is written" in told.out
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 22_000 for shard in shards)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert float((theirs(tokens).logits - model(tokens)).abs().max()) <= 1e-6

    flags = ["--fused-qkv"] if config.fused_qkv else []
    told = rung("ckpt", "import", tmp_path / "hf", tmp_path / "b", *flags)
    assert told.status == 0 and f"wrote {tmp_path}/b/step-00000000" in told.out
    assert digest(rung, tmp_path / "a") == digest(rung, tmp_path / "b")
    with Reader.open(str(tmp_path / "b")) as reader:
        assert config_from(reader.manifest.config).model == config
        assert reader.manifest.progress == {"step": 0, "consumed_samples": 0}


def test_dtypes(rung: Rung, tmp_path: Path) -> None:
    """What is stored stays unless another dtype is asked for; an import widens, and never narrows."""
    model = write(tmp_path / "a", LLAMA)
    assert rung("ckpt", "export", tmp_path / "a", tmp_path / "bf16", "--dtype", "bfloat16").status == 0
    exported = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    for dtype in ("float32", "float64"):
        assert rung("ckpt", "import", tmp_path / "bf16", tmp_path / dtype, "--dtype", dtype).status == 0
        with Reader.open(str(tmp_path / dtype)) as reader:
            assert reader.manifest.config["precision"] == dtype
            stored = torch.from_numpy(reader.tensor("lm_head.weight")).view(getattr(torch, dtype))
        assert torch.equal(stored, model.lm_head.weight.detach().bfloat16().to(stored.dtype).view(-1))
    assert rung("ckpt", "export", tmp_path / "float64", tmp_path / "f64").status == 0
    assert load_huggingface(tmp_path / "f64", torch.float64)[0] == LLAMA
    refused(rung("ckpt", "import", tmp_path / "f64", tmp_path / "new"), "is F64", "--dtype float64")
    refused(rung("ckpt", "import", tmp_path / "f64", tmp_path / "new", "--dtype", "bfloat16"), "--dtype=")


def refused(result: Any, *parts: str, status: int = 2) -> None:
    assert result.status == status and result.err.count("rung: error: ") == 1 and not result.out, result
    assert all(part in result.err for part in parts), (parts, result.err)


def test_wrong_exports(rung: Rung, tmp_path: Path) -> None:
    write(tmp_path / "a", LLAMA)
    export = ["ckpt", "export", tmp_path / "a", tmp_path / "hf"]
    refused(rung(*export, "--dtype", "int8"), "--dtype=int8 is not one of")
    refused(rung(*export, "--max-shard-size", "big"), "--max-shard-size=big", "5GB")
    refused(rung(*export, "--tokenizer", tmp_path / "no.json"), "no.json")
    refused(rung("ckpt", "export", tmp_path / "a", tmp_path), "not an empty folder")
    write(tmp_path / "b", LLAMA, model=nested(QWEN3))
    refused(rung("ckpt", "export", tmp_path / "b", tmp_path / "hf"), "layers.0.self_attn.q_norm.weight", status=1)
    assert not (tmp_path / "hf").exists()


def test_damaged_folders(rung: Rung, tmp_path: Path) -> None:
    """Whatever is wrong is found before anything is written."""
    write(tmp_path / "a", LLAMA)
    assert rung("ckpt", "export", tmp_path / "a", tmp_path / "good", "--max-shard-size", "20KB").status == 0
    shard = "model-00002-of-"
    name = next(path.name for path in (tmp_path / "good").iterdir() if path.name.startswith(shard))

    def without_one(path: Path) -> None:
        tensors = load_file(path)
        left_out = sorted(tensors)[0]
        tensors["model.layers.0.mlp.bias"] = tensors.pop(left_out)
        save_file(tensors, path)

    def quantized(path: Path) -> None:
        save_file({key: tensor.to(torch.int8) for key, tensor in load_file(path).items()}, path)

    spoil: list[tuple[Callable[[Path], Any], str, tuple[str, ...]]] = [
        (Path.unlink, name, (f"{name} is missing",)),
        (lambda path: os.truncate(path, path.stat().st_size - 5), name, (f"{name} is damaged",)),
        (lambda path: os.truncate(path, 5), name, (f"{name} is damaged",)),
        (without_one, name, ("2 problems", "mlp.bias, which this model does not have", "lacks model.layers.0")),
        (quantized, name, ("is I8", "dequantize")),
        (lambda path: path.write_text("{"), "model.safetensors.index.json", ("index.json cannot be read",)),
        (lambda path: path.write_text("{}"), "model.safetensors.index.json", ("has no weight_map",)),
        (lambda path: path.write_text("{"), "config.json", ("config.json cannot be read",)),
        (lambda path: path.write_text('{"model_type": "gpt2"}'), "config.json", ("model_type='gpt2'",)),
        (Path.unlink, "config.json", ("has no config.json",)),
    ]
    for number, (action, file, parts) in enumerate(spoil):
        folder = tmp_path / f"bad-{number}"
        shutil.copytree(tmp_path / "good", folder)
        action(folder / file)
        refused(rung("ckpt", "import", folder, tmp_path / "new"), *parts)
    assert not (tmp_path / "new").exists()
    assert rung("ckpt", "import", tmp_path / "good", tmp_path / "new").status == 0
    refused(rung("ckpt", "import", tmp_path / "good", tmp_path / "new"), "already holds step-00000000")


MODEL = ["model=tiny", "model.num_key_value_heads=2", "model.tie_word_embeddings=true"]


def test_training_from_an_import(rung: Rung, tiny: list[str], tmp_path: Path) -> None:
    """A run's export, tokenizer and all, becomes the beginning of another run with other settings."""
    assert rung("train", *tiny, *MODEL, "train.steps=1", "export.huggingface=false").status == 0
    told = rung("ckpt", "export", tmp_path / "run", tmp_path / "hf")
    assert told.status == 0 and "note" not in told.out
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["eos_token"]
    assert rung("sample", tmp_path / "hf", "--prompt", "def", "--tokens", 3).status == 0
    assert rung("ckpt", "import", tmp_path / "hf", tmp_path / "new").status == 0

    other = [*tiny, "export.huggingface=false", "optim.lr=0", "train.steps=2", "run.seed=7", "data.seq_len=8"]
    begin = [f"run.dir={tmp_path / 'next'}", f"run.resume={tmp_path / 'new'}"]
    refused_run = rung("train", *other, *begin, "model.tie_word_embeddings=true", "model.hidden_size=48")
    assert refused_run.status == 2 and "the weights of another model" in refused_run.err
    assert "model.hidden_size: " in refused_run.err and "data." not in refused_run.err
    told = rung("train", *other, *MODEL, *begin, "model.dropout=0.1", "optim=muon")
    assert told.status == 0, told.err
    lines = [json.loads(line) for line in (tmp_path / "next" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert digest(rung, tmp_path / "next") == digest(rung, tmp_path / "new")  # at a learning rate of zero


def test_on_an_object_store(rung: Rung, s3_folder: str, tmp_path: Path) -> None:
    """Imported there, resharded there: a model alone has no optimizer that could be missing."""
    write(tmp_path / "a", LLAMA)
    assert rung("ckpt", "export", tmp_path / "a", tmp_path / "hf").status == 0
    for verb in (["import", tmp_path / "hf", f"{s3_folder}/one"], ["reshard", f"{s3_folder}/one", f"{s3_folder}/two"]):
        told = rung("ckpt", *verb)
        assert told.status == 0, told.err
    digests = [rung("ckpt", "digest", f"{s3_folder}/{name}").out for name in ("one", "two")]
    assert digests[0] == digests[1] != ""
    refused(rung("ckpt", "import", tmp_path / "hf", f"{s3_folder}/two"), "already holds step-00000000")


def test_configuration_from_a_manifest() -> None:
    for overrides in (["optim=muon", "optim.lr=0.5", "checkpoint.async=false"], ["model=llama_60m"]):
        config, _ = load_config(overrides, 1)
        found = config_from(json.loads(json.dumps(nested(config))))
        assert found == config and type(found.optim) is type(config.optim) and flatten(found) == flatten(config)
    assert config_from({"train": {"steps": 3}}).train.steps == 3
    with pytest.raises(ValueError, match=r"2 problems:(.|\n)*model\.wings=2 is no setting(.|\n)*magic=1"):
        config_from({"model": {"wings": 2}, "magic": 1})


MEASURE = """
import sys
from rung.recipes.convert import export_checkpoint, import_huggingface
import hydra.core.global_hydra, safetensors.torch, torch
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
from rung.recipes.config import load_config
load_config([], 1)
small, model, out = sys.argv[1:]
def both(source, to):
    export_checkpoint(source, f"{to}/hf", max_shard_size="8MB", dtype="bfloat16")
    yield "export"
    import_huggingface(f"{to}/hf", f"{to}/in")
    yield "import"
list(both(small, f"{out}/small"))  # what is loaded on first use
steps = both(model, f"{out}/large")
for _ in range(2):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins again
    before = status("VmRSS")
    name = next(steps)
    print(name, status("VmHWM") - before)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Of 67 MB, in tensors of 4 MB at most and shards of 8 MB: a shard, a tensor and a block or two, not a model."""
    large = ModelConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8
    )
    write(tmp_path / "model", large)
    write(tmp_path / "small", LLAMA)
    size = sum(file.stat().st_size for file in (tmp_path / "model").rglob("*.bin"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "model", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    peaks = {name: int(peak) for name, peak in (line.split() for line in done.stdout.splitlines())}
    assert size > 60e6 and peaks["export"] < 32e6 and peaks["import"] < 24e6, peaks
