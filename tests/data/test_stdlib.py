"""The corpus every machine has: what is in it, two builders at once, a builder that was killed."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from rung.data import stdlib
from rung.data.corpus import Corpus
from rung.data.documents import Selection
from rung.data.source import DataConfig, open_data, prepare
from rung.data.stdlib import cache_folder, ensure_python_stdlib

BUILDER = """
import sys, sysconfig, time
from pathlib import Path
from rung.data import build, stdlib
sysconfig.get_paths = lambda *_: {"stdlib": sys.argv[1]}
encode = build._encode_shard
def slow(*arguments):
    Path(sys.argv[2], f"encoding-{time.time_ns()}").touch()
    time.sleep(float(sys.argv[3]))
    encode(*arguments)
build._encode_shard = slow
print(stdlib.ensure_python_stdlib(300, quiet=True))
"""


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A small standard library, and an empty cache."""
    root = tmp_path / "lib"
    for name in [f"package{i % 4}/module{i}.py" for i in range(120)] + [
        "test/test_x.py",
        "json/tests/test_y.py",
        "site-packages/numpy.py",
        "dist-packages/other.py",
        "package0/__pycache__/module0.py",
        "package0/data.txt",
    ]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\ndef f(x):\n    return {len(name)} * x\n" * 3)
    (root / "latin1.py").write_bytes("# größer".encode("latin-1"))
    (root / "dangling.py").symlink_to(root / "nowhere.py")
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"stdlib": str(root)})
    return root


def start_builder(library: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(library), str(library.parent), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def encodings(library: Path) -> int:
    return len(list(library.parent.glob("encoding-*")))


def test_folder_is_named_by_sources_and_settings(library):
    path = ensure_python_stdlib(300, quiet=True)
    info = Corpus(path).info
    assert sum(split.documents for split in info.splits.values()) == 120
    assert info.skipped == {"not UTF-8 text": 1}
    written = (path / "corpus.json").stat().st_mtime_ns
    assert ensure_python_stdlib(300) == path
    assert (path / "corpus.json").stat().st_mtime_ns == written
    assert ensure_python_stdlib(301, quiet=True) != path
    (library / "package1" / "module1.py").write_text("changed = True\n")
    assert ensure_python_stdlib(300, quiet=True) != path


def test_data_source_of_the_library(library):
    config = DataConfig(vocab_size=300, seq_len=32)
    prepare(config)
    source = open_data(config, seed=1)
    assert source.vocab_size == 300
    assert source.num_eval_windows > 0
    assert source.read(source.sample_ids(0, 4)).tokens_BT.shape == (4, 32)


def test_two_processes_at_once_build_once(library):
    builders = [start_builder(library, 0.5) for _ in range(2)]
    outputs = {builder.communicate(timeout=120)[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len(outputs) == 1
    assert encodings(library) == 1
    Corpus(outputs.pop())


def test_a_killed_builder_is_continued(library):
    builder = start_builder(library, 600)
    while not encodings(library):
        assert builder.poll() is None
        time.sleep(0.02)
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    [partial] = (library.parent / "cache").glob("*/.partial")
    trained = (partial / "tokenizer.json").read_bytes()
    path = ensure_python_stdlib(300, quiet=True)
    assert (path / "tokenizer.json").read_bytes() == trained
    assert not partial.exists()


def test_cache_folder(monkeypatch):
    for name in ("RUNG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "rung"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/rung")
    monkeypatch.setenv("RUNG_CACHE", "~/here")
    assert cache_folder() == Path.home() / "here"


def test_the_real_library_holds_out_a_few_percent():
    files = stdlib._source_files(Path(sysconfig.get_paths()["stdlib"]))
    total = sum(file.size for file in files)
    selection = Selection(stdlib._VALID_FRACTION, stdlib._SEED)
    held_out = sum(file.size for file in files if selection.holds_out(file.name))
    assert total > 5e6
    assert 0.02 < held_out / total < 0.05


@pytest.mark.slow
def test_the_real_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path))
    corpus = Corpus(ensure_python_stdlib())
    assert corpus.vocab_size == 4096
    assert corpus.info.splits["train"].tokens > 1_000_000
    assert 1.5 < corpus.info.splits["valid"].gzip_bits_per_byte < 3
    dataset, tokenizer = corpus.valid.dataset, corpus.tokenizer()
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [line.split('"')[3] for line in (corpus.path / "valid_documents.jsonl").read_text().splitlines()]
    for document, name in enumerate(names):
        ids = dataset.tokens(*dataset.document_span(document)).tolist()
        assert tokenizer.decode(ids[:-1], skip_special_tokens=False).encode() == (root / name).read_bytes()
