"""Any layout's checkpoint fills any other bit for bit, each block read once per node; damage stops every rank."""

import random

import pytest
from checkpoint import load_ranks

from rung.errors import CheckpointError


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_layout_to_any_other(workers, tmp_path, world_size):
    workers.run(world_size, load_ranks.check_layouts, tmp_path, range(25))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_failures_reach_every_rank(workers, tmp_path, world_size):
    for seed in range(100, 104):
        workers.run(world_size, load_ranks.check_failures, tmp_path, seed)


@pytest.mark.parametrize("world_size", [1, 4])
def test_what_does_not_fit_is_told_before_anything_is_written(workers, tmp_path, world_size):
    workers.run(world_size, load_ranks.check_strictness, tmp_path)


def test_ranks_that_cannot_share_memory(workers, tmp_path):
    workers.run(4, load_ranks.check_unshared, tmp_path, 3)


def test_real_blocks(workers, tmp_path):
    workers.run(2, load_ranks.check_full_blocks, tmp_path)


def test_every_flip_is_found_without_a_process_group(tmp_path):
    case = load_ranks.Case(tmp_path, 7)
    case.load()
    step = case.folder / f"step-{load_ranks.STEP:08d}"
    rng, manifest = random.Random(0), case.reader().manifest
    used = sorted(load_ranks.touched(manifest, case.logicals([0]), case.block_bytes))
    for _ in range(100):
        file, block = rng.choice(used)
        intact = (step / file).read_bytes()
        begin, end = block * case.block_bytes, min((block + 1) * case.block_bytes, len(intact))
        (step / file).write_bytes(load_ranks.flipped(intact, rng.randrange(8 * begin, 8 * end)))
        with pytest.raises(CheckpointError) as caught:
            case.load()
        (step / file).write_bytes(intact)
        said = str(caught.value)
        names = [n for n in manifest.tensors if (file, block) in load_ranks.holding(manifest, n, case.block_bytes)]
        assert f"{file}: block {block} " in said and all(name in said for name in names)
