"""``rung plot``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Draw loss curves of one or several runs into a PNG."""
    parser = argparse.ArgumentParser(prog="rung plot", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="picture to write (default: loss.png in the first run's folder)")
    arguments = parser.parse_args(argv)
    from rung.observe import plot, read_metrics

    lines = [line for run in arguments.runs for line in read_metrics(run)]
    gzip_bits = {line["gzip_bits_per_byte"] for line in lines if line.get("gzip_bits_per_byte") is not None}
    yardstick = gzip_bits.pop() if len(gzip_bits) == 1 else None  # runs on different text have no common one
    print(plot(arguments.runs, arguments.out or arguments.runs[0] / "loss.png", gzip_bits_per_byte=yardstick))
    return 0
