"""Cross-entropy of logits that exist, whole or spread over ranks.

Legend: N rows (tokens), V vocabulary, F facts about a row. "fp32" means promote(dtype, float32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rung_kernels import reference
from rung_kernels.dispatch import uses_triton
from rung_kernels.op import make_op
from rung_kernels.reference.cross_entropy import Backend, Loss, check_arguments, spread_cross_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TRITON", "cross_entropy"]


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
    """Negative log-likelihood of each label, in nats -> losses_N in fp32; 0 where the label is ignore_index, and then
    the gradient is 0, too. The gradient has the logits' dtype.

    With lse = log Σ exp(x) the loss is (1-s)·(lse - x_label) + s·mean(lse - x) + z·lse². s, label_smoothing, is the
    part of the label's weight that the whole vocabulary shares (Szegedy et al. 2016, "Rethinking the Inception
    Architecture", section 7; then a logit of -inf makes its row's loss infinite). z is z_loss (Chowdhery et al. 2022,
    "PaLM", section 5).

    The kernel reads N·V elements forward and keeps two fp32 numbers per row beside the logits; backward it reads and
    writes N·V. Rows that are ignored are not read. Labels outside the vocabulary: the kernel and ranks of a group say
    inf, torch's gather, where the reference runs, raises or stops the device.

    group: ranks that share the vocabulary; None: logits_NV has all of it. Each rank then has the columns ``first`` to
    ``first`` + V of it (any number, also none), and labels_N and the gradient of the losses are the same on each. The
    losses have the same bits on every rank. Collective: one message of three fp32 numbers per row, of four with label
    smoothing, none in backward.

    Raises ValueError where there is not one label for each row, for ``first`` without a group, for label_smoothing that
    is not in [0, 1) and for a negative z_loss.
    """
    if not uses_triton("cross_entropy", logits_NV) or (group is None and not logits_NV.shape[-1]):
        return reference.cross_entropy(
            logits_NV,
            labels_N,
            ignore_index,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            group=group,
            first=first,
        )
    loss = Loss(ignore_index, first, z_loss, label_smoothing)
    check_arguments(logits_NV.shape, labels_N, loss, group)
    if group is not None:
        return spread_cross_entropy(logits_NV, labels_N, loss, group, TRITON)
    losses_N: Tensor = _cross_entropy(logits_NV, labels_N, ignore_index, z_loss, label_smoothing)[0]
    return losses_N


def _columns_together(logits_NV: Tensor) -> Tensor:
    return logits_NV if logits_NV.stride(1) == 1 or logits_NV.shape[1] == 1 else logits_NV.contiguous()


def _per_row(logits_NV: Tensor) -> Tensor:
    return torch.empty(logits_NV.shape[0], dtype=torch.float32, device=logits_NV.device)


def _forward(
    logits_NV: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and of each row the maximum and log Σ exp(logit - maximum). Their sum would do, but for its rounding, by
    which every exponent of the gradient would be wrong."""
    from rung_kernels.triton_kernels import cross_entropy as kernels

    losses_N, max_N, log_sum_N = _fake_forward(logits_NV, labels_N, ignore_index, z_loss, label_smoothing)
    kernels.facts(
        _columns_together(logits_NV),
        labels_N.contiguous(),
        max_N,
        log_sum_N,
        None,
        None,
        losses_N,
        ignore_index=ignore_index,
        first=0,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
    )
    return losses_N, max_N, log_sum_N


def _fake_forward(
    logits_NV: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _per_row(logits_NV), _per_row(logits_NV), _per_row(logits_NV)


def _backward(
    grad_N: Tensor,
    logits_NV: Tensor,
    labels_N: Tensor,
    max_N: Tensor,
    log_sum_N: Tensor,
    vocab_size: Tensor | None,
    ignore_index: int,
    first: int,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    grad_NV = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
    loss = Loss(ignore_index, first, z_loss, label_smoothing)
    _fill_gradient(grad_N, logits_NV, labels_N, max_N, log_sum_N, loss, vocab_size, grad_NV)
    return grad_NV


def _fill_gradient(
    grad_N: Tensor,
    logits_NV: Tensor,
    labels_N: Tensor,
    max_N: Tensor,
    log_sum_N: Tensor,
    loss: Loss,
    vocab_size: Tensor | None,
    out_NV: Tensor,
) -> None:
    from rung_kernels.triton_kernels import cross_entropy as kernels

    kernels.gradient(
        grad_N.contiguous(),
        _columns_together(logits_NV),
        labels_N.contiguous(),
        max_N,
        log_sum_N,
        vocab_size,
        out_NV,
        **loss._asdict(),
    )


def _fake_backward(grad_N: Tensor, logits_NV: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits_NV, labels_N, *ctx.settings = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits_NV, labels_N, *output[1:])


def _differentiate(ctx: Any, backward: Any, grad_N: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_N is None:
        return None, None, None, None, None
    ignore_index, z_loss, label_smoothing = ctx.settings
    grad_NV = backward(grad_N, *ctx.saved_tensors, None, ignore_index, 0, z_loss, label_smoothing)
    return grad_NV, None, None, None, None


_cross_entropy = make_op(
    "cross_entropy",
    _forward,
    _backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
)


def _facts(logits_NV: Tensor, labels_N: Tensor, loss: Loss) -> Tensor:
    from rung_kernels.triton_kernels import cross_entropy as kernels

    facts_FN = torch.empty(loss.num_facts, logits_NV.shape[0], dtype=torch.float32, device=logits_NV.device)
    max_N, log_sum_N, label_N = facts_FN[:3]
    below_N = facts_FN[3] if loss.label_smoothing else None
    kernels.facts(
        _columns_together(logits_NV), labels_N.contiguous(), max_N, log_sum_N, label_N, below_N, None, **loss._asdict()
    )
    return facts_FN


TRITON = Backend(_facts, _fill_gradient)
