"""AdamW and SPAM over many tensors at once, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rung_kernels import reference
from rung_kernels.dispatch import uses_triton
from rung_kernels.op import is_plain
from rung_kernels.reference.optimizer import Rounding

__all__ = ["adamw_step", "spam_step"]


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    *,
    levels: Tensor | None = None,
    maxima: Tensor | None = None,
    gains: Tensor | None = None,
    counts: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    rounding: Rounding | None = None,
) -> None:
    """AdamW in place on all tensors, with the level clipping and the gains of Stable-SPAM where they are given.

    ``reference.adamw_step`` says what each argument is and gives the formula. The kernel takes the same arguments,
    contiguous, and has the same bits: nothing is fused, divisions and roots are correctly rounded. One launch for all
    tensors of the same dtypes, one pass over memory: 28 bytes a parameter where it and its state are float32, two more
    for a bfloat16 copy; 14 where all is bfloat16. The host does not wait for the device.

    Loshchilov and Hutter, arXiv 1711.05101; Huang et al., arXiv 2502.17055. ValueError where the kernel is to run and
    tensors are not contiguous, or differ in shape or device.
    """
    clip = None if levels is None or maxima is None else (levels, maxima)
    tensors = params, grads, exp_avgs, exp_avg_sqs, copies
    if not _fits("adamw_step", *tensors):
        reference.adamw_step(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            factors,
            levels=levels,
            maxima=maxima,
            gains=gains,
            counts=counts,
            copies=copies,
            rounding=rounding,
        )
        return
    _run(*tensors, factors, clip, gains, counts, rounding, spam=False)


def spam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    *,
    counts: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    rounding: Rounding | None = None,
) -> None:
    """SPAM (Huang et al., arXiv 2501.06842) in place on all tensors; see ``adamw_step`` and ``reference.spam_step``.

    A spike is told by the second moment that is read anyway, so SPAM moves as many bytes as AdamW.
    """
    tensors = params, grads, exp_avgs, exp_avg_sqs, copies
    if not _fits("spam_step", *tensors):
        reference.spam_step(
            params, grads, exp_avgs, exp_avg_sqs, factors, counts=counts, copies=copies, rounding=rounding
        )
        return
    _run(*tensors, factors, None, None, counts, rounding, spam=True)


def _fits(op: str, *lists: Sequence[Tensor] | None) -> bool:
    # One of each kind: there may be thousands, and the kernel wants all of them on one device anyway.
    tensors = {(type(x), x.dtype): x for tensors in lists for x in tensors or ()}.values()
    return uses_triton(op, *tensors) and (torch.compiler.is_compiling() or is_plain(*tensors))


def _run(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    factors: Tensor,
    clip: tuple[Tensor, Tensor] | None,
    gains: Tensor | None,
    counts: Tensor | None,
    rounding: Rounding | None,
    *,
    spam: bool,
) -> None:
    run = _step_op if torch.compiler.is_compiling() else _step
    levels, maxima = clip or (None, None)
    keys, firsts, number = rounding or (None, None, None)
    run(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(copies or ()),
        factors,
        counts,
        levels,
        maxima,
        gains,
        keys,
        firsts,
        number,
        spam,
    )


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    factors: Tensor,
    counts: Tensor | None,
    levels: Tensor | None,
    maxima: Tensor | None,
    gains: Tensor | None,
    keys: Tensor | None,
    firsts: Tensor | None,
    number: Tensor | None,
    spam: bool,
) -> None:
    from rung_kernels.triton_kernels import optimizer

    _check(params, grads, exp_avgs, exp_avg_sqs, copies, factors)
    numbers = {"counts": counts, "levels": levels, "maxima": maxima, "gains": gains, "firsts": firsts}
    _check_numbers(numbers, len(params))
    optimizer.step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        factors.contiguous(),
        None if levels is None or maxima is None else (levels.contiguous(), maxima.contiguous()),
        None if gains is None else gains.contiguous(),
        counts,
        copies or None,
        None
        if keys is None or firsts is None or number is None
        else Rounding(keys.contiguous(), firsts.contiguous(), number),
        spam=spam,
    )
    # The kernel writes through addresses, which autograd cannot see.
    changed = [*params, *exp_avgs, *exp_avg_sqs, *copies, *([] if counts is None else [counts])]
    torch.autograd.graph.increment_version(changed)


def _check_numbers(numbers: dict[str, Tensor | None], number: int) -> None:
    """ValueError where what is given for each tensor is not one number for each."""
    problems = []
    for name, x in numbers.items():
        dtype = torch.int64 if name in ("counts", "firsts") else torch.float64
        if x is not None and (x.shape != (number,) or x.dtype != dtype or (name == "counts" and x.stride() != (1,))):
            where = f"{x.dtype} {list(x.shape)} with strides {list(x.stride())}"
            problems.append(f"{name} is {where}, where {dtype} [{number}] is wanted")
    if problems:
        raise ValueError("; ".join(problems))


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    factors: Tensor,
) -> None:
    """ValueError that names every tensor that the kernel cannot go through element by element."""
    names = "parameter", "gradient", "exp_avg", "exp_avg_sq", "copy"
    lists = [params, grads, exp_avgs, exp_avg_sqs] + ([copies] if copies else [])
    lengths = [len(tensors) for tensors in lists]
    if len(set(lengths)) > 1:
        raise ValueError(
            ", ".join(f"{n} of {name}" for n, name in zip(lengths, names, strict=False)) + ": as many of each"
        )
    number, problems = factors.get_device(), []  # to compare devices as such takes longer than all the rest
    for index, tensors in enumerate(zip(*lists, strict=True)):
        shape = tensors[0].shape
        for kind, x in enumerate(tensors):
            if x.shape != shape or not x.is_contiguous() or x.get_device() != number:
                problems.append(
                    f"{names[kind]} {index} is {list(x.shape)} with strides {list(x.stride())} on {x.device}, where a "
                    f"contiguous {list(shape)} on {factors.device} is wanted"
                )
    if problems:
        raise ValueError("; ".join(problems))


_step_op = torch.library.custom_op(
    "rung::optimizer_step", _step, mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies", "counts")
)


@_step_op.register_fake
def _fake_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    factors: Tensor,
    counts: Tensor | None,
    levels: Tensor | None,
    maxima: Tensor | None,
    gains: Tensor | None,
    keys: Tensor | None,
    firsts: Tensor | None,
    number: Tensor | None,
    spam: bool,
) -> None:
    return None
