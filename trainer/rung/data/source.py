"""What a run reads: settings, the blend of corpora, and the held-out windows."""

# B sequences, T tokens

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rung.config import choice_problem, positive_problems
from rung.data.batch import Batch
from rung.data.corpus import Corpus, read_windows
from rung.data.order import WINDOW_BITS, SampleOrder
from rung.data.stdlib import ensure_python_stdlib
from rung.data.tokenizer import load_tokenizer, token_byte_lengths
from rung.errors import UserError

__all__ = ["DataConfig", "DataSource", "open_data", "prepare"]

NAMES = ("python_stdlib", "corpus")


@dataclass
class DataConfig:
    """What is trained on, and how it is cut."""

    name: str = "python_stdlib"
    """python_stdlib: the source code of Python's standard library, built on first use. corpus: those in data.paths."""
    paths: list[str] = field(default_factory=list)
    """Corpora: folders made by `rung data build`, or prefixes of Megatron's .bin and .idx files."""
    weights: list[float] = field(default_factory=list)
    """Share of the samples that each corpus gives, in any unit. Empty: in proportion to their numbers of windows."""
    seq_len: int = 256
    """Tokens per training window."""
    document_mask: bool = False
    """Windows may hold several documents; true keeps attention from crossing their boundaries."""
    vocab_size: int = 4096
    """python_stdlib: tokens of the vocabulary that is trained on it. Other corpora bring their own."""
    tokenizer: str | None = None
    """tokenizer.json that belongs to bare Megatron prefixes, for the exported weights and samples. Corpora made by
    `rung data build` bring theirs."""

    def validate(self) -> list[str]:
        """Problems that can be seen without opening a file."""
        problems = choice_problem("data.name", self.name, NAMES) + positive_problems(data__seq_len=self.seq_len)
        if self.name == "corpus" and not self.paths:
            problems.append("data.paths is empty; give the corpora, as data.paths=[/data/code,/data/text]")
        if self.name == "python_stdlib":
            problems += [
                f"data.{key} is set, but data=python_stdlib reads its own corpus; choose data=corpus or leave it out"
                for key in ("paths", "weights", "tokenizer")
                if getattr(self, key)
            ]
            if self.vocab_size < 257:
                problems.append(f"data.vocab_size={self.vocab_size} must be at least 257: all bytes and one end token")
        elif self.weights and len(self.weights) != len(self.paths):
            problems.append(f"data.weights has {len(self.weights)} entries for {len(self.paths)} data.paths")
        return problems


class DataSource:
    """The training blend and the held-out windows of a run. A run's place in it is its number of consumed samples."""

    def __init__(self, config: DataConfig, seed: int, corpora: Sequence[Corpus]) -> None:
        """``corpora`` in the order of ``config.weights``. Raises UserError when they cannot be read together."""
        self.config = config
        self.corpora = tuple(corpora)
        seq_len = config.seq_len
        sizes = [corpus.train.num_windows(seq_len) for corpus in corpora]
        UserError.raise_all(
            f"{corpus.path} has {corpus.train.dataset.num_tokens} tokens, less than a window of data.seq_len={seq_len}"
            f" inputs and the last one's label; set data.seq_len to at most {corpus.train.dataset.num_tokens - 1}"
            for corpus, size in zip(corpora, sizes, strict=True)
            if size < 1
        )
        tokenizers = {corpus.info.tokenizer_sha256: corpus.path for corpus in corpora if corpus.info is not None}
        if len(tokenizers) > 1:
            raise UserError(
                f"corpora with different tokenizers cannot be blended: {', '.join(map(str, tokenizers.values()))};"
                " build them again with one tokenizer.json"
            )
        if config.tokenizer:
            if tokenizers:
                raise UserError(f"data.tokenizer is for bare prefixes; {self.path} brings its own: leave it out")
            load_tokenizer(config.tokenizer)  # a wrong path is told before training, not at the first evaluation
        self.order = SampleOrder(sizes, config.weights or sizes, seed, [corpus.fingerprint for corpus in corpora])
        """``order.sample_ids(first, count)``, any place of the run."""
        self.eval_sources = tuple((index, held.valid) for index, held in enumerate(corpora) if held.valid is not None)
        windows = [source.num_eval_windows(seq_len) for _, source in self.eval_sources]
        self._eval_ends = np.cumsum(windows, dtype=np.int64)

    @property
    def path(self) -> str:
        """The corpora, for messages."""
        return ", ".join(str(corpus.path) for corpus in self.corpora)

    @cached_property
    def fingerprint(self) -> str:
        """Names what is read: one corpus's own fingerprint; of a blend a digest of all and of their integer weights."""
        if len(self.corpora) == 1:
            return self.corpora[0].fingerprint
        pairs = zip(self.order.fingerprints, self.order.weights, strict=True)
        parts = [f"{fingerprint} {weight}" for fingerprint, weight in pairs]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    @cached_property
    def vocab_size(self) -> int:
        """Token ids end below this."""
        return max(corpus.vocab_size for corpus in self.corpora)

    @cached_property
    def tokenizer_path(self) -> Path | None:
        """The corpora's tokenizer.json, or data.tokenizer for bare prefixes, or None."""
        own = next((corpus.tokenizer_path for corpus in self.corpora if corpus.tokenizer_path is not None), None)
        return own or (Path(self.config.tokenizer) if self.config.tokenizer else None)

    @cached_property
    def tokenizer_fingerprint(self) -> str | None:
        """sha256 of the tokenizer.json, or None where there is none."""
        return None if self.tokenizer_path is None else hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest()

    @property
    def eos_id(self) -> int | None:
        """The token that ends a document, where a corpus says so."""
        return next((corpus.info.eos_id for corpus in self.corpora if corpus.info is not None), None)

    @cached_property
    def token_bytes(self) -> Tensor | None:
        """UTF-8 bytes of every token id (``token_byte_lengths``), int64 [vocabulary]; None where they are not known."""
        if self.tokenizer_path is None:
            return None
        try:
            lengths = torch.from_numpy(token_byte_lengths(load_tokenizer(self.tokenizer_path)))
        except UserError as error:
            warnings.warn(f"{self.tokenizer_path}: {error}", stacklevel=2)
            return None
        return torch.nn.functional.pad(lengths, (0, max(0, self.vocab_size - len(lengths))))

    def sample_ids(self, first: int, count: int) -> NDArray[np.int64]:
        """Ids of ``count`` samples from number ``first`` on. Step t (from 0) reads ``sample_ids(t * n, n)``."""
        return self.order.sample_ids(first, count)

    def read(self, sample_ids: ArrayLike) -> Batch:
        """Training windows."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        sources = [self.corpora[corpus].train for corpus in (ids >> WINDOW_BITS).tolist()]
        return read_windows(sources, ids, self.config.seq_len, self.config.document_mask)

    @property
    def gzip_bits_per_byte(self) -> float | None:
        """What gzip -9 needs per byte of the held-out documents, each alone; None where a corpus does not say."""
        infos = [corpus.info for corpus in self.corpora if corpus.valid is not None]
        splits = [info.splits["valid"] for info in infos if info is not None]
        sizes = [split.gzip9_bytes for split in splits if split.gzip9_bytes is not None]
        if not sizes or len(sizes) < len(infos):
            return None
        return 8 * sum(sizes) / sum(split.bytes for split in splits)

    @property
    def num_eval_windows(self) -> int:
        """Held-out windows of all corpora, one corpus after the other; the last window of each may be short."""
        return int(self._eval_ends[-1]) if len(self._eval_ends) else 0

    def read_eval(self, windows: ArrayLike) -> Batch:
        """Held-out windows by their number."""
        numbers = np.asarray(windows, dtype=np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.num_eval_windows:
            raise IndexError(f"held-out windows {numbers.min()}..{numbers.max()} of {self.num_eval_windows}")
        which = np.searchsorted(self._eval_ends, numbers, side="right")
        starts = np.concatenate([np.zeros(1, np.int64), self._eval_ends])
        corpora = np.array([corpus for corpus, _ in self.eval_sources], dtype=np.int64)
        ids = corpora[which] << WINDOW_BITS | numbers - starts[which]
        sources = [self.eval_sources[index][1] for index in which.tolist()]
        return read_windows(sources, ids, self.config.seq_len, self.config.document_mask)


def prepare(config: DataConfig) -> None:
    """Make what ``open_data`` opens, where it can be made: one process of a machine calls this and the others wait."""
    UserError.raise_all(config.validate())
    if config.name == "python_stdlib":
        ensure_python_stdlib(config.vocab_size)


def open_data(config: DataConfig, seed: int) -> DataSource:
    """Open the data of a run. Raises UserError with every problem of the settings, or the first of the files."""
    UserError.raise_all(config.validate())
    paths = [str(ensure_python_stdlib(config.vocab_size))] if config.name == "python_stdlib" else config.paths
    return DataSource(config, seed, [Corpus(path) for path in paths])
