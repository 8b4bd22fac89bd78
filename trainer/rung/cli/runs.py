"""``rung runs``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """List the runs below a folder: state, step, losses."""
    parser = argparse.ArgumentParser(prog="rung runs", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"))
    arguments = parser.parse_args(argv)
    from rich.console import Console

    from rung.errors import UserError
    from rung.observe import list_runs, runs_table

    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is not a folder; give the one that holds your runs")
    Console().print(runs_table(list_runs(arguments.folder), root=arguments.folder))
    return 0
