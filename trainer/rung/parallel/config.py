"""Settings of the spreading: degrees, recomputation, FSDP policy, precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from rung.config import choice_problem
from rung.layout import Layout
from rung.layout.stages import (
    SCHEDULES,
    default_virtual_stages,
    layers_of_stages,
    schedule_problems,
    split_layers,
    splits_backward,
)
from rung.models.flops import StageCosts

if TYPE_CHECKING:
    import torch

__all__ = ["PRECISIONS", "Dtypes", "ParallelConfig", "dtypes", "uses_fsdp"]

PRECISIONS = ("float64", "float32", "bf16")
RECOMPUTE = ("none", "selective", "full")
CP_METHODS = ("ring", "ulysses")


@dataclass
class ParallelConfig:
    """Degrees of the six axes and how memory is traded for work. The layout never changes the answer."""

    dp_replicate: int = 1
    """Copies of the sharded model (hybrid sharding): parameters are sharded inside a copy, gradients summed across."""
    dp_shard: int = -1
    """Ranks over which parameters, gradients and optimizer state are sharded (FSDP2). -1 takes what is left."""
    tp: int = 1
    """Tensor parallel degree: ranks that share every matrix product."""
    pp: int = 1
    """Pipeline parallel degree: ranks that share the layers."""
    cp: int = 1
    """Context parallel degree: ranks that share the tokens of a sequence."""
    ep: int = 1
    """Expert parallel degree. This version runs 1."""
    auto: bool = False
    """Fit data parallelism to the world size that is found: dp_shard takes what is left, dp_replicate shrinks."""
    sequence_parallel: bool = True
    """Split the tokens of the residual stream over the tp ranks too: less memory for the same traffic."""
    async_tp: bool = False
    """Overlap the collectives of tensor parallelism with the products beside them (CUDA with compile=true)."""
    pp_schedule: str = "1f1b"
    """Order of the pipeline's passes: gpipe, 1f1b, interleaved_1f1b, interleaved_zero_bubble or zbv."""
    pp_virtual_stages: int = 0
    """Stages on each pipeline rank; 0 takes 1 for gpipe and 1f1b, 2 for the others."""
    pp_layers: list[int] = field(default_factory=list)
    """Layers of each stage, in the order of stages; empty balances their work, embedding and output head included."""
    cp_method: str = "ring"
    """How attention sees the tokens of other context ranks. ring: keys and values go round; ulysses: all-to-alls
    exchange tokens for heads."""
    cp_ulysses_degree: int = 0
    """Neighbouring context ranks that exchange heads, inside a ring over the rest; 0 takes 1 for ring and cp for
    ulysses."""
    activation_checkpointing: str = "none"
    """What is recomputed in the backward pass: none; selective (matrix products and attention outputs are kept, the
    rest recomputed); full (only each layer's input is kept; with cp also what attention received and returned, so that
    nothing is sent twice)."""
    reshard_after_forward: bool | None = None
    """Free a layer's gathered parameters after its forward pass (least memory) instead of keeping them for backward.
    Unset: true without a pipeline, false with one, where every micro-batch would gather them again."""
    prefetch: int = 1
    """Layers gathered ahead of the one that computes."""
    defer_gradient_sync: bool = False
    """Sum gradients over ranks once a step instead of once a micro-batch: less traffic under accumulation, but every
    rank then holds the whole unsharded gradient. A pipeline always does."""

    def layout(self, world_size: int) -> Layout:
        """The layout on ``world_size`` ranks. Raises UserError with every problem at once."""
        if self.auto:
            return Layout.auto(
                world_size, dp_replicate=self.dp_replicate, tp=self.tp, pp=self.pp, cp=self.cp, ep=self.ep
            )
        return Layout(self.dp_replicate, self.dp_shard, self.tp, self.pp, self.cp, self.ep, world_size)

    @property
    def ulysses_degree(self) -> int:
        """Neighbouring context ranks that exchange heads."""
        return self.cp_ulysses_degree or (self.cp if self.cp_method == "ulysses" else 1)

    @property
    def virtual_stages(self) -> int:
        """Stages on each pipeline rank; one without a pipeline."""
        return 1 if self.pp == 1 else self.pp_virtual_stages or default_virtual_stages(self.pp_schedule)

    def backward_is_split(self, *, compiled: bool) -> bool:
        """Whether a pipeline's schedule runs the gradients of weights apart from those of inputs: not where it would
        make recomputation run once for each group of them, nor in compiled blocks, which have one backward pass."""
        recomputed = self.activation_checkpointing != "none"
        return self.pp > 1 and splits_backward(self.pp_schedule) and not recomputed and not compiled

    def micro_batch_for(self, share: int) -> int:
        """The micro-batch, in sequences, where none is asked for: a data rank's whole ``share`` of the global batch;
        with a pipeline, the largest that leaves a micro-batch for each of its ranks, or as many as there can be."""
        if self.pp == 1:
            return max(share, 1)
        counts = [count for count in range(1, max(share, 1) + 1) if share % count == 0]
        stages = self.pp * self.virtual_stages
        legal = [
            count
            for count in counts
            if not schedule_problems(self.pp_schedule, self.pp, self.virtual_stages, count, stages)
        ]
        enough = [count for count in legal if count >= self.pp]
        return max(share, 1) // (enough or legal[-1:] or counts[-1:])[0]

    def split_layers(self, costs: StageCosts) -> list[range]:
        """The layers of each stage: as given, or so that the dearest stage is as cheap as can be and, among such
        splits, the fullest one as small."""
        stages = self.pp * self.virtual_stages

        def memory(stage: int, layers: range) -> int:
            tables = (stage == 0) + (stage == stages - 1)
            return len(layers) * costs.layer_parameters + tables * costs.table_parameters

        return layers_of_stages(
            self.pp_layers or split_layers(costs.layers, costs.embedding, costs.head, stages, memory)
        )

    def reshards(self) -> bool:
        """Whether layers are freed after their forward pass."""
        return self.pp == 1 if self.reshard_after_forward is None else self.reshard_after_forward

    def validate(self) -> list[str]:
        """Problems that need no world size."""
        problems = choice_problem("parallel.activation_checkpointing", self.activation_checkpointing, RECOMPUTE)
        problems += choice_problem("parallel.pp_schedule", self.pp_schedule, SCHEDULES)
        problems += choice_problem("parallel.cp_method", self.cp_method, CP_METHODS)
        if self.ep > 1:
            problems.append(f"parallel.ep={self.ep}: this version has no experts to spread; legal value: 1")
        if self.pp_virtual_stages < 0:
            problems.append(f"parallel.pp_virtual_stages={self.pp_virtual_stages} must be 0 (by schedule) or more")
        if self.prefetch < 0:
            problems.append(f"parallel.prefetch={self.prefetch} must be 0 or more layers")
        return problems


class Dtypes(NamedTuple):
    """``parameters`` are stored and updated, layers see ``compute``, gradients are summed in ``reduce``."""

    parameters: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype


def uses_fsdp(layout: Layout, dtypes: Dtypes) -> bool:
    """Whether parameters are wrapped by FSDP2: it shards, sums over copies, and casts."""
    return layout.dp_replicate * layout.dp_shard * layout.cp > 1 or dtypes.compute != dtypes.parameters


def dtypes(precision: str) -> Dtypes:
    """bf16 means float32 masters, bf16 gather and compute, float32 gradient sums."""
    import torch

    return {
        "float64": Dtypes(torch.float64, torch.float64, torch.float64),
        "float32": Dtypes(torch.float32, torch.float32, torch.float32),
        "bf16": Dtypes(torch.float32, torch.bfloat16, torch.float32),
    }[precision]
