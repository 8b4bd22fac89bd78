"""A kernel is held against its reference: as near the float64 answer as torch in the same dtype, within a factor."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rung_kernels.dispatch import use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Float64, the same on every machine."""
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: Sequence[Tensor],
    dtypes: Sequence[torch.dtype] | torch.dtype,
    *others: Any,
    factor: float = 2.0,
    ulps: float = 1.0,
    make: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    **options: Any,
) -> None:
    """Outputs and gradients of every tensor: error ≤ factor × the error of the reference in the same dtypes + ulps.

    ``tensors`` (float64) are rounded to ``dtypes`` first, and errors are against the reference in float64 on what was
    rounded. ``others`` are further arguments after the tensors. ``make`` lays a tensor out in memory in another way.
    """
    if isinstance(dtypes, torch.dtype):
        dtypes = [dtypes] * len(tensors)
    rounded = [t.to(dtype).to(DEVICE) for t, dtype in zip(tensors, dtypes, strict=True)]
    others = tuple(o.to(DEVICE) if isinstance(o, Tensor) else o for o in others)
    outer: list[Tensor] = []

    def run(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = [make(t.detach().clone()).requires_grad_() for t in inputs]
        outputs = [o for o in as_tuple(function(*leaves, *others, **options)) if isinstance(o, Tensor)]
        through = [o for o in outputs if o.requires_grad]
        for i, output in enumerate(through[len(outer) :]):
            outer.append(randn(*output.shape, seed=1000 + i).to(DEVICE))
        grads = [make(g.to(o.dtype)) for g, o in zip(outer, through, strict=True)]
        found = torch.autograd.grad(through, leaves, grads, allow_unused=True)
        return [o.detach() for o in outputs] + [
            torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)
        ]

    same = run(reference, rounded)
    outer = [g.to(o.dtype).double() for g, o in zip(outer, [o for o in same if o.is_floating_point()], strict=False)]
    exact = run(reference, [t.double() for t in rounded])
    with use_backend("triton"):
        ours = run(op, rounded)
    assert len(ours) == len(same) == len(exact)
    for index, (mine, theirs, truth) in enumerate(zip(ours, same, exact, strict=True)):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, index
        if not mine.is_floating_point():
            assert torch.equal(mine, theirs), index
            continue
        close(mine, theirs, truth, factor=factor, ulps=ulps, what=f"output {index}")


def close(
    mine: Tensor, theirs: Tensor, truth: Tensor, *, factor: float = 2.0, ulps: float = 1.0, what: str = ""
) -> None:
    """Error against ``truth`` ≤ factor × the largest error of ``theirs`` + ulps; the same infinities.

    A value's ulp is not counted smaller than that of the tensor's root mean square: sums may have cancelled.
    """
    finite = truth.isfinite()
    assert torch.equal(mine.isfinite(), finite) and torch.equal(mine[~finite].double(), truth[~finite]), what
    if not bool(finite.any()):
        return
    error, other = (mine.double() - truth)[finite].abs(), (theirs.double() - truth)[finite].abs()
    info = torch.finfo(mine.dtype)
    scale = truth[finite].square().mean().sqrt().clamp(min=info.tiny)
    ulp = truth[finite].abs().clamp(min=scale) * info.eps
    excess = error - (factor * other.max() + ulps * ulp)
    assert bool((excess <= 0).all()), f"{what}: error {error.max():.3g}, torch's {other.max():.3g}"


def strided(tensor: Tensor) -> Tensor:
    """The same values, every second element of something larger in the last two dims."""
    if tensor.ndim == 0:
        return tensor
    big = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7.0)
    if tensor.ndim > 1:
        big = big.repeat_interleave(2, dim=-2)
        view = big[..., ::2, ::2]
    else:
        view = big[::2]
    view.copy_(tensor)
    return view
