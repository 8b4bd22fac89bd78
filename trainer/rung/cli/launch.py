"""``rung launch``: start the processes of a run here, or submit them to Slurm, with the scripts of launch/."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NoReturn

from rung.errors import UserError

__all__ = ["main", "run_local", "slurm"]


def main(argv: Sequence[str]) -> int:
    """Parse `local` or `slurm`, its options, and the overrides that `rung train` is given."""
    parser = argparse.ArgumentParser(prog="rung launch", description=__doc__, allow_abbrev=False)
    places = parser.add_subparsers(dest="place", required=True, metavar="{local,slurm}")
    local = places.add_parser("local", help="torchrun on this machine", allow_abbrev=False)
    local.add_argument("--nproc", type=int, help="number of processes; default one for each GPU, or one without GPUs")
    batch = places.add_parser("slurm", help="submit to Slurm; further --option=value go to sbatch", allow_abbrev=False)
    batch.add_argument("--nodes", type=int, default=1, help="number of nodes (default 1)")
    batch.add_argument("--gpus-per-node", type=int, default=8, help="GPUs and processes on each node (default 8)")
    batch.add_argument("--print", action="store_true", help="print the command and the script; submit nothing")
    for place in (local, batch):
        place.add_argument("overrides", nargs="*", metavar="key=value", help="what `rung train` is given")
    known, options = parser.parse_known_args(list(argv))

    if wrong := [word for word in known.overrides if "=" not in word and not word.startswith("~")]:
        raise UserError(f"{' '.join(wrong)}: settings are written key=value, and options of sbatch --option=value")
    if known.place == "slurm":
        return slurm(
            known.overrides,
            nodes=known.nodes,
            gpus_per_node=known.gpus_per_node,
            options=options,
            print_only=known.print,
        )
    if options:
        raise UserError(f"unknown option {' '.join(options)}; `rung launch local` has --nproc")
    run_local(known.nproc, known.overrides)


def run_local(nproc: int | None, arguments: Sequence[str], module: str = "rung.train") -> NoReturn:
    """Become `launch/local.sh`: `python -m module` on this machine with `nproc` processes (None: one for each GPU, else
    one)."""
    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc={nproc} is not a number of processes; legal values: 1, 2, 3, …")
    options = [] if nproc is None else ["--nproc", str(nproc)]
    options += [] if module == "rung.train" else ["--module", module]
    os.environ["PYTHON"] = sys.executable
    with _template("local.sh") as script:
        os.execvp("bash", ["bash", str(script), *options, "--", *arguments])


def slurm(
    overrides: Sequence[str],
    *,
    nodes: int = 1,
    gpus_per_node: int = 8,
    options: Sequence[str] = (),
    print_only: bool = False,
) -> int:
    """Submit `launch/slurm/train.sbatch`, which trains with these overrides; return sbatch's exit code.

    Args:
        overrides: what `rung train` is given. The script adds a `run.dir` where there is none.
        nodes: number of nodes.
        gpus_per_node: GPUs, and so processes, on each node; 0 on a cluster without GPUs.
        options: further options of sbatch, such as `--time=24:00:00` or `--partition=NAME`.
        print_only: print the command and the script instead of submitting.
    """
    if nodes < 1 or gpus_per_node < 0:
        raise UserError(f"--nodes={nodes} must be at least 1, and --gpus-per-node={gpus_per_node} at least 0")
    sizes = [f"--nodes={nodes}", f"--gpus-per-node={gpus_per_node}"]
    with _template("slurm", "train.sbatch") as script:
        command = ["sbatch", *sizes, *options, str(script), *overrides]
        if print_only:
            print(f"# RUNG_PYTHON={shlex.quote(sys.executable)} {shlex.join(command)}")
            print(script.read_text(), end="")
            return 0
        if shutil.which("sbatch") is None:
            raise UserError("there is no sbatch on this machine; use a cluster's login node, or --print the script")
        return subprocess.run(command, env={**os.environ, "RUNG_PYTHON": sys.executable}, check=False).returncode


@contextlib.contextmanager
def _template(*parts: str) -> Iterator[Path]:
    """A file of launch/, wherever the package is installed."""
    with resources.as_file(resources.files("rung.launch_templates").joinpath(*parts)) as path:
        yield path
