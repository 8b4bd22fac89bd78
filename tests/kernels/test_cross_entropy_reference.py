"""The references of cross-entropy, with and without a head, against naive formulas."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import cross_entropy as cases
from kernel_cases import linear_cross_entropy as linear_cases
from kernel_cases.accuracy import DTYPES, check, randn
from kernel_cases.cross_entropy import IGNORED, SETTINGS, labels_of
from law.workers import Workers
from live_bytes import LiveBytes

import rung_kernels
from rung_kernels import reference
from rung_kernels.reference import rows
from rung_kernels.reference.cross_entropy import Loss

EACH = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def naive(logits_NV, labels_N, z_loss=0.0, label_smoothing=0.0):
    """By torch; an ignored row has neither loss nor penalty."""
    losses_N = F.cross_entropy(
        logits_NV, labels_N, reduction="none", ignore_index=IGNORED, label_smoothing=label_smoothing
    )
    return losses_N + z_loss * logits_NV.logsumexp(1).square() * (labels_N != IGNORED)


def assert_same(ours, theirs, inputs):
    outer = torch.randn_like(ours)
    found = torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, inputs, outer)
    for a, b in zip((ours, *found[0]), (theirs, *found[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@EACH
@pytest.mark.parametrize("num_rows", [1, 4, 11])
def test_cross_entropy(num_rows, settings, monkeypatch):
    monkeypatch.setitem(rows.CHUNK_ELEMENTS, "cpu", 4 * 65)
    logits, labels = randn(num_rows, 65, scale=5.0).requires_grad_(), labels_of(num_rows, 65)
    assert_same(reference.cross_entropy(logits, labels, **settings), naive(logits, labels, **settings), [logits])


@EACH
def test_gradients_are_those_of_differences(settings):
    logits, labels = randn(4, 7).requires_grad_(), labels_of(4, 7)
    assert torch.autograd.gradcheck(lambda x: reference.cross_entropy(x, labels, **settings), logits)


@EACH
def test_the_size_of_chunks_changes_no_bit(settings, monkeypatch):
    logits, labels, outer = randn(6, 40_001).float().requires_grad_(), labels_of(6, 40_001), randn(6, seed=1).float()
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    for elements in (1, 4 * 40_001, 2**40):
        monkeypatch.setitem(rows.CHUNK_ELEMENTS, "cpu", elements)
        losses = reference.cross_entropy(logits, labels, **settings)
        found.append((losses, *torch.autograd.grad(losses, logits, outer)))
    torch.set_num_threads(threads)
    for losses, gradient in found[1:]:
        assert torch.equal(losses, found[0][0]) and torch.equal(gradient, found[0][1])


@EACH
def test_nothing_to_learn_from(settings):
    logits = randn(3, 5).requires_grad_()
    losses = reference.cross_entropy(logits, torch.full((3,), IGNORED), **settings)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.equal(losses, torch.zeros(3)) and torch.equal(gradient, torch.zeros(3, 5))
    assert reference.cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), **settings).shape == (0,)


def test_arguments_that_mean_nothing():
    logits, labels = torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits_NV \(2, 4\) and labels_N \(3,\).*first=3.*smoothing=1.5.*z_loss=-1"):
        reference.cross_entropy(logits, labels, first=3, label_smoothing=1.5, z_loss=-1)


def test_a_vocabulary_that_two_ranks_share(workers: Workers):
    workers.run(2, cases.vocabulary_over_two_ranks, "torch")


@EACH
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
@pytest.mark.parametrize(
    "op", [reference.linear_cross_entropy, rung_kernels.linear_cross_entropy], ids=["plain", "ours"]
)
def test_linear_cross_entropy(op, chunk_size, reduction, settings):
    """The public function, too, runs torch where there is no kernel, and keeps no more than a chunk of logits."""
    x, weight, labels, _ = linear_cases.case(11, 6, 37)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    expected = naive(x @ weight.T, labels, **settings)
    found = op(*leaves, labels, reduction=reduction, chunk_size=chunk_size, **settings)
    assert_same(found, expected.sum() if reduction == "sum" else expected, leaves)


@DTYPES
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_head_in_chunks_is_as_accurate(reduction, dtype):
    x, weight, labels, _ = linear_cases.case(65, 16, 123)

    def reduced(op, **options):
        return lambda x, weight: op(x, weight, labels, reduction=reduction, **options, **SETTINGS[3]).reshape(-1)

    with_chunks = reduced(rung_kernels.linear_cross_entropy, chunk_size=9)
    check(with_chunks, reduced(reference.linear_cross_entropy), [x, weight], dtype)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(
    "op", [reference.linear_cross_entropy, rung_kernels.linear_cross_entropy], ids=["plain", "ours"]
)
def test_gradients_of_a_head_are_those_of_differences(op, reduction):
    x, weight, labels, _ = linear_cases.case(4, 3, 7)

    def loss(x, weight):
        return op(x, weight, labels, reduction=reduction, chunk_size=3, **SETTINGS[3]).reshape(-1)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), weight.requires_grad_()))


def test_large_batches_are_cut_into_even_chunks():
    from rung_kernels.linear_cross_entropy import _Head

    weight = torch.empty(5, 2, device="meta")
    for num_rows, expected in ((7, [7]), (4096, [4096]), (4097, [2176, 1921]), (10_000, [3456, 3456, 3088]), (0, [])):
        x, labels = torch.empty(num_rows, 2, device="meta"), torch.empty(num_rows, device="meta", dtype=torch.int64)
        head = _Head(x, weight, labels, Loss(), 0)
        assert [logits.shape[0] for _, logits in head.chunks()] == expected


def test_one_chunk_of_logits_lives():
    num_rows, vocab_size, chunk_rows = 256, 1024, 32
    x, weight, labels, _ = linear_cases.case(num_rows, 2, vocab_size)
    with LiveBytes() as live:
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        rung_kernels.linear_cross_entropy(*leaves, labels, chunk_size=chunk_rows).sum().backward()
    chunk = 8 * chunk_rows * vocab_size
    # Beside the chunk's logits, torch's softmax of it.
    assert 2 * chunk <= live.peak[torch.float64] < 3 * chunk


def test_a_head_whose_vocabulary_two_ranks_share(workers: Workers):
    workers.run(2, linear_cases.vocabulary_over_two_ranks, "torch")
