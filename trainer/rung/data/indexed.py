"""Megatron's token files: ``<prefix>.bin`` holds the tokens, ``<prefix>.idx`` says where sequences and documents start.

The index, little-endian: ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code, u64 number of sequences, u64 length of the
document array, int32 sequence lengths, int64 byte pointers, int64 document array (the first sequence of every document,
then the number of sequences), and for multimodal data one int8 mode a sequence. Source: Megatron-LM,
``megatron/core/datasets/indexed_dataset.py``.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rung.errors import UserError

__all__ = ["IndexedDataset", "IndexedDatasetWriter", "bin_path", "idx_path", "token_dtype"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's rule: uint16 below 65,500 tokens, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedDataset:
    """A read-only view of one token file as one stream. Nothing is copied or scanned when it is opened."""

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Raises UserError for missing files, a truncated or foreign index, a ``.bin`` of another size than indexed."""
        self.prefix = Path(prefix)
        idx, data = idx_path(prefix), bin_path(prefix)
        UserError.raise_all(f"{path} does not exist" for path in (idx, data) if not path.is_file())
        num_bytes = idx.stat().st_size
        with idx.open("rb") as file:
            header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            raise UserError(f"{idx} is not a Megatron index: it starts with {header[:9]!r} instead of {_MAGIC!r}")
        if len(header) < _HEADER.size:
            raise UserError(
                f"{idx} is truncated: {num_bytes} bytes, its header alone has {_HEADER.size}; write or copy it again"
            )
        _, version, code, num_sequences, num_offsets = _HEADER.unpack(header)
        if version != 1:
            raise UserError(f"{idx} has version {version}; only version 1 is known")
        if code not in _DTYPES:
            raise UserError(
                f"{idx} has dtype code {code} ({_FLOATS.get(code, 'unknown')}); tokens are integers: {sorted(_DTYPES)}"
            )
        expected = _HEADER.size + 12 * num_sequences + 8 * num_offsets
        if num_bytes < expected:
            raise UserError(
                f"{idx} is truncated: {num_bytes} bytes, its header promises {expected}; write or copy it again"
            )
        if num_bytes not in (expected, expected + num_sequences):
            raise UserError(
                f"{idx} has {num_bytes} bytes, its header promises {expected}: it is not a Megatron index of version 1"
            )
        if num_offsets < 1:
            raise UserError(f"{idx} has an empty document array; write it again")

        self.dtype: np.dtype[Any] = np.dtype(_DTYPES[code])
        buffer = np.memmap(idx, mode="r", dtype=np.uint8)
        sections = np.cumsum([_HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_offsets])
        self.lengths: NDArray[np.int32] = buffer[sections[0] : sections[1]].view(np.ndarray).view("<i4")
        """Tokens of every sequence."""
        self._pointers: NDArray[np.int64] = buffer[sections[1] : sections[2]].view(np.ndarray).view("<i8")
        self._document_starts: NDArray[np.int64] = buffer[sections[2] : sections[3]].view(np.ndarray).view("<i8")

        self.num_documents = num_offsets - 1
        if int(self._document_starts[0]) != 0 or int(self._document_starts[-1]) != num_sequences:
            raise UserError(
                f"{idx} is damaged: its documents do not cover its {num_sequences} sequences; write or copy it again"
            )
        end = 0
        if num_sequences:
            end = int(self._pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
            if int(self._pointers[0]) != 0:
                raise UserError(
                    f"{idx}: the first sequence starts at byte {int(self._pointers[0])}; only gapless files are read"
                )
        size = data.stat().st_size
        if size != end:
            fault = "is truncated" if size < end else "does not belong to its index"
            raise UserError(f"{data} {fault}: {size} bytes, {idx.name} promises {end}; write or copy both files again")
        self.num_tokens = end // self.dtype.itemsize
        # An empty file cannot be mapped.
        self._tokens = np.memmap(data, mode="r", dtype=self.dtype).view(np.ndarray) if size else np.empty(0, self.dtype)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop) of the stream, in the file's dtype: a view of the file, so copy before writing to it."""
        self._check(start, stop)
        return self._tokens[start:stop]

    def document_ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """For each token of [start, stop), the index of its document. O(log sequences + sequences touched)."""
        self._check(start, stop)
        if start == stop:
            return np.empty(0, np.int64)
        # Not searchsorted: behind a 34-byte header the arrays are unaligned, and it would copy them whole.
        itemsize = self.dtype.itemsize
        first = bisect_right(self._pointers, start * itemsize) - 1
        last = bisect_right(self._pointers, (stop - 1) * itemsize) - 1
        sequences = np.arange(first, last + 1)
        starts = self._pointers[first : last + 1] // itemsize
        counts = np.minimum(starts + self.lengths[first : last + 1], stop) - np.maximum(starts, start)
        first_document = bisect_right(self._document_starts, first) - 1
        last_document = bisect_right(self._document_starts, last) - 1
        boundaries = self._document_starts[first_document + 1 : last_document + 1]
        documents = first_document + np.searchsorted(boundaries, sequences, side="right")
        return np.repeat(documents.astype(np.int64), counts)

    def document_span(self, document: int) -> tuple[int, int]:
        """First token and end of a document in the stream."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        starts = (int(self._document_starts[document]), int(self._document_starts[document + 1]))
        begin, end = (
            self.num_tokens if sequence == len(self._pointers) else int(self._pointers[sequence]) // self.dtype.itemsize
            for sequence in starts
        )
        return begin, end

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of every document. Reads the whole index."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(ends[self._document_starts])

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.prefix}")


class IndexedDatasetWriter:
    """Writes ``<prefix>.bin`` as documents come, ``<prefix>.idx`` when it is closed; a document is one sequence.

    Use it in a ``with`` statement. When the block raises, no index is written: half a file is never read as whole.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype[Any] | type) -> None:
        self.prefix = Path(prefix)
        self.dtype: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        codes = {np.dtype(name): code for code, name in _DTYPES.items()}
        if self.dtype not in codes:
            raise UserError(f"tokens cannot be stored as {self.dtype}; use uint16 or int32")
        self._code = codes[self.dtype]
        self._lengths: list[NDArray[np.int32]] = []
        idx_path(prefix).unlink(missing_ok=True)
        self._file: BinaryIO | None = bin_path(prefix).open("wb")

    def add_document(self, tokens: ArrayLike) -> None:
        """Append one document."""
        tokens = np.asarray(tokens)
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, tokens: ArrayLike, lengths: ArrayLike) -> None:
        """Append documents given as their tokens one after the other and the length of each."""
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, dtype=np.int64)
        if int(lengths.sum()) != len(tokens):
            raise ValueError(f"lengths sum to {int(lengths.sum())}, there are {len(tokens)} tokens")
        if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
            raise UserError(
                f"a document of {int(lengths.max())} tokens: an index holds at most {np.iinfo(np.int32).max}; split it"
            )
        limits = np.iinfo(self.dtype)
        if tokens.size and not (limits.min <= int(tokens.min()) and int(tokens.max()) <= limits.max):
            raise UserError(f"token ids {int(tokens.min())}..{int(tokens.max())} do not fit {self.dtype}; write int32")
        assert self._file is not None, "the writer is closed"
        self._file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(lengths.astype(np.int32))

    def close(self) -> None:
        """Write the index."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths]).astype("<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        with idx_path(self.prefix).open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, self._code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write((ends - lengths.astype("<i8") * self.dtype.itemsize).tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()
            self._file = None
