"""Cross-entropy of logits, whole or spread over ranks.

Legend: N rows (tokens), V vocabulary, C rows of one chunk, R ranks. "fp32" means promote(dtype, float32).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rung_kernels.reference.rows import row_chunks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["cross_entropy"]


class _CrossEntropy(torch.autograd.Function):
    """Row-wise -log softmax(logits)[label]. Backward makes the softmax again from the logits, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> Tensor:
        fp32 = torch.promote_types(logits_NV.dtype, torch.float32)
        kept_N = labels_N != ignore_index
        column_N1 = labels_N.masked_fill(~kept_N, 0).unsqueeze(1)
        losses_N = logits_NV.new_empty(logits_NV.shape[0], dtype=fp32)
        for rows in row_chunks(logits_NV):
            log_probs_CV = torch.log_softmax(logits_NV[rows], dim=-1, dtype=fp32)
            torch.neg(log_probs_CV.gather(1, column_N1[rows]).squeeze(1), out=losses_N[rows])
        ctx.save_for_backward(logits_NV, column_N1, kept_N)
        return losses_N.masked_fill_(~kept_N, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, column_N1, kept_N = ctx.saved_tensors
        grad_N1 = grad_N.masked_fill(~kept_N, 0.0).unsqueeze(1)
        grad_logits_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        in_place = logits_NV.dtype == grad_N.dtype
        for rows in row_chunks(logits_NV):
            out_CV = grad_logits_NV[rows] if in_place else None
            probs_CV = torch.softmax(logits_NV[rows], dim=-1, dtype=grad_N.dtype, out=out_CV)
            probs_CV.mul_(grad_N1[rows]).scatter_add_(1, column_N1[rows], -grad_N1[rows])
            if not in_place:
                grad_logits_NV[rows] = probs_CV
        return grad_logits_NV, None, None


class _SpreadCrossEntropy(torch.autograd.Function):
    """The same where a rank has some columns of the logits: one message of three numbers per row, none in backward.

    Each rank finds, of its columns, the largest logit, the log of the sum of exponentials relative to it, and the
    label's logit if it is among them. All ranks learn all of these and do the same arithmetic on them. Shoeybi et al.
    2019, "Megatron-LM", section 3, computes the same with three sums over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, ignore_index: int, group: ProcessGroup, first: int
    ) -> Tensor:
        kept_N = labels_N != ignore_index
        column_N = labels_N - first
        here_N = kept_N & (column_N >= 0) & (column_N < logits_NV.shape[1])
        column_N1 = column_N.masked_fill(~here_N, 0).unsqueeze(1)
        of_ranks_R3N = _gather(_row_facts(logits_NV, column_N1, here_N), group)
        maxima_RN, log_sums_RN, labels_RN = of_ranks_R3N.unbind(1)
        max_N = maxima_RN.amax(0)
        log_sum_N = (maxima_RN - max_N + log_sums_RN).exp_().sum(0).log_()
        # All ranks but one say -inf: a label outside the vocabulary has an infinite loss, which nobody overlooks.
        losses_N = (max_N - labels_RN.amax(0)).add_(log_sum_N)
        ctx.save_for_backward(logits_NV, column_N1, here_N, kept_N, max_N, log_sum_N)
        return losses_N.masked_fill_(~kept_N, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_NV, column_N1, here_N, kept_N, max_N, log_sum_N = ctx.saved_tensors
        grad_N1 = grad_N.masked_fill(~kept_N, 0.0).unsqueeze(1)
        at_label_N1 = -grad_N1.masked_fill(~here_N.unsqueeze(1), 0.0)
        max_N1, log_sum_N1 = max_N.unsqueeze(1), log_sum_N.unsqueeze(1)
        grad_logits_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        if not logits_NV.numel():
            return grad_logits_NV, None, None, None, None
        in_place = logits_NV.dtype == grad_N.dtype
        for rows in row_chunks(logits_NV):
            # Not relative to max + log_sum, whose rounding grows with the logits.
            probs_CV = torch.sub(logits_NV[rows], max_N1[rows], out=grad_logits_NV[rows] if in_place else None)
            probs_CV.sub_(log_sum_N1[rows]).exp_().mul_(grad_N1[rows])
            probs_CV.scatter_add_(1, column_N1[rows], at_label_N1[rows])
            if not in_place:
                grad_logits_NV[rows] = probs_CV
        return grad_logits_NV, None, None, None, None


def _row_facts(logits_NV: Tensor, column_N1: Tensor, here_N: Tensor) -> Tensor:
    """[3, N] in fp32: maximum, log Σ exp(logit - maximum), and the logit at the column, -inf where it is not here.

    A row without columns, or with none above -inf, has the maximum -inf and counts for nothing.
    """
    fp32 = torch.promote_types(logits_NV.dtype, torch.float32)
    facts_3N = logits_NV.new_full((3, logits_NV.shape[0]), -math.inf, dtype=fp32)
    if not logits_NV.shape[1]:
        return facts_3N
    max_N, log_sum_N, label_N = facts_3N
    for rows in row_chunks(logits_NV):
        max_N[rows] = logits_NV[rows].amax(1)
        # The log-probability of the largest logit is minus the log of the sum. Softmax treats each row by itself, where
        # a plain sum may be made in another order when there are fewer rows.
        log_sum_N[rows] = torch.log_softmax(logits_NV[rows], dim=1, dtype=fp32).amax(1).neg_()
        label_N[rows] = logits_NV[rows].gather(1, column_N1[rows]).squeeze(1)
    log_sum_N.masked_fill_(max_N == -math.inf, 0.0)
    label_N.masked_fill_(~here_N, -math.inf)
    return facts_3N


def _gather(mine: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's tensor, stacked in rank order."""
    from torch import distributed

    # torch 2.13 renamed it, and warns about the old name.
    all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    everyone = mine.new_empty((distributed.get_world_size(group), *mine.shape))
    if mine.numel():
        all_gather(everyone.flatten(0, 1), mine, group=group)
    return everyone


def cross_entropy(
    logits_NV: Tensor,
    labels_N: Tensor,
    ignore_index: int = -100,
    *,
    group: ProcessGroup | None = None,
    first: int = 0,
) -> Tensor:
    """Negative log-likelihood of each label, in nats -> losses_N in fp32; 0 where the label is ignore_index.

    Beside the logits at most one chunk of rows lives in fp32; the gradient has the logits' dtype. The answer does not
    depend on the size of chunks.

    group: ranks that share the vocabulary; None: logits_NV has all of it. Each rank then has the columns ``first`` to
    ``first`` + V of it (any number, also none), and labels_N and the gradient of the losses are the same on each. The
    losses have the same bits on every rank. Collective: one message of three fp32 numbers per row, none in backward.
    """
    if group is None:
        if first:
            raise ValueError(f"first={first} without a group: the columns before it are nowhere")
        return _CrossEntropy.apply(logits_NV, labels_N, ignore_index)
    return _SpreadCrossEntropy.apply(logits_NV, labels_N, ignore_index, group, first)
