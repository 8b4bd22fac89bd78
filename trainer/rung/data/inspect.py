"""`rung data inspect`: what is in a corpus."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rung.data.corpus import Corpus, SplitInfo
from rung.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Inspection", "SplitInspection", "inspect_corpus", "render_inspection"]

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_SAMPLE_TOKENS = 128


@dataclass(frozen=True)
class SplitInspection:
    """One split."""

    tokens: int
    documents: int
    info: SplitInfo | None
    """What corpus.json says; None for a bare prefix."""
    length_quantiles: dict[float, int]
    """Quantile -> document length in tokens, end-of-document token included."""
    samples: list[str]
    """The beginnings of the first documents: text, or token ids where there is no tokenizer."""


@dataclass(frozen=True)
class Inspection:
    """A corpus at a glance."""

    path: Path
    fingerprint: str
    vocab_size: int
    token_dtype: str
    tokenizer: Path | None
    splits: dict[str, SplitInspection]
    skipped: dict[str, int]


def inspect_corpus(path: str | os.PathLike[str], num_samples: int = 3) -> Inspection:
    """Open a corpus and describe it, with the first ``num_samples`` documents of each split."""
    if num_samples < 0:
        raise UserError(f"num_samples={num_samples} must be 0 or more")
    corpus = Corpus(path)
    tokenizer = corpus.tokenizer()
    splits = {}
    for name, source in {"train": corpus.train, "valid": corpus.valid}.items():
        if source is None:
            continue
        dataset = source.dataset
        samples = []
        for document in range(min(num_samples, dataset.num_documents)):
            start, stop = dataset.document_span(document)
            ids = dataset.tokens(start, min(stop, start + _SAMPLE_TOKENS)).tolist()
            text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)
            samples.append(text + ("…" if stop - start > _SAMPLE_TOKENS else ""))
        lengths = np.quantile(dataset.document_lengths(), _QUANTILES, method="nearest").tolist()
        splits[name] = SplitInspection(
            tokens=dataset.num_tokens,
            documents=dataset.num_documents,
            info=None if corpus.info is None else corpus.info.splits[name],
            length_quantiles=dict(zip(_QUANTILES, map(int, lengths), strict=True)),
            samples=samples,
        )
    return Inspection(
        path=corpus.path,
        fingerprint=corpus.fingerprint,
        vocab_size=corpus.vocab_size,
        token_dtype=str(corpus.train.dataset.dtype),
        tokenizer=corpus.tokenizer_path,
        splits=splits,
        skipped={} if corpus.info is None else corpus.info.skipped,
    )


def render_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Print an inspection."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    facts = Table.grid(padding=(0, 2))
    facts.add_row("corpus", Text(str(inspection.path), overflow="fold"))
    facts.add_row("fingerprint", inspection.fingerprint)
    facts.add_row("vocabulary", f"{inspection.vocab_size:,} tokens, stored as {inspection.token_dtype}")
    facts.add_row("tokenizer", Text(str(inspection.tokenizer or "none (bare token files)"), overflow="fold"))
    for reason, count in inspection.skipped.items():
        facts.add_row("skipped", f"{count:,} {reason}")
    console.print(facts)

    sizes = Table()
    for heading in ("split", "documents", "tokens", "bytes", "bytes/token", "gzip -9 bits/byte"):
        sizes.add_column(heading, justify="left" if heading == "split" else "right")
    lengths = Table("split", title="tokens per document")
    for quantile in _QUANTILES:
        lengths.add_column({0: "least", 0.5: "median", 1: "most"}.get(quantile, f"{quantile:.0%}"), justify="right")
    for name, split in inspection.splits.items():
        info = split.info
        gzip_bits = None if info is None else info.gzip_bits_per_byte
        sizes.add_row(
            name,
            f"{split.documents:,}",
            f"{split.tokens:,}",
            f"{info.bytes:,}" if info else "–",
            f"{info.bytes / split.tokens:.3f}" if info else "–",
            f"{gzip_bits:.4f}" if gzip_bits is not None else "–",
        )
        lengths.add_row(name, *(f"{length:,}" for length in split.length_quantiles.values()))
    console.print(sizes)
    console.print(lengths)
    for name, split in inspection.splits.items():
        for number, sample in enumerate(split.samples):
            console.print(Panel(Text(sample), title=f"{name}, document {number}", title_align="left"))
