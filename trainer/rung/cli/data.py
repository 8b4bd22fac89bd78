"""``rung data``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Build a corpus from text, or look into one."""
    parser = argparse.ArgumentParser(prog="rung data", description=main.__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{build,inspect}")
    build = verbs.add_parser("build", help="tokenize text, JSONL, parquet, folders or globs", allow_abbrev=False)
    build.add_argument("inputs", nargs="+", help="files, folders, globs or URLs that fsspec knows")
    build.add_argument("--out", required=True, type=Path, help="the corpus folder to make")
    build.add_argument("--tokenizer", type=Path, help="a tokenizer.json; default: train a byte-level BPE on the text")
    build.add_argument("--vocab-size", type=int, default=32000, help="tokens of a trained tokenizer (default 32000)")
    build.add_argument("--valid-fraction", type=float, default=0.01, help="share of documents held out (default 0.01)")
    build.add_argument("--text-key", default="text", help="field or column that holds the text (default: text)")
    build.add_argument("--eos-token", help="the tokenizer's end-of-document token, where it has no usual name")
    build.add_argument("--workers", type=int, default=0, help="processes (default 0: one for each core)")
    build.add_argument("--seed", type=int, default=0, help="which documents are held out (default 0)")
    look = verbs.add_parser("inspect", help="sizes, lengths, fingerprint, first samples", allow_abbrev=False)
    look.add_argument("path", type=Path, help="a corpus folder, or the prefix of a .bin/.idx pair")
    look.add_argument("--samples", type=int, default=2, help="decoded samples to show (default 2)")
    arguments = parser.parse_args(argv)
    if arguments.verb == "inspect":
        from rung.data import inspect_corpus, render_inspection

        render_inspection(inspect_corpus(arguments.path, arguments.samples))
        return 0
    from rung.data import build_corpus

    build_corpus(
        arguments.inputs,
        arguments.out,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        valid_fraction=arguments.valid_fraction,
        eos_token=arguments.eos_token,
        text_key=arguments.text_key,
        workers=arguments.workers,
        seed=arguments.seed,
    )
    print(f"corpus ready: {arguments.out}  (train on it with data=corpus data.paths=[{arguments.out}])")
    return 0
