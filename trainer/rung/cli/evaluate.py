"""``rung eval``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Held-out bits per byte of a finished run, file by file, beside gzip -9 of the same file."""
    parser = argparse.ArgumentParser(prog="rung eval", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, metavar="RUN_DIR", help="a run's folder or a Hugging Face folder")
    parser.add_argument("--corpus", type=Path, help="corpus to evaluate on (default: the run's own)")
    parser.add_argument("--seq-len", type=int, help="tokens per window (default: the run's own)")
    parser.add_argument(
        "--files", type=int, default=10, help="files to list, best and worst first (default 10; 0: none)"
    )
    parser.add_argument("--json", type=Path, help="also write every file's numbers here")
    arguments = parser.parse_args(argv)
    from rung.recipes.inspect import evaluate_files

    report = evaluate_files(arguments.model, corpus=arguments.corpus, seq_len=arguments.seq_len)
    print(report.render(arguments.files))
    if arguments.json:
        arguments.json.write_text(report.to_json())
    return 0
