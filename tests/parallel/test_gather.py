"""Whole tensors out of every layout, bit for bit, on four, six and eight gloo ranks."""

import pytest
import torch
from parallel import gather_ranks
from torch import nn

from rung.checkpoint import gathered_tensors
from rung.checkpoint.gather import _merged


@pytest.mark.parametrize("world_size", [4, 6, 8])
def test_every_layout_gives_the_same_bits(workers, world_size):
    workers.run(world_size, gather_ranks.check_everything)


def names_of(layers: list[int], *, first: bool = False, last: bool = False) -> tuple[str, ...]:
    names = ["wte.weight"] if first else []
    for layer in layers:
        names += [f"blocks.{layer}.norm", f"blocks.{layer}.attn", f"blocks.{layer}.mlp"]
    return (*names, "norm.weight", "head.weight") if last else tuple(names)


@pytest.mark.parametrize(
    "stages",
    [
        [(range(12), True, True)],
        [(range(6), True, False), (range(6, 12), False, True)],
        [([0, 1, 2, 6, 7, 8], True, False), ([3, 4, 5, 9, 10, 11], False, True)],  # interleaved
        [([0, 1, 2, 9, 10, 11], True, True), (range(3, 9), False, False)],  # zbv
        [(range(12), True, False), ([], False, True)],
        [([], True, False), (range(12), False, True)],
    ],
)
def test_names_of_stages_come_in_the_order_of_the_model(stages):
    whole = names_of(list(range(12)), first=True, last=True)
    parts = [names_of(list(layers), first=first, last=last) for layers, first, last in stages]
    # A stage without layers says nothing about its place: there the name decides, or the caller.
    said = [] if all(layers for layers, _, _ in stages) else whole[:4]
    for sequences in (parts, parts[::-1]):
        assert _merged(dict.fromkeys(sequences), said) == list(whole)


def test_orders_that_contradict_are_refused():
    with pytest.raises(ValueError, match="give the order explicitly"):
        _merged(dict.fromkeys([("a", "b"), ("b", "a")]), [])
    assert _merged(dict.fromkeys([("a", "b"), ("b", "a")]), ["b", "a"]) == ["b", "a"]


def test_one_process_without_a_group():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))
    found = dict(gathered_tensors(model, keep=True))
    assert list(found) == ["0.weight", "0.bias", "1.weight"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())
    assert [tensor.numel() for _, tensor in gathered_tensors(model, keep=False)] == [0, 0, 0]
