"""Logical tensors by arithmetic, against arrays that are cut the slow way."""

import random
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard

from rung.layout import Box, LogicalTensor, Section, Shard, clean_name, local_view, logical_tensors
from rung.layout.logical import _splits


def chunk(array, dim, parts, index):
    step = -(-array.shape[dim] // parts)
    return np.take(array, range(min(index * step, array.shape[dim]), min((index + 1) * step, array.shape[dim])), dim)


def divisor(rng, number):
    return rng.choice([n for n in range(1, number + 1) if number % n == 0])


def random_sections(rng, size, axis_size):
    cuts = sorted(rng.randint(0, size) for _ in range(rng.randint(0, 3)))
    ends = [0, *cuts, size]  # sections of no index among them
    return tuple(Section(b - a, divisor(rng, axis_size)) for a, b in pairwise(ends))


def random_case(rng):
    """A mesh, a tensor and placements, among them the ones that models have and many that none has."""
    sizes = {
        axis: rng.randint(1, 4)
        for axis in rng.sample(["pp", "dp_replicate", "dp_shard", "ep", "tp"], rng.randint(1, 4))
    }
    shape = tuple(rng.randint(0, 9) for _ in range(rng.randint(0, 3)))
    padded = tuple(size + rng.choice([0, 0, 1, 5]) for size in shape)
    sharded = rng.sample(sorted(sizes), rng.randint(0, len(sizes))) if shape else []
    placements, replicas = {}, {}
    for axis in sharded:
        dim, kind = rng.randrange(len(shape)), rng.random()
        placements[axis] = Shard(dim)
        if kind < 0.3:
            replicas[axis] = divisor(rng, sizes[axis])
        elif kind < 0.6:
            placements[axis] = Shard(dim, random_sections(rng, padded[dim], sizes[axis]))
    stage = None
    if "pp" in sizes and "pp" not in sharded and rng.random() < 0.7:
        stage = rng.sample(range(sizes["pp"]), rng.randint(1, sizes["pp"]))
    return {
        "shape": shape, "placements": placements, "sizes": sizes, "replicas": replicas, "padded_shape": padded,
        "stage": stage, "tied_to": rng.choice([None, None, None, "other"]),
    }  # fmt: skip


def fused_case(rng):
    """A fused projection as tensor parallelism and then FSDP leave it, with few key and value heads or as many."""
    tp, heads, head_dim = rng.choice([1, 2, 4]), rng.choice([4, 8]), rng.randint(1, 3)
    sizes = {"dp_replicate": rng.randint(1, 2), "fsdp": rng.randint(1, 7), "tp": tp}
    kv_heads = rng.choice([1, 2, 4])
    kv = Section(kv_heads * head_dim, max(1, tp // kv_heads))
    sections = rng.choice([(Section(heads * head_dim), kv, kv), (Section(rng.randint(0, 9)),) * 2])
    shape = (sum(section.size for section in sections), rng.randint(1, 2))
    return {
        "shape": shape, "placements": {"tp": Shard(0, sections), "fsdp": Shard(0)}, "sizes": sizes, "replicas": {},
        "padded_shape": shape, "stage": None, "tied_to": None,
    }  # fmt: skip


def take_sections(stored, origin, dim, sections, size, place):
    """What the rank at ``place`` gets of each section; ``origin`` tells along ``dim`` where each slice came from."""
    picked, start = [], 0
    for rows, replicas in sections:
        here = [i for i, index in enumerate(origin) if start <= index < start + rows]
        picked += list(chunk(np.array(here, int), 0, size // replicas, place // replicas))
        start += rows
    return np.take(stored, np.array(picked, int), dim), [origin[i] for i in picked]


def check_case(case):
    shape, padded = case["shape"], case["padded_shape"]
    logical = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    stored = np.full(padded, -1)
    stored[tuple(map(slice, shape))] = logical
    owners = np.zeros(shape, int)
    tensor = LogicalTensor.from_spec("name", dtype="float32", coordinates=dict.fromkeys(case["sizes"], 0), **case)
    places = [dict(zip(case["sizes"], place, strict=True)) for place in product(*map(range, case["sizes"].values()))]
    for place, mine in zip(places, tensor.everywhere(), strict=True):
        assert mine == tensor.at(**place)
        if case["stage"] is not None and place["pp"] not in case["stage"]:
            assert mine.boxes == ()
            continue
        local, origins = stored, [list(range(size)) for size in padded]
        for axis, (dim, sections) in case["placements"].items():
            sections = sections or (Section(padded[dim], case["replicas"].get(axis, 1)),)
            local, origins[dim] = take_sections(local, origins[dim], dim, sections, case["sizes"][axis], place[axis])
        assert mine.local_shape == local.shape
        covered = np.zeros(local.shape, int)
        for box, where, owned in mine.pieces():
            assert box.numel > 0
            np.testing.assert_array_equal(local[where], logical[box.slices()])
            covered[where] += 1
            owners[box.slices()] += owned
        np.testing.assert_array_equal(covered, local >= 0)  # padding, and nothing else, lies in no box
    assert (owners == (case["tied_to"] is None)).all()


def test_owned_boxes_tile_every_tensor_exactly_once():
    rng = random.Random(0)
    for _ in range(300):
        check_case(random_case(rng))
        check_case(fused_case(rng))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_owned_boxes_tile_every_tensor_exactly_once_many(seed):
    rng = random.Random(seed)
    for _ in range(1000):
        check_case(random_case(rng))
        check_case(fused_case(rng))


def test_fsdp_splits_what_tensor_parallelism_left():
    sizes = {"dp_shard": 3, "tp": 2}  # 13 rows: tp leaves 7 and 6, of which FSDP makes 3, 3, 1 and 2, 2, 2
    tensor = LogicalTensor.from_spec(
        "w", (13,), "float32", {"tp": Shard(0), "dp_shard": Shard(0)}, sizes, {"dp_shard": 2, "tp": 0}
    )
    assert tensor.boxes == (Box((6,), (1,)),)
    assert tensor.at(tp=1).boxes == (Box((11,), (2,)),)
    assert tensor.owned == (True,) and tensor.replicated_over == ()


def test_kv_heads_fewer_than_tp():
    heads, head_dim, tp = 2, 4, 8
    tensor = LogicalTensor.from_spec(
        "k_proj",
        (heads * head_dim, 3),
        "float32",
        {"tp": Shard(0)},
        {"tp": tp},
        {"tp": 0},
        replicas={"tp": tp // heads},
    )
    for rank, mine in enumerate(tensor.everywhere()):
        assert mine.boxes == (Box((rank * heads // tp * head_dim, 0), (head_dim, 3)),)
        assert mine.owned == (rank in (0, 4),)
        assert mine.replicated_over == ("tp",)


def test_a_fused_projection_is_owned_box_by_box():
    """8 query heads and 2 key/value heads of one row each on tp=4: two neighbours hold a key and a value row alike."""
    sections = (Section(8), Section(2, replicas=2), Section(2, replicas=2))
    tensor = LogicalTensor.from_spec("qkv", (12,), "float32", {"tp": Shard(0, sections)}, {"tp": 4}, {"tp": 0})
    for rank, mine in enumerate(tensor.everywhere()):
        key = 8 + rank // 2
        assert mine.boxes == (Box((2 * rank,), (2,)), Box((key,), (1,)), Box((key + 2,), (1,)))
        assert mine.local_boxes == (Box((0,), (2,)), Box((2,), (1,)), Box((3,), (1,)))
        assert mine.owned == (True, rank % 2 == 0, rank % 2 == 0)
        assert mine.replicated_over == ("tp",)


def test_fsdp_splits_the_rows_that_sections_left():
    """The rows q0 q1 k v of one tp rank on three FSDP ranks: two and two, and none for the third."""
    placements = {"tp": Shard(0, (Section(4), Section(1, 2), Section(1, 2))), "fsdp": Shard(0)}
    tensor = LogicalTensor.from_spec("qkv", (6,), "float32", placements, {"fsdp": 3, "tp": 2}, {"fsdp": 1, "tp": 1})
    assert tensor.boxes == (Box((4,), (1,)), Box((5,), (1,))) and tensor.owned == (False, False)
    assert tensor.at(tp=0).boxes == tensor.boxes and tensor.at(tp=0).owned == (True, True)
    assert tensor.at(fsdp=0).boxes == (Box((2,), (2,)),) and tensor.at(fsdp=0).owned == (True,)
    assert tensor.at(fsdp=2).boxes == () and tensor.at(fsdp=2).local_shape == (0,)


def test_padded_vocabulary():
    arguments = ("embed", (10, 2), "float32", {"tp": Shard(0)}, {"tp": 4})
    parts = [LogicalTensor.from_spec(*arguments, {"tp": rank}, padded_shape=(16, 2)) for rank in range(4)]
    assert [part.boxes for part in parts[:2]] == [(Box((0, 0), (4, 2)),), (Box((4, 0), (4, 2)),)]
    assert parts[2].boxes == (Box((8, 0), (2, 2)),) and parts[2].local_shape == (4, 2)
    assert parts[3].boxes == () and parts[3].local_shape == (4, 2)


def test_a_tensor_held_by_two_stages_is_owned_by_the_first_named():
    tensor = LogicalTensor.from_spec("embed", (4,), "float32", {}, {"pp": 4}, {"pp": 3}, stage=(3, 0))
    assert [mine.owned for mine in tensor.everywhere()] == [(False,), (), (), (True,)]
    assert tensor.replicated_over == ("pp",)


def test_what_cannot_be_is_said_at_once():
    with pytest.raises(ValueError) as error:
        LogicalTensor.from_spec(
            "w", (4,), "float32", {"tp": Shard(1)}, {"tp": 2}, {"tp": 2}, replicas={"tp": 3}, stage=0
        )
    for text in ("w: ", "'pp' is not one of", "coordinate 2 on 'tp'", "shards dim 1 of 1", "replicas=3"):
        assert text in str(error.value)
    sections = {"tp": Shard(0, (Section(2), Section(3, replicas=3)))}
    with pytest.raises(ValueError) as error:
        LogicalTensor.from_spec("w", (4,), "float32", sections, {"tp": 2}, {"tp": 0}, replicas={"tp": 2})
    for text in ("sections of [2, 3]", "replicas=3 on 'tp'", "leave out replicas=2"):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="no DTensor"):
        LogicalTensor.from_tensor("w", torch.ones(4), replicas={"tp": 2})


def test_dtensor_placements_become_splits_in_the_order_they_were_made():
    sizes = {"dp_replicate": 2, "dp_shard": 2, "ep": 3, "tp": 2}

    def splits(*placements):
        return list(_splits("w", dict(zip(sizes, placements, strict=True)), sizes).items())

    keep, rows, columns = Replicate(), TorchShard(0), TorchShard(1)
    assert splits(keep, rows, keep, rows) == [("dp_shard", Shard(0)), ("tp", Shard(0))]
    fsdp_on_tp = splits(keep, _StridedShard(0, split_factor=2), keep, rows)
    assert fsdp_on_tp == [("tp", Shard(0)), ("dp_shard", Shard(0))]
    fsdp_on_experts = splits(keep, _StridedShard(0, split_factor=3), rows, columns)
    assert fsdp_on_experts == [("ep", Shard(0)), ("dp_shard", Shard(0)), ("tp", Shard(1))]
    fsdp_on_both = splits(keep, _StridedShard(0, split_factor=6), rows, rows)
    assert fsdp_on_both == [("ep", Shard(0)), ("tp", Shard(0)), ("dp_shard", Shard(0))]
    with pytest.raises(ValueError, match="split factor 3, but axes to its right make 1 parts"):
        splits(keep, keep, keep, _StridedShard(0, split_factor=3))


def test_names_lose_what_wrappers_add():
    assert (
        clean_name("module._orig_mod.layers.0._checkpoint_wrapped_module.mlp._orig_mod.weight") == "layers.0.mlp.weight"
    )
    assert clean_name("_fsdp_wrapped_module.module.weight") == "weight"
    assert clean_name("inner.module.weight") == "inner.module.weight"


def test_plain_models_own_everything_and_ties_count_once():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    tensors = logical_tensors(torch.compile(model))
    assert list(tensors) == ["0.weight"]
    tensor = tensors["0.weight"]
    assert (tensor.shape, tensor.dtype, tensor.owned) == ((5, 3), torch.float32, (True,))
    assert tensor.boxes == tensor.local_boxes == (Box((0, 0), (5, 3)),)
    assert local_view(model[0].weight) is model[0].weight


def test_facts_say_what_a_tensor_does_not():
    model = nn.ModuleDict({"lm_head": nn.Linear(3, 8, bias=False)})
    facts = {"lm_head.weight": {"shape": (5, 3), "tied_to": "embed_tokens.weight"}}
    tensor = logical_tensors(model, facts=facts)["lm_head.weight"]
    assert tensor.boxes == (Box((0, 0), (5, 3)),) and tensor.owned == (False,)
    assert tensor.source == "embed_tokens.weight"
    with pytest.raises(ValueError, match="does not have"):
        logical_tensors(model, facts={"lm_haed.weight": {}})
