"""Megatron's token files: our writer, our reader, their errors, and megatron-core as the oracle."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rung.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path, token_dtype
from rung.errors import UserError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def rewrite_document_array(prefix: Path, starts: list[int]) -> None:
    """Make the file's four sequences into other documents."""
    content = bytearray(idx_path(prefix).read_bytes()[: 34 + 12 * len(DOCUMENTS)])
    content[26:34] = len(starts).to_bytes(8, "little")
    idx_path(prefix).write_bytes(bytes(content) + np.array(starts, "<i8").tobytes())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_what_is_written_is_read(tmp_path, dtype):
    data = IndexedDataset(write(tmp_path / "some.name", dtype=dtype))
    flat = np.concatenate(DOCUMENTS)
    assert (data.num_tokens, data.num_documents, data.dtype) == (len(flat), 4, np.dtype(dtype))
    assert data.lengths.tolist() == [3, 1, 5, 2] == data.document_lengths().tolist()
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            assert data.tokens(start, stop).tolist() == flat[start:stop].tolist()
    with pytest.raises(IndexError):
        data.tokens(0, len(flat) + 1)


@pytest.mark.parametrize(
    "starts", [[0, 1, 2, 3, 4], [0, 4], [0, 2, 4], [0, 0, 3, 3, 4, 4]], ids=["one-each", "one", "pairs", "empty-ones"]
)
def test_document_ids_are_the_naive_ones(tmp_path, starts):
    prefix = write(tmp_path / "x")
    rewrite_document_array(prefix, starts)
    data = IndexedDataset(prefix)
    lengths = [sum(map(len, DOCUMENTS[a:b])) for a, b in pairwise(starts)]
    naive = np.repeat(np.arange(len(lengths)), lengths)
    assert data.document_lengths().tolist() == lengths
    spans = [data.document_span(document) for document in range(data.num_documents)]
    assert [stop - start for start, stop in spans] == lengths
    for start in range(len(naive) + 1):
        for stop in range(start, len(naive) + 1):
            found = data.document_ids(start, stop)
            assert found.dtype == np.int64
            assert found.tolist() == naive[start:stop].tolist()


def test_no_documents_and_empty_documents(tmp_path):
    assert IndexedDataset(write(tmp_path / "none", [])).num_tokens == 0
    data = IndexedDataset(write(tmp_path / "holes", [[], [1, 2], [], [3], []]))
    assert data.document_ids(0, 3).tolist() == [1, 1, 3]


def test_dtype_follows_megatrons_rule(tmp_path):
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32
    with pytest.raises(UserError, match="do not fit"), IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([65536])
    assert not idx_path(tmp_path / "x").exists()


def test_an_interrupted_writer_leaves_no_index(tmp_path):
    write(tmp_path / "x")
    with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"x\.idx does not exist"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda idx, data: (idx.unlink(), data.unlink()), r"2 problems(.|\n)*x\.idx(.|\n)*x\.bin"),
        (lambda idx, data: data.write_bytes(data.read_bytes()[:-2]), "is truncated: 20 bytes, x.idx promises 22"),
        (lambda idx, data: data.write_bytes(data.read_bytes() + b"\0\0"), "does not belong to its index: 24 bytes"),
        (lambda idx, data: idx.write_bytes(idx.read_bytes()[:20]), "is truncated: 20 bytes, its header alone has 34"),
        (lambda idx, data: idx.write_bytes(idx.read_bytes()[:-8]), "is truncated: 114 bytes, its header promises 122"),
        (lambda idx, data: idx.write_bytes(idx.read_bytes() + b"\0"), "is not a Megatron index of version 1"),
        (
            lambda idx, data: idx.write_bytes(b"TNTIDX" + idx.read_bytes()[6:]),
            "is not a Megatron index: it starts with",
        ),
        (lambda idx, data: idx.write_bytes(idx.read_bytes()[:9] + b"\2" + idx.read_bytes()[10:]), "has version 2"),
        (lambda idx, data: idx.write_bytes(idx.read_bytes()[:17] + b"\7" + idx.read_bytes()[18:]), "float32"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    prefix = write(tmp_path / "x")
    damage(idx_path(prefix), bin_path(prefix))
    with pytest.raises(UserError, match=message):
        IndexedDataset(prefix)


MEGATRON = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

ours, theirs, plan = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
read = {}
for name in ("uint16", "int32"):
    data = IndexedDataset(f"{ours}-{name}")
    read[name] = {
        "dtype": numpy.dtype(data.index.dtype).name,
        "sequences": [data[i].tolist() for i in range(len(data))],
        "documents": data.document_indices.tolist(),
    }
    dtype = DType.optimal_dtype(1000 if name == "uint16" else 100000)
    builder = IndexedDatasetBuilder(f"{theirs}-{name}.bin", dtype=dtype)
    for document in plan:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{theirs}-{name}.idx")
builder = IndexedDatasetBuilder(f"{theirs}-modes.bin", dtype=numpy.uint16, multimodal=True)
builder.add_document(torch.tensor([1, 2, 3]), [2, 1], [0, 1])
builder.finalize(f"{theirs}-modes.idx")
print("READ" + json.dumps(read))
"""


def test_megatron_core_reads_ours_and_we_read_theirs(tmp_path):
    import json

    plan = [[[5, 6, 7], [8]], [[9, 10, 11, 12]], [[13], [14, 15], [999]]]
    for name in ("uint16", "int32"):
        write(tmp_path / f"ours-{name}", dtype=np.dtype(name))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        MEGATRON,
        str(tmp_path / "ours"),
        str(tmp_path / "theirs"),
        json.dumps(plan),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.rpartition("READ")[2])
    for name in ("uint16", "int32"):
        assert read[name] == {"dtype": name, "sequences": DOCUMENTS, "documents": [0, 1, 2, 3, 4]}
        data = IndexedDataset(tmp_path / f"theirs-{name}")
        assert data.dtype == np.dtype(name)
        assert data.tokens(0, data.num_tokens).tolist() == [
            t for document in plan for sequence in document for t in sequence
        ]
        assert data.lengths.tolist() == [len(sequence) for document in plan for sequence in document]
        assert data.document_lengths().tolist() == [4, 4, 4]
        assert data.document_ids(0, 12).tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert IndexedDataset(tmp_path / "theirs-modes").document_ids(0, 3).tolist() == [0, 0, 0]
