"""The manifest says the same after a round trip, tells damage from novelty, and no wrong state gets one."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from checkpoint.make_golden import GOLDEN, TENSORS, make

from rung.checkpoint.format import (
    SCHEMA_VERSION,
    CheckpointError,
    Manifest,
    Part,
    PartTensor,
    StoredBox,
    StoredFile,
    block_digest,
    merge,
    tile,
)
from rung.layout import Box

HEAD = {"progress": {"step": 1}, "config": {}, "fingerprints": {}, "versions": {}}
FILES = {"data-00000.bin": StoredFile(4096, ("0" * 32,)), "data-00001.bin": StoredFile(4096, ("1" * 32,))}


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return make(tmp_path / "step-00000003")


def test_round_trip(manifest):
    data = manifest.to_json()
    again = Manifest.from_json(data, "m")
    assert again == replace(manifest, tensors=again.tensors) and again.to_json() == data
    assert again.digest == manifest.digest
    assert dict(again.tensors) == dict(manifest.tensors) and list(again.tensors) == sorted(TENSORS)
    assert again.step == 3
    assert json.loads(data)["digest"] == manifest.digest


def test_numbers_as_keys_of_progress(manifest):
    """They come back as text, and 10 sorts before 2."""
    numbered = replace(manifest, progress={"step": 1, "groups": {2: "a", 10: "b"}})
    assert Manifest.from_json(numbered.to_json(), "m").digest == numbered.digest


def test_digest_is_of_the_state(manifest):
    name = next(iter(manifest.tensors))
    tensor = manifest.tensors[name]
    others = [
        replace(manifest, progress={**manifest.progress, "consumed_samples": 25}),
        replace(manifest, tensors={**manifest.tensors, name: replace(tensor, digest="0" * 32)}),
        replace(manifest, tensors={**manifest.tensors, name: replace(tensor, dtype="float16")}),
        replace(manifest, tensors={**manifest.tensors, name: replace(tensor, shape=(6, 4))}),
        replace(manifest, tensors={**manifest.tensors, "else": replace(tensor, name="else")}),
    ]
    assert len({manifest.digest, *(other.digest for other in others)}) == 6
    shuffled = dict(sorted(manifest.tensors.items(), reverse=True))
    same = replace(
        manifest, tensors=shuffled, config={"parallel": {"tp": 8}}, versions={}, fingerprints={}, files=FILES
    )
    assert same.digest == manifest.digest


def test_newer_schema(manifest):
    later = manifest.to_json().partition(b"\n")[2].replace(b'"schema_version": 1', b'"schema_version": 2')
    line = f'{{"checksum": "{block_digest(b"{" + later)}",\n'.encode()
    with pytest.raises(CheckpointError, match=r"here/manifest.json has schema version 2; .* install a newer"):
        Manifest.from_json(line + later, "here/manifest.json")


def test_every_damaged_byte_is_found(manifest):
    data = manifest.to_json()
    rng = random.Random(0)
    places = [*range(60), *rng.sample(range(60, len(data)), 140), len(data) - 1]
    for place in places:
        for byte in {data[place] ^ 1 << rng.randrange(8), 32, 9, 10, rng.randrange(256)} - {data[place]}:
            with pytest.raises(CheckpointError, match="here is damaged"):
                Manifest.from_json(data[:place] + bytes([byte]) + data[place + 1 :], "here")
        for other in (data[:place], data[:place] + data[place + 1 :], data[:place] + b" " + data[place:]):
            with pytest.raises(CheckpointError, match="here is damaged"):
                Manifest.from_json(other, "here")


def test_what_another_program_made_of_it(manifest):
    data = manifest.to_json()
    for other in (data + b"\n", data.replace(b"\n", b"\r\n"), json.dumps(json.loads(data)).encode(), b"{}", b"[1]"):
        with pytest.raises(CheckpointError, match="damaged"):
            Manifest.from_json(other, "here")


def part(file: int, *boxes: Box, shape=(4, 6), dtype="float32", offset=0) -> Part:
    name = f"data-{file:05}.bin"
    stored = tuple(StoredBox(box, name, offset + 128 * index) for index, box in enumerate(boxes))
    return Part({name: FILES[name]}, {"w": PartTensor(shape, dtype, (1, 2), stored)})


UPPER, LOWER = Box((0, 0), (2, 6)), Box((2, 0), (2, 6))


def test_merge():
    manifest = merge([part(0, UPPER), part(1, LOWER)], **HEAD)
    assert [stored.box for stored in manifest.tensors["w"].boxes] == [UPPER, LOWER]
    assert manifest.tensors["w"].digest == f"{2:016x}{4:016x}"
    assert dict(manifest.files) == FILES


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([part(0, UPPER)], "exactly once"),  # a gap
        ([part(0, UPPER), part(1, UPPER)], "exactly once"),  # as many elements, half of them twice
        ([part(0, UPPER, LOWER), part(1, LOWER)], "exactly once"),
        ([part(0, UPPER), part(1, Box((3, 0), (2, 6)))], "exactly once"),  # beyond the end
        ([part(0, Box((0, 0), (3, 4))), part(1, Box((1, 2), (3, 4)))], "exactly once"),
        ([part(0, Box((0,), (24,)))], "exactly once"),  # of another number of dims
        ([part(0, UPPER), part(1, LOWER, dtype="bfloat16")], r"disagree.*bfloat16 \[4, 6\], float32"),
        ([part(0, UPPER), part(1, LOWER, shape=(4, 7))], r"disagree.*\[4, 6\], float32 \[4, 7\]"),
        ([part(0, UPPER), part(0, LOWER)], "data-00000.bin: two writers"),
        ([part(0, UPPER), part(1, LOWER, offset=4096)], "bytes 4096 to 4144 of data-00001.bin, which has 4096"),
        ([part(0, UPPER), part(1, LOWER, offset=4)], "byte 4 of data-00001.bin, no multiple of 64"),
        ([part(0, UPPER, LOWER, dtype="float7")], "float7"),
        ([replace(part(0, UPPER, LOWER), files={})], "no file of this checkpoint"),
    ],
)
def test_merge_refuses(parts, says):
    with pytest.raises(CheckpointError, match=says):
        merge(parts, **HEAD)


def test_tiling():
    assert tile([Box((), ())], ()) and not tile([], ()) and not tile([Box((), ())] * 2, ())
    assert tile([], (0, 3)) and tile([Box((0, 0), (0, 3))] * 2, (0, 3))
    pinwheel = [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1)), Box((1, 1), (1, 1))]
    assert tile(pinwheel, (3, 3)) and not tile(pinwheel[:4] + [Box((0, 0), (1, 1))], (3, 3))


def test_what_is_written_today_is_the_golden_checkpoint(tmp_path):
    """If this fails the format has changed: that takes a new schema version, and a golden checkpoint beside this."""
    made, golden = tmp_path / "step-00000003", GOLDEN / f"schema-{SCHEMA_VERSION}" / "step-00000003"
    make(made)
    names = sorted(path.name for path in golden.iterdir())
    assert names == sorted(path.name for path in made.iterdir())
    for name in names:
        assert (made / name).read_bytes() == (golden / name).read_bytes(), name
