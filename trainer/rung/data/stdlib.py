"""The corpus every machine has: the source code of Python's standard library, built on first use."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import xxhash

from rung.data.build import build_files
from rung.data.corpus import FORMAT_VERSION
from rung.data.documents import SourceFile

__all__ = ["cache_folder", "ensure_python_stdlib"]

# Test suites are left out: some distributions ship them (60 % of CPython's tree) and some do not, so with them machines
# of one Python version would train on different text; and much of them is tables of cases.
_EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_VALID_FRACTION = 0.04
_SEED = 0
_RECIPE_VERSION = 1
"""Goes up when the same sources would become another corpus."""


def cache_folder() -> Path:
    """Where Rung keeps what it can make again: RUNG_CACHE, else ``rung`` in XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("RUNG_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rung"


def ensure_python_stdlib(vocab_size: int = 4096, *, quiet: bool = False) -> Path:
    """The folder of the ``python_stdlib`` corpus; builds it when there is none for these sources and ``vocab_size``.

    Every UTF-8 .py file of ``sysconfig.get_paths()["stdlib"]`` outside installed packages and test suites; 4 % of the
    files, chosen by hash of their path, are held out. Some 12 MB of text, a quarter of a minute. Processes that come
    while one builds wait for it; an interrupted build is continued.
    """
    files = _source_files(Path(sysconfig.get_paths()["stdlib"]))
    digest = xxhash.xxh3_128(f"{_RECIPE_VERSION} {FORMAT_VERSION} {vocab_size} {_VALID_FRACTION} {_SEED}".encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode())
        digest.update(Path(file.path).read_bytes())
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    out = cache_folder() / f"python_stdlib-{version}-{digest.hexdigest()[:16]}"
    if not (out / "corpus.json").is_file():
        build_files(
            files,
            out,
            tokenizer=None,
            vocab_size=vocab_size,
            eos_token=None,
            text_key="text",
            valid_fraction=_VALID_FRACTION,
            seed=_SEED,
            workers=1,
            tokenizer_bytes=2**30,
            quiet=quiet,
            reuse=True,
        )
    return out


def _source_files(root: Path) -> list[SourceFile]:
    """The library's files, sorted by their path below ``root``."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _EXCLUDED]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            if path.is_file() and os.access(path, os.R_OK):  # distributions leave dangling links
                files.append(SourceFile(path.relative_to(root).as_posix(), str(path), path.stat().st_size))
    return sorted(files, key=lambda file: file.name)
