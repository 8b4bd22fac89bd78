"""Windows of a corpus, blends of corpora, held-out windows, and every error on the way."""

import json

import numpy as np
import pytest
import torch

from rung.data import corpus as corpus_module
from rung.data.batch import IGNORED
from rung.data.build import build_corpus
from rung.data.corpus import Corpus, TokenSource, check_vocab
from rung.data.indexed import IndexedDataset, IndexedDatasetWriter
from rung.data.order import WINDOW_BITS
from rung.data.source import DataConfig, DataSource, open_data, prepare
from rung.errors import UserError


def write(prefix, lengths, first=10):
    """Documents of consecutive token ids, each ending with 0."""
    stream = np.arange(first, first + sum(lengths))
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in np.split(stream, np.cumsum(lengths)[:-1]):
            document[-1] = 0
            writer.add_document(document)
    return str(prefix)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two corpora with one tokenizer, and one with another."""
    root = tmp_path_factory.mktemp("corpora")
    for name, count in (("a", 40), ("b", 25)):
        (root / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} document {i}: größer " * (1 + i % 5)}) + "\n" for i in range(count))
        )
    first = build_corpus(root / "a.jsonl", root / "a", vocab_size=300, valid_fraction=0.2, quiet=True)
    build_corpus(root / "b.jsonl", root / "b", tokenizer=first.tokenizer_path, valid_fraction=0.2, quiet=True)
    build_corpus(root / "b.jsonl", root / "other", vocab_size=290, valid_fraction=0.2, quiet=True)
    return root


def blend(built, *names, weights=(), **options) -> DataSource:
    paths = [str(built / name) for name in names]
    return open_data(DataConfig("corpus", paths, list(weights), **{"seq_len": 16} | options), seed=3)


@pytest.mark.parametrize("seq_len", [1, 4, 7, 18, 19])
def test_windows_cover_the_stream_with_labels_shifted(tmp_path, seq_len):
    source = TokenSource(IndexedDataset(write(tmp_path / "x", [5, 1, 8, 6])))
    stream = source.dataset.tokens(0, 20)
    windows = source.num_windows(seq_len)
    assert windows == 19 // seq_len
    batch = source.read(np.arange(windows) | 5 << WINDOW_BITS, seq_len)
    assert batch.tokens_BT.flatten().tolist() == stream[: windows * seq_len].tolist()
    assert batch.labels_BT.flatten().tolist() == stream[1 : windows * seq_len + 1].tolist()
    assert batch.positions_BT.tolist() == [list(range(seq_len))] * windows
    assert batch.sample_ids_B.tolist() == [5 << WINDOW_BITS | window for window in range(windows)]
    assert batch.document_ids_BT is None
    tensors = (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.sample_ids_B)
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in tensors)


def test_the_last_evaluation_window_is_padded(tmp_path):
    source = TokenSource(IndexedDataset(write(tmp_path / "x", [5, 1, 8, 6])), pad_id=3)
    assert [source.num_eval_windows(length) for length in (4, 8, 19, 20, 100)] == [5, 3, 1, 1, 1]
    batch = source.read([4, 0], 4, document_mask=True)
    assert batch.tokens_BT.tolist() == [[26, 27, 28, 3], [10, 11, 12, 13]]
    assert batch.labels_BT.tolist() == [[27, 28, 0, IGNORED], [11, 12, 13, 0]]
    assert batch.document_ids_BT.tolist() == [[3, 3, 3, 4], [0, 0, 0, 0]]
    assert source.read([1], 4, document_mask=True).document_ids_BT.tolist() == [[0, 1, 2, 2]]
    with pytest.raises(IndexError, match="window 5 of 5"):
        source.read([5], 4)


def test_batches_split_and_move(tmp_path):
    source = TokenSource(IndexedDataset(write(tmp_path / "x", [30])))
    for mask in (False, True):
        batch = source.read(range(5), 4, mask)
        parts = batch.split(2)
        assert [part.num_sequences for part in parts] == [2, 2, 1]
        assert torch.equal(torch.cat([part.labels_BT for part in parts]), batch.labels_BT)
        assert torch.equal(torch.cat([part.sample_ids_B for part in parts]), batch.sample_ids_B)
        assert (parts[0].document_ids_BT is None) == (not mask)
        moved = batch.to("meta")
        assert moved.tokens_BT.device.type == moved.sample_ids_B.device.type == "meta"


def test_bare_prefix_of_megatron(tmp_path):
    prefix = write(tmp_path / "foo", [50, 51])
    bare = Corpus(prefix)
    assert (bare.info, bare.valid, bare.tokenizer_path, bare.tokenizer()) == (None, None, None, None)
    assert bare.vocab_size == 110
    check_vocab(bare, 110)
    with pytest.raises(UserError, match=r"up to 109, model\.vocab_size=64 ends at 63; set model\.vocab_size=110"):
        check_vocab(bare, 64)
    source = open_data(DataConfig("corpus", [prefix], seq_len=10), seed=0)
    assert (source.num_eval_windows, source.token_bytes, source.tokenizer_path) == (0, None, None)
    assert sorted(source.sample_ids(0, 10).tolist()) == list(range(10))


def test_fingerprint_of_a_bare_prefix_sees_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_WHOLE_BYTES", 1024)
    monkeypatch.setattr(corpus_module, "_BLOCK_BYTES", 16)
    prints = {Corpus(write(tmp_path / name, lengths, first)).fingerprint for name, lengths, first in (
        ("a", [100, 100], 10), ("b", [101, 99], 10), ("c", [100, 100], 11), ("d", [4000], 10), ("e", [4001], 10),
    )}  # fmt: skip
    assert len(prints) == 5
    path = tmp_path / "d.bin"
    assert Corpus(tmp_path / "d").vocab_size == 10 + 3999
    original = path.read_bytes()
    for place in (0, 5, len(original) - 3):
        path.write_bytes(original[:place] + b"\xff" + original[place + 1 :])
        assert Corpus(tmp_path / "d").fingerprint not in prints
    path.write_bytes(original)
    assert Corpus(tmp_path / "d").fingerprint in prints


def test_one_corpus(built):
    source = blend(built, "a")
    corpus = source.corpora[0]
    assert source.fingerprint == corpus.fingerprint == corpus.info.fingerprint
    assert source.vocab_size == 300
    assert source.eos_id == 0
    windows = corpus.train.num_windows(16)
    batch = source.read(source.sample_ids(0, windows))
    seen = np.sort(batch.tokens_BT.numpy(), axis=None)
    assert np.array_equal(seen, np.sort(corpus.train.dataset.tokens(0, windows * 16)))


def test_held_out_windows_predict_every_byte_but_the_first_tokens(built):
    """Concatenated over corpora; the labels stand for the documents' bytes exactly."""
    source = blend(built, "a", "b")
    batch = source.read_eval(range(source.num_eval_windows))
    labels = batch.labels_BT[batch.labels_BT != IGNORED]
    valid = [corpus.valid.dataset for corpus in source.corpora]
    assert labels.tolist() == [t for data in valid for t in data.tokens(1, data.num_tokens).tolist()]
    not_predicted = sum(int(source.token_bytes[int(data.tokens(0, 1)[0])]) for data in valid)
    total = sum(corpus.info.splits["valid"].bytes for corpus in source.corpora)
    assert int(source.token_bytes[labels].sum()) == total - not_predicted
    corpora = (batch.sample_ids_B >> WINDOW_BITS).tolist()
    assert corpora == sorted(corpora)
    assert set(corpora) == {0, 1}
    some = source.read_eval([source.num_eval_windows - 1, 0])
    assert torch.equal(some.labels_BT, batch.labels_BT[[-1, 0]])
    with pytest.raises(IndexError):
        source.read_eval([source.num_eval_windows])


def test_held_out_windows_skip_corpora_without_any(built, tmp_path):
    prefix = write(tmp_path / "bare", [300])
    paths = [prefix, str(built / "a")]
    source = open_data(DataConfig("corpus", paths, [1, 1], seq_len=16), seed=0)
    alone = blend(built, "a")
    assert source.num_eval_windows == alone.num_eval_windows
    assert torch.equal(source.read_eval([1]).labels_BT, alone.read_eval([1]).labels_BT)
    assert (source.read_eval([1]).sample_ids_B >> WINDOW_BITS).tolist() == [1]
    assert source.token_bytes.shape == (source.vocab_size,) == (309,)


def test_blend_reads_each_corpus_by_its_share(built):
    source = blend(built, "a", "b", weights=[3, 1], document_mask=True)
    ids = source.sample_ids(0, 40)
    assert np.bincount(ids >> WINDOW_BITS).tolist() == [30, 10]
    batch = source.read(ids)
    for row, sample in enumerate(ids.tolist()):
        alone = source.corpora[sample >> WINDOW_BITS].train.read([sample], 16, document_mask=True)
        assert torch.equal(batch.tokens_BT[row], alone.tokens_BT[0])
        assert torch.equal(batch.document_ids_BT[row], alone.document_ids_BT[0])
    assert source.fingerprint not in {corpus.fingerprint for corpus in source.corpora}
    assert source.fingerprint != blend(built, "a", "b", weights=[1, 1]).fingerprint
    by_size = blend(built, "a", "b")
    sizes = [corpus.train.num_windows(16) for corpus in by_size.corpora]
    assert by_size.order.weights[0] * sizes[1] == by_size.order.weights[1] * sizes[0]


def test_corpora_that_do_not_go_together(built, tmp_path):
    with pytest.raises(UserError, match="different tokenizers cannot be blended"):
        blend(built, "a", "other")
    with pytest.raises(UserError, match="listed twice"):
        blend(built, "a", "a")
    with pytest.raises(UserError, match=r"2 problems(.|\n)*less than a window of data.seq_len=99999"):
        blend(built, "a", "b", seq_len=99999)
    with pytest.raises(UserError, match="brings its own"):
        blend(built, "a", tokenizer=str(built / "a" / "tokenizer.json"))
    prefix = write(tmp_path / "bare", [300])
    source = open_data(
        DataConfig("corpus", [prefix], seq_len=16, tokenizer=str(built / "a" / "tokenizer.json")), seed=0
    )
    assert source.token_bytes is not None
    with pytest.raises(UserError, match="does not exist"):
        open_data(DataConfig("corpus", [prefix], seq_len=16, tokenizer="missing.json"), seed=0)


def test_damaged_corpora_are_named(built, tmp_path):
    import shutil

    def broken(name, damage):
        folder = shutil.copytree(built / "a", tmp_path / name)
        damage(folder)
        return folder

    def edit(folder, change):
        info = json.loads((folder / "corpus.json").read_text())
        change(info)
        (folder / "corpus.json").write_text(json.dumps(info))

    cases = {
        "missing": (lambda f: (f / "train.idx").unlink(), r"train\.idx does not exist"),
        "short": (lambda f: (f / "valid.bin").write_bytes(b"\0\0"), r"valid\.bin is truncated"),
        "untokenized": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json does not exist; build"),
        "garbled": (lambda f: (f / "corpus.json").write_text("{"), r"corpus\.json is damaged"),
        "newer": (
            lambda f: edit(f, lambda info: info.update(format_version=2)),
            "has format version 2, this Rung reads 1",
        ),
        "swapped": (lambda f: edit(f, lambda i: i["splits"]["train"].update(tokens=5)), r"corpus\.json says 5 in"),
        "unnamed": (
            lambda f: (f / "corpus.json").unlink(),
            "has no corpus.json; did you mean the token files .*/train, ",
        ),
    }
    for name, (damage, message) in cases.items():
        with pytest.raises(UserError, match=message):
            Corpus(broken(name, damage))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="make one with `rung data build`"):
        Corpus(tmp_path / "folder")
    with pytest.raises(UserError, match="does not exist; give a folder"):
        Corpus(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is empty: it holds no token"):
        with IndexedDatasetWriter(tmp_path / "hollow", np.uint16):
            pass
        Corpus(tmp_path / "hollow")


def test_settings_are_checked_together():
    assert DataConfig().validate() == []
    assert DataConfig("corpus", ["x", "y"], [1.0, 2.0]).validate() == []
    problems = DataConfig("corpis", seq_len=0).validate()
    assert len(problems) == 2
    assert "did you mean corpus" in problems[0]
    assert any("data.paths is empty" in problem for problem in DataConfig("corpus").validate())
    assert any("2 entries for 1" in problem for problem in DataConfig("corpus", ["x"], [1.0, 2.0]).validate())
    assert len(DataConfig(paths=["x"], weights=[1.0], vocab_size=100).validate()) == 3
    with pytest.raises(UserError, match="2 problems"):
        prepare(DataConfig("corpis", seq_len=0))
