"""The router against what it is by definition, in float64 and where numbers are equal, tiny or not numbers."""

import pytest
import torch
from torch import Tensor

import rung_kernels


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(logits, top_k, bias, score, normalize, scale):
    """Token by token."""
    num_experts = logits.shape[1]
    weights, experts, counts, scores = [], [], torch.zeros(num_experts, dtype=torch.int64), []
    for row in logits:
        of_token = torch.exp(row) / torch.exp(row).sum() if score == "softmax" else 1 / (1 + torch.exp(-row))
        value = of_token if bias is None else of_token + bias
        best = sorted(range(num_experts), key=lambda e: (-value[e].item(), e))[:top_k]
        chosen = of_token[best]
        weights.append(scale * (chosen / chosen.sum() if normalize else chosen))
        experts.append(best)
        counts[best] += 1
        scores.append(of_token)
    return torch.stack(weights), torch.tensor(experts), counts, torch.stack(scores)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_router(score: str, normalize: bool, biased: bool) -> None:
    logits, bias = randn(9, 7).requires_grad_(), randn(7, seed=1) if biased else None
    options = {"bias": bias, "score": score, "normalize": normalize, "scale": 2.5}
    ours, theirs = rung_kernels.router(logits, 3, **options), naive(logits, 3, **options)
    outer = [randn(9, 3, seed=2), randn(9, 7, seed=3)]
    grads = [torch.autograd.grad((out[0], out[3]), logits, outer)[0] for out in (ours, theirs)]
    for found, expected in zip((*ours, grads[0]), (*theirs, grads[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits, bias = torch.zeros(2, 4), torch.tensor([0.0, 0.0, 5.0, 1.0]).requires_grad_()
    weights, experts, counts, scores = rung_kernels.router(logits.requires_grad_(), 2, bias=bias)
    assert experts.tolist() == [[2, 3]] * 2 and counts.tolist() == [0, 0, 2, 2]
    assert torch.equal(weights, torch.full((2, 2), 0.5)) and torch.equal(scores, torch.full((2, 4), 0.25))
    (weights[:, 0].sum() + scores.sum()).backward()
    assert bias.grad is None and logits.grad is not None


def test_softmax_before_the_choice_or_after_it() -> None:
    logits = randn(6, 8)
    weights, experts, _, _ = rung_kernels.router(logits, 3)
    torch.testing.assert_close(weights, logits.gather(1, experts).softmax(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_ones_go_to_the_first_expert(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1, 3, 1, 3, 3, 0], [0] * 6, [-0.0, 0.0, -1, 0.0, -0.0, -1]], dtype=dtype)
    _, experts, counts, _ = rung_kernels.router(logits, 4)
    assert experts.tolist() == [[1, 3, 4, 0], [0, 1, 2, 3], [0, 1, 3, 4]] and counts.tolist() == [3, 3, 1, 3, 2, 0]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_too_small_for_a_number(score: str) -> None:
    """Logits still say who is next, and shares of a sum that is zero in float32 are those that float64 finds."""
    logits = torch.tensor([[300.0, -300, -200, -301], [-600.0, -500, -640, -501], [-95, -96, -300, -700]])
    bias = torch.tensor([-2.0, 0, 0, 0])
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype).requires_grad_()
        assert rung_kernels.router(leaf, 3, score=score)[1].tolist() == [[0, 2, 1], [1, 3, 0], [0, 1, 2]]
        weights, _, _, scores = rung_kernels.router(leaf, 2, score=score)
        biased = rung_kernels.router(leaf[:1], 4, bias=bias, score=score)[0]
        grad = torch.autograd.grad(weights.square().sum() + biased.square().sum() + scores.sum(), leaf)[0]
        results.append([t.double() for t in (weights, biased, scores, grad)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][0][1], torch.tensor([0.7310585786, 0.2689414214]).double())


def test_no_expert_that_was_chosen_may_be_used() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf]]).requires_grad_()
    bias = torch.tensor([-9.0, 0, 0])
    for score in ("softmax", "sigmoid"):
        weights, experts, _, _ = rung_kernels.router(logits, 2, bias=bias, score=score)
        assert experts.tolist() == [[1, 2]] and weights.tolist() == [[0, 0]]
        assert torch.isfinite(torch.autograd.grad(weights.square().sum(), logits)[0]).all()


def test_experts_that_a_token_may_not_use() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, -torch.inf, 0.0]]).requires_grad_()
    for score in ("softmax", "sigmoid"):
        weights, experts, _, _ = rung_kernels.router(logits, 2, score=score)
        assert experts.tolist() == [[2, 0], [2, 0]] and weights[1].tolist() == [1, 0]
        assert torch.isfinite(torch.autograd.grad(weights.square().sum(), logits)[0]).all()


def test_narrow_logits_have_float32_scores() -> None:
    logits = randn(5, 6).bfloat16().requires_grad_()
    weights, _, _, scores = rung_kernels.router(logits, 2)
    assert weights.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(scores, logits.float().softmax(-1))
    assert torch.autograd.grad(weights[:, 0].sum(), logits)[0].dtype == torch.bfloat16


def test_no_tokens() -> None:
    logits = torch.zeros(0, 4).requires_grad_()
    weights, experts, counts, scores = rung_kernels.router(logits, 2)
    assert weights.shape == experts.shape == (0, 2) and scores.shape == (0, 4) and counts.tolist() == [0] * 4
    assert torch.autograd.grad(weights.sum() + scores.sum(), logits)[0].shape == (0, 4)


def test_balance_over_micro_batches() -> None:
    """Gradients of micro-batches under the counts of all are those of the whole batch (Qiu et al. 2025, section 3)."""
    logits = randn(12, 5).requires_grad_()

    def loss(part: Tensor, counts: Tensor) -> Tensor:
        scores = rung_kernels.router(part, 2)[3]
        return 5 * (counts / counts.sum() * scores.sum(0)).sum() / 12

    counts = rung_kernels.router(logits, 2)[2]
    parts = logits[:3], logits[3:]
    assert torch.equal(sum(rung_kernels.router(part, 2)[2] for part in parts), counts)
    whole = torch.autograd.grad(loss(logits, counts), logits)[0]
    pieces = torch.autograd.grad(sum(loss(part, counts) for part in parts), logits)[0]
    torch.testing.assert_close(whole, pieces, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("logits", "top_k", "options", "says"),
    [
        ((2, 3, 4), 1, {}, "must be [tokens, experts]"),
        ((3, 4), 0, {}, "top_k=0 must be at least 1 and at most the 4 experts"),
        ((3, 4), 5, {}, "top_k=5"),
        ((3, 4), 2, {"score": "relu"}, "score='relu' is none of softmax, sigmoid"),
        ((3, 4), 2, {"bias": torch.zeros(3)}, "bias (3,) must be [4]"),
    ],
)
def test_what_says_nothing_is_refused(logits: tuple[int, ...], top_k: int, options: dict, says: str) -> None:
    with pytest.raises(ValueError) as error:
        rung_kernels.router(torch.zeros(*logits), top_k, **options)
    assert says in str(error.value)
