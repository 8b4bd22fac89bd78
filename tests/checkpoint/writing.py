"""Small checkpoints written with nothing but the format, in any boxes: what readers are tested against."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rung.checkpoint.digest import box_lanes
from rung.checkpoint.format import (
    ALIGNMENT,
    BLOCK_BYTES,
    Manifest,
    Part,
    PartTensor,
    StoredBox,
    StoredFile,
    block_digest,
    item_bytes,
    merge,
)
from rung.layout import Box

Values = tuple[str, np.ndarray[Any, Any]]
"""dtype by torch's name, and elements of as many bytes."""
Cuts = Mapping[str, Sequence[tuple[int, Box]]]
"""For a tensor, which file has which box of it."""


def whole(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def tiling(shape: Sequence[int], rng: random.Random, splits: int = 4) -> list[Box]:
    """Boxes that make up ``shape``, cut at random places."""
    boxes = [whole(shape)]
    for _ in range(splits if shape else 0):
        box = boxes.pop(rng.randrange(len(boxes)))
        dim = rng.randrange(len(shape))
        at = rng.randint(0, box.sizes[dim])
        for start, stop in ((0, at), (at, box.sizes[dim])):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim] += start
            sizes[dim] = stop - start
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    rng.shuffle(boxes)
    return boxes


def write(
    folder: Path,
    tensors: Mapping[str, Values],
    cuts: Cuts | None = None,
    *,
    num_files: int = 2,
    block_bytes: int = BLOCK_BYTES,
    progress: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a checkpoint into a folder, one data file per writer; without ``cuts`` every tensor is one box."""
    data = [bytearray() for _ in range(num_files)]
    parts: list[dict[str, PartTensor]] = [{} for _ in data]
    for index, (name, (dtype, values)) in enumerate(tensors.items()):
        for writer, box in (cuts or {}).get(name, [(index % num_files, whole(values.shape))]):
            content = np.ascontiguousarray(values[box.slices()]).tobytes()
            data[writer].extend(b"\0" * (-len(data[writer]) % ALIGNMENT))
            stored = StoredBox(box, f"data-{writer:05}.bin", len(data[writer]))
            data[writer].extend(content)
            one, two = box_lanes(content, item_bytes(dtype), values.shape, box)
            known = parts[writer].get(name, PartTensor(values.shape, dtype, (0, 0), ()))
            lanes = known.lanes[0] + one, known.lanes[1] + two
            parts[writer][name] = PartTensor(values.shape, dtype, lanes, (*known.boxes, stored))
    made = []
    folder.mkdir(parents=True)
    for writer, content_ in enumerate(data):
        (folder / f"data-{writer:05}.bin").write_bytes(content_)
        blocks = (bytes(content_[start : start + block_bytes]) for start in range(0, len(content_), block_bytes))
        file = StoredFile(len(content_), tuple(map(block_digest, blocks)))
        # The way through JSON is part of what is tested.
        made.append(Part.from_json(Part({f"data-{writer:05}.bin": file}, parts[writer]).to_json()))
    manifest = merge(
        made,
        progress=progress or {"step": int(folder.name.removeprefix("step-")), "consumed_samples": 24},
        config=config or {},
        fingerprints={"corpus": "c0ffee", "tokenizer": None},
        versions={"rung": "0.1.0", "torch": "2.13.0"},
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return manifest
