"""Cross-entropy of a linear head, whose logits are never all there.

Legend: N rows (tokens), D features, V vocabulary, C rows of one chunk. "fp32" means promote(dtype, float32).

Chunks are for memory; for speed there should be few. The weight's gradient is a sum over chunks, and each of them reads
and writes all of it, in fp32: 8·V·D bytes beside 2·C·V·D operations, so that with fewer than about 700 rows an H200
would wait for its memory. Matrix products are torch's, whatever runs over the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rung_kernels.cross_entropy import TRITON
from rung_kernels.dispatch import uses_triton
from rung_kernels.op import make_op, refuse_second_derivative
from rung_kernels.reference.cross_entropy import TORCH, Backend, Loss, check_arguments, losses_of, merged
from rung_kernels.reference.rows import row_chunks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_cross_entropy"]

_CHUNK_ROWS = 4096  # 1.05 GB of bfloat16 logits where V is 128256
_TILE_ROWS = 128  # of a matrix product: chunks of a size that is chosen here are multiples


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    ignore_index: int = -100,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
    first: int = 0,
    reduction: str = "none",
    chunk_size: int | None = None,
) -> Tensor:
    """``cross_entropy(x_ND @ weight_VD.T, labels_N, ...)``, of which only the logits of ``chunk_size`` rows are ever
    alive, in x's dtype; None: of 4096 at most. The settings of the loss are those of ``cross_entropy``.

    reduction="none": losses_N in fp32. Each row may have its own gradient, so that backward makes every chunk's logits
    again: 8·N·D·V operations in all. reduction="sum": their sum, 0-dim. The forward pass makes the gradients, too,
    where they are wanted (6·N·D·V operations; that of the weight is kept in fp32 meanwhile), and backward multiplies
    them by the gradient of the sum, without waiting for its value, as Hsu et al. 2024, "Liger Kernel", do.

    The gradient of the weight is summed in fp32 over all rows, in a fixed order, and rounded once. A gradient that
    nobody wants costs nothing: neither x nor the weight (a frozen head) need require one.

    group: ranks that share the vocabulary. Each has x_ND and labels_N whole and the rows ``first`` to ``first`` + V of
    the weight (also none). Losses and their sum have the same bits on every rank; the gradient of the weight is that of
    the rank's rows. **The gradient of x is this rank's summand:** the caller adds those of the group, as the collective
    by which x became whole does in its backward pass (all-reduce, or reduce-scatter of a sequence's parts). Collective:
    a message per chunk, as small as ``cross_entropy``'s; none in backward.

    Raises ValueError for shapes or dtypes that do not belong together, for another reduction, for a chunk_size below 1,
    and for what ``cross_entropy`` does not accept.
    """
    loss = Loss(ignore_index, first, z_loss, label_smoothing)
    check_arguments(x_ND.shape, labels_N, loss, group, what="x_ND")
    problems = []
    if weight_VD.ndim != 2 or weight_VD.shape[1] != x_ND.shape[1]:
        problems.append(f"weight_VD {tuple(weight_VD.shape)} and x_ND {tuple(x_ND.shape)} need the same D")
    if weight_VD.dtype != x_ND.dtype:
        problems.append(f"weight_VD is {weight_VD.dtype}, x_ND {x_ND.dtype}: they must have one dtype")
    if reduction not in ("none", "sum"):
        problems.append(f"reduction={reduction!r} is neither 'none' nor 'sum'")
    if chunk_size is not None and chunk_size < 1:
        problems.append(f"chunk_size={chunk_size} must be at least 1")
    if problems:
        raise ValueError("; ".join(problems))
    rows = chunk_size or 0
    wants = [torch.is_grad_enabled() and t.requires_grad for t in (x_ND, weight_VD)]
    result: Tensor
    if group is not None:
        function = _SpreadSum if reduction == "sum" else _SpreadRows
        result = function.apply(x_ND, weight_VD, labels_N, loss, group, rows, wants)
    elif reduction == "sum":
        result = _sum_op(x_ND, weight_VD, labels_N, ignore_index, z_loss, label_smoothing, rows, *wants)[0]
    else:
        result = _rows_op(x_ND, weight_VD, labels_N, ignore_index, z_loss, label_smoothing, rows)[0]
    return result


# --- chunks, with or without a group


class _Head:
    """What is done with the chunks of x, one after another, in one piece of memory for logits."""

    def __init__(self, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, loss: Loss, rows: int) -> None:
        self.x_ND, self.weight_VD, self.labels_N, self.loss = x_ND, weight_VD, labels_N, loss
        num_rows = x_ND.shape[0]
        if rows == 0 and num_rows <= _CHUNK_ROWS:
            rows = num_rows
        elif rows == 0:  # as many chunks as are needed, of even size
            even = -(-num_rows // -(-num_rows // _CHUNK_ROWS))
            rows = -(-even // _TILE_ROWS) * _TILE_ROWS
        self.rows = max(1, min(rows, num_rows))
        self.fp32 = torch.promote_types(x_ND.dtype, torch.float32)
        self.backend: Backend = TRITON if uses_triton("linear_cross_entropy", x_ND, weight_VD) else TORCH

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits, which may be overwritten and are gone with the next."""
        num_columns = self.weight_VD.shape[0]
        # Rows begin at multiples of 16 elements, which kernels and matrix products need to be fast.
        buffer_CV = self.x_ND.new_empty(self.rows, -(-num_columns // 16) * 16)[:, :num_columns]
        for first in range(0, self.x_ND.shape[0], self.rows):
            rows = slice(first, min(first + self.rows, self.x_ND.shape[0]))
            logits_CV = buffer_CV[: rows.stop - first]
            torch.mm(self.x_ND[rows], self.weight_VD.T, out=logits_CV)
            yield rows, logits_CV

    def per_row(self) -> Tensor:
        return self.x_ND.new_empty(self.x_ND.shape[0], dtype=self.fp32)

    def facts(self, rows: slice, logits_CV: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor | None]:
        """Facts about whole rows, and the size of the whole vocabulary if it is not V and is needed."""
        facts_FC = self.backend.facts(logits_CV, self.labels_N[rows], self.loss)
        return merged(facts_FC, logits_CV.shape[1], self.loss, group)

    def losses(self, rows: slice, facts_FC: Tensor, vocab_size: Tensor | None) -> Tensor:
        size = self.weight_VD.shape[0] if vocab_size is None else vocab_size
        return losses_of(facts_FC, self.labels_N[rows], self.loss, size)

    def losses_in_place(self, rows: slice, logits_CV: Tensor, group: ProcessGroup | None) -> Tensor:
        """Losses of a chunk, whose logits become the gradient of their sum."""
        if group is None and self.backend is TRITON and logits_CV.shape[1]:
            from rung_kernels.triton_kernels import cross_entropy as kernels

            losses_C = logits_CV.new_empty(logits_CV.shape[0], dtype=self.fp32)
            settings = self.loss._asdict()
            del settings["first"]
            kernels.losses_and_gradient(logits_CV, self.labels_N[rows].contiguous(), losses_C, **settings)
            return losses_C
        facts_FC, vocab_size = self.facts(rows, logits_CV, group)
        ones_C = torch.ones_like(facts_FC[0])
        self.gradient_in_place(rows, logits_CV, ones_C, facts_FC[0], facts_FC[1], vocab_size)
        return self.losses(rows, facts_FC, vocab_size)

    def gradient_in_place(
        self,
        rows: slice,
        logits_CV: Tensor,
        grad_C: Tensor,
        max_C: Tensor,
        log_sum_C: Tensor,
        vocab_size: Tensor | None,
    ) -> None:
        """Logits of a chunk become their gradient."""
        if logits_CV.numel():
            labels_C = self.labels_N[rows]
            self.backend.gradient(grad_C, logits_CV, labels_C, max_C, log_sum_C, self.loss, vocab_size, logits_CV)


class _Grads:
    """Gradients of x and of the weight, those that are wanted, as they come together from those of logits."""

    def __init__(self, head: _Head, want_x: bool, want_weight: bool) -> None:
        self._head, self._want_x, self._want_weight = head, want_x, want_weight
        self.x, self.weight = _fake_grads(head.x_ND, head.weight_VD, head.fp32, want_x, want_weight)
        if want_weight and not head.x_ND.shape[0]:
            self.weight.zero_()

    def add(self, rows: slice, grad_CV: Tensor) -> None:
        """Chunks come in order, from the first."""
        x_CD = self._head.x_ND[rows]
        if self._want_x:
            torch.mm(grad_CV, self._head.weight_VD, out=self.x[rows])
        if self._want_weight:
            _add_product(self.weight, grad_CV, x_CD, begins=rows.start == 0)


def _fake_grads(
    x_ND: Tensor, weight_VD: Tensor, weight_dtype: torch.dtype, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    """Undefined; without elements where they are not wanted."""
    return (
        x_ND.new_empty(x_ND.shape if want_x else (0,)),
        weight_VD.new_empty(weight_VD.shape if want_weight else (0,), dtype=weight_dtype),
    )


def _add_product(out_VD: Tensor, grad_CV: Tensor, x_CD: Tensor, *, begins: bool) -> None:
    """out (+)= gradᵀ · x, summed in out's dtype, also between calls; the first call need not find zeros."""
    if out_VD.dtype == x_CD.dtype:
        torch.addmm(out_VD, grad_CV.T, x_CD, beta=0 if begins else 1, out=out_VD)
    elif x_CD.device.type == "cuda":
        if begins:
            torch.mm(grad_CV.T, x_CD, out_dtype=out_VD.dtype, out=out_VD)
        else:
            torch.addmm(out_VD, grad_CV.T, x_CD, out_dtype=out_VD.dtype, out=out_VD)
    else:  # no other device has such products; few rows at a time are widened
        for rows in row_chunks(grad_CV):
            beta = 0 if begins and rows.start == 0 else 1
            torch.addmm(out_VD, grad_CV[rows].T.to(out_VD.dtype), x_CD[rows].to(out_VD.dtype), beta=beta, out=out_VD)


def _sum_and_grads(
    head: _Head, group: ProcessGroup | None, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of losses, and its gradients by x and, in fp32, by the weight."""
    losses_N, grads = head.per_row(), _Grads(head, want_x, want_weight)
    for rows, logits_CV in head.chunks():
        if want_x or want_weight:
            losses_N[rows] = head.losses_in_place(rows, logits_CV, group)
            grads.add(rows, logits_CV)
        else:
            losses_N[rows] = head.losses(rows, *head.facts(rows, logits_CV, group))
    return losses_N.sum(), grads.x, grads.weight


def _scaled(unit: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """unit · factor (0-dim), rounded once. (A factor without dims would be rounded to the dtype of ``unit`` first.)"""
    return torch.mul(unit, factor.reshape(1), out=torch.empty(unit.shape, dtype=dtype, device=unit.device))


def _losses_and_state(head: _Head, group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Losses, and what backward needs: maximum and log-sum of every row, and the size of the vocabulary."""
    losses_N, max_N, log_sum_N, vocab_size = head.per_row(), head.per_row(), head.per_row(), None
    for rows, logits_CV in head.chunks():
        facts_FC, vocab_size = head.facts(rows, logits_CV, group)
        max_N[rows], log_sum_N[rows] = facts_FC[:2]
        losses_N[rows] = head.losses(rows, facts_FC, vocab_size)
    return losses_N, max_N, log_sum_N, vocab_size


def _grads_again(
    head: _Head,
    grad_N: Tensor,
    max_N: Tensor,
    log_sum_N: Tensor,
    vocab_size: Tensor | None,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients by x and by the weight, from logits that are made again."""
    grads = _Grads(head, want_x, want_weight)
    for rows, logits_CV in head.chunks():
        head.gradient_in_place(rows, logits_CV, grad_N[rows], max_N[rows], log_sum_N[rows], vocab_size)
        grads.add(rows, logits_CV)
    return grads.x, grads.weight.to(head.weight_VD.dtype)


# --- reduction="sum"


def _sum_forward(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    rows: int,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head = _Head(x_ND, weight_VD, labels_N, Loss(ignore_index, 0, z_loss, label_smoothing), rows)
    return _sum_and_grads(head, None, want_x, want_weight)


def _fake_sum_forward(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    rows: int,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    fp32 = torch.promote_types(x_ND.dtype, torch.float32)
    return x_ND.new_empty((), dtype=fp32), *_fake_grads(x_ND, weight_VD, fp32, want_x, want_weight)


def _sum_backward(
    grad: Tensor, unit_x: Tensor, unit_weight: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _scaled(unit_x, grad, unit_x.dtype), _scaled(unit_weight, grad, weight_dtype)


def _fake_sum_backward(
    grad: Tensor, unit_x: Tensor, unit_weight: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(unit_x), torch.empty_like(unit_weight, dtype=weight_dtype)


def _sum_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.weight_dtype, ctx.wants = inputs[1].dtype, inputs[-2:]
    ctx.save_for_backward(*output[1:])


def _sum_differentiate(ctx: Any, backward: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    refuse_second_derivative("linear_cross_entropy")
    if grad is None:
        return (None,) * 9
    grads = backward(grad, *ctx.saved_tensors, ctx.weight_dtype)
    return *(g if wanted else None for g, wanted in zip(grads, ctx.wants, strict=True)), *[None] * 7


_sum_op = make_op(
    "linear_cross_entropy_sum",
    _sum_forward,
    _sum_backward,
    fake_forward=_fake_sum_forward,
    fake_backward=_fake_sum_backward,
    save=_sum_save,
    differentiate=_sum_differentiate,
)


# --- reduction="none"


def _rows_forward(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    head = _Head(x_ND, weight_VD, labels_N, Loss(ignore_index, 0, z_loss, label_smoothing), rows)
    return _losses_and_state(head, None)[:3]


def _fake_rows_forward(x_ND: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    fp32 = torch.promote_types(x_ND.dtype, torch.float32)
    losses_N, max_N, log_sum_N = (x_ND.new_empty(x_ND.shape[0], dtype=fp32) for _ in range(3))
    return losses_N, max_N, log_sum_N


def _rows_backward(
    grad_N: Tensor,
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    max_N: Tensor,
    log_sum_N: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    rows: int,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    head = _Head(x_ND, weight_VD, labels_N, Loss(ignore_index, 0, z_loss, label_smoothing), rows)
    return _grads_again(head, grad_N, max_N, log_sum_N, None, want_x, want_weight)


def _fake_rows_backward(grad_N: Tensor, x_ND: Tensor, weight_VD: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _fake_grads(x_ND, weight_VD, weight_VD.dtype, *others[-2:])


def _rows_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_ND, weight_VD, labels_N, *ctx.settings = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x_ND, weight_VD, labels_N, *output[1:])


def _rows_differentiate(ctx: Any, backward: Any, grad_N: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_N is None:
        return (None,) * 7
    wants = ctx.needs_input_grad[:2]
    grads = backward(grad_N, *ctx.saved_tensors, *ctx.settings, *wants)
    return *(g if wanted else None for g, wanted in zip(grads, wants, strict=True)), *[None] * 5


_rows_op = make_op(
    "linear_cross_entropy",
    _rows_forward,
    _rows_backward,
    fake_forward=_fake_rows_forward,
    fake_backward=_fake_rows_backward,
    save=_rows_save,
    differentiate=_rows_differentiate,
)


# --- over a group; collectives keep these out of the library


class _SpreadSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        loss: Loss,
        group: ProcessGroup,
        rows: int,
        wants: list[bool],
    ) -> Tensor:
        head = _Head(x_ND, weight_VD, labels_N, loss, rows)
        total, unit_x, unit_weight = _sum_and_grads(head, group, *wants)
        ctx.wants, ctx.weight_dtype = wants, weight_VD.dtype
        ctx.save_for_backward(unit_x, unit_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative("linear_cross_entropy")
        unit_x, unit_weight = ctx.saved_tensors
        grads = _sum_backward(grad, unit_x, unit_weight, ctx.weight_dtype)
        return *(g if wanted else None for g, wanted in zip(grads, ctx.wants, strict=True)), *[None] * 5


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        loss: Loss,
        group: ProcessGroup,
        rows: int,
        wants: list[bool],
    ) -> Tensor:
        losses_N, *state = _losses_and_state(_Head(x_ND, weight_VD, labels_N, loss, rows), group)
        ctx.loss, ctx.rows, ctx.wants = loss, rows, wants
        ctx.save_for_backward(x_ND, weight_VD, labels_N, *state)
        return losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative("linear_cross_entropy")
        x_ND, weight_VD, labels_N, *state = ctx.saved_tensors
        grads = _grads_again(_Head(x_ND, weight_VD, labels_N, ctx.loss, ctx.rows), grad_N, *state, *ctx.wants)
        return *(g if wanted else None for g, wanted in zip(grads, ctx.wants, strict=True)), *[None] * 5
