"""A corpus: a folder of token files that `rung data build` wrote, or one of Megatron's token files; read by windows.

    corpus.json             sizes, fingerprint, end-of-document token; written last, so its presence means "whole"
    tokenizer.json          the tokenizer of the tokenizers library
    train.bin, train.idx    token files of the splits (``rung.data.indexed``); every document ends with the eos token
    valid.bin, valid.idx
    valid_documents.jsonl   {"name", "bytes", "gzip9_bytes"} of every held-out document, in the order of the token file

Window w of sequence length T covers tokens w·T … w·T + T of the stream: T inputs, and as labels the T tokens one later.
"""

# B sequences, T tokens

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from rung.data.batch import IGNORED, Batch
from rung.data.indexed import IndexedDataset, bin_path, idx_path
from rung.data.order import WINDOW_BITS
from rung.data.tokenizer import load_tokenizer
from rung.errors import UserError

__all__ = ["FORMAT_VERSION", "Corpus", "CorpusInfo", "SplitInfo", "TokenSource", "check_vocab", "read_windows"]

FORMAT_VERSION = 1
_WHOLE_BYTES = 64 * 2**20
_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 2**20


@dataclass(frozen=True)
class SplitInfo:
    """Sizes of one split."""

    tokens: int
    """End-of-document tokens included."""
    documents: int
    bytes: int
    """UTF-8 bytes of the text, without the end-of-document tokens."""
    gzip9_bytes: int | None = None
    """Σ over documents of the size of the document alone under gzip -9; held-out split only."""

    @property
    def gzip_bits_per_byte(self) -> float | None:
        """What gzip -9 needs for one byte of this split: the yardstick for a model's bits per byte."""
        return None if self.gzip9_bytes is None else 8 * self.gzip9_bytes / self.bytes


@dataclass(frozen=True)
class CorpusInfo:
    """``corpus.json``."""

    fingerprint: str
    """xxh3-128 over the token files' and the tokenizer's content. Names the corpus in the data order."""
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    splits: dict[str, SplitInfo]
    """"train", and "valid" where documents were held out."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Inputs that were left out, counted by reason."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> CorpusInfo:
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            version = fields["format_version"]
            if version == FORMAT_VERSION:
                fields["splits"] = {name: SplitInfo(**split) for name, split in fields["splits"].items()}
                return cls(**fields)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); build the corpus again") from error
        raise UserError(f"{path} has format version {version}, this Rung reads {FORMAT_VERSION}; build it again")


class TokenSource:
    """One token file read by windows."""

    def __init__(self, dataset: IndexedDataset, pad_id: int = 0) -> None:
        """``pad_id``: the input beyond the end of the stream, where the label is ignored."""
        self.dataset = dataset
        self.pad_id = pad_id

    def num_windows(self, seq_len: int) -> int:
        """Full windows, as training reads them."""
        return max(self.dataset.num_tokens - 1, 0) // seq_len

    def num_eval_windows(self, seq_len: int) -> int:
        """Windows that cover every token that can be predicted: the last one may be short and is then padded."""
        return -(-max(self.dataset.num_tokens - 1, 0) // seq_len)

    def read(self, sample_ids: ArrayLike, seq_len: int, document_mask: bool = False) -> Batch:
        """The windows that the low bits of ``sample_ids`` name."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        return read_windows([self] * len(ids), ids, seq_len, document_mask)


def read_windows(
    sources: Sequence[TokenSource], sample_ids: ArrayLike, seq_len: int, document_mask: bool = False
) -> Batch:
    """The windows that the low bits of ``sample_ids`` [B] name, row b from ``sources[b]``, as one batch on the CPU.

    With ``document_mask`` the batch says which document each input is in. Beyond the end of a stream inputs are the
    source's ``pad_id``, labels ``IGNORED``, and the document is one past the last.
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    shape = (len(ids), seq_len)
    tokens, labels = np.empty(shape, np.int64), np.full(shape, IGNORED, np.int64)
    documents = np.empty(shape, np.int64) if document_mask else None
    for row, (source, sample) in enumerate(zip(sources, ids.tolist(), strict=True)):
        start = (sample & (1 << WINDOW_BITS) - 1) * seq_len
        count = min(seq_len, source.dataset.num_tokens - 1 - start)
        if count < 1:
            raise IndexError(f"sample {sample}: window {start // seq_len} of {source.num_eval_windows(seq_len)}")
        stream = source.dataset.tokens(start, start + count + 1)
        tokens[row, :count], tokens[row, count:] = stream[:-1], source.pad_id
        labels[row, :count] = stream[1:]
        if documents is not None:
            documents[row, :count] = source.dataset.document_ids(start, start + count)
            documents[row, count:] = source.dataset.num_documents
    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        labels_BT=torch.from_numpy(labels),
        sample_ids_B=torch.from_numpy(ids.copy()),
        positions_BT=torch.arange(seq_len).repeat(len(ids), 1),
        document_ids_BT=None if documents is None else torch.from_numpy(documents),
    )


class Corpus:
    """A corpus on disk: ``train`` and, where documents were held out, ``valid``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path``: a folder made by `rung data build`, or Megatron's prefix, ``…/foo`` for foo.bin and foo.idx.

        A bare prefix has neither tokenizer nor held-out split. Raises UserError where files are missing, truncated or
        of another format.
        """
        self.path = Path(path)
        self.info: CorpusInfo | None = None
        self.valid: TokenSource | None = None
        if (self.path / "corpus.json").is_file():
            self.info = CorpusInfo.read(self.path / "corpus.json")
            self.train = self._open("train")
            if "valid" in self.info.splits:
                self.valid = self._open("valid")
            if self.tokenizer_path is not None and not self.tokenizer_path.is_file():
                raise UserError(f"{self.tokenizer_path} does not exist; build the corpus again")
        elif idx_path(path).exists() or bin_path(path).exists():
            self.train = TokenSource(IndexedDataset(path))
        elif (self.path / ".partial").is_dir():
            raise UserError(f"{self.path} is an unfinished corpus; run the same `rung data build` again to complete it")
        elif self.path.is_dir():
            prefixes = ", ".join(str(found.with_suffix("")) for found in sorted(self.path.glob("*.idx")))
            hint = f"did you mean the token files {prefixes}?" if prefixes else "make one with `rung data build`"
            raise UserError(f"{self.path} is not a corpus: it has no corpus.json; {hint}")
        else:
            raise UserError(
                f"{self.path} does not exist; give a folder made by `rung data build` or a prefix of .bin and .idx"
            )
        if self.train.dataset.num_tokens == 0:
            raise UserError(f"{self.path} is empty: it holds no token to train on")

    def _open(self, split: str) -> TokenSource:
        assert self.info is not None
        dataset = IndexedDataset(self.path / split)
        promised = self.info.splits[split]
        if (dataset.num_tokens, dataset.num_documents) != (promised.tokens, promised.documents):
            raise UserError(
                f"{self.path / split} holds {dataset.num_tokens} tokens in {dataset.num_documents} documents,"
                f" corpus.json says {promised.tokens} in {promised.documents}; build the corpus again"
            )
        return TokenSource(dataset, self.info.eos_id)

    @cached_property
    def fingerprint(self) -> str:
        """Names the content. Of a bare prefix: xxh3-128 over both files' sizes and content; of a file above 64 MiB only
        over 64 blocks of 1 MiB, evenly spaced from its first to its last byte, so an edit between them goes unseen."""
        if self.info is not None:
            return self.info.fingerprint
        digest = xxhash.xxh3_128()
        for file in (idx_path(self.path), bin_path(self.path)):
            digest.update(file.stat().st_size.to_bytes(8, "little"))
            for block in _blocks(file):
                digest.update(block.tobytes())
        return digest.hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids. Of a bare prefix: one more than the largest in the blocks that ``fingerprint`` reads."""
        if self.info is not None:
            return self.info.vocab_size
        dtype = self.train.dataset.dtype
        return 1 + max(int(block.view(dtype).max()) for block in _blocks(bin_path(self.path)))

    @property
    def tokenizer_path(self) -> Path | None:
        return None if self.info is None else self.path / "tokenizer.json"

    def tokenizer(self) -> Tokenizer | None:
        return None if self.tokenizer_path is None else load_tokenizer(self.tokenizer_path)


def check_vocab(corpus: Any, model_vocab_size: int) -> None:
    """Raise UserError when ``corpus`` (what has ``path`` and ``vocab_size``) has token ids that the model lacks."""
    if corpus.vocab_size > model_vocab_size:
        raise UserError(
            f"{corpus.path} has token ids up to {corpus.vocab_size - 1}, model.vocab_size={model_vocab_size} ends at"
            f" {model_vocab_size - 1}; set model.vocab_size={corpus.vocab_size} or larger"
        )


def _blocks(path: Path) -> list[NDArray[np.uint8]]:
    """The whole file, or evenly spaced blocks of a large one; blocks start at whole tokens."""
    file = np.memmap(path, mode="r", dtype=np.uint8).view(np.ndarray)
    if len(file) <= _WHOLE_BYTES:
        return [file]
    last = len(file) - _BLOCK_BYTES
    starts = [last * block // (_SAMPLED_BLOCKS - 1) // 8 * 8 for block in range(_SAMPLED_BLOCKS - 1)] + [last]
    return [file[start : start + _BLOCK_BYTES] for start in starts]
