"""Where documents come from: finding input files, cutting them into shards of work, reading what a shard holds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import fsspec
import xxhash

from rung.errors import UserError

__all__ = ["Document", "Piece", "Selection", "SourceFile", "find_files", "make_shards", "read_documents"]

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_STAMPS = ("mtime", "ETag", "etag", "LastModified", "updated")  # names that file systems have for it


@dataclass(frozen=True)
class SourceFile:
    """One input file."""

    name: str
    """Path below the input it was found in; names its documents."""
    path: str
    """Path or URL that fsspec opens."""
    size: int
    """Bytes as stored."""
    stamp: str = ""
    """Changes when the file does: modification time, or what the remote store has instead."""

    @property
    def kind(self) -> str:
        """text (the file is one document), jsonl (a document a line) or parquet (a document a row)."""
        plain = self.name
        for suffix in _COMPRESSED:
            plain = plain.removesuffix(suffix)
        return "jsonl" if plain.endswith(".jsonl") else "parquet" if self.name.endswith(".parquet") else "text"

    @property
    def compressed(self) -> bool:
        return self.name.endswith(_COMPRESSED)


class Piece(NamedTuple):
    """What one shard reads of a file: bytes of a jsonl file, row groups of a parquet file, else the whole file."""

    file: SourceFile
    start: int
    stop: int
    size: int
    """Bytes, for balance and progress."""


class Document(NamedTuple):
    name: str
    text: str | None
    """None when the bytes are not UTF-8 text."""


@dataclass(frozen=True)
class Selection:
    """Which documents are held out: those whose hash, of seed and name, is in the lowest ``fraction`` of all hashes."""

    fraction: float
    seed: int

    def holds_out(self, name: str) -> bool:
        return xxhash.xxh3_64_intdigest(f"{self.seed}/{name}".encode()) < self.fraction * 2**64


def find_files(inputs: Sequence[str | os.PathLike[str]]) -> list[SourceFile]:
    """Files, folders (all but hidden files and __pycache__) and globs, local or at a protocol of fsspec.

    In the order of ``inputs``, within each by name; a file named twice is taken once. Raises UserError for every input
    that does not exist or holds nothing.
    """
    found: dict[str, SourceFile] = {}
    problems = []
    for given in [os.fspath(path) for path in inputs]:
        filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(given))
        path = path.rstrip("/") or "/"
        if any(mark in path for mark in "*?["):
            base = path[: min(path.index(mark) for mark in "*?[" if mark in path)].rpartition("/")[0]
            paths = [match for match in filesystem.glob(path) if filesystem.isfile(match)]
        elif filesystem.isfile(path):
            base, paths = path.rpartition("/")[0], [path]
        elif filesystem.isdir(path):
            base, paths = path, [match for match in filesystem.find(path) if not _hidden(match[len(path) :])]
        else:
            problems.append(f"{given} does not exist; give files, folders or globs")
            continue
        if not paths:
            problems.append(f"{given} holds no file")
        for match in sorted(paths):
            details = filesystem.info(match)
            stamp = next((str(details[key]) for key in _STAMPS if key in details), "")
            url = filesystem.unstrip_protocol(match)
            found.setdefault(url, SourceFile(match[len(base) :].lstrip("/"), url, int(details["size"] or 0), stamp))
    UserError.raise_all(problems)
    return list(found.values())


def make_shards(files: Sequence[SourceFile], shard_bytes: int) -> list[list[Piece]]:
    """Cut the input into shards of about ``shard_bytes``, in order. Depends on the files only, never on the machine.

    Large uncompressed jsonl files are cut into byte ranges, parquet files between row groups; other files stay whole.
    """
    shards: list[list[Piece]] = [[]]
    filled = 0
    for file in files:
        for piece in _pieces(file, shard_bytes):
            if filled and filled + piece.size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(piece)
            filled += piece.size
    return shards


def read_documents(piece: Piece, text_key: str, tail_fraction: float | None = None) -> Iterator[Document]:
    """The documents of a piece. ``text_key``: the field of jsonl and the column of parquet that holds the text.

    A text file is read whole. With ``tail_fraction`` it becomes two documents, cut at the last line end that leaves at
    least that share for the second, whose name ends in ":tail". Raises UserError for a line that is not JSON or lacks
    the field.
    """
    file = piece.file
    if file.kind == "jsonl":
        yield from _json_documents(piece, text_key)
    elif file.kind == "parquet":
        yield from _parquet_documents(piece, text_key)
    else:
        with fsspec.open(file.path, "rb", compression="infer") as stream:
            text = _decoded(stream.read())
        if tail_fraction is not None and text is not None:
            limit = math.floor(len(text) * (1 - tail_fraction))
            cut = text.rfind("\n", 0, limit) + 1 or limit
            yield Document(file.name, text[:cut])
            yield Document(f"{file.name}:tail", text[cut:])
        else:
            yield Document(file.name, text)


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.split("/"))


def _pieces(file: SourceFile, shard_bytes: int) -> Iterator[Piece]:
    if file.kind == "parquet":
        with fsspec.open(file.path, "rb") as stream:
            groups = _parquet(file, stream).num_row_groups
        per_piece = max(1, groups * shard_bytes // max(file.size, 1))
        for start in range(0, groups, per_piece):
            stop = min(start + per_piece, groups)
            yield Piece(file, start, stop, file.size * (stop - start) // groups)
    elif file.kind == "jsonl" and not file.compressed:
        for start in range(0, file.size, shard_bytes):
            stop = min(start + shard_bytes, file.size)
            yield Piece(file, start, stop, stop - start)
    else:
        yield Piece(file, 0, file.size, file.size)


def _json_documents(piece: Piece, text_key: str) -> Iterator[Document]:
    """The lines that start in the piece; a document is named by the byte its line starts at (uncompressed)."""
    file = piece.file
    with fsspec.open(file.path, "rb", compression="infer") as stream:
        offset = piece.start
        if offset:
            # From the byte before: a line end there means that a line starts exactly at the piece.
            stream.seek(offset - 1)
            offset += len(stream.readline()) - 1
        while (file.compressed or offset < piece.stop) and (line := stream.readline()):
            name, offset = f"{file.name}:{offset}", offset + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{file.path}: the line at byte {offset - len(line)} is not JSON ({error})") from error
            if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(
                    f"{file.path}: the line at byte {offset - len(line)} has no text in {text_key!r}; it has: {fields};"
                    " set text_key"
                )
            yield Document(name, _checked(record[text_key]))


def _parquet_documents(piece: Piece, text_key: str) -> Iterator[Document]:
    file = piece.file
    with fsspec.open(file.path, "rb") as stream:
        table = _parquet(file, stream)
        columns = table.schema_arrow.names
        if text_key not in columns:
            raise UserError(f"{file.path} has no column {text_key!r}; it has: {', '.join(columns)}; set text_key")
        row = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
        for group in range(piece.start, piece.stop):
            for value in table.read_row_group(group, columns=[text_key]).column(0):
                text = value.as_py()
                if not isinstance(text, str | None):
                    raise UserError(f"{file.path}: column {text_key!r} holds {value.type}, not text; set text_key")
                yield Document(f"{file.name}:{row}", _checked(text or ""))
                row += 1


def _parquet(file: SourceFile, stream: Any) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(stream)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file.path} is not a parquet file: {error}") from error


def _decoded(data: bytes) -> str | None:
    """Text of a file, or None: not UTF-8, or with NUL bytes, which no text has."""
    try:
        return None if b"\0" in data else data.decode()
    except UnicodeDecodeError:
        return None


def _checked(text: str) -> str | None:
    """None for JSON's lone surrogates, which have no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text
