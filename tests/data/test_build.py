"""`rung data build`: the same bytes with any number of workers and after any interruption; formats; errors."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rung.data import build
from rung.data.build import build_corpus
from rung.data.corpus import Corpus
from rung.data.documents import Selection, find_files, make_shards, read_documents
from rung.errors import UserError


def sentence(i: int) -> str:
    return f"Document {i} says {'ha' * (i % 9)} größer than {i * 37 % 101}.\n" * (1 + i % 4)


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder of 60 text files, a jsonl file of 40 lines and a parquet file of 30 rows."""
    folder = tmp_path / "texts"
    for i in range(60):
        path = folder / f"part{i % 3}" / f"{i}.{'md' if i % 2 else 'py'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sentence(i))
    (folder / "lines.jsonl").write_text(
        "".join(json.dumps({"text": sentence(i), "id": i}) + "\n" for i in range(60, 100))
    )
    table = pyarrow.table({"text": [sentence(i) for i in range(100, 130)], "id": list(range(30))})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=7)
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(build, "SHARD_BYTES", 1500)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def make(texts, out, **options) -> Corpus:
    return build_corpus(texts, out, **{"vocab_size": 300, "valid_fraction": 0.1, "quiet": True} | options)


def decoded(corpus: Corpus, split: str) -> list[str]:
    dataset = getattr(corpus, split).dataset
    tokenizer = corpus.tokenizer()
    spans = [dataset.document_span(document) for document in range(dataset.num_documents)]
    documents = [dataset.tokens(*span).tolist() for span in spans]
    assert all(ids[-1] == corpus.info.eos_id for ids in documents)
    return [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents]


def test_every_document_is_there_once(texts, tmp_path, small_shards):
    corpus = make(texts, tmp_path / "out")
    train, valid = decoded(corpus, "train"), decoded(corpus, "valid")
    assert sorted(train + valid) == sorted(sentence(i) for i in range(130))
    assert 4 <= len(valid) <= 30
    info = corpus.info
    for name, documents in (("train", train), ("valid", valid)):
        assert info.splits[name].bytes == sum(len(text.encode()) for text in documents)
        assert info.splits[name].documents == len(documents)
    listing = [json.loads(line) for line in (tmp_path / "out" / "valid_documents.jsonl").read_text().splitlines()]
    assert [entry["bytes"] for entry in listing] == [len(text.encode()) for text in valid]
    gzipped = [len(gzip.compress(text.encode(), 9)) for text in valid]
    assert [entry["gzip9_bytes"] for entry in listing] == gzipped
    assert info.splits["valid"].gzip9_bytes == sum(gzipped)
    assert info.splits["valid"].gzip_bits_per_byte == 8 * sum(gzipped) / info.splits["valid"].bytes
    assert all(Selection(0.1, 0).holds_out(entry["name"]) for entry in listing)
    assert not (tmp_path / "out" / ".partial").exists()


def test_workers_change_nothing(texts, tmp_path, small_shards):
    make(texts, tmp_path / "one")
    make(texts, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_an_interrupted_build_continues_to_the_same_bytes(texts, tmp_path, small_shards, monkeypatch):
    make(texts, tmp_path / "straight")
    encode, done = build._encode_shard, []

    def interrupted(pieces, path, settings):
        if len(done) == 3:
            path.with_suffix(".tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(path.name)
        encode(pieces, path, settings)

    monkeypatch.setattr(build, "_encode_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(texts, tmp_path / "out")
    with pytest.raises(UserError, match="is an unfinished corpus; run the same"):
        Corpus(tmp_path / "out")
    kept = sorted((tmp_path / "out" / ".partial").glob("*.npz"))
    assert len(kept) == 3
    kept[1].write_bytes(kept[1].read_bytes()[:-30])  # as a machine that lost power leaves it

    again = []
    monkeypatch.setattr(build, "_encode_shard", lambda *args: (again.append(args[1].name), encode(*args)))
    monkeypatch.setattr(build, "train_tokenizer", None)  # trained already
    make(texts, tmp_path / "out")
    assert kept[0].name not in again
    assert kept[1].name in again
    assert kept[2].name not in again
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_partial_work_of_other_settings_is_not_used(texts, tmp_path, small_shards, monkeypatch):
    make(texts, tmp_path / "straight", seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_join", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(texts, tmp_path / "out", seed=0)
    make(texts, tmp_path / "out", seed=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_given_tokenizer_is_kept(texts, tmp_path):
    first = make(texts, tmp_path / "first")
    second = make(texts / "part0", tmp_path / "second", tokenizer=first.tokenizer_path)
    assert second.tokenizer_path.read_bytes() == first.tokenizer_path.read_bytes()
    assert second.info.tokenizer_sha256 == first.info.tokenizer_sha256
    assert second.fingerprint != first.fingerprint


def test_shards_cut_files_without_losing_a_document(texts, tmp_path):
    """Cut at every size, also in the middle of lines, jsonl and parquet give each document once, under one name."""
    files = find_files([texts / "lines.jsonl", texts / "rows.parquet"])
    whole = [
        document for shard in make_shards(files, 10**9) for piece in shard for document in read_documents(piece, "text")
    ]
    assert [document.text for document in whole] == [sentence(i) for i in range(60, 130)]
    for shard_bytes in (1, 7, 64, 100, 333, 1000, 5000):
        shards = make_shards(files, shard_bytes)
        assert [d for shard in shards for piece in shard for d in read_documents(piece, "text")] == whole


def test_compressed_and_globbed_inputs(texts, tmp_path):
    (texts / "lines.jsonl.gz").write_bytes(gzip.compress((texts / "lines.jsonl").read_bytes()))
    [packed] = find_files([texts / "*.gz"])
    [plain] = find_files([f"{texts}/l*.jsonl"])
    documents = [
        [d.text for d in read_documents(piece, "text")]
        for file in (packed, plain)
        for piece in make_shards([file], 10**9)[0]
    ]
    assert documents[0] == documents[1]
    assert len(find_files([f"{texts}/**/*.py"])) == 30
    names = [file.name for file in find_files([texts / "part1", texts])]
    assert names.count("7.md") == 1, "a file found twice is taken once"
    assert "part1/7.md" not in names


def test_remote_inputs(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for i in range(12):
        memory.pipe(f"/corpus/{i}.txt", sentence(i).encode())
    corpus = build_corpus("memory://corpus", tmp_path / "out", vocab_size=300, valid_fraction=0, quiet=True)
    assert sorted(decoded(corpus, "train")) == sorted(sentence(i) for i in range(12))
    assert corpus.valid is None
    assert not (tmp_path / "out" / "valid.bin").exists()


def test_what_is_not_text_is_skipped_and_counted(texts, tmp_path, capsys):
    (texts / "image.png").write_bytes(b"\x89PNG\0\1\2\xff")
    (texts / "latin1.txt").write_bytes("größer".encode("latin-1"))
    (texts / "empty.txt").write_bytes(b"")
    (texts / ".hidden").write_text("not read")
    (texts / "odd.jsonl").write_text('{"text": "\\ud800"}\n\n{"text": ""}\n')
    corpus = make(texts, tmp_path / "out", quiet=False)
    assert corpus.info.skipped == {"empty": 2, "not UTF-8 text": 3}
    assert sum(split.documents for split in corpus.info.splits.values()) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "skipped 2 empty, 3 not UTF-8 text" in printed.err
    assert "training the tokenizer" in printed.err


def test_one_text_file_holds_out_its_end(tmp_path):
    text = "".join(f"line {i}\n" for i in range(500))
    (tmp_path / "book.txt").write_text(text)
    corpus = make(tmp_path / "book.txt", tmp_path / "out")
    [train], [valid] = decoded(corpus, "train"), decoded(corpus, "valid")
    assert train + valid == text
    assert train.endswith("\n")
    assert 0.1 <= len(valid) / len(text) < 0.11


def test_long_texts_are_encoded_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_PIECE_CHARACTERS", 50)
    (tmp_path / "a.txt").write_text("word " * 100)
    (tmp_path / "b.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    corpus = make([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", valid_fraction=0)
    assert decoded(corpus, "train") == [(tmp_path / "a.txt").read_text(), (tmp_path / "b.txt").read_text()]


def test_large_inputs_train_the_tokenizer_on_a_sample(texts, tmp_path, small_shards):
    make(texts, tmp_path / "all")
    make(texts, tmp_path / "some", tokenizer_bytes=1000)
    assert contents(tmp_path / "all")["tokenizer.json"] != contents(tmp_path / "some")["tokenizer.json"]


def test_wide_vocabularies_take_four_bytes(texts, tmp_path):
    document = json.loads(make(texts, tmp_path / "narrow").tokenizer_path.read_text())
    document["added_tokens"].append({**document["added_tokens"][0], "id": 70000, "content": "<|far|>"})
    document["model"]["vocab"]["<|far|>"] = 70000
    (tmp_path / "wide.json").write_text(json.dumps(document))
    corpus = make(texts, tmp_path / "wide", tokenizer=tmp_path / "wide.json", eos_token="<|far|>")
    assert corpus.train.dataset.dtype == np.int32
    assert (corpus.vocab_size, corpus.info.eos_id) == (70001, 70000)
    decoded(corpus, "train")


def test_errors_say_what_to_do(texts, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"2 problems(.|\n)*nowhere does not exist(.|\n)*empty holds no file"):
        (tmp_path / "empty").mkdir()
        make([tmp_path / "nowhere", tmp_path / "empty"], out)
    with pytest.raises(UserError, match=r"valid_fraction=2 (.|\n)*workers=-1(.|\n)*vocab_size=9 "):
        make(texts, out, valid_fraction=2, workers=-1, vocab_size=9)
    with pytest.raises(UserError, match="has no text in 'body'; it has: text, id; set text_key"):
        make(texts / "lines.jsonl", out, text_key="body")
    with pytest.raises(UserError, match="has no column 'body'; it has: text, id; set text_key"):
        make(texts / "rows.parquet", out, text_key="body")
    with pytest.raises(UserError, match="column 'id' holds int64, not text"):
        make(texts / "rows.parquet", out, text_key="id")
    (texts / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is not a parquet file"):
        make(texts / "rows.parquet", out)
    (texts / "lines.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match="the line at byte 14 is not JSON"):
        make(texts / "lines.jsonl", out)
    with pytest.raises(UserError, match=r"holds out none of 20 documents; raise it to about 0\.15"):
        make(texts / "part0", out, valid_fraction=1e-9)
    with pytest.raises(UserError, match="holds out all 20 documents"):
        make(texts / "part0", out, valid_fraction=0.9999999)
    (tmp_path / "blank.txt").write_text("")
    with pytest.raises(UserError, match="hold no text"):
        make(tmp_path / "blank.txt", out)
    make(texts / "part0", out)
    with pytest.raises(UserError, match="already holds a corpus"):
        make(texts / "part0", out)
    with pytest.raises(UserError, match="cannot be created"):
        make(texts / "part0", texts / "part0" / "0.py" / "out")


def test_an_error_in_a_worker_reaches_the_person(texts, tmp_path, small_shards):
    tokenizer = make(texts / "part0", tmp_path / "ok").tokenizer_path
    with (texts / "lines.jsonl").open("a") as file:
        file.write("[]\n")
    with pytest.raises(UserError, match="has no text in 'text'; it has: list"):
        make(texts, tmp_path / "out", workers=2, tokenizer=tokenizer)
