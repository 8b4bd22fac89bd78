"""router as Triton kernels."""

import pytest
import torch
from kernel_cases import router as cases
from kernel_cases.accuracy import DEVICE, DTYPES, check, randn, strided
from law.workers import Workers

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch
from rung_kernels.triton_kernels import router as kernels

SCORES = pytest.mark.parametrize("score", ["softmax", "sigmoid"])


@DTYPES
@SCORES
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_router(dtype: torch.dtype, score: str, normalize: bool, biased: bool) -> None:
    bias = 0.3 * randn(12, seed=1).float().to(DEVICE) if biased else None
    options = {"bias": bias, "score": score, "normalize": normalize, "scale": 2.5}
    check(rung_kernels.router, reference.router, [3 * randn(21, 12)], dtype, 3, **options)


@SCORES
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(5, 1, 1), (9, 8, 8), (3, 5, 2), (70, 3, 1), (6, 384, 16), (3, 512, 10), (0, 6, 2), (1, 160, 6)],
)
def test_sizes(num_tokens: int, num_experts: int, top_k: int, score: str) -> None:
    logits = randn(num_tokens, num_experts)
    check(rung_kernels.router, reference.router, [logits], torch.float32, top_k, score=score)


def test_a_program_takes_many_tiles() -> None:
    programs = kernels._PROGRAMS_PER_MULTIPROCESSOR * launch.num_multiprocessors(torch.device(DEVICE))
    num_tokens = 32 * programs + 100
    check(rung_kernels.router, reference.router, [randn(num_tokens, 3)], torch.float32, 2)


@DTYPES
def test_rows_that_are_not_contiguous(dtype: torch.dtype) -> None:
    for make in (strided, lambda t: t.T.contiguous().T, lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]]):
        check(rung_kernels.router, reference.router, [randn(7, 12)], dtype, 3, make=make)


@SCORES
@pytest.mark.parametrize("pick", [0, 3], ids=["weights", "scores"])
def test_an_output_that_nobody_reads(pick: int, score: str) -> None:
    for normalize in (True, False):
        options = {"score": score, "normalize": normalize}
        check(
            lambda x: rung_kernels.router(x, 3, **options)[pick],  # noqa: B023
            lambda x: reference.router(x, 3, **options)[pick],  # noqa: B023
            [randn(6, 9)],
            torch.float32,
        )


@SCORES
def test_losses_that_sum_over_the_tokens(score: str) -> None:
    """Their gradient is the same for every token, and lies in memory once."""

    def loss(op, logits):
        weights, _, counts, scores = op(logits, 3, score=score)
        return (weights[:, 1].sum() + (counts / counts.sum() * scores.sum(0)).sum()).reshape(1)

    tensors = [randn(11, 10)]
    check(lambda x: loss(rung_kernels.router, x), lambda x: loss(reference.router, x), tensors, torch.float32)


@DTYPES
def test_equal_ones_go_to_the_first_expert(dtype: torch.dtype) -> None:
    """The very experts of the reference, without a bias whatever the logits: signed zeros, infinities, NaN, ties."""
    logits = torch.randint(-2, 3, (64, 11), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    logits[1::2] *= 1e30
    logits[2], logits[2, ::2] = 0.0, -0.0
    logits[4, 2:5], logits[5, 3], logits[6, 4:6], logits[7] = -0.0, -torch.inf, torch.nan, torch.nan
    logits[8:] += randn(56, 11).to(DEVICE, dtype) * 2**-6
    for score in ("softmax", "sigmoid"):
        with use_backend("triton"):
            weights, experts, counts, _ = rung_kernels.router(logits, 7, score=score)
        expected = reference.router(logits, 7, score=score)
        assert torch.equal(experts, expected[1]) and torch.equal(counts, expected[2])
        assert torch.equal(weights.isnan(), expected[0].isnan())


@SCORES
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_scores_too_small_for_a_number(score: str, scale: float) -> None:
    """Their shares are still right; where no expert that was chosen may be used there are no weights and no NaN."""
    logits = torch.tensor(
        [[300.0, -300, -200, -400], [-1000, -500, -999, -800], [-95, -96, -94, -3], [0, -torch.inf, -torch.inf, -1]],
        device=DEVICE,
    ).requires_grad_()
    bias = torch.tensor([-2.0, 1, 1, 0], device=DEVICE)
    results = []
    for op in (rung_kernels.router, reference.router):
        with use_backend("triton"):
            weights, experts, _, scores = op(logits, 2, bias=bias, score=score, scale=scale)
        (grad,) = torch.autograd.grad(weights.square().sum() + scores.sum(), logits)
        results.append((weights, experts, scores, grad))
    assert results[0][0][3].tolist() == [0, 0]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_same_twice() -> None:
    logits = randn(500, 24).float().to(DEVICE).requires_grad_()
    outer = randn(500, 24, seed=1).float().to(DEVICE)
    found = []
    for _ in range(2):
        with use_backend("triton"):
            outputs = rung_kernels.router(logits, 4)
            grad = torch.autograd.grad((outputs[0].square().sum() + (outputs[3] * outer).sum()), logits)
        found.append([*outputs, *grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_launch_each_way() -> None:
    before = launch.counts.copy()
    logits = randn(9, 8).float().to(DEVICE).requires_grad_()
    with use_backend("triton"):
        weights, _, _, scores = rung_kernels.router(logits, 2)
        (weights.sum() + scores.square().sum()).backward()
    assert launch.counts - before == {"_router_forward": 1, "_router_backward": 1}


def test_what_the_kernel_does_not_take_runs_the_reference() -> None:
    before = launch.counts.copy()
    with use_backend("triton"):
        rung_kernels.router(randn(3, 8).to(DEVICE), 2)
        rung_kernels.router(randn(3, kernels.MAX_EXPERTS + 1).float().to(DEVICE), 2)
        rung_kernels.router(randn(3, 64).float().to(DEVICE), kernels.MAX_CHOSEN + 1)
    assert launch.counts == before


def test_library_operators() -> None:
    logits, bias = randn(5, 6).float().to(DEVICE), randn(6, seed=1).float().to(DEVICE)
    for given in (None, bias):
        arguments = (logits.clone().requires_grad_(), given, 2, "sigmoid", True, 1.5)
        torch.library.opcheck(torch.ops.rung.router.default, arguments)
    with use_backend("triton"):
        weights, experts, _, _ = rung_kernels.router(logits, 2)
    grads = randn(5, 2, seed=2).float().to(DEVICE), randn(5, 6, seed=3).float().to(DEVICE)
    for weights_grad, scores_grad in (grads, (None, grads[1]), (grads[0], None)):
        arguments = (logits, weights, experts, weights_grad, scores_grad, "softmax", True, 1.0)
        torch.library.opcheck(torch.ops.rung.router_backward.default, arguments)


def test_compiled_whole() -> None:
    def both(op, logits):
        weights, _, counts, scores = op(logits, 2, scale=2.0)
        return weights, counts * scores.sum(0)

    compiled = torch.compile(lambda x: both(rung_kernels.router, x), fullgraph=True, backend="aot_eager")
    check(compiled, lambda x: both(reference.router, x), [randn(9, 5)], torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_dtensors_on_two_ranks(workers: Workers) -> None:
    for differences in workers.run(2, cases.spread_over_two_ranks):
        assert max(differences) < 1e-5
