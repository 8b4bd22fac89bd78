"""Cross-entropy of logits, whole or spread over ranks.

Legend: N rows (tokens), V vocabulary, C rows of one chunk, R ranks, F facts about a row. "fp32" means
promote(dtype, float32).

The loss of a row with label y is lse - x_y, lse = log Σ exp(x). With label smoothing s it is (1-s)·(lse - x_y) +
s·mean(lse - x), the mean over the whole vocabulary (Szegedy et al. 2016, "Rethinking the Inception Architecture",
section 7); with a z-loss z, z·lse² is added (Chowdhery et al. 2022, "PaLM", section 5). Of a gradient g of the loss,
logit x_v gets g·((1 + 2z·lse)·exp(x_v - lse) - s/V - (1-s)·[v = y]).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rung_kernels.op import refuse_second_derivative
from rung_kernels.reference.rows import row_chunks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "TORCH",
    "Backend",
    "Loss",
    "check_arguments",
    "cross_entropy",
    "losses_of",
    "merged",
    "spread_cross_entropy",
]


class Loss(NamedTuple):
    """What is computed of logits and labels."""

    ignore_index: int = -100
    first: int = 0
    """The label that the first column stands for."""
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    @property
    def num_facts(self) -> int:
        """Numbers that a rank has to know of a row of another rank's logits."""
        return 4 if self.label_smoothing else 3


class Backend(NamedTuple):
    """What runs over the logits of this rank: here in torch, elsewhere in kernels."""

    facts: Callable[[Tensor, Tensor, Loss], Tensor]
    """(logits_NV, labels_N) -> ``num_facts`` numbers [F, N] in fp32: maximum, log Σ exp(logit - maximum), the label's
    logit (-inf where it is not here) and Σ (logit - maximum), which only label smoothing needs. A row without columns,
    or with none above -inf, has the maximum -inf and counts for nothing."""
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Loss, Tensor | None, Tensor], None]
    """(grad_N, logits_NV, labels_N, max_N, log_sum_N, loss, size of the whole vocabulary, out_NV): fill the gradient
    of the logits, which may be the logits themselves. The size (0-dim fp32; None: V) is for label smoothing."""


class _CrossEntropy(torch.autograd.Function):
    """Row-wise losses. Backward makes the softmax again from the logits, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, loss: Loss) -> Tensor:
        fp32 = torch.promote_types(logits_NV.dtype, torch.float32)
        kept_N = labels_N != loss.ignore_index
        column_N1 = labels_N.masked_fill(~kept_N, 0).unsqueeze(1)
        losses_N = logits_NV.new_empty(logits_NV.shape[0], dtype=fp32)
        lse_N = torch.empty_like(losses_N) if loss.z_loss else None
        for rows in row_chunks(logits_NV):
            log_probs_CV = torch.log_softmax(logits_NV[rows], dim=-1, dtype=fp32)
            torch.neg(log_probs_CV.gather(1, column_N1[rows]).squeeze(1), out=losses_N[rows])
            if loss.label_smoothing:
                mean_C = _sum_of_each_row(log_probs_CV) / -logits_NV.shape[1]
                losses_N[rows] = (1 - loss.label_smoothing) * losses_N[rows] + loss.label_smoothing * mean_C
            if lse_N is not None:
                lse_N[rows] = logits_NV[rows].amax(1) - log_probs_CV.amax(1)
        if lse_N is not None:
            losses_N += loss.z_loss * lse_N.square()
        ctx.loss = loss
        ctx.save_for_backward(logits_NV, column_N1, kept_N, lse_N)
        return losses_N.masked_fill_(~kept_N, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative("cross_entropy")
        logits_NV, column_N1, kept_N, lse_N = ctx.saved_tensors
        loss: Loss = ctx.loss
        grad_N1 = grad_N.masked_fill(~kept_N, 0.0).unsqueeze(1)
        of_softmax_N1, uniform_N1, at_label_N1 = _factors(grad_N1, lse_N, loss, logits_NV.shape[1])
        grad_logits_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        in_place = logits_NV.dtype == grad_N.dtype
        for rows in row_chunks(logits_NV):
            out_CV = grad_logits_NV[rows] if in_place else None
            probs_CV = torch.softmax(logits_NV[rows], dim=-1, dtype=grad_N.dtype, out=out_CV)
            probs_CV.mul_(of_softmax_N1[rows])
            if uniform_N1 is not None:
                probs_CV.sub_(uniform_N1[rows])
            probs_CV.scatter_add_(1, column_N1[rows], -at_label_N1[rows])
            if not in_place:
                grad_logits_NV[rows] = probs_CV
        return grad_logits_NV, None, None


def _factors(
    grad_N1: Tensor, lse_N: Tensor | None, loss: Loss, vocab_size: int | Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """By what the softmax is multiplied, and what is taken off everywhere and at the label, all [N, 1]."""
    of_softmax_N1, uniform_N1, at_label_N1 = grad_N1, None, grad_N1
    if loss.z_loss:
        assert lse_N is not None
        of_softmax_N1 = grad_N1 * (1 + 2 * loss.z_loss * lse_N.unsqueeze(1))
    if loss.label_smoothing:
        uniform_N1 = grad_N1 * (loss.label_smoothing / vocab_size)
        at_label_N1 = grad_N1 * (1 - loss.label_smoothing)
    return of_softmax_N1, uniform_N1, at_label_N1


def _sum_of_each_row(x_CV: Tensor) -> Tensor:
    """On the CPU torch sums a row that is alone in another order than one among others."""
    num_rows = x_CV.shape[0]
    return x_CV.expand(max(2, num_rows), -1).sum(1)[:num_rows]


class _SpreadCrossEntropy(torch.autograd.Function):
    """The same where a rank has some columns of the logits: one message of a few numbers per row, none in backward.

    Each rank finds facts about its columns. All ranks learn all of these and do the same arithmetic on them. Shoeybi et
    al. 2019, "Megatron-LM", section 3, computes the same with three sums over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, loss: Loss, group: ProcessGroup, backend: Backend
    ) -> Tensor:
        facts_FN, vocab_size = merged(backend.facts(logits_NV, labels_N, loss), logits_NV.shape[1], loss, group)
        ctx.loss, ctx.backend = loss, backend
        ctx.save_for_backward(logits_NV, labels_N, *facts_FN[:2], vocab_size)
        return losses_of(facts_FN, labels_N, loss, vocab_size)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        refuse_second_derivative("cross_entropy")
        logits_NV, labels_N, max_N, log_sum_N, vocab_size = ctx.saved_tensors
        grad_logits_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        if logits_NV.numel():
            ctx.backend.gradient(grad_N, logits_NV, labels_N, max_N, log_sum_N, ctx.loss, vocab_size, grad_logits_NV)
        return grad_logits_NV, None, None, None, None


def _torch_facts(logits_NV: Tensor, labels_N: Tensor, loss: Loss) -> Tensor:
    fp32 = torch.promote_types(logits_NV.dtype, torch.float32)
    facts_FN = logits_NV.new_full((loss.num_facts, logits_NV.shape[0]), -math.inf, dtype=fp32)
    facts_FN[3:] = 0.0
    if not logits_NV.shape[1]:
        return facts_FN
    max_N, log_sum_N, label_N = facts_FN[:3]
    column_N1, here_N = _columns(labels_N, logits_NV.shape[1], loss)
    for rows in row_chunks(logits_NV):
        max_N[rows] = logits_NV[rows].amax(1)
        # The log-probability of the largest logit is minus the log of the sum. Softmax treats each row by itself, where
        # a plain sum may be made in another order when there are fewer rows.
        log_probs_CV = torch.log_softmax(logits_NV[rows], dim=1, dtype=fp32)
        log_sum_N[rows] = log_probs_CV.amax(1).neg_()
        label_N[rows] = logits_NV[rows].gather(1, column_N1[rows]).squeeze(1)
        if loss.label_smoothing:
            facts_FN[3, rows] = _sum_of_each_row(log_probs_CV) + logits_NV.shape[1] * log_sum_N[rows]
    facts_FN[1::2].masked_fill_(max_N == -math.inf, 0.0)
    label_N.masked_fill_(~here_N, -math.inf)
    return facts_FN


def _columns(labels_N: Tensor, num_columns: int, loss: Loss) -> tuple[Tensor, Tensor]:
    """[N, 1] column of each label, and [N] whether it is one that is here; 0 where it is not."""
    column_N = labels_N - loss.first
    here_N = (labels_N != loss.ignore_index) & (column_N >= 0) & (column_N < num_columns)
    return column_N.masked_fill(~here_N, 0).unsqueeze(1), here_N


def _torch_gradient(
    grad_N: Tensor,
    logits_NV: Tensor,
    labels_N: Tensor,
    max_N: Tensor,
    log_sum_N: Tensor,
    loss: Loss,
    vocab_size: Tensor | None,
    out_NV: Tensor,
) -> None:
    num_columns = logits_NV.shape[1]
    column_N1, here_N = _columns(labels_N, num_columns, loss)
    grad_N1 = grad_N.masked_fill(labels_N == loss.ignore_index, 0.0).unsqueeze(1)
    of_softmax_N1, uniform_N1, at_label_N1 = _factors(
        grad_N1, max_N + log_sum_N, loss, num_columns if vocab_size is None else vocab_size
    )
    at_label_N1 = -at_label_N1.masked_fill(~here_N.unsqueeze(1), 0.0)
    max_N1, log_sum_N1 = max_N.unsqueeze(1), log_sum_N.unsqueeze(1)
    in_place = logits_NV.dtype == grad_N.dtype
    for rows in row_chunks(logits_NV):
        # Not relative to max + log_sum, whose rounding grows with the logits.
        probs_CV = torch.sub(logits_NV[rows], max_N1[rows], out=out_NV[rows] if in_place else None)
        probs_CV.sub_(log_sum_N1[rows]).exp_().mul_(of_softmax_N1[rows])
        if uniform_N1 is not None:
            probs_CV.sub_(uniform_N1[rows])
        probs_CV.scatter_add_(1, column_N1[rows], at_label_N1[rows])
        if not in_place:
            out_NV[rows] = probs_CV


TORCH = Backend(_torch_facts, _torch_gradient)


def merged(facts_FN: Tensor, num_columns: int, loss: Loss, group: ProcessGroup | None) -> tuple[Tensor, Tensor | None]:
    """Facts about whole rows of facts about every rank's columns, with the same bits on each; and the number of all
    columns (0-dim), if it is needed and these are not all.

    Collective over ``group``: one message of F fp32 numbers per row, and with label smoothing of F more.
    """
    if group is None:
        return facts_FN, None
    if loss.label_smoothing:
        # No rank knows how many columns others have. Fewer than 2²⁴, so that fp32 can say it.
        facts_FN = torch.cat((facts_FN, facts_FN.new_full((facts_FN.shape[0], 1), num_columns)), 1)
    of_ranks_RFN = _gather(facts_FN, group)
    vocab_size = None
    if loss.label_smoothing:
        sizes_R1, of_ranks_RFN = of_ranks_RFN[:, 3, -1:], of_ranks_RFN[:, :, :-1]
        vocab_size = sizes_R1.sum()
    maxima_RN, log_sums_RN, labels_RN = of_ranks_RFN[:, :3].unbind(1)
    max_N = maxima_RN.amax(0)
    log_sum_N = (maxima_RN - max_N + log_sums_RN).exp_().sum(0).log_()
    # All ranks but one say -inf: a label outside the vocabulary has an infinite loss, which nobody overlooks.
    whole = [max_N, log_sum_N, labels_RN.amax(0)]
    if loss.label_smoothing:
        below_RN = of_ranks_RFN[:, 3] + sizes_R1 * (maxima_RN - max_N)
        whole.append(below_RN.masked_fill_(sizes_R1 == 0, 0.0).sum(0))
    return torch.stack(whole), vocab_size


def losses_of(facts_FN: Tensor, labels_N: Tensor, loss: Loss, vocab_size: int | Tensor | None) -> Tensor:
    """Losses [N] of facts about whole rows. ``vocab_size`` is for label smoothing."""
    max_N, log_sum_N, label_N = facts_FN[:3]
    losses_N = (max_N - label_N).add_(log_sum_N)
    if loss.label_smoothing:
        assert vocab_size is not None
        mean_N = log_sum_N - facts_FN[3] / vocab_size
        losses_N = (1 - loss.label_smoothing) * losses_N + loss.label_smoothing * mean_N
    if loss.z_loss:
        losses_N += loss.z_loss * (max_N + log_sum_N).square()
    return losses_N.masked_fill_(labels_N == loss.ignore_index, 0.0)


def _gather(mine: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's tensor, stacked in rank order."""
    from torch import distributed

    # torch 2.13 renamed it, and warns about the old name.
    all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    everyone = mine.new_empty((distributed.get_world_size(group), *mine.shape))
    if mine.numel():
        all_gather(everyone.flatten(0, 1), mine, group=group)
    return everyone


def check_arguments(
    shape: tuple[int, ...], labels_N: Tensor, loss: Loss, group: ProcessGroup | None, *, what: str = "logits_NV"
) -> None:
    """Raise ValueError where ``shape`` and labels do not belong together, and for numbers that mean nothing."""
    problems = []
    if len(shape) != 2 or labels_N.shape != shape[:1]:
        problems.append(f"{what} {tuple(shape)} and labels_N {tuple(labels_N.shape)}: one label for each row is needed")
    if group is None and loss.first:
        problems.append(f"first={loss.first} without a group: the columns before it are nowhere")
    if not 0 <= loss.label_smoothing < 1:
        problems.append(f"label_smoothing={loss.label_smoothing} must be at least 0 and less than 1")
    if not 0 <= loss.z_loss < math.inf:
        problems.append(f"z_loss={loss.z_loss} must be finite and at least 0")
    if problems:
        raise ValueError("; ".join(problems))


def spread_cross_entropy(
    logits_NV: Tensor, labels_N: Tensor, loss: Loss, group: ProcessGroup, backend: Backend
) -> Tensor:
    """``cross_entropy`` over a group, with ``backend`` for what runs over this rank's logits."""
    losses_N: Tensor = _SpreadCrossEntropy.apply(logits_NV, labels_N, loss, group, backend)
    return losses_N


def cross_entropy(
    logits_NV: Tensor,
    labels_N: Tensor,
    ignore_index: int = -100,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
    first: int = 0,
) -> Tensor:
    """Negative log-likelihood of each label, in nats -> losses_N in fp32; 0 where the label is ignore_index.

    Beside the logits at most one chunk of rows lives in fp32; the gradient has the logits' dtype. The answer does not
    depend on the size of chunks.

    z_loss: times log² of the sum of exponentials, added to each loss. label_smoothing: the part of the label's weight
    that all of the vocabulary shares; with it a logit of -inf makes the loss of its row infinite.

    group: ranks that share the vocabulary; None: logits_NV has all of it. Each rank then has the columns ``first`` to
    ``first`` + V of it (any number, also none), and labels_N and the gradient of the losses are the same on each. The
    losses have the same bits on every rank. Collective: one message of three fp32 numbers per row, of four with label
    smoothing, none in backward.
    """
    loss = Loss(ignore_index, first, z_loss, label_smoothing)
    check_arguments(logits_NV.shape, labels_N, loss, group)
    if group is None:
        losses_N: Tensor = _CrossEntropy.apply(logits_NV, labels_N, loss)
        return losses_N
    return spread_cross_entropy(logits_NV, labels_N, loss, group, TORCH)
