"""Tensor parallelism: which parameter is split how, and where its modules talk.

Parameters become DTensors, because FSDP2, optimizers and checkpoints need to know what is where. Activations stay plain
local tensors between explicit collectives: a module is given a subclass of its class whose ``weight`` is the local part
and whose forward begins or ends with a collective (Shoeybi et al. 2019, "Megatron-LM", section 3). With sequence
parallelism the residual stream holds a part of the tokens, and all-reduces become all-gathers and reduce-scatters of
the same bytes in total (Korthikanti et al. 2022, "Reducing Activation Recomputation", section 4.2.2).
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as TorchShard

from rung.layout import Facts, Section, chunk, clean_name
from rung.models.decoder import Attention, Dropout
from rung.parallel.collectives import all_reduce_backward, all_reduce_forward, gather, reduce_scatter

__all__ = ["DECODER_PLAN", "Heads", "PartialGradient", "TensorPlan", "local_part", "role_of", "tensor_parallel"]

DECODER_PLAN: dict[str, str] = {
    "embed_tokens": "embedding",
    "layers.*.input_layernorm": "stream",
    "layers.*.self_attn": "region",
    "layers.*.self_attn.qkv_proj": "fused_qkv",
    "layers.*.self_attn.q_proj": "column",
    "layers.*.self_attn.k_proj": "kv_column",
    "layers.*.self_attn.v_proj": "kv_column",
    "layers.*.self_attn.q_norm": "inside",
    "layers.*.self_attn.k_norm": "inside",
    "layers.*.self_attn.o_proj": "row",
    "layers.*.post_attention_layernorm": "stream",
    "layers.*.mlp": "region",
    "layers.*.mlp.gate_proj": "column",
    "layers.*.mlp.up_proj": "column",
    "layers.*.mlp.down_proj": "row",
    "norm": "stream",
    "lm_head": "head",
}
"""Module name -> role.

embedding: rows of the table are split; tokens of other ranks' rows give zeros, and the sum is handed on.
stream: a copy on every rank, on the residual stream; with sequence parallelism each rank's gradient is its tokens'.
region: no parameters of its own; what it receives from the residual stream is made whole before it begins.
column: output features (rows of the weight) are split.
kv_column: the same for K/V heads, which neighbours share where there are fewer than ranks.
fused_qkv: column for the query rows, kv_column for the key and for the value rows, in one weight.
inside: a copy on every rank, on split features; each rank's gradient is its features'.
row: input features (columns of the weight) are split; outputs are partial sums, which are handed on.
head: region and column in one.
"""


@dataclass(frozen=True)
class PartialGradient:
    """A parameter whose gradient must still be summed over tp, among the ranks that hold the same part of it."""

    name: str
    replicas: int
    """Number of neighbouring ranks that hold the same part; the size of tp for a copy on every rank."""
    first_row: int = 0
    """Logical rows before this one are on one rank each, and whole."""


@dataclass
class TensorPlan:
    """What tensor parallelism leaves for others to know."""

    facts: dict[str, Facts] = field(default_factory=dict)
    """What DTensors do not say about themselves, by clean parameter name."""
    partial: list[PartialGradient] = field(default_factory=list)


class Heads(NamedTuple):
    """Numbers of query heads and of key (and value) heads of the whole model, and features of each."""

    queries: int
    keys: int
    size: int


def tensor_parallel(
    part: nn.Module,
    mesh: DeviceMesh,
    group: str,
    *,
    plan: Mapping[str, str],
    heads: Heads,
    sequence_parallel: bool,
) -> TensorPlan:
    """Split a model on the meta device, or a stage of it, over the 1-D ``mesh`` ("tp"), in place.

    Raises ValueError when parameters are left that the plan says nothing about: they would silently get a part of their
    gradient.
    """
    edges = _Edges(group, mesh.size(), mesh.get_local_rank(), sequence_parallel)
    found = TensorPlan()
    seen: dict[nn.Parameter, nn.Parameter] = {}
    planned: set[str] = set()
    for raw_name, module in part.named_modules():
        name = clean_name(raw_name)
        if isinstance(module, Dropout) and sequence_parallel:
            _become(module, edges, "dropout")
        role = role_of(name, plan)
        if role is None:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{key}"
            planned.add(full_name)
            if role == "row" and parameter.ndim == 1:
                raise ValueError(
                    f"{full_name}: a bias after a split sum is not planned for; it would be added tp times"
                )
            if parameter not in seen:  # a tied parameter is met twice
                seen[parameter] = _distribute(full_name, parameter, role, mesh, heads, sequence_parallel, found)
            module.register_parameter(key, seen[parameter])
        if isinstance(module, Attention):
            module.num_heads = heads.queries // edges.size
            module.num_kv_heads = max(1, heads.keys // edges.size)
        _become(module, edges, role)
    missing = sorted({clean_name(n) for n, _ in part.named_parameters(remove_duplicate=False)} - planned)
    if missing:
        raise ValueError(f"tensor parallelism has no plan for {', '.join(missing)}; their gradients would be wrong")
    return found


def role_of(module: str, plan: Mapping[str, str]) -> str | None:
    """The role of a module by its clean name; None where the plan says nothing about it."""
    return next((role for pattern, role in plan.items() if fnmatch.fnmatchcase(module, pattern)), None)


class LocalPart(NamedTuple):
    """What a tensor rank holds of a parameter."""

    shape: list[int]
    replicas: int
    """Number of neighbouring ranks that hold the same rows and have a summand of their gradient each; 1 for none."""
    first_row: int
    """Logical rows before this one are on one rank each."""


def local_part(
    role: str, shape: Sequence[int], heads: Heads, size: int, rank: int, *, sequence_parallel: bool
) -> LocalPart:
    """What a rank of ``size`` holds of a parameter of ``shape``, by the role of its module."""
    local = list(shape)
    if role in ("stream", "inside"):
        return LocalPart(local, size if role == "inside" or sequence_parallel else 1, 0)
    if role in ("kv_column", "fused_qkv"):
        replicas = max(1, size // heads.keys)
        queries = heads.queries * heads.size if role == "fused_qkv" else 0
        local[0] = queries // size + (shape[0] - queries) * replicas // size
        return LocalPart(local, replicas, queries)
    dim = 1 if role == "row" else 0
    local[dim] = chunk(shape[dim], size, rank)[1]
    return LocalPart(local, 1, 0)


def _distribute(
    name: str,
    parameter: nn.Parameter,
    role: str,
    mesh: DeviceMesh,
    heads: Heads,
    sequence_parallel: bool,
    found: TensorPlan,
) -> nn.Parameter:
    """The parameter as a DTensor on the meta device."""
    size, rank = mesh.size(), mesh.get_local_rank()
    shape = list(parameter.shape)
    part = local_part(role, shape, heads, size, rank, sequence_parallel=sequence_parallel)
    if part.replicas > 1:
        found.partial.append(PartialGradient(name, part.replicas, part.first_row))
    if role in ("stream", "inside"):
        return _dtensor(parameter, mesh, Replicate(), shape, part.shape)
    if role in ("kv_column", "fused_qkv"):
        # Copies of the same head count in the DTensor's shape; the logical tensor knows them for one.
        if role == "fused_qkv":
            pair = [Section((shape[0] - part.first_row) // 2, part.replicas)] * 2
            found.facts[name] = {"shape": shape, "sections": {"tp": (Section(part.first_row), *pair)}}
        elif part.replicas > 1:
            found.facts[name] = {"replicas": {"tp": part.replicas}}
        return _dtensor(parameter, mesh, TorchShard(0), [part.shape[0] * size, *shape[1:]], part.shape)
    return _dtensor(parameter, mesh, TorchShard(1 if role == "row" else 0), shape, part.shape)


def _dtensor(
    parameter: nn.Parameter, mesh: DeviceMesh, placement: Any, shape: list[int], local: list[int]
) -> nn.Parameter:
    values = torch.empty(local, dtype=parameter.dtype, device=parameter.device)
    stride = torch.empty(shape, device="meta").stride()
    tensor = DTensor.from_local(values, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


@dataclass(frozen=True)
class _Edges:
    """Where the residual stream meets the split regions."""

    group: str
    size: int
    rank: int
    sequence_parallel: bool

    def enter(self, x_BTD: Tensor) -> Tensor:
        """From the residual stream into a region."""
        return gather(x_BTD, 1, self.group) if self.sequence_parallel else all_reduce_backward(x_BTD, self.group)

    def leave(self, y_BTD: Tensor) -> Tensor:
        """Partial sums of a region onto the residual stream."""
        return reduce_scatter(y_BTD, 1, self.group) if self.sequence_parallel else all_reduce_forward(y_BTD, self.group)


def _become(module: nn.Module, edges: _Edges, role: str) -> None:
    cls: Any = type(module)
    module.__class__ = _subclass(cls, edges, role)


@functools.cache
def _subclass(cls: Any, edges: _Edges, role: str) -> type[nn.Module]:
    """One class for all modules of a kind, so that layers share one compiled graph."""
    return type(f"TensorParallel{cls.__name__}", (cls,), {"forward": _FORWARDS[role](cls.forward, edges)})


class _Local:
    """A module as its forward sees it: parameters are what this rank holds of them, all else is the module's.

    Gradients come back as parts; who shares them is summed later, once a step, instead of parameter by parameter in
    every backward pass. (A property on the module would say the same to FSDP, which needs the DTensor.)
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        parameter: Any = self._module._parameters.get(name)
        return getattr(self._module, name) if parameter is None else parameter.to_local()


def _plain_forward(original: Callable[..., Tensor], edges: _Edges) -> Callable[..., Tensor]:
    del edges

    def forward(self: nn.Module, *args: Tensor) -> Tensor:
        return original(_Local(self), *args)

    return forward


def _region_forward(original: Callable[..., Tensor], edges: _Edges) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x_BTD: Tensor, *args: Any) -> Tensor:
        return original(self, edges.enter(x_BTD), *args)

    return forward


def _head_forward(original: Callable[..., Tensor], edges: _Edges) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x_BTD: Tensor) -> Tensor:
        return original(_Local(self), edges.enter(x_BTD))

    return forward


def _row_forward(original: Callable[..., Tensor], edges: _Edges) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x_BTF: Tensor) -> Tensor:
        return edges.leave(original(_Local(self), x_BTF))

    return forward


def _embedding_forward(original: Callable[..., Tensor], edges: _Edges) -> Callable[..., Tensor]:
    del original

    def forward(self: nn.Module, tokens_BT: Tensor) -> Tensor:
        weight_VD: Any = self.weight
        local_VD = weight_VD.to_local()
        first, length = chunk(weight_VD.shape[0], edges.size, edges.rank)
        if length == 0:  # fewer rows than ranks: this one adds zeros
            return edges.leave(local_VD.sum() + local_VD.new_zeros(*tokens_BT.shape, local_VD.shape[1]))
        rows_BT = tokens_BT - first
        elsewhere_BT = (rows_BT < 0) | (rows_BT >= length)
        x_BTD = F.embedding(rows_BT.masked_fill(elsewhere_BT, 0), local_VD)
        return edges.leave(x_BTD.masked_fill(elsewhere_BT.unsqueeze(-1), 0.0))

    return forward


def _dropout_forward(original: Callable[..., Tensor], edges: _Edges) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x_BTD: Tensor, key_2: Tensor, sample_ids_B: Tensor, positions_BT: Tensor) -> Tensor:
        length = x_BTD.shape[1]  # the part of the tokens that is here, where positions are those of all
        return original(self, x_BTD, key_2, sample_ids_B, positions_BT.narrow(1, edges.rank * length, length))

    return forward


_FORWARDS: dict[str, Callable[[Callable[..., Tensor], _Edges], Callable[..., Tensor]]] = {
    "embedding": _embedding_forward,
    "stream": _plain_forward,
    "region": _region_forward,
    "column": _plain_forward,
    "fused_qkv": _plain_forward,
    "kv_column": _plain_forward,
    "inside": _plain_forward,
    "row": _row_forward,
    "head": _head_forward,
    "dropout": _dropout_forward,
}
