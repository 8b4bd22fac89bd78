"""Hugging Face model folders: written from a stream of tensors, read into a Decoder.

A folder holds config.json, generation_config.json, safetensors shards (with an index when there are several) and, if
there is a tokenizer, tokenizer.json and tokenizer_config.json. transformers is not needed to write or read it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rung.errors import UserError
from rung.models import Decoder, ModelConfig, build, parameter_shapes
from rung.models.huggingface import (
    from_huggingface_config,
    from_huggingface_name,
    to_huggingface_config,
    to_huggingface_name,
)

__all__ = ["HuggingFaceFolder", "export_huggingface", "load_huggingface"]

_INDEX = "model.safetensors.index.json"


def export_huggingface(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_json: Path | None = None,
    eos_id: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the folder ``directory``, which must not exist yet or be empty; it appears complete or not at all.

    tensors: (name, CPU tensor) of every parameter, all of one dtype, under the Decoder's names and in any order; the
    stream is consumed once and at most one shard is held in memory. tokenizer_json: a file of the ``tokenizers``
    library. eos_id: the id that ends a document, if any. max_shard_bytes: only a shard of one tensor may be larger.
    """
    if config.fused_qkv:
        tensors, config = _separate(tensors, config), dataclasses.replace(config, fused_qkv=False)
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists and is not an empty folder; remove it or choose another")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes a private folder
        dtype = _write_shards(temporary, config, tensors, max_shard_bytes)
        dtype_name = str(dtype).removeprefix("torch.")
        _write_json(temporary / "config.json", to_huggingface_config(config, dtype=dtype_name, eos_id=eos_id))
        _write_json(temporary / "generation_config.json", {"bos_token_id": None, "eos_token_id": eos_id})
        if tokenizer_json is not None:
            shutil.copyfile(tokenizer_json, temporary / "tokenizer.json")
            _write_json(temporary / "tokenizer_config.json", _tokenizer_config(config, tokenizer_json, eos_id))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        os.replace(temporary, target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _separate(tensors: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Query, key and value projections of their own, as transformers has them."""
    keys = config.num_key_value_heads * config.head_dim
    for name, tensor in tensors:
        if "qkv_proj" not in name:
            yield name, tensor
            continue
        parts = tensor.split([config.num_attention_heads * config.head_dim, keys, keys])
        yield from (
            (name.replace("qkv_proj", f"{letter}_proj"), part) for letter, part in zip("qkv", parts, strict=True)
        )


def _write_shards(
    folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> torch.dtype:
    """Write the weights and, if there are several shards, their index; return the tensors' dtype."""
    missing = parameter_shapes(config)
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    shard_bytes = total_bytes = 0
    dtype: torch.dtype | None = None

    def flush() -> None:
        # How many shards there will be is not known yet, so names are made final at the end.
        nonlocal shard_bytes
        path = folder / f"{len(shards)}.partial"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # safetensors makes a private file
        shards.append(list(shard))
        shard.clear()
        shard_bytes = 0

    for name, tensor in tensors:
        shape = missing.pop(name, None)
        if shape is None:
            raise ValueError(f"{name} is not a parameter of this model, or came twice")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this model needs {shape}")
        dtype = dtype or tensor.dtype
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} where the tensors before it are {dtype}")
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        shard[to_huggingface_name(name)] = tensor.detach().contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if missing or dtype is None:
        raise ValueError(f"missing parameters: {', '.join(missing)}")
    flush()

    if len(shards) == 1:
        (folder / "0.partial").rename(folder / "model.safetensors")
        return dtype
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.partial").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    _write_json(folder / _INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return dtype


def _tokenizer_config(config: ModelConfig, tokenizer_json: Path, eos_id: int | None) -> dict[str, Any]:
    from tokenizers import Tokenizer

    result: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    if eos_id is not None:
        eos_token = Tokenizer.from_file(str(tokenizer_json)).id_to_token(eos_id)
        if eos_token is None:
            raise UserError(f"eos_id={eos_id} is not a token of {tokenizer_json}")
        result["eos_token"] = eos_token
    return result


def load_huggingface(
    directory: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[ModelConfig, Decoder]:
    """The config and the Decoder of a folder of safetensors, in ``dtype`` on ``device``, in training mode."""
    folder = HuggingFaceFolder.open(directory)
    with torch.device("meta"):
        model = build(folder.config)
    model.to(dtype).to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(folder.tensor(name))
    return folder.config, model


@dataclass(frozen=True)
class HuggingFaceFolder:
    """The model in a folder: its settings, and its weights by the Decoder's names, read when they are asked for."""

    path: Path
    config: ModelConfig
    dtypes: Mapping[str, str]
    """Of each weight, as safetensors calls it: F32, BF16 ..."""
    _places: Mapping[str, tuple[Path, str]]
    """Of each weight: its file, and its name there."""

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> HuggingFaceFolder:
        """Read the settings and the headers of the weights.

        Raises UserError with everything that is missing, damaged, too much or of another shape.
        """
        folder = Path(directory)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json; a Hugging Face model folder is needed")
        config = from_huggingface_config(_read_json(folder / "config.json"))
        shapes = parameter_shapes(config)
        dtypes: dict[str, str] = {}
        places: dict[str, tuple[Path, str]] = {}
        problems: list[str] = []
        damaged = False
        for path in _weight_files(folder):
            try:
                with safe_open(path, framework="pt") as weights:
                    headers = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - not a dict
                    found = {name: (tuple(at.get_shape()), str(at.get_dtype())) for name, at in headers.items()}
            except (SafetensorError, OSError) as error:
                problems.append(f"{path} is damaged: {error}")
                damaged = True
                continue
            for theirs, (shape, dtype) in found.items():
                name = from_huggingface_name(theirs)
                if (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith("rotary_emb.inv_freq"):
                    continue  # a second copy of the embedding table; a buffer of old versions
                if name not in shapes:
                    problems.append(f"{folder} holds {theirs}, which this model does not have")
                    continue
                if name in places:
                    problems.append(f"{theirs} stands both in {places[name][0]} and in {path}")
                if shape != shapes[name]:
                    problems.append(f"{path}: {theirs} has shape {shape}; config.json asks for {shapes[name]}")
                dtypes[name], places[name] = dtype, (path, theirs)
        if not damaged:  # where a file cannot be read, all that it holds is missing
            missing = sorted(shapes.keys() - places.keys())
            problems += [f"{folder} lacks {to_huggingface_name(name)}" for name in missing]
        UserError.raise_all(problems)
        return cls(folder, config, dtypes, places)

    def tensor(self, name: str) -> Tensor:
        """A weight, on the CPU, as it is stored. Its memory is the file's: let go of it before the next."""
        path, theirs = self._places[name]
        with safe_open(path, framework="pt") as weights:
            tensor: Tensor = weights.get_tensor(theirs)
        return tensor


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(_read_json(folder / _INDEX)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / _INDEX} is damaged: it has no weight_map of names and files") from error
    else:
        names = ["model.safetensors"]
    paths = [folder / name for name in names]
    UserError.raise_all(f"{path} is missing; only safetensors can be read" for path in paths if not path.is_file())
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _flush(path: Path) -> None:
    """Have the file or folder on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
