"""What two ranks do for the tests of cross-entropy: rows as DTensors, and a vocabulary that the ranks share.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from kernel_cases.accuracy import close, randn
from torch import Tensor, distributed
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rung_kernels
import rung_kernels.sharding
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch

IGNORED = -100
SETTINGS = [{}, {"z_loss": 0.01}, {"label_smoothing": 0.2}, {"z_loss": 0.01, "label_smoothing": 0.2}]


def labels_of(num_rows: int, vocab_size: int) -> Tensor:
    """The same on every machine; every fourth row is ignored."""
    labels_N = torch.randint(vocab_size, (num_rows,), generator=torch.Generator().manual_seed(vocab_size))
    labels_N[1::4] = IGNORED
    return labels_N


def rows_over_two_ranks() -> list[float]:
    """Largest differences between whole tensors and DTensors, losses and gradients of every placement."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    logits_NV, labels_N, outer_N = randn(6, 33).float(), labels_of(6, 33), randn(6, seed=1).float()
    differences = []
    with use_backend("triton"):
        expected = _run(logits_NV, labels_N, outer_N, SETTINGS[3])
        for placement in (Shard(0), Shard(1), Replicate()):
            per_row = Replicate() if placement == Shard(1) else placement
            spread = distribute_tensor(logits_NV, mesh, [placement])
            there = [distribute_tensor(t, mesh, [per_row]) for t in (labels_N, outer_N)]
            for compiled in (False, True)[: 1 + (placement == Shard(0))]:
                found = _run(spread, *there, SETTINGS[3], compiled=compiled)
                assert found[0].placements == (per_row,)
                differences += [float((f.full_tensor() - e).abs().max()) for f, e in zip(found, expected, strict=True)]
    return differences


def _run(logits_NV, labels_N, outer_N, settings, compiled=False):
    leaf = logits_NV.detach().clone().requires_grad_()

    def loss(leaf):
        return rung_kernels.cross_entropy(leaf, labels_N, IGNORED, **settings)

    losses_N = (torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss)(leaf)
    return [losses_N.detach(), *torch.autograd.grad(losses_N, leaf, outer_N)]


def vocabulary_over_two_ranks(backend: str) -> None:
    """Every rank has some columns: losses and gradients against one process, and the bits of other ranks' losses."""
    for sizes in ((21, 12), (33, 0), (1, 32)):
        for dtype in (torch.float32, torch.bfloat16) if backend == "triton" else (torch.float64, torch.bfloat16):
            for settings in SETTINGS:
                _check_columns(sizes, dtype, settings, backend)
    _check_far_from_zero(backend)


def _mine(sizes: tuple[int, ...]) -> slice:
    first = sum(sizes[: distributed.get_rank()])
    return slice(first, first + sizes[distributed.get_rank()])


def _check_columns(sizes: tuple[int, ...], dtype: torch.dtype, settings: dict[str, float], backend: str) -> None:
    mine = _mine(sizes)
    logits_NV, labels_N = randn(7, sum(sizes), scale=3.0).to(dtype), labels_of(7, sum(sizes))
    logits_NV[2, 21:] = -torch.inf
    if "label_smoothing" not in settings:
        labels_N[2], labels_N[3] = 20, sum(sizes)
    else:
        labels_N[2] = IGNORED
    fp32 = torch.promote_types(dtype, torch.float32)
    outer_N = randn(7, seed=1).to(fp32)
    group = distributed.group.WORLD
    truth, same = (_alone(logits_NV.to(d), labels_N, outer_N.to(g), settings) for d, g in _dtypes(dtype, fp32))
    before = launch.counts.copy()
    with use_backend(backend):
        leaf = logits_NV[:, mine].requires_grad_()
        losses_N = rung_kernels.cross_entropy(leaf, labels_N, IGNORED, group=group, first=mine.start, **settings)
        (grad_NV,) = torch.autograd.grad(losses_N, leaf, outer_N)
    assert (launch.counts != before) == (backend == "triton")
    assert losses_N.dtype == fp32 and grad_NV.dtype == dtype and not grad_NV[1].any() and losses_N[1] == 0
    everyone = [torch.empty_like(losses_N) for _ in sizes]
    distributed.all_gather(everyone, losses_N.detach())
    assert torch.equal(everyone[0], everyone[1])
    ulps = 16 if dtype == torch.float64 else 2  # of the gradient's root mean square; its probabilities were near one
    close(losses_N.detach(), same[0], truth[0], ulps=4, what=f"losses {sizes} {settings}")
    close(grad_NV, same[1][:, mine], truth[1][:, mine], ulps=ulps, what=f"gradient {sizes} {settings}")


def _dtypes(dtype: torch.dtype, fp32: torch.dtype) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
    return (torch.float64, torch.float64), (dtype, fp32)


def _alone(logits_NV, labels_N, outer_N, settings):
    """Of one process, which refuses a label outside: there the loss is infinite and the gradient that of lse."""
    outside_N = (labels_N >= logits_NV.shape[1]) & (labels_N != IGNORED)
    leaf = logits_NV.detach().requires_grad_()
    losses_N = torch.nn.functional.cross_entropy(
        leaf.to(outer_N.dtype), labels_N.masked_fill(outside_N, 0), reduction="none", ignore_index=IGNORED,
        label_smoothing=settings.get("label_smoothing", 0.0),
    )  # fmt: skip
    lse_N = leaf.to(outer_N.dtype).logsumexp(1).masked_fill(labels_N == IGNORED, 0.0)
    losses_N = torch.where(outside_N, lse_N, losses_N) + settings.get("z_loss", 0.0) * lse_N.square()
    (grad_NV,) = torch.autograd.grad(losses_N, leaf, outer_N)
    return losses_N.detach().masked_fill(outside_N, torch.inf), grad_NV


def _check_far_from_zero(backend: str) -> None:
    """The largest logit is taken off before anything is rounded."""
    sizes = (20, 13)
    mine = _mine(sizes)
    logits_NV, labels_N, outer_N = (randn(5, 33) + 3e5).float(), labels_of(5, 33), randn(5, seed=1)
    settings = {"label_smoothing": 0.2}
    losses_N, grad_NV = _alone(logits_NV.double(), labels_N, outer_N, settings)
    with use_backend(backend):
        leaf = logits_NV[:, mine].requires_grad_()
        found_N = rung_kernels.cross_entropy(
            leaf, labels_N, group=distributed.group.WORLD, first=mine.start, **settings
        )
        (found_NV,) = torch.autograd.grad(found_N, leaf, outer_N.float())
    torch.testing.assert_close(found_N.double(), losses_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_NV.double(), grad_NV[:, mine], rtol=1e-5, atol=1e-7)
