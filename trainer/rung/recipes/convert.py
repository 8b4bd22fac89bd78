"""Checkpoints become Hugging Face folders and the other way round, with one process, a tensor at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rung.checkpoint import CheckpointError, HuggingFaceFolder, Manifest, Reader, export_huggingface, open_storage
from rung.checkpoint.save import versions
from rung.checkpoint.storage import step_name
from rung.checkpoint.writer import BoxValues, Head, write_alone
from rung.config import choice_problem, compose, flatten, literal, nested
from rung.data import DataConfig, load_tokenizer
from rung.data.corpus import CorpusInfo
from rung.data.stdlib import cache_folder
from rung.errors import UserError
from rung.layout import Box
from rung.models import ModelConfig, parameter_shapes
from rung.recipes.config import NODES, Config, config_from
from rung.recipes.folder import NO_STRUCTURE
from rung.recipes.reshard import free_for

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["EXPORT_DTYPES", "IMPORT_DTYPES", "export_checkpoint", "import_huggingface"]

EXPORT_DTYPES = ("float32", "bfloat16", "float16")
IMPORT_DTYPES = ("float32", "float64")
"""What parameters are trained in."""
_WIDENED = {"float32": {"F16", "BF16", "F32"}, "float64": {"F16", "BF16", "F32", "F64"}}
"""What each of these holds without loss, by safetensors' names."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{letter}I": 2 ** (10 * power) for power, letter in enumerate("KMGT", 1)
}


def export_checkpoint(
    source: str,
    directory: str,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer: str | None = None,
    eos_id: int | None = None,
) -> list[str]:
    """Write the model of a checkpoint as a Hugging Face folder, which must not exist or be empty; returns what to tell.

    At most one shard and one tensor are held in memory. dtype: None keeps what is stored. tokenizer, eos_id: None takes
    those of the corpus that the checkpoint was trained on, where it is found on this machine.
    """
    UserError.raise_all(choice_problem("--dtype", dtype, EXPORT_DTYPES) if dtype is not None else [])
    max_shard_bytes = _num_bytes(max_shard_size)
    if eos_id is not None and eos_id < 0:
        raise UserError(f"--eos-id={eos_id} must be 0 or more")
    with Reader.open(source) as reader:
        manifest = reader.manifest
        config = config_from(manifest.config)
        shapes = parameter_shapes(config.model)
        _check_model(reader, shapes)
        stored = sorted({manifest.tensors[name].dtype for name in shapes})
        if dtype is None and len(stored) > 1:
            raise UserError(f"{reader.where()} holds parameters of {' and '.join(stored)}; say --dtype")
        notes, path, found_eos_id = _tokenizer(config.data, manifest, tokenizer)
        eos_id = found_eos_id if eos_id is None else eos_id
        if path is not None and eos_id is None:
            notes.append("note: nothing says which token ends a document; --eos-id does")
        kind: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        tensors = _converted(reader, list(shapes), kind)
        export_huggingface(directory, config.model, tensors, path, eos_id, max_shard_bytes)
    files = sorted(Path(directory).glob("*.safetensors"))
    size = f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB of {dtype or stored[0]}"
    shards = "1 file" if len(files) == 1 else f"{len(files)} shards"
    return [*notes, f"wrote {directory}: {size} in {shards}, from {reader.where()}"]


def _check_model(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless a checkpoint's parameters are those of the model that its settings describe."""
    tensors = reader.manifest.tensors
    here = {name: tensor.shape for name, tensor in tensors.items() if "/" not in name}
    problems = [f"it lacks {name}" for name in shapes if name not in here]
    problems += [f"it holds {name}, which the model does not have" for name in here if name not in shapes]
    problems += [
        f"{name} has shape {list(here[name])}, and must have {list(shape)}"
        for name, shape in shapes.items()
        if name in here and here[name] != shape
    ]
    if problems:
        more = [f"and {len(problems) - 8} problems more"] if len(problems) > 8 else []
        text = "; ".join(problems[:8] + more)
        raise CheckpointError(f"{reader.where()} is not the model that its settings describe: {text}")


def _converted(reader: Reader, names: Sequence[str], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        stored = reader.manifest.tensors[name]
        tensor = torch.from_numpy(reader.tensor(name)).view(getattr(torch, stored.dtype)).view(stored.shape)
        if dtype is not None and dtype != tensor.dtype:
            narrow = tensor.to(dtype)
            if narrow.isinf().any() and not tensor.isinf().any():
                raise UserError(f"{name} has numbers too large for {str(dtype)[6:]}; use --dtype bfloat16 or float32")
            tensor = narrow
            del narrow
        yield name, tensor
        del tensor  # before the next


def _tokenizer(data: DataConfig, manifest: Manifest, given: str | None) -> tuple[list[str], Path | None, int | None]:
    """What to tell; the tokenizer.json, if there is one; the token that ends a document, if that is known."""
    wanted = manifest.fingerprints.get("tokenizer")
    path, eos_id = (None, None) if wanted is None else _of_corpus(data, wanted)
    if given is not None:
        path = Path(given)
        load_tokenizer(path)  # a wrong one is told before anything is written
        if wanted is not None and _sha256(path) != wanted:
            return [f"note: {given} is another tokenizer than the checkpoint was trained with"], path, None
        return [], path, eos_id
    if path is not None:
        return [], path, eos_id
    why = "the checkpoint knows of none" if wanted is None else "that of the checkpoint's corpus is not found here"
    return [f"note: no tokenizer.json is written, as {why}; --tokenizer PATH gives one"], None, None


def _of_corpus(data: DataConfig, wanted: str) -> tuple[Path | None, int | None]:
    """The tokenizer of this sha256 and the end-of-document token, from the corpora that a run has read."""
    folders = sorted(cache_folder().glob("python_stdlib-*")) if data.name == "python_stdlib" else map(Path, data.paths)
    for folder in folders:
        path = folder / "tokenizer.json"
        if (folder / "corpus.json").is_file() and path.is_file() and _sha256(path) == wanted:
            return path, CorpusInfo.read(folder / "corpus.json").eos_id
    if data.tokenizer and Path(data.tokenizer).is_file() and _sha256(Path(data.tokenizer)) == wanted:
        return Path(data.tokenizer), None
    return None, None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _num_bytes(text: str) -> int:
    """Bytes of a size as people write it: 5GB, 500MB, 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise UserError(f"--max-shard-size={text} is no size; write it as 5GB, 500MB or 2GiB")
    return size


def import_huggingface(
    directory: str, destination: str, *, dtype: str = "float32", fused_qkv: bool = False
) -> list[str]:
    """Write the weights in a Hugging Face folder as a checkpoint of step 0 that holds a model alone; returns what to
    tell.

    A tensor at a time is held in memory. Settings other than the model's are the defaults; the tokenizer's fingerprint
    is noted. fused_qkv: query, key and value projections become one, for runs with model.fused_qkv.
    """
    UserError.raise_all(choice_problem("--dtype", dtype, IMPORT_DTYPES))
    storage = open_storage(destination)
    free_for(storage, 0)
    folder = HuggingFaceFolder.open(directory)
    UserError.raise_all(
        f"{name} is {kind}, which {dtype} does not hold without loss"
        + ("; use --dtype float64" if kind == "F64" else "; dequantize the model first")
        for name, kind in folder.dtypes.items()
        if kind not in _WIDENED[dtype]
    )
    config: Config = compose(Config, [], nodes=NODES)
    config.model = folder.config
    config.model.fused_qkv = fused_qkv
    config.precision = dtype
    config.data.seq_len = min(config.data.seq_len, folder.config.max_position_embeddings)
    tokenizer = folder.path / "tokenizer.json"
    head = Head(
        progress={"step": 0, "consumed_samples": 0},
        config=nested(config),
        fingerprints={"corpus": None, "tokenizer": _sha256(tokenizer) if tokenizer.is_file() else None},
        versions=versions(),
        keep=0,
    )
    size = write_alone(storage, _boxes(folder, config.model, getattr(torch, dtype)), head)
    where = storage.where(step_name(0))
    return [
        f"wrote {where}: {size / 1e6:,.1f} MB of {dtype}, from {directory}",
        f"train from it: rung train run.resume={storage.address} {_settings(config.model)} and your data",
    ]


def _settings(model: ModelConfig) -> str:
    """The overrides that describe a model, whatever preset they are added to."""
    settings = flatten({"model": nested(model)})
    return " ".join(f"{key}={literal(value)}" for key, value in settings.items() if key not in NO_STRUCTURE)


def _boxes(folder: HuggingFaceFolder, config: ModelConfig, dtype: torch.dtype) -> Iterator[BoxValues]:
    """The folder's tensors as boxes of the Decoder's."""
    for name, shape in parameter_shapes(config).items():
        parts = [name.replace("qkv_proj", f"{letter}_proj") for letter in "qkv"] if "qkv_proj" in name else [name]
        first = 0
        for part in parts:
            tensor = folder.tensor(part).to(dtype).contiguous()
            box = Box((first, *(0 for _ in shape[1:])), tuple(tensor.shape))
            values: Any = tensor.view(-1).view(torch.uint8).numpy()
            first += tensor.shape[0]
            del tensor
            yield BoxValues(name, shape, str(dtype).removeprefix("torch."), box, values)
            del values
