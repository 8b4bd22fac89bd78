"""`rung data inspect`."""

import json

import numpy as np
import pytest
from rich.console import Console

from rung.data.build import build_corpus
from rung.data.indexed import IndexedDatasetWriter
from rung.data.inspect import inspect_corpus, render_inspection
from rung.errors import UserError


def rendered(inspection) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    render_inspection(inspection, console)
    return console.export_text()


def test_a_built_corpus(tmp_path):
    texts = [f"[bold]document {i}[/bold] " * (i + 1) for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = build_corpus(tmp_path / "a.jsonl", tmp_path / "out", vocab_size=300, valid_fraction=0.1, quiet=True)
    found = inspect_corpus(tmp_path / "out", num_samples=2)
    assert found.fingerprint == corpus.fingerprint
    assert found.splits["train"].samples[0].startswith("[bold]document ")
    lengths = found.splits["train"].length_quantiles
    assert list(lengths.values()) == sorted(lengths.values())
    text = rendered(found)
    for wanted in (
        corpus.fingerprint,
        "300 tokens",
        f"{corpus.info.splits['train'].tokens:,}",
        "[bold]document 0[/bold]",
    ):
        assert wanted in text
    assert f"{corpus.info.splits['valid'].gzip_bits_per_byte:.4f}" in text
    with pytest.raises(UserError, match="num_samples=-1"):
        inspect_corpus(tmp_path / "out", -1)


def test_a_bare_prefix(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(range(200))
        writer.add_document([7, 8])
    found = inspect_corpus(tmp_path / "x")
    assert found.splits["train"].samples[1] == "7 8"
    assert found.splits["train"].samples[0].endswith("127…")
    assert "none (bare token files)" in rendered(found)
