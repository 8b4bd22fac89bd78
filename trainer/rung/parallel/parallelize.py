"""Spread a meta-device model: stages, tensor and context parallelism, recomputation, compile, FSDP2. One order."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rung.errors import UserError
from rung.layout.stages import stages_of
from rung.models import Decoder, stage_costs
from rung.models.decoder import Attention
from rung.parallel.config import Dtypes, ParallelConfig, uses_fsdp
from rung.parallel.context import SAVED_UNDER_RECOMPUTE, ContextAttention, ContextMask
from rung.parallel.mesh import Groups
from rung.parallel.spread import SpreadModel
from rung.parallel.tensor import DECODER_PLAN, Heads, TensorPlan, tensor_parallel

__all__ = ["parallelize"]


def parallelize(
    model: Decoder,
    groups: Groups,
    config: ParallelConfig,
    dtypes: Dtypes,
    *,
    seq_len: int,
    num_micro_batches: int,
    compile_blocks: bool = False,
) -> SpreadModel:
    """Take ``model`` apart, on the meta device, and return what of it this rank runs, still without storage.

    ``seq_len`` balances the work of pipeline stages, ``num_micro_batches`` is what they run in a step. Forwards are
    replaced rather than wrapped, so parameter names stay what the model file says. Collective, because process groups
    are made here.
    """
    layout, place = groups.layout, groups.place
    if config.async_tp:
        overlap_collectives_with_products(groups)
    mesh = groups.mesh(sharded=uses_fsdp(layout, dtypes))
    ties = _ties(model)
    stages = stages_of(config.pp_schedule, layout.pp, config.virtual_stages, place["pp"])
    split = config.split_layers(stage_costs(model.config, seq_len))
    if len(split) > 1:
        from rung.parallel.pipeline import stage_part  # a second of imports that most runs can do without
    parts, plans = [], []
    for stage in stages:
        first, last = stage == 0, stage == len(split) - 1
        part = model if len(split) == 1 else stage_part(model, split[stage], first, last)
        plans.append(_spread_part(part, mesh, groups, config, dtypes, compile_blocks))
        parts.append(part)
    return SpreadModel(
        parts,
        stages,
        len(split),
        groups,
        config,
        dtypes,
        plans,
        ties,
        num_micro_batches=num_micro_batches,
        split_backward=config.backward_is_split(compiled=compile_blocks),
    )


def _spread_part(
    part: Decoder,
    mesh: DeviceMesh | None,
    groups: Groups,
    config: ParallelConfig,
    dtypes: Dtypes,
    compile_blocks: bool,
) -> TensorPlan:
    plan = TensorPlan()
    if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
        name = groups.name("tp")
        plan = tensor_parallel(
            part,
            mesh["tp"],
            name,
            plan=DECODER_PLAN,
            heads=Heads(part.config.num_attention_heads, part.config.num_key_value_heads, part.config.head_dim),
            sequence_parallel=config.sequence_parallel,
        )
    if groups.layout.cp > 1:
        _context_parallel(part, groups, config)
    for block in part.blocks():
        forward = _recomputed(block.forward, config.activation_checkpointing, groups.layout.cp > 1)
        # Inside compile, so that the partitioner sees what is recomputed; outside FSDP, whose hooks run eagerly.
        block.forward = torch.compile(forward, fullgraph=True, dynamic=False) if compile_blocks else forward
    if mesh is not None and "fsdp" in (mesh.mesh_dim_names or ()):
        copies = "dp_replicate" in (mesh.mesh_dim_names or ())
        _fully_shard(part, mesh["dp_replicate", "fsdp"] if copies else mesh["fsdp"], config, dtypes)
    return plan


def _fully_shard(part: Decoder, mesh: DeviceMesh, config: ParallelConfig, dtypes: Dtypes) -> None:
    """FSDP2: parameters are gathered in ``dtypes.compute`` a block at a time, gradients are *summed* (not averaged: the
    loss already holds Σ/N over the whole batch) in ``dtypes.reduce``; the last block and the root (embedding, norm,
    head) stay gathered because backward begins with them."""
    # Inputs of a block stay as they are: rotary tables are float32 also where the block computes in bf16.
    policy = MixedPrecisionPolicy(param_dtype=dtypes.compute, reduce_dtype=dtypes.reduce, cast_forward_inputs=False)
    blocks = part.blocks()
    for block in blocks:
        reshard = config.reshards() and block is not blocks[-1]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            # The default divides by the number of ranks; gloo has no pre-multiplied sum, so a plain sum is forced.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for index, block in enumerate(blocks):
        assert isinstance(block, FSDPModule)
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + config.prefetch])  # type: ignore[arg-type]
        before = blocks[max(0, index - config.prefetch) : index]
        block.set_modules_to_backward_prefetch(before[::-1])  # type: ignore[arg-type]


def _context_parallel(part: Decoder, groups: Groups, config: ParallelConfig) -> None:
    """Attention that sees the tokens of other context ranks takes the place of the model's."""
    group = groups.group("cp")
    assert group is not None
    part.attention_mask = ContextMask(group)
    for module in part.modules():
        if isinstance(module, Attention):
            module.inner = ContextAttention(group, config.ulysses_degree, part.config.sliding_window)


def overlap_collectives_with_products(groups: Groups) -> None:
    """Have inductor cut products in pieces and send each while the next is computed: torch's async tensor parallel.

    The switch is the process's, and stays on. Without symmetric memory for the group torch would leave all as it is, in
    silence. Collective. Raises UserError where there is no CUDA.
    """
    if groups.device_type != "cuda":
        raise UserError(f"parallel.async_tp=true needs CUDA, and this run is on {groups.device_type}; set it to false")
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(cast(Any, groups.name("tp")))  # torch's type of names is newer than 2.11
    inductor._micro_pipeline_tp = True


def _ties(model: nn.Module) -> dict[str, str]:
    """Name -> the first name of the same parameter."""
    first: dict[nn.Parameter, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            ties[name] = first[parameter]
    return ties


def _recomputed(forward: Any, mode: str, distributed: bool) -> Any:
    """``distributed``: attention talks to other ranks; its results are kept in either mode, so that no message is
    repeated."""
    if mode == "none":
        return forward
    # Draws are functions of (seed, step, name, position): there is no generator state to save and restore.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    kept = frozenset(SAVED_UNDER_RECOMPUTE if distributed else ()) | (_PRODUCTS if mode == "selective" else frozenset())
    if kept:
        policy = functools.partial(_keep, kept)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(checkpoint, forward, **options)


_PRODUCTS: frozenset[Any] = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)


def _keep(kept: Collection[Any], _context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Save the results of ``kept``: what is dear to compute for its size, or came from other ranks."""
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
