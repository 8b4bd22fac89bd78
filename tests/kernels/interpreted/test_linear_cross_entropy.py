"""linear_cross_entropy with Triton kernels between its matrix products."""

import gc

import pytest
import torch
from kernel_cases import linear_cross_entropy as cases
from kernel_cases.accuracy import DEVICE, DTYPES, check, strided
from kernel_cases.cross_entropy import IGNORED, SETTINGS
from kernel_cases.linear_cross_entropy import case
from law.workers import Workers
from live_bytes import LiveBytes
from torch import Tensor

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch

REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum"])


def reduced(op, reduction: str):
    """``op``, with a dim, so that its gradient may be any."""
    return lambda *args, **options: op(*args, reduction=reduction, **options).reshape(-1)


def against_the_reference(tensors: list[Tensor], dtype: torch.dtype, reduction: str, *others, **options) -> None:
    chunk_size = options.pop("chunk_size", None)

    def ours(*args, **options):
        return reduced(rung_kernels.linear_cross_entropy, reduction)(*args, chunk_size=chunk_size, **options)

    theirs = reduced(reference.linear_cross_entropy, reduction)
    check(ours, theirs, tensors, dtype, *others, ulps=2.0, **options)


@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("shape", [(7, 16, 33), (9, 8, 300), (3, 5, 1), (0, 8, 33), (1, 64, 257)], ids=str)
def test_linear_cross_entropy(shape: tuple[int, int, int], reduction: str, dtype: torch.dtype) -> None:
    x, weight, labels, _ = case(*shape)
    for chunk_size, settings in ((None, SETTINGS[0]), (4, SETTINGS[3])):
        against_the_reference([x, weight], dtype, reduction, labels, chunk_size=chunk_size, **settings)


@REDUCTIONS
@pytest.mark.parametrize("settings", SETTINGS[1:3], ids=str)
def test_one_penalty(settings: dict[str, float], reduction: str) -> None:
    x, weight, labels, _ = case(6, 8, 123)
    against_the_reference([x, weight], torch.float32, reduction, labels, chunk_size=5, **settings)


def run(
    x: Tensor, weight: Tensor, labels: Tensor, outer: Tensor | None = None, **options
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    with use_backend("triton"):
        losses = rung_kernels.linear_cross_entropy(*leaves, labels, **options)
        grads = torch.autograd.grad(losses, leaves, torch.ones_like(losses) if outer is None else outer)
    return losses.detach(), *grads


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.to(DEVICE, dtype if t.is_floating_point() else t.dtype) for t in case(*shape)]


@REDUCTIONS
def test_chunks_do_not_change_the_answer(reduction: str) -> None:
    x, weight, labels, outer = on_device(11, 8, 65)
    outer = outer if reduction == "none" else outer[0]
    found = [run(x, weight, labels, outer, reduction=reduction, chunk_size=size) for size in (None, 1, 3, 11, 100)]
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_sum_and_its_gradients_are_those_of_the_losses() -> None:
    x, weight, labels, _ = on_device(11, 8, 65)
    one, two = (run(x, weight, labels, reduction=r, chunk_size=4) for r in ("none", "sum"))
    torch.testing.assert_close(one[0].sum(), two[0])
    for a, b in zip(one[1:], two[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_gradient_for_every_row() -> None:
    """Ones for some rows and not for others: nothing of one row's gradient is taken for another's."""
    x, weight, labels, _ = on_device(6, 8, 33)
    outer = torch.tensor([1.0, 0.0, -3.0, 1e3, 0.0, 0.5], device=DEVICE)
    _, grad_x, grad_weight = run(x, weight, labels, outer, chunk_size=2)
    expected = torch.zeros_like(weight)
    for row in range(6):
        _, of_row, of_weight = run(x[row : row + 1], weight, labels[row : row + 1], outer[row : row + 1])
        torch.testing.assert_close(grad_x[row], of_row[0], rtol=1e-5, atol=1e-5)
        expected += of_weight
    torch.testing.assert_close(grad_weight, expected, rtol=1e-5, atol=1e-4)


@DTYPES
def test_the_sum_is_scaled_in_fp32(dtype: torch.dtype) -> None:
    """A factor such as one over the number of tokens is not itself rounded to bfloat16; and backward runs twice."""
    x, weight, labels, _ = on_device(6, 8, 33, dtype=dtype)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with use_backend("triton"):
        total = rung_kernels.linear_cross_entropy(*leaves, labels, reduction="sum")
        unit = torch.autograd.grad(total, leaves, retain_graph=True)
        scaled = torch.autograd.grad(total / 1021, leaves)
    for a, b in zip(unit, scaled, strict=True):
        factor = (b.double() * a.double()).sum() / a.double().square().sum()
        assert abs(float(factor) * 1021 - 1) < (1e-6 if dtype == torch.float32 else 1e-3)


@REDUCTIONS
@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_gradients_that_nobody_wants_are_not_made(frozen: str, reduction: str) -> None:
    x, weight, labels, _ = on_device(6, 8, 33)
    expected = run(x, weight, labels, reduction=reduction)
    x.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "x")
    with use_backend("triton"), Products() as products:
        losses = rung_kernels.linear_cross_entropy(x, weight, labels, reduction=reduction)
        if frozen != "both":
            losses.sum().backward()
    torch.testing.assert_close(losses.detach(), expected[0])
    made_twice = reduction == "none" and frozen != "both"
    assert products.count == 1 + made_twice + (frozen != "both")
    for leaf, grad in zip((x, weight), expected[1:], strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, grad)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@REDUCTIONS
def test_without_gradients_only_logits_are_made(reduction: str) -> None:
    x, weight, labels, _ = on_device(6, 8, 33)
    with use_backend("triton"), torch.no_grad(), Products() as products:
        losses = rung_kernels.linear_cross_entropy(
            x.requires_grad_(), weight.requires_grad_(), labels, reduction=reduction, chunk_size=3
        )
    assert products.count == 2 and not losses.requires_grad


@DTYPES
@REDUCTIONS
def test_rows_that_are_not_contiguous(reduction: str, dtype: torch.dtype) -> None:
    x, weight, labels, _ = case(6, 8, 43)
    check_options = {"chunk_size": 4, **SETTINGS[3]}
    for make in (strided, lambda t: t.mT.contiguous().mT if t.ndim == 2 else t):
        against_the_reference([x, weight], dtype, reduction, labels, make=make, **check_options)


@DTYPES
@REDUCTIONS
def test_ignored_rows(reduction: str, dtype: torch.dtype) -> None:
    x, weight, labels, _ = on_device(5, 8, 33, dtype=dtype)
    losses, grad_x, _ = run(x, weight, labels, reduction=reduction, chunk_size=2)
    ignored = labels == IGNORED
    assert ignored.any() and not grad_x[ignored].any() and grad_x[~ignored].any()
    for found in run(x, weight, torch.full_like(labels, IGNORED), reduction=reduction, **SETTINGS[3]):
        assert torch.equal(found, torch.zeros_like(found))  # and not -0 or NaN
    assert losses.dtype == torch.float32


@DTYPES
@REDUCTIONS
def test_one_chunk_of_logits_lives(reduction: str, dtype: torch.dtype) -> None:
    num_rows, width, vocab_size, chunk_rows = 64, 1, 1024, 16
    x, weight, labels, _ = on_device(num_rows, width, vocab_size, dtype=dtype)
    with use_backend("triton"), LiveBytes() as live:
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        losses = rung_kernels.linear_cross_entropy(*leaves, labels, reduction=reduction, chunk_size=chunk_rows)
        gc.collect()  # the interpreter's arguments hold each other
        losses.sum().backward()
    # Inputs, seen by slices; their gradients; the weight's once more while it is summed; numbers of rows.
    small = 4 * (3 * num_rows * width + 4 * vocab_size * width + 16 * num_rows)
    chunk = chunk_rows * vocab_size * dtype.itemsize
    assert small < chunk <= live.peak[dtype] < chunk + small
    if dtype != torch.float32:  # where matrix products cannot widen, the rows of a chunk are, for the weight's gradient
        assert live.peak[torch.float32] < 4 * chunk_rows * vocab_size + small


def test_float64_runs_torch() -> None:
    before = launch.counts.copy()
    x, weight, labels, _ = on_device(5, 8, 33, dtype=torch.float64)
    run(x, weight, labels, reduction="sum")
    assert launch.counts == before


def test_arguments_that_mean_nothing() -> None:
    x, weight, labels = torch.zeros(4, 8), torch.zeros(33, 7).bfloat16(), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"need the same D; .*one dtype; reduction='mean'.*; chunk_size=0"):
        rung_kernels.linear_cross_entropy(x, weight, labels, reduction="mean", chunk_size=0)
    with pytest.raises(ValueError, match="first=2 without a group"):
        rung_kernels.linear_cross_entropy(x, weight, labels, first=2)


def test_library_operators() -> None:
    x, weight, labels, outer = on_device(5, 8, 33)
    numbers = IGNORED, 0.01, 0.1, 2
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    torch.library.opcheck(torch.ops.rung.linear_cross_entropy.default, (*leaves, labels, *numbers))
    state = torch.ops.rung.linear_cross_entropy(x, weight, labels, *numbers)[1:]
    for wants in ((True, True), (False, True)):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight), wants, strict=True)]
        torch.library.opcheck(torch.ops.rung.linear_cross_entropy_sum.default, (*leaves, labels, *numbers, *wants))
        arguments = (outer, x, weight, labels, *state, *numbers, *wants)
        torch.library.opcheck(torch.ops.rung.linear_cross_entropy_backward.default, arguments)
        units = torch.ops.rung.linear_cross_entropy_sum(x, weight, labels, *numbers, *wants)[1:]
        arguments = (outer[0], *units, torch.float32)
        torch.library.opcheck(torch.ops.rung.linear_cross_entropy_sum_backward.default, arguments)


@REDUCTIONS
def test_compiled_whole(reduction: str) -> None:
    def loss(op):
        return lambda x, weight, labels: (
            op(x * 2, weight, labels, reduction=reduction, chunk_size=2, **SETTINGS[3]).sum().reshape(1) / 7
        )

    compiled = torch.compile(loss(rung_kernels.linear_cross_entropy), fullgraph=True, backend="aot_eager")
    x, weight, labels, _ = case(5, 8, 33)
    for each in (labels, torch.full_like(labels, IGNORED)):
        check(compiled, loss(reference.linear_cross_entropy), [x, weight], torch.float32, each, ulps=2.0)


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_dtensors_on_two_ranks(workers: Workers) -> None:
    for differences in workers.run(2, cases.rows_over_two_ranks):
        assert max(differences) < 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_a_vocabulary_that_two_ranks_share(workers: Workers) -> None:
    workers.run(2, cases.vocabulary_over_two_ranks, "triton")
