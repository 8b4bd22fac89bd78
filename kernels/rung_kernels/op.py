"""What makes a differentiable operation of a forward and a backward function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_plain", "make_op", "refuse_second_derivative"]

_PLAIN = (Tensor, nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors that run eagerly: no DTensor, nothing that is being traced."""
    return not torch.compiler.is_compiling() and all(t is None or type(t) in _PLAIN for t in tensors)


def refuse_second_derivative(what: str) -> None:
    """For backward passes that are not differentiable themselves. RuntimeError where autograd records one of them."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has no second derivative: call backward and grad without create_graph")


def make_op(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    fake_forward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    """An operation with two faces: library operators ``rung::name`` and ``rung::name_backward``, which torch.compile
    and DTensor see, and an autograd function for plain eager tensors, since crossing the library costs about 60 µs.

    forward(*inputs) -> outputs; annotated as ``torch.library.custom_op`` wants it. backward(...) likewise.
    fake_forward, fake_backward: outputs of the same shapes, dtypes and strides, undefined.
    save(ctx, inputs, output): what torch calls setup_context. Gradients that nobody asked for arrive as None.
    differentiate(ctx, backward, *grad_outputs): the gradients of the inputs, by calling ``backward``.
    """
    forward_op = torch.library.custom_op(f"rung::{name}", forward, mutates_args=())
    forward_op.register_fake(fake_forward)
    backward_op = torch.library.custom_op(f"rung::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(fake_backward)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    def through_library(ctx: Any, *grads: Any) -> Any:
        return differentiate(ctx, backward_op, *grads)

    def direct(ctx: Any, *grads: Any) -> Any:
        # The operator refuses a second derivative; torch's once_differentiable lets pass what comes from a constant.
        return differentiate(ctx, backward_op if torch.is_grad_enabled() else backward, *grads)

    forward_op.register_autograd(through_library, setup_context=setup_context)
    eager = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(direct),
        },
    )

    def call(*inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if is_plain(*tensors):
            return eager.apply(*inputs)  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling() and "torch.distributed.tensor" in sys.modules:
            import rung_kernels.sharding  # noqa: F401  (the rules by which DTensor spreads these operators)
        return forward_op(*inputs)

    return call
