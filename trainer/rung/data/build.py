"""`rung data build`: text files to a corpus.

The input is cut into shards by a rule that knows only the input; each shard is tokenized on its own and kept in
``OUT/.partial`` until all are there, then they are joined in order. So the result is the same, byte for byte, with any
number of workers and after any number of interruptions.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rung.data.corpus import FORMAT_VERSION, Corpus, CorpusInfo, SplitInfo
from rung.data.documents import Document, Piece, Selection, SourceFile, find_files, make_shards, read_documents
from rung.data.indexed import IndexedDatasetWriter, bin_path, idx_path, token_dtype
from rung.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer
from rung.errors import UserError

__all__ = ["build_corpus", "build_files"]

SHARD_BYTES = 16 * 2**20
# Texts are encoded in pieces of this many characters, cut at line ends: the tokenizer needs some 50 bytes a character.
_PIECE_CHARACTERS = 2**19
_SPLITS = ("train", "valid")


@dataclass(frozen=True)
class _Settings:
    """All that decides what a shard becomes."""

    text_key: str
    selection: Selection
    tail_fraction: float | None
    eos_id: int
    tokenizer_sha256: str


def build_corpus(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    vocab_size: int = 32000,
    eos_token: str | None = None,
    text_key: str = "text",
    valid_fraction: float = 0.01,
    seed: int = 0,
    workers: int = 1,
    tokenizer_bytes: int = 2**30,
    quiet: bool = False,
) -> Corpus:
    """Tokenize text into a new corpus. Run again after an interruption, it continues.

    inputs: files, folders or globs, on disk or wherever fsspec reaches (s3://…): .jsonl (one document a line), .parquet
        (one a row), and any other file of UTF-8 text as one document; .gz, .bz2, .xz and .zst are unpacked. Files that
        are not text and empty documents are skipped and counted.
    out: folder of the corpus; it must not hold one yet.
    tokenizer: path of a tokenizer.json. Without one, a byte-level BPE is trained on the training split.
    vocab_size: tokens of the trained tokenizer; fewer when the text has fewer pairs to merge.
    eos_token: the token that ends a document; a given tokenizer must have it. None: the usual names are tried.
    text_key: field of .jsonl and column of .parquet that holds the text.
    valid_fraction: share of the documents held out, by hash of seed and document name. A single text file is cut
        instead: its last part is held out. 0 holds out nothing.
    seed: of that hash, and of the sample that the tokenizer is trained on.
    workers: processes; 0 takes one per CPU. 1 works in this process, where the tokenizers library uses threads.
    tokenizer_bytes: train the tokenizer on at most about this much of the input, drawn by shard.
    quiet: print nothing.

    Raises UserError for inputs that cannot be used. With ``workers`` > 1 the calling script needs the usual
    ``if __name__ == "__main__"`` guard.
    """
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    return build_files(
        find_files(paths),
        out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        eos_token=eos_token,
        text_key=text_key,
        valid_fraction=valid_fraction,
        seed=seed,
        workers=workers,
        tokenizer_bytes=tokenizer_bytes,
        quiet=quiet,
    )


def build_files(
    files: Sequence[SourceFile],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None,
    vocab_size: int,
    eos_token: str | None,
    text_key: str,
    valid_fraction: float,
    seed: int,
    workers: int,
    tokenizer_bytes: int,
    quiet: bool,
    reuse: bool = False,
) -> Corpus:
    """``build_corpus`` of found files. With ``reuse``, a corpus that ``out`` already holds is the result."""
    out = Path(out)
    problems = [] if files else ["no input file; give files, folders or globs"]
    if not 0 <= valid_fraction < 1:
        problems.append(f"valid_fraction={valid_fraction} must be at least 0 and below 1")
    if workers < 0:
        problems.append(f"workers={workers} must be 0 (one per CPU) or more")
    if tokenizer is None and vocab_size < 257:
        problems.append(f"vocab_size={vocab_size} must be at least 257: the bytes and an end-of-document token")
    UserError.raise_all(problems)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be created ({error}); choose another folder") from error
    progress = _Progress(quiet)
    with _locked(out, progress):
        if (out / "corpus.json").exists():
            if reuse:
                return Corpus(out)
            raise UserError(f"{out} already holds a corpus; remove it or choose another folder")
        given = None
        if tokenizer is not None:
            end_of_text_id(load_tokenizer(tokenizer), eos_token)  # a wrong tokenizer is told before any work
            given = Path(tokenizer).read_bytes()
        selection = Selection(valid_fraction, seed)
        single = len(files) == 1 and files[0].kind == "text" and valid_fraction > 0
        shards = make_shards(files, SHARD_BYTES)
        recipe = {
            "files": [asdict(file) for file in files],
            "shard_bytes": SHARD_BYTES,
            "tokenizer": [vocab_size, tokenizer_bytes] if given is None else hashlib.sha256(given).hexdigest(),
            "settings": [eos_token, text_key, valid_fraction, seed, FORMAT_VERSION],
        }
        partial = _open_partial(out / ".partial", json.dumps(recipe))

        tokenizer_path = partial / "tokenizer.json"
        tail_fraction = valid_fraction if single else None
        if given is not None:
            _write(tokenizer_path, given)
        elif not tokenizer_path.exists():
            sample = _training_sample(shards, seed, tokenizer_bytes)
            documents = (document for piece in sample for document in read_documents(piece, text_key, tail_fraction))
            wanted = (d.text for d in documents if d.text and not _held_out(d, selection, tail_fraction))
            texts = (part for text in wanted for part in _cut(text))
            with progress.phase("training the tokenizer", sum(piece.size for piece in sample)):
                _write(tokenizer_path, train_tokenizer(texts, vocab_size, eos_token).encode())
        settings = _Settings(
            text_key=text_key,
            selection=selection,
            tail_fraction=tail_fraction,
            eos_id=end_of_text_id(load_tokenizer(tokenizer_path), eos_token),
            tokenizer_sha256=hashlib.sha256(tokenizer_path.read_bytes()).hexdigest(),
        )
        _encode_shards(shards, partial, settings, workers or os.cpu_count() or 1, progress)
        with progress.phase("joining the shards", 0):
            _join(len(shards), partial, out, settings)
        shutil.rmtree(partial)
        corpus = Corpus(out)
        if corpus.info is not None and corpus.info.skipped:
            progress.say("skipped " + ", ".join(f"{count} {reason}" for reason, count in corpus.info.skipped.items()))
    return corpus


@contextlib.contextmanager
def _locked(folder: Path, progress: _Progress) -> Iterator[None]:
    """Hold ``folder/.lock``; wait while another process does. It is freed when its holder ends, however it ends."""
    path = folder / ".lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"waiting for another process that works in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"{path} cannot be locked ({error}); choose a folder on another file system") from error
        yield


def _open_partial(partial: Path, recipe: str) -> Path:
    """The folder of unfinished work, emptied when it was begun from other inputs or settings."""
    key = hashlib.sha256(recipe.encode()).hexdigest()
    key_file = partial / "recipe.sha256"
    if not key_file.exists() or key_file.read_text() != key:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(key_file, key.encode())
    return partial


def _write(path: Path, data: bytes) -> None:
    """All or nothing: a reader, or the next attempt, never sees half a file."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _training_sample(shards: list[list[Piece]], seed: int, max_bytes: int) -> list[Piece]:
    """Pieces to train the tokenizer on: all, or shards in the order of their hash until there is enough."""
    order = sorted(range(len(shards)), key=lambda index: xxhash.xxh3_64_intdigest(f"{seed}/tokenizer/{index}".encode()))
    sample: list[Piece] = []
    size = 0
    for index in order:
        if size >= max_bytes:
            break
        sample += shards[index]
        size += sum(piece.size for piece in shards[index])
    return sample


def _held_out(document: Document, selection: Selection, tail_fraction: float | None) -> bool:
    return selection.holds_out(document.name) if tail_fraction is None else document.name.endswith(":tail")


def _encode_shards(
    shards: list[list[Piece]], partial: Path, settings: _Settings, workers: int, progress: _Progress
) -> None:
    # A machine that lost power may leave a file without its end.
    missing = [index for index in range(len(shards)) if not zipfile.is_zipfile(_shard_path(partial, index))]
    sizes = [sum(piece.size for piece in shard) for shard in shards]
    workers = min(workers, len(missing))
    with progress.phase("tokenizing", sum(sizes)) as advance:
        advance(sum(sizes) - sum(sizes[index] for index in missing))
        if workers <= 1:
            for index in missing:
                _encode_shard(shards[index], _shard_path(partial, index), settings)
                advance(sizes[index])
            return
        # forkserver: its server imports this package once, and its children never inherit the caller's threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
            jobs = {
                pool.submit(_encode_shard, shards[index], _shard_path(partial, index), settings): sizes[index]
                for index in missing
            }
            try:
                for job in as_completed(jobs):
                    job.result()
                    advance(jobs[job])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the parent


def _shard_path(partial: Path, index: int) -> Path:
    return partial / f"shard-{index:06d}.npz"


@lru_cache(maxsize=1)
def _worker_tokenizer(path: Path, sha256: str) -> tuple[Tokenizer, Any]:
    """The tokenizer and the dtype of its tokens, once a process."""
    tokenizer = load_tokenizer(path)
    return tokenizer, token_dtype(_vocab_size(tokenizer))


def _vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; a vocabulary may have holes."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def _encode_shard(pieces: list[Piece], path: Path, settings: _Settings) -> None:
    """Tokenize one shard into one file: tokens and document lengths of each split, and the counts as JSON."""
    tokenizer, dtype = _worker_tokenizer(path.parent / "tokenizer.json", settings.tokenizer_sha256)
    tokens: dict[str, list[NDArray[Any]]] = {split: [] for split in _SPLITS}
    lengths: dict[str, list[int]] = {split: [] for split in _SPLITS}
    num_bytes, skipped = Counter[str](), Counter[str]()
    held_out: list[dict[str, Any]] = []
    eos = np.array([settings.eos_id], dtype)

    def documents() -> Iterator[tuple[str, str]]:
        for piece in pieces:
            for document in read_documents(piece, settings.text_key, settings.tail_fraction):
                if not document.text:
                    skipped["empty" if document.text == "" else "not UTF-8 text"] += 1
                    continue
                split = _SPLITS[_held_out(document, settings.selection, settings.tail_fraction)]
                data = document.text.encode()
                num_bytes[split] += len(data)
                if split == "valid":
                    gzipped = len(gzip.compress(data, 9, mtime=0))
                    held_out.append({"name": document.name, "bytes": len(data), "gzip9_bytes": gzipped})
                yield split, document.text

    for split, ids in _encoded(documents(), tokenizer, dtype):
        tokens[split] += [ids, eos]
        lengths[split].append(len(ids) + 1)
    counts = {"bytes": num_bytes, "skipped": skipped, "held_out": held_out}
    arrays: dict[str, Any] = {"counts": np.frombuffer(json.dumps(counts).encode(), np.uint8)}
    for split in _SPLITS:
        arrays[f"{split}_tokens"] = np.concatenate([np.empty(0, dtype), *tokens[split]])
        arrays[f"{split}_lengths"] = np.array(lengths[split], np.int64)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)
    unfinished.replace(path)


def _encoded(
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, dtype: Any
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Documents with their tokens, in order. Short texts together, long ones in pieces fill the tokenizer's batches."""
    waiting: list[tuple[str, int]] = []
    pieces: list[str] = []

    def flush() -> Iterator[tuple[str, NDArray[Any]]]:
        encodings = iter(tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
        for split, count in waiting:
            yield split, np.concatenate([np.array(next(encodings).ids, dtype) for _ in range(count)])
        waiting.clear()
        pieces.clear()

    size = 0
    for split, text in documents:
        cut = list(_cut(text))
        waiting.append((split, len(cut)))
        pieces += cut
        size += len(text)
        if size >= 8 * _PIECE_CHARACTERS:
            yield from flush()
            size = 0
    yield from flush()


def _cut(text: str) -> Iterator[str]:
    """Pieces of a long text, each ending with a line where a line ends soon enough."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        stop = start + _PIECE_CHARACTERS
        stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
    yield text[start:]


def _join(num_shards: int, partial: Path, out: Path, settings: _Settings) -> None:
    """All shards, in order, into the files of the corpus: written aside, then moved, ``corpus.json`` last."""
    ready = partial / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    shutil.copyfile(partial / "tokenizer.json", ready / "tokenizer.json")
    vocab_size = _vocab_size(load_tokenizer(ready / "tokenizer.json"))
    num_bytes, skipped, num_tokens, num_documents = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    gzipped = 0
    with contextlib.ExitStack() as stack:
        dtype = token_dtype(vocab_size)
        writers = {split: stack.enter_context(IndexedDatasetWriter(ready / split, dtype)) for split in _SPLITS}
        listing = stack.enter_context((ready / "valid_documents.jsonl").open("w"))
        for index in range(num_shards):
            with np.load(_shard_path(partial, index)) as shard:
                counts = json.loads(shard["counts"].tobytes())
                for split in _SPLITS:
                    tokens, lengths = shard[f"{split}_tokens"], shard[f"{split}_lengths"]
                    writers[split].add_documents(tokens, lengths)
                    num_tokens[split] += len(tokens)
                    num_documents[split] += len(lengths)
            num_bytes.update(counts["bytes"])
            skipped.update(counts["skipped"])
            for document in counts["held_out"]:
                gzipped += document["gzip9_bytes"]
                listing.write(json.dumps(document) + "\n")
    _check_splits(num_documents, settings.selection.fraction)

    splits = {"train": SplitInfo(num_tokens["train"], num_documents["train"], num_bytes["train"])}
    if num_documents["valid"]:
        splits["valid"] = SplitInfo(num_tokens["valid"], num_documents["valid"], num_bytes["valid"], gzipped)
    else:
        for path in (bin_path(ready / "valid"), idx_path(ready / "valid"), ready / "valid_documents.jsonl"):
            path.unlink()
    content = [path for split in splits for path in (bin_path(ready / split), idx_path(ready / split))]
    info = CorpusInfo(
        fingerprint=_fingerprint([*content, ready / "tokenizer.json"]),
        tokenizer_sha256=settings.tokenizer_sha256,
        vocab_size=vocab_size,
        eos_id=settings.eos_id,
        splits=splits,
        skipped=dict(sorted(skipped.items())),
    )
    for path in sorted(ready.iterdir()):
        path.replace(out / path.name)
    _write(out / "corpus.json", info.to_json().encode())


def _check_splits(num_documents: Counter[str], fraction: float) -> None:
    total = num_documents.total()
    if total == 0:
        raise UserError("the inputs hold no text: the corpus would be empty")
    if num_documents["train"] == 0:
        raise UserError(
            f"--valid-fraction={fraction} holds out all {total} documents; lower it, to 0 to hold out nothing"
        )
    if fraction > 0 and num_documents["valid"] == 0:
        raise UserError(
            f"--valid-fraction={fraction} holds out none of {total} documents; raise it to about"
            f" {min(0.5, 3 / total):.2g}, try another seed, or 0 to hold out nothing"
        )


def _fingerprint(paths: Sequence[Path]) -> str:
    """xxh3-128 over the names, sizes and content of files."""
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


class _Progress:
    """A bar on a terminal, else a line when a phase starts and at every tenth of it; on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def phase(self, name: str, num_bytes: int) -> Iterator[Any]:
        """Yields ``advance(bytes)``."""
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(name, total=num_bytes or None)
                yield lambda size: bar.advance(task, size)
                bar.update(task, total=num_bytes, completed=num_bytes)
            return
        done = tenth = 0

        def advance(size: int) -> None:
            nonlocal done, tenth
            done += size
            if num_bytes and done * 10 // num_bytes > tenth:
                tenth = done * 10 // num_bytes
                self.say(f"{name}: {done / 2**20:.1f} of {num_bytes / 2**20:.1f} MiB")

        self.say(f"{name} ({num_bytes / 2**20:.1f} MiB)" if num_bytes else name)
        yield advance
