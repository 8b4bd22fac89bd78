"""One committed checkpoint, read by one process: whole tensors, and whether every byte is as it was written.

Bytes are read in the blocks that the manifest has digests of, and none is used before its block matched. Importing this
needs no torch. Many ranks load with ``rung.checkpoint.load``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rung.checkpoint.digest import Lanes, box_lanes, hex_digest
from rung.checkpoint.format import (
    BLOCK_BYTES,
    CheckpointError,
    Manifest,
    StoredBox,
    StoredTensor,
    block_digest,
    item_bytes,
    misplaced,
    tile,
)
from rung.checkpoint.scatter import pieces, scatter
from rung.errors import UserError
from rung.layout import Box

if TYPE_CHECKING:
    from rung.checkpoint.storage import Storage

__all__ = ["Reader"]

_NAMES_SHOWN = 6


class _Place(NamedTuple):
    """The bytes [first, last) of a file, which hold a box of a tensor."""

    first: int
    last: int
    tensor: StoredTensor
    box: Box


class Reader:
    """A committed checkpoint. While this is open, the checkpoint is not retired.

    Holds one block and, while it is asked for, one tensor. Not for several threads at once.
    """

    manifest: Manifest

    def __init__(self, storage: Storage, step: int) -> None:
        """Raises CheckpointError where there is no committed checkpoint of ``step``, or its manifest is damaged."""
        self.storage, self.step = storage, step
        self._buffer = np.empty(BLOCK_BYTES, np.uint8)
        self._held: tuple[str, int, bool] | None = None
        """File and number of the block in the buffer, and whether it was verified."""
        with ExitStack() as pin:
            pin.enter_context(storage.pin(step))
            self.manifest = Manifest.from_json(storage.manifest(step), self.where("manifest.json"))
            self._pin = pin.pop_all()

    @classmethod
    def open(cls, path: str) -> Reader:
        """The checkpoint that a path or address names, as a person gives it; of several the newest."""
        from rung.checkpoint.storage import locate

        storage, step = locate(path)
        steps = storage.steps() if step is None else [step]
        if not steps:
            raise UserError(f"{path} holds no committed checkpoint (a folder step-… with a manifest.json)")
        return cls(storage, steps[-1])

    def close(self) -> None:
        """Let go of the checkpoint."""
        self._pin.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def where(self, file: str = "") -> str:
        """The full address of a file of this checkpoint, or of its folder: for messages."""
        return self.storage.where(self.storage.step_path(self.step, file)).rstrip("/")

    def tensor(self, name: str, *, verify: bool = True) -> NDArray[np.uint8]:
        """The bytes of a whole tensor, row by row, little-endian.

        Raises CheckpointError, which names the tensor and the file, unless every block that holds some of it and the
        tensor as a whole match their digests. ``verify=False`` leaves out both, for bytes that were verified before.
        """
        tensor = self.manifest.tensors.get(name)
        if tensor is None:
            near = get_close_matches(name, self.manifest.tensors, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise CheckpointError(f"{self.where()} holds no tensor {name}{hint}")
        if problems := self._unsound(tensor):
            raise CheckpointError(f"{self.where('manifest.json')}: {'; '.join(problems)}")
        width = item_bytes(tensor.dtype)
        whole = np.empty(tensor.nbytes, np.uint8)
        elements: NDArray[Any] = whole.view(f"<u{width}").reshape(tensor.shape)
        for stored in sorted(tensor.boxes, key=lambda stored: (stored.file, stored.offset)):
            sizes = stored.box.sizes
            corner: Any = (*stored.box.slices(), ...)  # the dots: a view also where there is no dim
            target = elements[corner]
            for first, data in self._stretches(tensor, stored, verify):
                items = data.view(elements.dtype)
                scatter(items, first // width, sizes, Box((0,) * len(sizes), sizes), target)
        if verify:
            everything = Box((0,) * len(tensor.shape), tensor.shape)
            lanes = [0, 0]
            for start in range(0, len(whole), BLOCK_BYTES):
                part = whole[start : start + BLOCK_BYTES]
                _add(lanes, _lanes_of_run(part, start // width, tensor, everything))
            if hex_digest((lanes[0], lanes[1])) != tensor.digest:
                files = sorted({stored.file for stored in tensor.boxes})
                raise CheckpointError(
                    f"{name}: its blocks in {_some(map(self.where, files))} are as they were written, "
                    "but do not make up the tensor: it does not match its digest"
                )
        return whole

    def verify(self) -> Iterator[str]:
        """Read every file once; yields what is wrong with this checkpoint, and nothing if all is well."""
        told: set[str] = set()
        lanes = {name: [0, 0] for name in self.manifest.tensors}
        places: dict[str, list[_Place]] = {}
        for tensor in self.manifest.tensors.values():
            for problem in self._unsound(tensor):
                told.add(tensor.name)
                yield f"{self.where('manifest.json')}: {problem}"
            for stored in tensor.boxes if tensor.name not in told else ():
                last = stored.offset + stored.box.numel * item_bytes(tensor.dtype)
                if stored.offset < last:
                    places.setdefault(stored.file, []).append(_Place(stored.offset, last, tensor, stored.box))
        for file in sorted(self.manifest.files):
            yield from self._verify_file(file, sorted(places.get(file, ()), key=lambda place: place[:2]), lanes, told)
        for name, (one, two) in lanes.items():
            if name not in told and hex_digest((one, two)) != self.manifest.tensors[name].digest:
                files = sorted({stored.file for stored in self.manifest.tensors[name].boxes})
                yield (
                    f"{name}: its blocks in {_some(map(self.where, files))} are as they were written, "
                    "but do not make up the tensor: it does not match its digest"
                )

    def notes(self) -> list[str]:
        """What is odd about the folder and does no harm: files that the manifest does not know, another step's name."""
        known = {"manifest.json", *self.manifest.files}
        folders = {""} | {name.rpartition("/")[0] for name in known}
        entries = known | folders
        notes = []
        if self.manifest.step != self.step:
            notes.append(f"{self.where()} holds step {self.manifest.step}")
        for folder in sorted(folders):
            for name in sorted(self.storage.names(self.storage.step_path(self.step, folder).rstrip("/"))):
                path = f"{folder}/{name}".lstrip("/")
                if path not in entries:
                    notes.append(f"{self.where(path)} is no part of the checkpoint")
        return notes

    def _verify_file(
        self, file: str, places: Sequence[_Place], lanes: dict[str, list[int]], told: set[str]
    ) -> Iterator[str]:
        """What is wrong with a file; adds to the lanes of the tensors that have ``places`` in it, by first byte."""
        where, known = self.where(file), self.manifest.files[file]
        num_blocks = -(-known.size // BLOCK_BYTES)
        if len(known.blocks) != num_blocks:
            told |= {place.tensor.name for place in places}
            yield f"{self.where('manifest.json')}: {file} has {num_blocks} blocks, and {len(known.blocks)} digests"
            return
        try:
            size = self.storage.size(self.storage.step_path(self.step, file))
        except (CheckpointError, OSError) as error:
            told |= {place.tensor.name for place in places}
            text = str(error) if isinstance(error, CheckpointError) else f"{where}: {error}"
            yield f"{text}; it held (part of) {_tensors(places)}"
            return
        if size > known.size:
            yield f"{where} has {size:,} bytes where {known.size:,} were written; what follows them is nobody's"
        if size < known.size:
            lost = [place for place in places if place.last > size // BLOCK_BYTES * BLOCK_BYTES]
            told |= {place.tensor.name for place in lost}
            yield (
                f"{where} is cut short: it has {size:,} of {known.size:,} bytes; "
                f"what is lost, to the block, held (part of) {_tensors(lost)}"
            )
        waiting, here = 0, list[_Place]()
        for number in range(num_blocks):
            start = number * BLOCK_BYTES
            stop = min(start + BLOCK_BYTES, known.size)
            while waiting < len(places) and places[waiting].first < stop:
                here.append(places[waiting])
                waiting += 1
            here = [place for place in here if place.last > start]
            if stop > size:
                told |= {place.tensor.name for place in here}
                continue
            try:
                block = self._block(file, number, verify=True)
            except CheckpointError as error:
                told |= {place.tensor.name for place in here}
                yield f"{error}; it holds (part of) {_tensors(here)}"
                continue
            for place in here:
                first, last = max(place.first, start), min(place.last, stop)
                run = block[first - start : last - start]
                index = (first - place.first) // item_bytes(place.tensor.dtype)
                _add(lanes[place.tensor.name], _lanes_of_run(run, index, place.tensor, place.box))

    def _unsound(self, tensor: StoredTensor) -> list[str]:
        """What is wrong with what the manifest says of a tensor."""
        try:
            item_bytes(tensor.dtype)
        except CheckpointError as error:
            return [f"{tensor.name}: {error}"]
        if not tile([stored.box for stored in tensor.boxes], tensor.shape):
            return [f"{tensor.name}: its boxes do not make up its shape {list(tensor.shape)} exactly once"]
        found = (misplaced(stored, tensor.dtype, self.manifest.files) for stored in tensor.boxes)
        return [f"{tensor.name}: {problem}" for problem in found if problem]

    def _stretches(
        self, tensor: StoredTensor, stored: StoredBox, verify: bool
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The bytes of a box block by block: (number of its bytes before, bytes). Valid until the next."""
        first, last = stored.offset, stored.offset + stored.box.numel * item_bytes(tensor.dtype)
        if first == last:
            return
        for number in range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES)):
            start = number * BLOCK_BYTES
            try:
                block = self._block(stored.file, number, verify)
            except CheckpointError as error:
                raise CheckpointError(f"{tensor.name} cannot be read: {error}") from error
            begin = max(first, start)
            yield begin - first, block[begin - start : last - start]

    def _block(self, file: str, number: int, verify: bool) -> NDArray[np.uint8]:
        """A block of a file, in the buffer. Raises CheckpointError where it is not there or not as it was written."""
        known = self.manifest.files[file]
        start = number * BLOCK_BYTES
        block = self._buffer[: min(BLOCK_BYTES, known.size - start)]
        if self._held in ((file, number, True), (file, number, verify)):
            return block
        self._held = None
        which = f"block {number} (bytes {start:,} to {start + len(block):,})"
        try:
            self.storage.read_into(self.storage.step_path(self.step, file), start, block.data)
        except CheckpointError as error:  # names the file
            raise CheckpointError(f"{error}; wanted was {which}") from error
        except OSError as error:
            raise CheckpointError(f"{self.where(file)}: {which} cannot be read: {error}") from error
        if verify and [block_digest(block)] != list(known.blocks[number : number + 1]):
            raise CheckpointError(f"{self.where(file)}: {which} is damaged: it does not match its digest")
        self._held = file, number, verify
        return block


def _lanes_of_run(values: NDArray[np.uint8], first: int, tensor: StoredTensor, box: Box) -> Lanes:
    """The lanes of a run of a box's elements, from flat index ``first`` of the box on."""
    width = item_bytes(tensor.dtype)
    total = [0, 0]
    for start, piece in pieces(first, len(values) // width, box.sizes):
        offsets = tuple(inside + corner for inside, corner in zip(piece.offsets, box.offsets, strict=True))
        part = values[start * width : (start + piece.numel) * width]
        _add(total, box_lanes(part, width, tensor.shape, Box(offsets, piece.sizes)))
    return total[0], total[1]


def _add(total: list[int], lanes: Lanes) -> None:
    total[0] += lanes[0]
    total[1] += lanes[1]


def _tensors(places: Iterable[_Place]) -> str:
    return _some(dict.fromkeys(place.tensor.name for place in places)) or "no tensor"


def _some(names: Iterable[Any]) -> str:
    """All names, or the first few of many."""
    every = list(names)
    if len(every) <= _NAMES_SHOWN:
        return ", ".join(every)
    return f"{', '.join(every[: _NAMES_SHOWN - 1])} and {len(every) - _NAMES_SHOWN + 1} more"
