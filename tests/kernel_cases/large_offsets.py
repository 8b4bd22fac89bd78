"""What test_large_offsets.py runs in a process of its own, where an offset that wrapped round would end the process.

Tensors of more than 2³¹ elements are allocated and hardly filled, for the system hands out memory where it is touched;
of a launch over all their rows only the last program runs.
"""

from collections.abc import Callable
from typing import Any

import torch
from kernel_cases.accuracy import randn
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from rung_kernels import reference
from rung_kernels.triton_kernels import launch, norm, rope, swiglu

DTYPE = torch.float16  # the interpreter truncates what it stores in bfloat16
LIMIT = 2**31
"""The first offset, in elements, that a signed 32-bit number does not hold."""


def far(*shape: int, last: Tensor | None = None, gap: int = 0) -> Tensor:
    """Empty rows ``gap`` elements apart, or with ``last`` written over the last ones."""
    x = torch.empty(*shape[:-1], shape[-1] + gap, dtype=DTYPE)[..., : shape[-1]]
    if last is not None:
        x[-len(last) :] = last
    return x


def run_last_program(launcher: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Of each launch only the last program, under its own index."""
    with launch.recording() as launches:
        launcher(*arguments, **options)
    builder = interpreter_builder
    for recorded in launches:
        builder.grid_dim = (*recorded.grid, 1, 1)[:3]
        builder.grid_idx = tuple(size - 1 for size in builder.grid_dim)
        builder.set_grid_dim = builder.set_grid_idx = lambda *_: None
        try:
            recorded.kernel[(1,)](**recorded.arguments)
        finally:
            del builder.set_grid_dim, builder.set_grid_idx


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=2e-3, atol=2e-3)


def check_rms_norm() -> None:
    # A row for each program, and a tile of rows.
    for features in (1024, 24):
        num_rows = LIMIT // features + 100
        values, grads = randn(1, features).to(DTYPE), randn(1, features, seed=1).to(DTYPE)
        weight = randn(features, seed=2).to(DTYPE)
        x, y, stream = far(num_rows, features, last=values, gap=8), far(num_rows, features), far(num_rows, features)
        rstd = torch.empty(num_rows)
        run_last_program(norm.forward, x, x, weight, 1e-5, y, stream, rstd)
        leaf = (2 * values).double().requires_grad_()
        expected = reference.rms_norm(leaf, weight.double(), 1e-5)
        close(y[-1:], expected.detach())
        close(stream[-1:], leaf.detach())
        # A program of the backward pass walks over tiles; where there is one for each, the last has only the last.
        del x
        grad_y, grad_x = far(num_rows, features, last=grads, gap=8), y
        summands = torch.empty(num_rows, features, dtype=DTYPE)
        arguments = grad_y, None, stream, weight, rstd, grad_x, None
        with launch.recording() as launches:
            norm.backward(*arguments, summands)
        num_tiles = -(-num_rows // launches[0].arguments["ROWS"])
        run_last_program(norm.backward, *arguments, summands[:num_tiles])
        close(grad_x[-1:], torch.autograd.grad(expected, leaf, grads.double())[0])


def check_swiglu() -> None:
    # One row of everything; one whose last tile alone goes beyond; rows that lie apart; narrow ones.
    for num_rows, features, gap in ((1, LIMIT + 123, 0), (1, LIMIT - 5, 0), (2**20 + 1, 2048, 8), (2**27 + 1, 16, 8)):
        size = min(features, 100)
        values = [randn(1, size, seed=seed).to(DTYPE) for seed in range(3)]
        gate, up, grad_y = (far(num_rows, features, gap=gap) for _ in values)
        for x, value in zip((gate, up, grad_y), values, strict=True):
            x[-1, -size:] = value
        y, grad_up = far(num_rows, features), far(num_rows, features)
        run_last_program(swiglu.forward, gate, up, y)
        leaves = [value.double().requires_grad_() for value in values[:2]]
        expected = reference.swiglu(*leaves)
        close(y[-1:, -size:], expected.detach())
        run_last_program(swiglu.backward, grad_y, gate, up, y, grad_up)
        for found, grad in zip((y, grad_up), torch.autograd.grad(expected, leaves, values[2].double()), strict=True):
            close(found[-1:, -size:], grad)


def check_rope() -> None:
    size = 64
    values, (cos, sin) = (
        randn(1, 1, 1, size).to(DTYPE),
        (f(randn(1, 1, size // 2, seed=1).repeat(1, 1, 2)).to(DTYPE) for f in (torch.cos, torch.sin)),
    )
    expected, _ = reference.rope(values.double(), values.double(), cos.double(), sin.double())
    # Many tokens, and many sequences.
    for batch, tokens in ((1, LIMIT // size + 100), (LIMIT // size // 3 + 100, 3)):
        x, out = far(batch, tokens, 1, size), [far(batch, tokens, 1, size) for _ in "qk"]
        around = [far(batch, tokens, size) for _ in "cs"]
        x[-1, -1], around[0][-1, -1], around[1][-1, -1] = values[0, 0], cos[0, 0], sin[0, 0]
        run_last_program(rope.turn, x, x, *around, *out, back=False)
        for found in out:
            close(found[-1:, -1:], expected)
    # Three of something, far apart: the strides themselves are numbers of 32 bits.
    for dim in range(3):
        shape, strides = [1, 1, 1, size], [0, 0, 0, 1]
        shape[dim], strides[dim] = 3, LIMIT // 2 + 8
        x = torch.empty(LIMIT + 16 + size, dtype=DTYPE).as_strided(shape, strides)
        x.copy_(values.expand(shape))
        around = [table.expand(shape[0], shape[1], size) for table in (cos, sin)]
        out = [torch.empty(shape, dtype=DTYPE) for _ in "qk"]
        run_last_program(rope.turn, x, x, *around, *out, back=False)
        for found in out:
            close(found[-1:, -1:, -1:], expected)


if __name__ == "__main__":
    check_rms_norm()
    check_rope()
    check_swiglu()
