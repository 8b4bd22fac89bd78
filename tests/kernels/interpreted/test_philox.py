"""Random words, normals and dropout masks as Triton kernels: the integers of rung.random, bit for bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases.accuracy import DEVICE

from rung import random as rung_random
from rung.random import normal
from rung_kernels import random
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels.launch import launch
from rung_kernels.triton_kernels.philox import normals_of

KEY = rung_random.name_key(7, "a.weight")
TABLE = torch.from_numpy(np.load(f"{normal.__file__.removesuffix('.py')}_table.npy")).to(DEVICE)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
STARTS = [0, 1, 3, 2**32 - 5, 2**32, 2**34 - 6, 2**63 - 3, 2**63 - 2050]


@BACKENDS
@pytest.mark.parametrize("count", [0, 1, 513])
@pytest.mark.parametrize("start", [*STARTS, 2**63, 2**64 - 2], ids=str)
def test_words(start: int, count: int, backend: str) -> None:
    with use_backend(backend):
        words = random.philox_words(KEY, start, count, 0xFFFFFFFF, 2**31, device=DEVICE)
    counters = (np.uint64(start) + np.arange(count, dtype=np.uint64)) & np.uint64(2**64 - 1)
    theirs = rung_random.philox_numpy(counters, counters >> np.uint64(32), 0xFFFFFFFF, 2**31, KEY)
    assert words.dtype == torch.int64 and words.shape == (count, 4)
    np.testing.assert_array_equal(words.cpu().numpy(), np.stack(theirs, -1).astype(np.int64))


@BACKENDS
def test_the_known_answers_of_the_paper(backend: str) -> None:
    """Random123's kat_vectors, philox4x32 10."""
    ones = 0xFFFFFFFF
    known = {
        (0, 0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (ones, ones, ones, ones, ones, ones): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
            0xD16CFE09,
            0x94FDCCEB,
            0x5001E420,
            0x24126EA1,
        ),
    }
    for (c0, c1, c2, c3, k0, k1), words in known.items():
        with use_backend(backend):
            assert random.philox_words((k0, k1), c1 << 32 | c0, 1, c2, c3, device=DEVICE).tolist() == [list(words)]


@BACKENDS
def test_words_of_keys_on_the_device(backend: str) -> None:
    key = tuple(torch.tensor(word, device=DEVICE) for word in KEY)
    step = torch.tensor(2**40 + 3, device=DEVICE)
    with use_backend(backend):
        words = random.philox_words(key, 5, 9, step, step >> 32, device=DEVICE)
    theirs = rung_random.philox_torch(torch.arange(5, 14), 0, 3, 256, *KEY)
    assert torch.equal(words.cpu(), torch.stack(theirs, -1))


@BACKENDS
@pytest.mark.parametrize("count", [0, 1, 2049])
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_normals(start: int, count: int, backend: str) -> None:
    count = min(count, 2**63 - start)
    with use_backend(backend):
        values = random.normals(KEY, start, count, TABLE)
    assert values.dtype == torch.float64
    np.testing.assert_array_equal(values.cpu().numpy(), rung_random.normals_numpy(KEY, start, count))


@triton.jit
def _normals_of_words(words, table, out, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = normals_of(tl.load(words + at, at < count, 0).to(tl.uint32), table, 2048, tl.float64)
    tl.store(out + at, values, at < count)


def test_normals_of_all_segments() -> None:
    """Both signs of the first and the last place of each quadratic that a word can ask for."""
    firsts = [n for e in range(32) for n in range(2**e, 2 ** (e + 1), max(1, 2**e // 64))]
    words = torch.tensor([x for n in firsts for x in (n, n | 1, n - 1, (n - 1) & -2)])
    found = torch.empty(len(words), dtype=torch.float64, device=DEVICE)
    size = triton.next_power_of_2(len(words))
    launch(_normals_of_words, (1,), words=words.to(DEVICE), table=TABLE, out=found, count=len(words), SIZE=size)
    assert torch.equal(found.cpu(), rung_random.normal_from_bits_torch(words))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normals_of_less_precision(dtype: torch.dtype, backend: str) -> None:
    with use_backend(backend):
        values = random.normals(KEY, 6, 1000, TABLE, dtype)
    exact = torch.from_numpy(rung_random.normals_numpy(KEY, 6, 1000)).to(DEVICE)
    if dtype == torch.bfloat16:  # the interpreter truncates
        torch.testing.assert_close(values.double(), exact, rtol=2**-7, atol=0)
    else:
        assert torch.equal(values, exact.to(dtype))


@BACKENDS
@pytest.mark.parametrize("features", [1, 6, 64, 1100])
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_dropout_mask(features: int, p: float, backend: str) -> None:
    ids = torch.tensor([2**32 - 1, 2**40 + 7, 3], device=DEVICE)
    positions = torch.tensor([[0, 1, 2**31, 2**32 - 1, 9]], device=DEVICE).expand(3, 5)
    with use_backend(backend):
        kept = random.dropout_mask(KEY, ids, positions, features, 8, p)
    theirs = rung_random.dropout_mask(KEY, ids, positions, features, 8, p)
    assert kept.dtype == torch.bool and torch.equal(kept, theirs)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)], ids=str)
def test_masks_of_nothing(shape: tuple[int, int, int]) -> None:
    batch, tokens, features = shape
    ids, positions = torch.arange(batch, device=DEVICE), torch.zeros(batch, tokens, dtype=torch.int64, device=DEVICE)
    with use_backend("triton"):
        assert random.dropout_mask(KEY, ids, positions, features, 0, 0.5).shape == shape


def test_a_rank_with_some_features_draws_its_part() -> None:
    ids, positions = torch.arange(4, device=DEVICE)[::2], torch.arange(12, device=DEVICE).view(6, 2).T
    with use_backend("triton"):
        whole = random.dropout_mask(KEY, ids, positions, 40, 0, 0.3)
        assert torch.equal(random.dropout_mask(KEY, ids, positions, 17, 12, 0.3), whole[..., 12:29])


def test_wrong_arguments() -> None:
    ids, positions = torch.arange(2), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="multiple of 4"):
        random.dropout_mask(KEY, ids, positions, 8, 2, 0.1)
    with pytest.raises(ValueError, match="probability"):
        random.dropout_mask(KEY, ids, positions, 8, 0, 1.5)
    with pytest.raises(ValueError, match="2\\^63"):
        random.normals(KEY, 2**63, 1, TABLE)
    with pytest.raises(ValueError, match="int64"):
        random.normals(KEY, 0, 1, TABLE.double())


def test_library_operators() -> None:
    k0, k1 = (torch.tensor(word, device=DEVICE) for word in KEY)
    ids, positions = torch.arange(2, device=DEVICE), torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(torch.ops.rung.philox_words.default, (k0, k1, k0, k1, 5, 3))
    torch.library.opcheck(torch.ops.rung.normals.default, (k0, k1, TABLE, 5, 3, torch.float32))
    torch.library.opcheck(torch.ops.rung.dropout_mask.default, (k0, k1, ids, positions, 6, 4, 2**31))


def test_compiled_whole() -> None:
    ids, positions = torch.arange(2, device=DEVICE), torch.arange(6, device=DEVICE).view(2, 3)
    key = tuple(torch.tensor(word, device=DEVICE) for word in KEY)

    def all_of_them():
        words = random.philox_words(KEY, 3, 4, device=DEVICE)
        return words, random.normals(key, 3, 9, TABLE), random.dropout_mask(key, ids, positions, 10, 4, 0.5)

    with use_backend("triton"):
        compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")()
        for ours, theirs in zip(compiled, all_of_them(), strict=True):
            assert torch.equal(ours, theirs)
