"""What a checkpoint is on disk: the manifest, as data. Importing this needs no torch.

A checkpoint is a folder of raw files and a ``manifest.json`` that says which box of which logical tensor lies where in
them, what every 4 MiB of them hash to, and what each tensor is worth as a whole, whoever wrote it (see ``digest``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np
import xxhash

from rung.checkpoint.digest import Lanes, hex_digest
from rung.errors import CheckpointError, NewerCheckpointError
from rung.layout import Box

__all__ = [
    "ALIGNMENT",
    "BLOCK_BYTES",
    "SCHEMA_VERSION",
    "CheckpointError",
    "Manifest",
    "Part",
    "PartTensor",
    "StoredBox",
    "StoredFile",
    "StoredTensor",
    "block_digest",
    "is_optimizer_state",
    "item_bytes",
    "merge",
    "misplaced",
    "state_digest",
    "tile",
]

SCHEMA_VERSION = 1
BLOCK_BYTES = 4 * 2**20
"""What is hashed, read and verified at once."""
ALIGNMENT = 64
"""Every box begins at a multiple of this: a cache line, and a multiple of every item."""

_ITEM_BYTES = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
}


def item_bytes(dtype: str) -> int:
    """Bytes of an element of a dtype by torch's name, as ``bfloat16``."""
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"dtype {dtype!r} is not one that checkpoints hold: {', '.join(_ITEM_BYTES)}")
    return _ITEM_BYTES[dtype]


def is_optimizer_state(name: str) -> bool:
    """Whether a tensor is optimizer state, ``parameter/state``, and no part of the model."""
    return "/" in name


def block_digest(data: Any) -> str:
    """xxh3-128 of bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


class StoredBox(NamedTuple):
    """Where a box of a tensor lies: its elements, row by row, little-endian, from ``offset`` on in ``file``."""

    box: Box
    file: str
    offset: int


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor as it is stored: its boxes tile it exactly once."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As torch calls it, without ``torch.``."""
    digest: str
    """Of its bits by logical place, whichever boxes they are stored in (``rung.checkpoint.digest``)."""
    boxes: tuple[StoredBox, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return prod(self.shape) * item_bytes(self.dtype)


class StoredFile(NamedTuple):
    """A file of a checkpoint: its size in bytes and the ``block_digest`` of each BLOCK_BYTES of it."""

    size: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """All that is known of a checkpoint without opening its data."""

    progress: Mapping[str, Any]
    """How far the run had come: step, consumed_samples, and what a recipe adds. Part of the state."""
    config: Mapping[str, Any]
    """The settings of the run that wrote it, nested as in resolved.yaml."""
    fingerprints: Mapping[str, str | None]
    """Of the corpus and the tokenizer."""
    versions: Mapping[str, str]
    """Of Rung and torch."""
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, StoredFile]
    """By name relative to the manifest's folder."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.progress["step"])

    @property
    def has_optimizer_state(self) -> bool:
        """Whether it holds more than a model."""
        return any(map(is_optimizer_state, self.tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of all logical elements."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def digest(self) -> str:
        """32 hex digits that name the logical state: progress, and each tensor's name, dtype, shape and bits."""
        return state_digest(self.tensors.values(), self.progress)

    def to_json(self) -> bytes:
        """The content of ``manifest.json``; its first entry is a checksum of the rest."""
        body = {
            "schema_version": SCHEMA_VERSION,
            "digest": self.digest,
            "progress": self.progress,
            "config": self.config,
            "fingerprints": self.fingerprints,
            "versions": self.versions,
            "files": _files_json(self.files),
            "tensors": {name: _tensor_json(tensor) for name, tensor in sorted(self.tensors.items())},
        }
        text = _dump(body)
        return _first_line(text) + text[1:]

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Manifest:
        """Read what ``to_json`` wrote. Raises CheckpointError for damage or a newer schema; names ``where``."""
        # The first line stays as it is in every later schema, so that damage is never taken for something newer.
        head, _, rest = data.partition(b"\n")
        if head + b"\n" != _first_line(b"{" + rest):
            raise CheckpointError(f"{where} is damaged: its content does not match its checksum")
        body = json.loads(data)
        version = body["schema_version"]
        if version not in range(1, SCHEMA_VERSION + 1):
            raise NewerCheckpointError(
                f"{where} has schema version {version}; this Rung reads 1 to {SCHEMA_VERSION}: install a newer one"
            )
        try:
            return cls(
                progress=body["progress"],
                config=body["config"],
                fingerprints=body["fingerprints"],
                versions=body["versions"],
                tensors={name: _tensor(name, entry) for name, entry in body["tensors"].items()},
                files=_files(body["files"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where} is no manifest of schema {version}: {error!r}") from error


def state_digest(tensors: Iterable[StoredTensor], progress: Mapping[str, Any]) -> str:
    """See ``Manifest.digest``."""
    parts = sorted([tensor.name, tensor.dtype, list(tensor.shape), tensor.digest] for tensor in tensors)
    stored = json.loads(json.dumps(progress))  # keys that are numbers come back as text, which sorts otherwise
    return block_digest(json.dumps([parts, stored], sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True)
class PartTensor:
    """What one writer wrote of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    lanes: Lanes
    """The sum over its boxes, from which the tensor's digest is made."""
    boxes: tuple[StoredBox, ...]


@dataclass(frozen=True)
class Part:
    """What one writer wrote."""

    files: Mapping[str, StoredFile]
    tensors: Mapping[str, PartTensor] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The content of ``part-*.json``."""
        body = {
            "files": _files_json(self.files),
            "tensors": {
                name: {
                    "shape": tensor.shape,
                    "dtype": tensor.dtype,
                    "lanes": tensor.lanes,
                    "boxes": _boxes_json(tensor.boxes),
                }
                for name, tensor in self.tensors.items()
            },
        }
        return _dump(body)

    @classmethod
    def from_json(cls, data: bytes) -> Part:
        """Read what ``to_json`` wrote."""
        body = json.loads(data)
        return cls(
            _files(body["files"]),
            {
                name: PartTensor(
                    tuple(entry["shape"]),
                    entry["dtype"],
                    (entry["lanes"][0], entry["lanes"][1]),
                    _boxes(entry["boxes"], len(entry["shape"])),
                )
                for name, entry in body["tensors"].items()
            },
        )


def merge(
    parts: Sequence[Part],
    *,
    progress: Mapping[str, Any],
    config: Mapping[str, Any],
    fingerprints: Mapping[str, str | None],
    versions: Mapping[str, str],
) -> Manifest:
    """The manifest of what several writers wrote.

    Raises CheckpointError where they disagree about a tensor, their boxes do not tile it exactly once, or do not lie in
    the files: nothing that could be loaded wrong is ever committed.
    """
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    files: dict[str, StoredFile] = {}
    for part in parts:
        problems += [f"{name}: two writers wrote it" for name in part.files if name in files]
        files |= part.files
    by_name: dict[str, list[PartTensor]] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            by_name.setdefault(name, []).append(tensor)
    for name, found in by_name.items():
        shape, dtype = found[0].shape, found[0].dtype
        boxes = tuple(stored for tensor in found for stored in tensor.boxes)
        if any((tensor.shape, tensor.dtype) != (shape, dtype) for tensor in found):
            kinds = {f"{tensor.dtype} {list(tensor.shape)}" for tensor in found}
            problems.append(f"{name}: writers disagree about what it is: {', '.join(sorted(kinds))}")
        elif not tile([stored.box for stored in boxes], shape):
            problems.append(f"{name}: the boxes written do not make up its shape {list(shape)} exactly once")
        elif outside := [where for stored in boxes if (where := misplaced(stored, dtype, files))]:
            problems += [f"{name}: {where}" for where in outside]
        else:
            lanes = (sum(tensor.lanes[0] for tensor in found), sum(tensor.lanes[1] for tensor in found))
            tensors[name] = StoredTensor(name, shape, dtype, hex_digest(lanes), boxes)
    if problems:
        raise CheckpointError("; ".join(problems))
    return Manifest(progress, config, fingerprints, versions, tensors, files)


def misplaced(stored: StoredBox, dtype: str, files: Mapping[str, StoredFile]) -> str:
    """What is wrong about where a box lies; empty if nothing."""
    name, first = stored.file, stored.offset
    last = first + stored.box.numel * item_bytes(dtype)
    if name not in files:
        return f"a box lies in {name}, which is no file of this checkpoint"
    if first < 0 or last > files[name].size:
        return f"a box lies in bytes {first} to {last} of {name}, which has {files[name].size}"
    return f"a box begins at byte {first} of {name}, no multiple of {ALIGNMENT}" if first % ALIGNMENT else ""


def tile(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Whether boxes cover every element of ``shape`` exactly once."""
    inside = all(len(box.sizes) == len(shape) for box in boxes) and all(
        offset >= 0 and offset + size <= whole
        for box in boxes
        for offset, size, whole in zip(box.offsets, box.sizes, shape, strict=True)
    )
    if not inside or sum(box.numel for box in boxes) != prod(shape):
        return False
    return not _overlap(boxes)


def _overlap(boxes: Sequence[Box]) -> bool:
    """Whether any two boxes share an element.

    Boxes of a layout lie on a grid of few distinct corners; they overlap if and only if a cell of the grid is covered
    twice.
    """
    if len(boxes) < 2 or not boxes[0].offsets:
        return len(boxes) > 1
    ends = [tuple(o + s for o, s in zip(box.offsets, box.sizes, strict=True)) for box in boxes]
    dims = range(len(boxes[0].offsets))
    cuts = [sorted({box.offsets[d] for box in boxes} | {end[d] for end in ends}) for d in dims]
    places = [{cut: index for index, cut in enumerate(line)} for line in cuts]
    covered = np.zeros([len(line) for line in cuts], np.int8)
    for box, end in zip(boxes, ends, strict=True):
        cell = tuple(slice(places[d][box.offsets[d]], places[d][end[d]]) for d in dims)
        if covered[cell].any():
            return True
        covered[cell] = 1
    return False


def _dump(body: Mapping[str, Any]) -> bytes:
    """JSON with a line for every entry of the first two levels, so that a person can read it."""
    lines = []
    for key, value in body.items():
        if key in ("files", "tensors") and value:
            entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{entries}\n}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return ("{" + ",\n".join(lines) + "}\n").encode()


def _first_line(text: bytes) -> bytes:
    """What replaces the opening brace of a manifest."""
    return f'{{"checksum": "{block_digest(text)}",\n'.encode()


def _tensor_json(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "digest": tensor.digest,
        "boxes": _boxes_json(tensor.boxes),
    }


def _tensor(name: str, entry: Mapping[str, Any]) -> StoredTensor:
    shape = tuple(entry["shape"])
    return StoredTensor(name, shape, entry["dtype"], entry["digest"], _boxes(entry["boxes"], len(shape)))


def _files_json(files: Mapping[str, StoredFile]) -> dict[str, Any]:
    return {name: {"size": file.size, "blocks": file.blocks} for name, file in sorted(files.items())}


def _files(entries: Mapping[str, Any]) -> dict[str, StoredFile]:
    return {name: StoredFile(entry["size"], tuple(entry["blocks"])) for name, entry in entries.items()}


def _boxes_json(boxes: Iterable[StoredBox]) -> list[list[Any]]:
    """[file, offset in bytes, first index of each dim ..., size of each dim ...] per box."""
    return [[stored.file, stored.offset, *stored.box.offsets, *stored.box.sizes] for stored in boxes]


def _boxes(entries: Iterable[Sequence[Any]], ndim: int) -> tuple[StoredBox, ...]:
    return tuple(
        StoredBox(Box(tuple(entry[2 : 2 + ndim]), tuple(entry[2 + ndim :])), entry[0], entry[1]) for entry in entries
    )
