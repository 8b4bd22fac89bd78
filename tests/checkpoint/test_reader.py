"""A reader gives the right bytes or says which file and tensor are damaged; never wrong bytes."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint.make_golden import BFLOAT16, GOLDEN, TENSORS, WEIGHT
from checkpoint.writing import tiling, write
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.checkpoint import Reader, open_storage
from rung.checkpoint.format import CheckpointError, StoredTensor
from rung.errors import UserError
from rung.layout import Box

BLOCK = 1024
"""Small, so that small files have several."""
DTYPES = {"float64": "<f8", "float32": "<f4", "bfloat16": "<u2", "int8": "<i1"}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rung.checkpoint.reader.BLOCK_BYTES", BLOCK)


def random_tensors(rng: random.Random, count: int = 9, least: int = 0):
    numbers = np.random.default_rng(rng.randrange(2**32))
    tensors = {}
    for index in range(count):
        shape = tuple(rng.randint(least, 13) for _ in range(rng.randint(0, 3)))
        dtype = rng.choice(list(DTYPES))
        values = np.frombuffer(numbers.bytes(int(np.prod(shape, dtype=int)) * 8), "<u8").reshape(shape)
        tensors[f"t{index}"] = (dtype, values.astype(f"<u{np.dtype(DTYPES[dtype]).itemsize}").view(DTYPES[dtype]))
    return tensors


def random_cuts(rng, tensors, num_files):
    return {
        name: [(rng.randrange(num_files), box) for box in tiling(values.shape, rng, rng.randrange(6))]
        for name, (_, values) in tensors.items()
    }


def open_step(folder: Path) -> Reader:
    return Reader(open_storage(str(folder.parent)), int(folder.name.removeprefix("step-")))


# What is read


@pytest.mark.parametrize("schema", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_golden(schema: Path):
    """Checkpoints of every schema load for ever, and their state is called the same."""
    with Reader.open(str(schema)) as reader:
        assert reader.manifest.digest == "7cd140072767dc0f40bce16b465f9e14"
        assert reader.step == reader.manifest.step == 3
        assert reader.manifest.progress["consumed_samples"] == 24 and reader.manifest.progress["note"] == "π"
        assert list(reader.manifest.tensors) == sorted(TENSORS)
        assert list(reader.verify()) == [] and reader.notes() == []
        for name, (dtype, values) in TENSORS.items():
            tensor = reader.manifest.tensors[name]
            assert (tensor.dtype, tensor.shape) == (dtype, values.shape)
            assert reader.tensor(name).tobytes() == values.tobytes()
        # In numbers, whatever becomes of the script that made it.
        assert reader.tensor("step/count").view("<i8").tolist() == [-1234567890123]
        assert reader.tensor("layers.0.proj.weight").view("<f4").tolist() == [(i - 17) / 8 for i in range(35)]
        assert reader.tensor("embed.weight").view("<u2").tolist() == list(range(0x3F80, 0x3F80 + 24))
    assert WEIGHT.shape == (5, 7) and BFLOAT16.shape == (4, 6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(25))
def test_any_boxes(tmp_path: Path, seed: int):
    rng = random.Random(seed)
    tensors = random_tensors(rng)
    folder = tmp_path / "step-00000001"
    manifest = write(folder, tensors, random_cuts(rng, tensors, 3), num_files=3, block_bytes=BLOCK)
    uncut = write(tmp_path / "else" / folder.name, tensors, block_bytes=BLOCK)
    assert uncut.digest == manifest.digest
    with open_step(folder) as reader:
        assert list(reader.verify()) == []
        for name in rng.sample(list(tensors), len(tensors)):
            raw = reader.tensor(name, verify=rng.random() < 0.7)
            assert raw.dtype == np.uint8 and raw.shape == (tensors[name][1].nbytes,)
            assert raw.tobytes() == tensors[name][1].tobytes(), name


def test_several_real_blocks(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 2**32, (1500, 1501), np.uint32).view("<f4")
    tensors = {"a": ("float32", values), "b": ("int8", np.arange(100, dtype="<i1"))}
    cuts = {"a": [(0, Box((0, 0), (1500, 1300))), (0, Box((0, 1300), (1500, 201)))], "b": [(0, Box((0,), (100,)))]}
    write(tmp_path / "step-00000002", tensors, cuts, num_files=1)
    with open_step(tmp_path / "step-00000002") as reader:
        assert len(reader.manifest.files["data-00000.bin"].blocks) == 3
        assert list(reader.verify()) == []
        assert reader.tensor("a").tobytes() == values.tobytes()


# Which checkpoint


def test_open_takes_the_newest(tmp_path: Path):
    run = tmp_path / "run"
    for step in (3, 12):
        write(run / "checkpoints" / f"step-{step:08}", TENSORS)
    for path, step in [(run, 12), (run / "checkpoints", 12), (run / "checkpoints" / "step-00000003", 3)]:
        with Reader.open(str(path)) as reader:
            assert reader.step == step
    with pytest.raises(UserError):
        Reader.open(str(tmp_path / "absent"))


def test_pinned_while_open(tmp_path: Path):
    write(tmp_path / "step-00000001", TENSORS)
    storage = open_storage(str(tmp_path))
    with Reader(storage, 1):
        assert not storage.retire(1)
    assert storage.retire(1)
    with pytest.raises(CheckpointError):
        Reader(storage, 1)


def test_not_pinned_after_a_damaged_manifest(tmp_path: Path):
    write(tmp_path / "step-00000001", TENSORS)
    (tmp_path / "step-00000001" / "manifest.json").write_text("{}")
    storage = open_storage(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"step-00000001/manifest\.json is damaged"):
        Reader(storage, 1)
    assert storage.retire(1)


def test_unknown_tensor(tmp_path: Path):
    write(tmp_path / "step-00000001", TENSORS)
    with open_step(tmp_path / "step-00000001") as reader, pytest.raises(CheckpointError, match=r"mean norm\.weight"):
        reader.tensor("norm.weigth")


# Damage


def blocks_of(tensor: StoredTensor, width: int) -> set[tuple[str, int]]:
    return {
        (stored.file, number)
        for stored in tensor.boxes
        if stored.box.numel
        for number in range(stored.offset // BLOCK, -(-(stored.offset + stored.box.numel * width) // BLOCK))
    }


def corrupt(folder: Path, rng: random.Random) -> tuple[list[str], set[tuple[str, int]]]:
    """Damage a checkpoint; returns the files that are not as written, and their blocks that are not."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("data-*"))}
    name, other = rng.sample([name for name, size in sizes.items() if size], 2)
    path, size = folder / name, sizes[name]
    every = {(name, number) for number in range(-(-size // BLOCK))}
    kind = rng.choice(["bit", "bit", "bit", "bytes", "cut", "cut", "swap", "missing", "longer", "zeros"])
    data = bytearray(path.read_bytes())
    if kind == "bit":
        place = rng.randrange(size)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        return [name], {(name, place // BLOCK)}
    if kind in ("bytes", "zeros"):
        place = rng.randrange(size)
        stop = min(place + rng.randint(1, 2 * BLOCK), size)
        old = data[place:stop]
        data[place:stop] = rng.randbytes(stop - place) if kind == "bytes" else bytes(stop - place)
        path.write_bytes(data)
        changed = [place + index for index, byte in enumerate(old) if data[place + index] != byte]
        return [name] * bool(changed), {(name, index // BLOCK) for index in changed}
    if kind == "cut":
        size = rng.randrange(size)
        path.write_bytes(data[:size])
        return [name], {(name, number) for _, number in every if (number + 1) * BLOCK > size}
    if kind == "longer":
        path.write_bytes(data + rng.randbytes(rng.randint(1, 3000)))
        return [name], set()
    if kind == "missing":
        path.unlink()
        return [name], every
    swapped = (folder / other).read_bytes()
    (folder / other).write_bytes(data)
    path.write_bytes(swapped)
    return [name, other], every | {(other, number) for number in range(-(-sizes[other] // BLOCK))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint of a dozen tensors over three files of several blocks, and its tensors."""
    rng = random.Random(7)
    tensors = random_tensors(rng, 14, least=5)
    folder = tmp_path_factory.mktemp("whole") / "step-00000001"
    write(folder, tensors, random_cuts(rng, tensors, 3), num_files=3, block_bytes=BLOCK)
    return folder, tensors


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tens", range(10))
def test_random_damage(checkpoint, tmp_path: Path, tens: int):
    whole, tensors = checkpoint
    for seed in range(10 * tens, 10 * tens + 10):
        rng = random.Random(seed)
        folder = tmp_path / str(seed) / whole.name
        shutil.copytree(whole, folder)
        files, blocks = corrupt(folder, rng)
        with open_step(folder) as reader:
            widths = {name: values.itemsize for name, (_, values) in tensors.items()}
            touched = {
                name for name, tensor in reader.manifest.tensors.items() if blocks_of(tensor, widths[name]) & blocks
            }
            problems = list(reader.verify())
            for file in files:
                assert any(str(folder / file) in problem for problem in problems), (seed, file, problems)
            assert bool(files) == bool(problems)
            named = {name for problem in problems for name in re.findall(r"\bt\d+\b", problem)}
            shortened = any(re.search(r"and \d+ more", problem) for problem in problems)
            assert named == touched or (shortened and named and named < touched), (seed, touched, problems)
            for name in rng.sample(list(tensors), len(tensors)):
                if name in touched:
                    with pytest.raises(CheckpointError, match=f"^{name} .*data-0000"):
                        reader.tensor(name)
                else:
                    assert reader.tensor(name).tobytes() == tensors[name][1].tobytes(), (seed, name)


@pytest.mark.usefixtures("small_blocks")
def test_messages(tmp_path: Path):
    tensors = {name: ("float32", np.arange(400, dtype="<f4")) for name in "abcd"}  # a and c in the first file
    folder = tmp_path / "step-00000001"
    write(folder, tensors, block_bytes=BLOCK)
    path = folder / "data-00000.bin"
    good = path.read_bytes()

    def problems() -> list[str]:
        with open_step(folder) as reader:
            return list(reader.verify())

    path.write_bytes(good[:1500] + b"\0\0" + good[1502:])
    assert problems() == [
        f"{path}: block 1 (bytes 1,024 to 2,048) is damaged: it does not match its digest; it holds (part of) a, c"
    ]
    path.write_bytes(good[:2000])
    assert problems() == [
        f"{path} is cut short: it has 2,000 of 3,200 bytes; what is lost, to the block, held (part of) a, c"
    ]
    path.write_bytes(good + b"more")
    assert "3,204 bytes where 3,200" in problems()[0]
    path.unlink()
    assert "is missing" in problems()[0] and problems()[0].endswith("it held (part of) a, c")


def patched(folder: Path, **changes) -> None:
    """Another manifest, with a checksum that is right."""
    with open_step(folder) as reader:
        manifest = replace(reader.manifest, **{key: change(reader.manifest) for key, change in changes.items()})
    (folder / "manifest.json").write_bytes(manifest.to_json())


def with_tensor(**changes):
    return lambda manifest: {**manifest.tensors, "a": replace(manifest.tensors["a"], **changes)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"digest": "0" * 32}, "a: .*data-00000.bin .*does not match its digest"),
        ({"shape": (11,)}, "a: .*exactly once"),
        ({"boxes": ()}, "a: .*exactly once"),
        ({"dtype": "float64"}, "a: .*bytes 0 to 80 of data-00000.bin, which has 40"),
        ({"dtype": "float3"}, "a: .*float3"),
    ],
)
def test_a_manifest_that_was_wrong_from_the_beginning(tmp_path: Path, changes, says):
    """No writer of ours makes one; nothing wrong is returned all the same."""
    folder = tmp_path / "step-00000001"
    write(folder, {"a": ("float32", np.arange(10, dtype="<f4")), "b": ("float32", np.arange(3, dtype="<f4"))})
    patched(folder, tensors=with_tensor(**changes))
    with open_step(folder) as reader:
        with pytest.raises(CheckpointError, match=says):
            reader.tensor("a")
        (problem,) = reader.verify()
        assert "a: " in problem
        assert reader.tensor("b").view("<f4").tolist() == [0, 1, 2]


def test_elements_exchanged_between_boxes(tmp_path: Path):
    """Every block is as it was written, every box lies in a file, and yet the tensor is wrong."""
    folder = tmp_path / "step-00000001"
    boxes = [Box((0,), (5,)), Box((5,), (5,))]
    write(folder, {"a": ("float32", np.arange(10, dtype="<f4"))}, {"a": [(0, boxes[0]), (1, boxes[1])]})
    with open_step(folder) as reader:
        one, other = reader.manifest.tensors["a"].boxes
    patched(folder, tensors=with_tensor(boxes=(one._replace(box=other.box), other._replace(box=one.box))))
    with open_step(folder) as reader:
        assert "a" in next(reader.verify())
        with pytest.raises(CheckpointError, match=r"^a: .*data-00000.bin, .*data-00001.bin"):
            reader.tensor("a")


def test_notes(tmp_path: Path):
    folder = tmp_path / "step-00000001"
    write(folder, TENSORS, progress={"step": 2})
    (folder / "data-00007.bin").write_bytes(b"x")
    with open_step(folder) as reader:
        assert reader.notes() == [f"{folder} holds step 2", f"{folder}/data-00007.bin is no part of the checkpoint"]
        assert list(reader.verify()) == []


def test_memory_is_one_tensor_and_one_block(tmp_path: Path):
    """Looked at from outside: the greatest resident size, above what a reader needs for a small tensor."""
    write(
        tmp_path / "step-00000001",
        {
            "column": ("float32", np.ones((2**22, 1), "<f4")),
            "square": ("float32", np.ones((2**11, 2**11), "<f4")),
            "vector": ("float32", np.ones(2**22, "<f4")),
            "small": ("float32", np.ones(1, "<f4")),
        },
    )
    code = (
        "import resource, sys; from rung.checkpoint import Reader\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"with Reader.open({str(tmp_path)!r}) as reader:\n"
        "    reader.tensor('small'); before = peak()\n"
        "    reader.tensor('square'); square = peak() - before\n"
        "    reader.tensor('column'); reader.tensor('vector'); everything = peak() - before\n"
        "    assert not list(reader.verify())\n"
        "print(square, everything, peak() - before, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    square, everything, verified, torch = done.stdout.split()
    tensor = 2**24
    assert int(square) < tensor + 2 * 2**22 + 2**21, done.stdout
    # Narrow rows need a pair of weights for each of a block's rows.
    assert int(everything) < 2 * tensor + 2**25 and int(verified) < 2 * tensor + 2**26, done.stdout
    assert torch == "False"


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1))
def test_order_of_asking_does_not_matter(seed: int):
    """Blocks are held between calls; what was read unverified is not taken for verified."""
    import tempfile

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "step-00000001"
        tensors = {key: ("int8", np.full(20, index, "<i1")) for index, key in enumerate("abc")}
        write(folder, tensors, num_files=1)
        data = bytearray((folder / "data-00000.bin").read_bytes())
        data[70] ^= 1
        (folder / "data-00000.bin").write_bytes(data)
        with open_step(folder) as reader:
            for key in rng.choices("abc", k=8):
                if rng.random() < 0.5:
                    reader.tensor(key, verify=False)
                else:
                    with pytest.raises(CheckpointError):
                        reader.tensor(key)
