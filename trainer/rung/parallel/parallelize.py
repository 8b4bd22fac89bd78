"""Spread a meta-device model: recomputation, per-block compile, FSDP2. One function, one order."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rung.parallel.config import Dtypes, ParallelConfig

__all__ = ["GradientSync", "parallelize"]


def parallelize(
    model: nn.Module, mesh: DeviceMesh, config: ParallelConfig, dtypes: Dtypes, *, compile_blocks: bool = False
) -> nn.Module:
    """Spread ``model`` in place over ``mesh`` and return it. ``model.blocks()`` names the units.

    FSDP policy: parameters are gathered in ``dtypes.compute`` a block at a time, gradients are *summed* (not averaged:
    the loss already holds Σ/N over the whole batch) in ``dtypes.reduce``, blocks are freed after forward unless
    ``reshard_after_forward`` is off, the last block and the root (embedding, norm, head) stay gathered because backward
    begins with them. One rank that computes in its parameters' dtype needs no FSDP.

    Forwards are replaced rather than wrapped, so parameter names stay what the model file says.
    """
    blocks: list[nn.Module] = model.blocks()  # type: ignore[operator]
    for block in blocks:
        forward = _recomputed(block.forward, config.activation_checkpointing)
        # Inside compile, so that the partitioner sees what is recomputed; outside FSDP, whose hooks run eagerly.
        block.forward = torch.compile(forward, fullgraph=True, dynamic=False) if compile_blocks else forward
    if mesh.size() == 1 and dtypes.compute == dtypes.parameters:
        return model
    # Inputs of a block stay as they are: rotary tables are float32 also where the block computes in bf16.
    policy = MixedPrecisionPolicy(param_dtype=dtypes.compute, reduce_dtype=dtypes.reduce, cast_forward_inputs=False)
    for block in blocks:
        reshard = config.reshard_after_forward and block is not blocks[-1]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The default divides by the number of ranks; gloo has no pre-multiplied sum, so a plain sum is forced.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for index, block in enumerate(blocks):
        assert isinstance(block, FSDPModule)
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + config.prefetch])  # type: ignore[arg-type]
        before = blocks[max(0, index - config.prefetch) : index]
        block.set_modules_to_backward_prefetch(before[::-1])  # type: ignore[arg-type]
    return model


class GradientSync:
    """Says before each micro-batch whether its backward pass sums gradients over ranks."""

    def __init__(self, model: nn.Module, *, defer: bool) -> None:
        self._fsdp = model if isinstance(model, FSDPModule) else None
        self._defer = defer

    def __call__(self, *, is_last: bool) -> None:
        """Sharded sums happen every micro-batch unless deferred; sums over copies only after the last."""
        if self._fsdp is None:
            return
        if self._defer:
            self._fsdp.set_requires_gradient_sync(is_last)
        else:
            self._fsdp.set_requires_all_reduce(is_last)
        self._fsdp.set_is_last_backward(is_last)


def _recomputed(forward: Any, mode: str) -> Any:
    if mode == "none":
        return forward
    # Draws are functions of (seed, step, name, position): there is no generator state to save and restore.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return functools.partial(checkpoint, forward, **options)


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_products(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute for its size: matrix products and attention."""
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
