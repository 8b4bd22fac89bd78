"""Philox against the known answers of Random123, and every implementation against the others."""

import numpy as np
import pytest
import torch

from rung.random import name_key, philox_numpy, philox_torch, step_key
from rung.random.philox import BLOCK, rounds

ONES = 0xFFFFFFFF
KNOWN = [  # counter, key, words: kat_vectors of Random123, "philox4x32 10"
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def arrays(words):
    return [np.array([word], np.uint64) for word in words]


def tensors(words):
    return [torch.tensor([word]) for word in words]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert rounds(*counter, *key) == words
    assert tuple(int(word[0]) for word in philox_numpy(*arrays(counter), key)) == words
    assert tuple(int(word[0]) for word in philox_torch(*tensors(counter), *key)) == words


def test_numpy_is_torch_across_blocks_and_broadcasts():
    rng = np.random.default_rng(0)
    counters = [rng.integers(0, 1 << 32, shape, np.uint64) for shape in [(2, 1, 3), (BLOCK // 2 + 1, 1), (3,), ()]]
    key = (0x12345678, ONES)
    mine = philox_numpy(*counters, key)
    theirs = philox_torch(*(torch.from_numpy(np.asarray(counter.astype(np.int64))) for counter in counters), *key)
    for a, b in zip(mine, torch.broadcast_tensors(*theirs), strict=True):
        np.testing.assert_array_equal(a.astype(np.int64), b.numpy())
    words = np.stack(mine)
    assert words.max() > 0.999 * 2**32 and abs(words.mean() / 2**31 - 1) < 0.01


def test_name_keys_are_fixed():
    assert name_key(0, "embed_tokens.weight") == (0x657416F9, 0x65DDB15D)
    assert len({name_key(seed, name) for seed in range(20) for name in ("a", "b", "1/a", "")}) == 80


def test_step_keys_of_ints_and_tensors_agree():
    key = name_key(1, "dropout")
    steps = [0, 1, ONES, 2**32, 2**33 + 5]
    keys = [step_key(key, step) for step in steps]
    assert len(set(keys)) == len(steps)
    assert keys[4] == rounds(5, 2, 0, 1, *key)[:2]
    for step, expected in zip(steps, keys, strict=True):
        assert tuple(int(word) for word in step_key(key, torch.tensor(step))) == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_words_are_the_same(device):
    """In the forms in which inductor went wrong: 0-dim tensors, an arange as counter, keys that change."""

    def draw(step, positions, key):
        key = step_key(key, step)
        words = philox_torch(torch.arange(40, device=positions.device), positions, 0, step, *key)
        return torch.stack(key), torch.stack(torch.broadcast_tensors(*words))

    compiled = torch.compile(draw, fullgraph=True)
    positions = torch.arange(3)[:, None] + ONES - 1
    for step, key in ((2**33 + 5, (11, ONES)), (1, (ONES, 1 << 31))):
        expected = draw(torch.tensor(step), positions, key)
        arguments = (torch.tensor(step, device=device), positions.to(device), key)
        for function in (draw, compiled):
            for words, right in zip(function(*arguments), expected, strict=True):
                assert torch.equal(words.cpu(), right)
