"""What a layout costs, before anything runs: bytes on every rank, messages of a step, idle time, balance. Arithmetic.

Parameters, gradients, optimizer state and traffic are exact for eager runs, and tests hold them against real ones.
Activations are an estimate: what the backward pass of today's eager modules keeps, without the allocator's waste and
what an operation needs for a moment. torch.compile keeps less and may move collectives it repeats under recomputation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, prod

import torch

from rung.layout import Layout, chunk
from rung.layout.context import Zigzag
from rung.layout.stages import (
    SINGLE_STAGE_SCHEDULES,
    bubble_share,
    num_boundary_buffers,
    peak_live_micro_batches,
    rank_of_stage,
    stages_of,
)
from rung.models import ModelConfig, parameter_shapes, stage_costs
from rung.optim import OptimConfig, SpamConfig
from rung.optim.base import acts_as_matrix
from rung.optim.exact_sum import LIMBS
from rung.optim.exchange import assign_owners
from rung.optim.newton_schulz import orthogonalize_cost
from rung.optim.sparse import room
from rung.parallel.config import ParallelConfig, dtypes, uses_fsdp
from rung.parallel.mesh import FSDP
from rung.parallel.tensor import DECODER_PLAN, Heads, LocalPart, local_part, role_of

__all__ = ["Collective", "LayoutReport", "RankReport", "layout_report"]

_MAX_GATHERED_STAGES = 3
"""torch's pipeline runtime keeps so many stages gathered and frees the others (``_add_unshard_reshard``)."""


@dataclass(frozen=True)
class Collective:
    """Messages of one kind and purpose that a rank takes part in during a step."""

    what: str
    """What for."""
    op: str
    """all_gather, reduce_scatter, all_reduce, all_to_all or send."""
    axes: tuple[str, ...]
    """Axes of the layout along which the ranks of the group differ."""
    count: int
    sent_bytes: int
    """What the rank sends in all of them, by the ring formulas: of n bytes over g ranks n (g - 1)/g to gather or to
    reduce and scatter, twice that to all-reduce; of a send, n."""
    at_least: bool = False
    """The schedule frees and gathers some parameters more often than is counted here."""


@dataclass(frozen=True)
class RankReport:
    """What one rank holds and sends. Bytes are peaks within a step."""

    stages: tuple[int, ...]
    """Pipeline stages."""
    num_layers: int
    parameter_bytes: int
    gradient_bytes: int
    """Of the rank's part of the parameters, in their dtype."""
    optimizer_bytes: int
    unsharded_gradient_bytes: int
    """Of all that the rank computes with, where sums over ranks wait for the end of the step."""
    gathered_bytes: int
    """Parameters that FSDP has gathered at once, in the dtype of computation."""
    activation_bytes: int
    """Kept for backward passes, logits apart: an estimate."""
    recomputed_bytes: int
    """Of the layer that is computed again, where activations are not kept: an estimate."""
    live_micro_batches: int
    """The most micro-batches that activations are kept of at once, each through one of the rank's stages."""
    logits_bytes: int
    """Logits and their gradient."""
    boundary_bytes: int
    """Buffers for what crosses boundaries of pipeline stages."""
    flops: int
    """Of the forward and backward passes of a step, this rank's share of the matrix products."""
    collectives: tuple[Collective, ...]

    @property
    def total_bytes(self) -> int:
        """Of everything."""
        return (
            self.parameter_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.unsharded_gradient_bytes
            + self.gathered_bytes
            + self.activation_bytes
            + self.recomputed_bytes
            + self.logits_bytes
            + self.boundary_bytes
        )

    def sent_bytes(self) -> dict[tuple[str, ...], int]:
        """Bytes that the rank sends in a step, for each group of axes."""
        totals: dict[tuple[str, ...], int] = {}
        for collective in self.collectives:
            totals[collective.axes] = totals.get(collective.axes, 0) + collective.sent_bytes
        return totals


@dataclass(frozen=True)
class LayoutReport:
    """A layout on a model, rank by rank."""

    layout: Layout
    ranks: tuple[RankReport, ...]
    """By rank; those that are alike share one object."""
    num_micro_batches: int
    """Of each data rank in a step."""
    bubble_share: float
    """Share of a step that a rank waits in its pipeline, were all stages alike and messages free."""
    flops_balance: float
    """FLOPs of the busiest pipeline rank over the mean."""
    ring_balance: float
    """Work of the busiest rank in each step of ring attention, over the mean."""
    notes: tuple[str, ...] = field(default=())
    """What the figures leave out."""


def layout_report(
    parallel: ParallelConfig,
    model: ModelConfig,
    layout: Layout,
    *,
    seq_len: int,
    global_batch_size: int,
    micro_batch_size: int,
    precision: str,
    optimizer: OptimConfig,
    compile: bool = False,
    document_mask: bool = False,
    device: str = "cuda",
) -> LayoutReport:
    """The report on a legal layout. ``device`` is cpu, or cuda or auto, which are taken for CUDA: norms keep different
    things on each, and Muon sends different dtypes."""
    num_micro_batches = layout.accumulation(global_batch_size, micro_batch_size)
    pieces = _Pieces(
        parallel=parallel,
        model=model,
        layout=layout,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
        precision=precision,
        optimizer=optimizer,
        split_backward=parallel.backward_is_split(compiled=compile),
        document_mask=document_mask,
        on_cuda=device != "cpu",
    )
    found: dict[object, RankReport] = {}
    ranks = []
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        where = place["pp"], place["dp_shard"] * layout.cp + place["cp"], place["tp"]
        key = pieces.signature(*where)
        if key not in found:
            found[key] = pieces.rank(*where)
        ranks.append(found[key])
    costs = [ranks[layout.rank(pp=place)].flops for place in range(layout.pp)]
    return LayoutReport(
        layout=layout,
        ranks=tuple(ranks),
        num_micro_batches=num_micro_batches,
        bubble_share=pieces.bubble_share(),
        flops_balance=max(costs) * len(costs) / sum(costs),
        ring_balance=_ring_balance(parallel, model, seq_len, document_mask),
        notes=tuple(_notes(parallel, compile, document_mask, pieces)),
    )


@dataclass(frozen=True)
class _Local:
    """A parameter as it is on a rank."""

    name: str
    numel: int
    """Elements of this rank's shard."""
    padded: int
    """Elements of the largest shard: FSDP pads all to it before they travel."""
    unsharded: int
    """Elements that a rank computes with: its part under tensor parallelism."""
    logical_ndim: int
    summed: int
    """Elements of the message that adds up its gradient over tp ranks; 0 where each has the whole of its own."""


@dataclass(frozen=True, eq=False)
class _Pieces:
    """All that is known of a run, and the parts of the report."""

    parallel: ParallelConfig
    model: ModelConfig
    layout: Layout
    seq_len: int
    micro_batch_size: int
    num_micro_batches: int
    precision: str
    optimizer: OptimConfig
    split_backward: bool
    document_mask: bool
    on_cuda: bool
    owners: dict[tuple[int, ...], list[tuple[str, int]]] = field(default_factory=dict)
    """Who owns which of Muon's matrices, by stages; filled when asked."""

    @functools.cached_property
    def split(self) -> list[range]:
        """Layers of each stage."""
        return self.parallel.split_layers(stage_costs(self.model, self.seq_len))

    @property
    def virtual(self) -> int:
        """Stages on each pipeline rank."""
        return len(self.split) // self.layout.pp

    @property
    def fsdp(self) -> int:
        """Ranks that parameters are sharded over."""
        return self.layout.dp_shard * self.layout.cp

    @property
    def has_fsdp(self) -> bool:
        """Whether FSDP is there at all: it also casts, and sums over copies."""
        return uses_fsdp(self.layout, dtypes(self.precision))

    @property
    def parameter_size(self) -> int:
        return dtypes(self.precision).parameters.itemsize

    @property
    def compute_size(self) -> int:
        return dtypes(self.precision).compute.itemsize

    @property
    def reduce_size(self) -> int:
        return dtypes(self.precision).reduce.itemsize

    @property
    def fp32_size(self) -> int:
        """promote(compute dtype, float32)."""
        return torch.promote_types(dtypes(self.precision).compute, torch.float32).itemsize

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank, as attention and feed-forward see them."""
        return self.micro_batch_size * self.seq_len // self.layout.cp

    @property
    def stream_tokens(self) -> int:
        """Tokens of a micro-batch on a rank's residual stream."""
        spread = self.layout.tp > 1 and self.parallel.sequence_parallel
        return self.tokens // self.layout.tp if spread else self.tokens

    @property
    def kv_heads(self) -> int:
        """K/V heads of a rank."""
        return max(1, self.model.num_key_value_heads // self.layout.tp)

    @property
    def heads(self) -> int:
        """Query heads of a rank."""
        return self.model.num_attention_heads // self.layout.tp

    @property
    def mask_elements(self) -> int:
        """Of the mask of a micro-batch, where attention needs one; over context ranks it is made block by block."""
        window = self.model.sliding_window
        masked = self.document_mask or (window is not None and window < self.seq_len)
        return self.micro_batch_size * self.seq_len**2 if masked and self.layout.cp == 1 else 0

    def bubble_share(self) -> float:
        if self.layout.pp == 1:
            return 0.0
        return bubble_share(
            self.parallel.pp_schedule,
            self.layout.pp,
            self.virtual,
            self.num_micro_batches,
            split_backward=self.split_backward,
        )

    def signature(self, pp: int, shard: int, tp: int) -> object:
        """What decides about a rank's report: most shards are of the same sizes."""
        sizes = tuple(
            (local.numel, local.unsharded)
            for shapes in self.shapes.values()
            for local in (self.local(name, shape, shard, tp) for name, shape in shapes.items())
        )
        return pp, sizes, (shard, tp) if self.optimizer.name == "muon" else None

    def rank(self, pp: int, shard: int, tp: int) -> RankReport:
        """The report of the ranks at a place, of which ``shard`` counts along FSDP."""
        stages = stages_of(self.parallel.pp_schedule, self.layout.pp, self.virtual, pp)
        groups = [group for stage in stages for group in self.parameter_groups(stage, shard, tp)]
        parameters = [local for group in groups for local in group]
        numel = sum(local.numel for local in parameters)
        unsharded = sum(local.unsharded for local in parameters)
        waits = self.has_fsdp and (
            self.layout.pp > 1 or (self.parallel.defer_gradient_sync and self.num_micro_batches > 1)
        )
        live = self.live(pp)
        kept = sum(self.kept_by_stage(stage) for stage in stages) * live // len(stages)
        has_last = stages[-1] == len(self.split) - 1
        boundary = self.stream_tokens * self.model.hidden_size * self.compute_size
        buffers = 0
        if self.layout.pp > 1:
            schedule, count = self.parallel.pp_schedule, self.num_micro_batches
            buffers = num_boundary_buffers(schedule, self.layout.pp, self.virtual, count, pp)
        return RankReport(
            stages=tuple(stages),
            num_layers=sum(len(self.split[stage]) for stage in stages),
            parameter_bytes=numel * self.parameter_size,
            gradient_bytes=numel * self.parameter_size,
            optimizer_bytes=sum(self.optimizer_bytes(local) for local in parameters),
            unsharded_gradient_bytes=unsharded * self.reduce_size * waits,
            gathered_bytes=self.gathered_bytes(stages, shard, tp),
            activation_bytes=kept,
            recomputed_bytes=self.kept_by_layer("none") * (self.parallel.activation_checkpointing != "none"),
            live_micro_batches=live,
            logits_bytes=self.logits_bytes(tp) * has_last,
            boundary_bytes=buffers * boundary,
            flops=self.flops(stages),
            collectives=tuple(
                collective
                for collective in self.collectives(pp, stages, shard, tp)
                if collective is not None and collective.count
            ),
        )

    # What a rank holds.

    @functools.cached_property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Names and shapes, by where they are: "layer" (of any layer; all are alike), "first" and "last" stage."""
        found: dict[str, dict[str, tuple[int, ...]]] = {"layer": {}, "first": {}, "last": {}}
        for name, shape in parameter_shapes(self.model).items():
            if name.startswith("layers.0."):
                found["layer"][name] = shape
            elif not name.startswith("layers."):
                found["first" if name.startswith("embed_tokens") else "last"][name] = shape
        return found

    def parameter_groups(self, stage: int, shard: int, tp: int) -> list[list[_Local]]:
        """The parameters of a stage as FSDP gathers them: those of each layer, then those of the root, if any."""
        shapes = self.shapes
        root: dict[str, tuple[int, ...]] = {}
        if stage == 0:
            root |= shapes["first"]
        if stage == len(self.split) - 1:
            root |= shapes["last"]
            if self.model.tie_word_embeddings and stage > 0:  # a table of its own
                root |= {"lm_head.weight": shapes["first"]["embed_tokens.weight"]}
        layer = [self.local(name, shape, shard, tp) for name, shape in shapes["layer"].items()]
        rest = [self.local(name, shape, shard, tp) for name, shape in root.items()]
        return [layer] * len(self.split[stage]) + [rest] * bool(rest)

    def local(self, name: str, shape: tuple[int, ...], shard: int, tp: int) -> _Local:
        """A parameter on a rank."""
        size, model = self.layout.tp, self.model
        part = LocalPart(list(shape), 1, 0)
        if size > 1:
            heads = Heads(model.num_attention_heads, model.num_key_value_heads, model.head_dim)
            role = role_of(name.rpartition(".")[0], DECODER_PLAN)
            assert role is not None, name
            part = local_part(role, shape, heads, size, tp, sequence_parallel=self.parallel.sequence_parallel)
        rows, width = part.shape[0], prod(part.shape[1:])
        first, number = chunk(rows, self.fsdp, shard)
        complete = max(0, min(part.first_row // size - first, number))  # rows that no other rank has a summand of
        return _Local(
            name=name,
            numel=number * width,
            padded=chunk(rows, self.fsdp, 0)[1] * width,
            unsharded=rows * width,
            logical_ndim=len(shape),
            summed=(number - complete) * width * (size // part.replicas) if part.replicas > 1 else 0,
        )

    def is_matrix(self, local: _Local) -> bool:
        """Whether Muon, or a subset of SPAM's, updates it."""
        return acts_as_matrix(local.name, local.logical_ndim)

    def optimizer_bytes(self, local: _Local) -> int:
        moment = local.numel * self.parameter_size
        if self.optimizer.name == "muon" and self.is_matrix(local):
            return moment
        if isinstance(self.optimizer, SpamConfig):
            if self.optimizer.density < 1 and self.is_matrix(local):
                moment = room(local.numel, self.optimizer.density) * self.parameter_size
            return 2 * moment + torch.int64.itemsize  # and a count of steps
        if self.optimizer.name == "stable_spam":
            return 2 * moment + torch.int64.itemsize + 3 * torch.float64.itemsize  # and three averages
        return 2 * moment + torch.float32.itemsize

    def gathered_bytes(self, stages: Sequence[int], shard: int, tp: int) -> int:
        if not self.has_fsdp:
            return 0
        total = 0
        for stage in stages:
            layers = len(self.split[stage])
            groups = self.parameter_groups(stage, shard, tp)
            if self.reshards:  # the last layer stays, and another is computed while the next ones arrive
                groups = groups[layers - min(layers, 2 + self.parallel.prefetch) :]
            total += sum(local.unsharded for group in groups for local in group)
        return total * self.compute_size

    @property
    def reshards(self) -> bool:
        """Whether layers are freed after their forward pass. (Under a split backward they never are.)"""
        return self.parallel.reshards() and not (self.layout.pp > 1 and self.split_backward)

    def live(self, pp: int) -> int:
        if self.layout.pp == 1:
            return 1
        return peak_live_micro_batches(
            self.parallel.pp_schedule,
            self.layout.pp,
            self.virtual,
            self.num_micro_batches,
            pp,
            split_backward=self.split_backward,
        )

    def kept_by_stage(self, stage: int) -> int:
        """Bytes that one micro-batch leaves behind in a stage for its backward pass, logits apart."""
        layers = len(self.split[stage]) * self.kept_by_layer(self.parallel.activation_checkpointing)
        layers += 2 * self.tokens * self.model.head_dim * self.fp32_size  # rotary tables
        if self.parallel.activation_checkpointing != "none":
            layers += self.mask_elements  # of one byte, for all layers
        if stage < len(self.split) - 1:
            return layers
        into_head = self.tokens * self.model.hidden_size * self.compute_size
        return layers + self.kept_by_norm(self.stream_tokens, self.model.hidden_size) + into_head

    def kept_by_layer(self, mode: str) -> int:
        """The same for a layer, under a mode of recomputation."""
        model, size = self.model, self.compute_size
        width, tokens, stream = model.hidden_size, self.tokens, self.stream_tokens
        queries, keys = self.heads * model.head_dim, self.kv_heads * model.head_dim
        inner = model.intermediate_size // self.layout.tp
        degree = self.parallel.ulysses_degree if self.layout.cp > 1 else 1
        copies = degree // gcd(degree, self.kv_heads)
        log_sums = tokens * self.heads * self.fp32_size
        attended = tokens * queries * size + log_sums
        # Where heads are exchanged: q, k and v as they arrived, and the output as it came back.
        exchanged = tokens * (2 * queries + 2 * keys * copies) * size if degree > 1 else 0
        x = stream * width * size
        if mode == "full":
            return x + ((attended + exchanged) if self.layout.cp > 1 else 0)
        if mode == "selective":
            products = tokens * (queries + 2 * keys + 2 * width + 2 * inner) * size
            return x + products + attended + exchanged
        rotated = tokens * (queries + keys) * size
        values = tokens * keys * size
        qk_norms = 0
        if model.qk_norm:
            heads = ((self.heads, tokens), (self.kv_heads, tokens))
            qk_norms = sum(self.kept_by_norm(count * number, model.head_dim) for count, number in heads)
        dropped = 2 * stream * width * (model.dropout > 0)  # masks of one byte
        return (
            2 * self.kept_by_norm(stream, width)
            + 2 * tokens * width * size  # into attention, into the feed-forward
            + qk_norms
            + (exchanged if degree > 1 else rotated + values)
            + attended
            + 4 * tokens * inner * size
            + dropped
            + self.mask_elements * size  # as what is added to the scores
        )

    def kept_by_norm(self, rows: int, width: int) -> int:
        """CUDA has one kernel for it, which keeps its input; the CPU keeps the input and what is scaled, in fp32."""
        kept = width * self.compute_size if self.on_cuda else 2 * width * self.fp32_size
        return rows * (kept + self.fp32_size)

    def logits_bytes(self, tp: int) -> int:
        columns = chunk(self.model.vocab_size, self.layout.tp, tp)[1]
        gpipe = self.layout.pp > 1 and self.parallel.pp_schedule == "gpipe"
        live = self.num_micro_batches if gpipe else 1
        return (live + 1) * self.tokens * columns * self.compute_size

    def flops(self, stages: Sequence[int]) -> int:
        costs = stage_costs(self.model, self.seq_len)
        forward = 0
        for stage in stages:
            forward += sum(costs.layers[layer] for layer in self.split[stage])
            forward += costs.embedding * (stage == 0) + costs.head * (stage == len(self.split) - 1)
        sequences = self.num_micro_batches * self.micro_batch_size
        return 3 * forward * sequences // (self.layout.tp * self.layout.cp)

    # What a rank sends.

    def collectives(self, pp: int, stages: Sequence[int], shard: int, tp: int) -> Iterable[Collective | None]:
        parameters = [p for stage in stages for group in self.parameter_groups(stage, shard, tp) for p in group]
        yield from self.of_fsdp(pp, stages, shard, tp)
        yield from self.of_tensors(stages)
        yield self.of_partial_gradients(parameters)
        yield from self.of_context(stages)
        yield from self.of_pipeline(pp, stages, shard, tp)
        if self.optimizer.name == "muon":
            yield self.of_muon(stages, shard, tp)
        world = tuple(self.layout.mesh)
        if self.optimizer.name == "spam":
            yield self.collective("spikes", "all_reduce", world, 1, torch.float64.itemsize)
        if self.optimizer.name == "stable_spam":
            holders, number = (*FSDP, "tp"), len(parameters)
            yield self.collective("maxima of tensors", "all_reduce", holders, 1, number * torch.float64.itemsize)
            sums = (LIMBS + 1) * torch.int64.itemsize
            yield self.collective("squares and spikes of tensors", "all_reduce", holders, 1, number * sums)
            yield self.collective("spikes", "all_reduce", ("pp",), 1, torch.int64.itemsize)
        yield self.collective("counts and checksums of the step", "all_reduce", world, 1, 3 * torch.int64.itemsize)
        yield self.collective("loss and gradient norm", "all_reduce", world, 1, 2 * torch.float64.itemsize)

    def collective(self, what: str, op: str, axes: tuple[str, ...], count: int, num_bytes: int) -> Collective | None:
        """``count`` messages of a whole tensor of ``num_bytes``; None where one rank is all there is."""
        mesh = self.layout.mesh
        size = prod(mesh[axis] for axis in axes)
        if size == 1:
            return None
        factor = {"send": 1.0, "all_reduce": 2 * (size - 1) / size}.get(op, (size - 1) / size)
        axes = tuple(axis for axis in axes if mesh[axis] > 1)
        return Collective(what, op, axes, count, count * round(num_bytes * factor))

    def of_fsdp(self, pp: int, stages: Sequence[int], shard: int, tp: int) -> Iterable[Collective | None]:
        axes, copies = FSDP, ("dp_replicate",)
        count = self.num_micro_batches
        deferred = self.layout.pp > 1 or self.parallel.defer_gradient_sync
        for_reduce = 1 if deferred else count
        gathers = gathered = scatters = scattered = sums = summed = 0
        at_least = False
        for stage in stages:
            groups = self.parameter_groups(stage, shard, tp)
            layers = len(self.split[stage])
            for index, group in enumerate(groups):
                freed = self.reshards and index < layers - 1  # the last layer and the root stay
                if self.layout.pp == 1:
                    times = count * (2 if freed else 1)
                else:
                    times = self.gathers_in_pipeline(pp) if freed else 1
                    at_least |= self.virtual > _MAX_GATHERED_STAGES or (
                        freed and self.parallel.pp_schedule not in SINGLE_STAGE_SCHEDULES
                    )
                padded = sum(local.padded for local in group)
                gather = self.collective("", "all_gather", axes, times, padded * self.fsdp * self.compute_size)
                scatter = self.collective("", "reduce_scatter", axes, for_reduce, padded * self.fsdp * self.reduce_size)
                over_copies = self.collective("", "all_reduce", copies, 1, padded * self.reduce_size)
                if gather is not None and scatter is not None:
                    gathers, gathered = gathers + gather.count, gathered + gather.sent_bytes
                    scatters, scattered = scatters + scatter.count, scattered + scatter.sent_bytes
                if over_copies is not None:
                    sums, summed = sums + 1, summed + over_copies.sent_bytes
        sharded = tuple(axis for axis in axes if self.layout.mesh[axis] > 1)
        yield Collective("parameters", "all_gather", sharded, gathers, gathered, at_least)
        yield Collective("gradients", "reduce_scatter", sharded, scatters, scattered)
        yield Collective("gradients of copies", "all_reduce", copies, sums, summed)

    def gathers_in_pipeline(self, pp: int) -> int:
        """How often a layer that is freed after its forward pass is gathered in a step.

        A forward pass frees it, a backward pass under a pipeline does not: it is gathered for every pass but those
        that follow a backward pass.
        """
        count = self.num_micro_batches
        if self.parallel.pp_schedule == "1f1b":
            ahead = min(count, self.layout.pp - pp)
            order = "F" * ahead + "BF" * (count - ahead) + "B" * ahead
        else:
            order = "F" * count + "B" * count
        return sum(before == "F" for before in "F" + order[:-1])

    def of_tensors(self, stages: Sequence[int]) -> Iterable[Collective | None]:
        if self.layout.tp == 1:
            return
        axes, count = ("tp",), self.num_micro_batches
        layers = sum(len(self.split[stage]) for stage in stages)
        has_embedding, has_head = int(0 in stages), int(len(self.split) - 1 in stages)
        stream = self.tokens * self.model.hidden_size * self.compute_size
        # Recomputation ends with the last thing that the backward pass needs: what follows the last product is left
        # out, unless a mask of dropout comes after it.
        again = layers * (self.parallel.activation_checkpointing != "none")
        leaves_again = again * (2 if self.model.dropout > 0 else 1)
        if self.parallel.sequence_parallel:
            # Into a region: gather, and back: reduce-scatter; out of one the other way round.
            gathers = count * (2 * layers + has_head + 2 * layers + has_embedding + 2 * again)
            scatters = count * (2 * layers + has_embedding + 2 * layers + has_head + leaves_again)
            yield self.collective("tokens, gathered", "all_gather", axes, gathers, stream)
            yield self.collective("partial sums, scattered", "reduce_scatter", axes, scatters, stream)
        else:
            sums = count * (2 * layers + has_embedding + 2 * layers + has_head + leaves_again)
            yield self.collective("partial sums", "all_reduce", axes, sums, stream)
        if has_head:
            facts = 3 * self.tokens * self.fp32_size * self.layout.tp
            yield self.collective("cross-entropy", "all_gather", axes, count, facts)

    def of_partial_gradients(self, parameters: Sequence[_Local]) -> Collective | None:
        elements = sum(local.summed for local in parameters)
        return self.collective(
            "summands of gradients", "all_reduce", ("tp",), int(elements > 0), elements * self.parameter_size
        )

    def of_context(self, stages: Sequence[int]) -> Iterable[Collective | None]:
        cp = self.layout.cp
        if cp == 1:
            return
        axes, count = ("cp",), self.num_micro_batches
        layers = sum(len(self.split[stage]) for stage in stages)
        degree = self.parallel.ulysses_degree
        places = cp // degree
        copies = degree // gcd(degree, self.kv_heads)
        keys = self.kv_heads * self.model.head_dim * copies
        if degree > 1:
            # Forward q, k and v go out and the output comes back; backward the same with gradients. Neighbours only.
            queries = self.heads * self.model.head_dim
            others = self.tokens * (2 * queries + 2 * keys) * self.compute_size * (degree - 1) // degree
            yield Collective("heads for tokens", "all_to_all", axes, 4 * count * layers, 2 * others * count * layers)
        if places > 1:
            # A place has the tokens of all its neighbours, and its share of the heads: as many numbers as a rank has.
            pair = 2 * self.tokens * keys
            hops = (places - 1) * count * layers
            yield self.collective("keys and values", "send", axes, 2 * hops, pair * self.compute_size)
            yield self.collective("gradients of keys and values", "send", axes, hops, pair * self.fp32_size)
        if self.document_mask:
            ids = self.tokens * torch.int64.itemsize * cp
            yield self.collective("document ids", "all_gather", axes, count * len(stages), ids)

    def of_pipeline(self, pp: int, stages: Sequence[int], shard: int, tp: int) -> Iterable[Collective | None]:
        if self.layout.pp == 1:
            return
        axes, last = ("pp",), len(self.split) - 1
        schedule, size = self.parallel.pp_schedule, self.layout.pp

        def elsewhere(stage: int) -> bool:
            return 0 <= stage <= last and rank_of_stage(schedule, size, self.virtual, stage) != pp

        boundary = self.stream_tokens * self.model.hidden_size * self.compute_size
        forward = sum(elsewhere(stage + 1) for stage in stages) * self.num_micro_batches
        backward = sum(elsewhere(stage - 1) for stage in stages) * self.num_micro_batches
        yield self.collective("activations", "send", axes, forward, boundary)
        yield self.collective("gradients of activations", "send", axes, backward, boundary)
        holds_table = (0 in stages) != (last in stages)  # one of the two ends: the other is elsewhere
        if self.model.tie_word_embeddings and holds_table:
            (table,) = self.shapes["first"].items()
            numel = self.local(*table, shard, tp).numel
            yield self.collective("gradient of the tied table", "send", axes, 1, numel * self.parameter_size)

    def of_muon(self, stages: Sequence[int], shard: int, tp: int) -> Collective | None:
        """Matrices travel to their owners and updates back."""
        axes = (*FSDP, "tp")
        size = self.fsdp * self.layout.tp
        if size == 1:
            return None
        if (known := self.owners.get(tuple(stages))) is None:
            known = self.owners[tuple(stages)] = self._owners(stages, size)
        me = shard * self.layout.tp + tp
        here = self._numels(shard, tp)
        element = self.parameter_size
        if self.precision != "float64":
            element = torch.bfloat16.itemsize if self.on_cuda else torch.float32.itemsize
        out = sum(here[name] for name, owner in known if owner != me)
        back = sum(self._numels_of_all[name] - here[name] for name, owner in known if owner == me)
        mesh = self.layout.mesh
        spread = tuple(axis for axis in axes if mesh[axis] > 1)
        return Collective("matrices of Muon", "all_to_all", spread, 2, (out + back) * element)

    def _owners(self, stages: Sequence[int], size: int) -> list[tuple[str, int]]:
        """The matrices of these stages, by the name of the same matrix in layer 0, and who orthogonalises each."""
        shapes = {name: shape for name, shape in self.shapes["layer"].items() if len(shape) == 2}
        layers = [layer for stage in stages for layer in self.split[stage]]
        # Names decide among equals, and they are the layers' own.
        names = sorted((name.replace(".0.", f".{layer}.", 1), name) for name in shapes for layer in layers)
        costs = [orthogonalize_cost(*shapes[first]) for _, first in names]
        return list(zip((first for _, first in names), assign_owners(costs, size), strict=True))

    def _numels(self, shard: int, tp: int) -> Mapping[str, int]:
        """Elements of each parameter of a layer at a place."""
        return {name: self.local(name, shape, shard, tp).numel for name, shape in self.shapes["layer"].items()}

    @functools.cached_property
    def _numels_of_all(self) -> Mapping[str, int]:
        """The same for all places of FSDP and tp together, copies included."""
        places = [self._numels(shard, tp) for shard in range(self.fsdp) for tp in range(self.layout.tp)]
        return {name: sum(place[name] for place in places) for name in self.shapes["layer"]}


def _ring_balance(parallel: ParallelConfig, model: ModelConfig, seq_len: int, documents: bool) -> float:
    places = parallel.cp // parallel.ulysses_degree
    if places == 1:
        return 1.0
    # Ranks meet in every step of the ring: the slowest one paces it.
    work = Zigzag(seq_len, places).computed(model.sliding_window, documents)
    return float(work.max(axis=0).sum() / work.mean(axis=0).sum())


def _notes(parallel: ParallelConfig, compile: bool, document_mask: bool, pieces: _Pieces) -> Iterable[str]:
    if compile:
        yield "compile=true keeps fewer activations, and may repeat other collectives under recomputation"
    if document_mask and parallel.ulysses_degree < pieces.layout.cp:
        yield "how the work of a ring balances also depends on where documents end; here every pair is computed"
    firsts = [pieces.rank(pp, 0, 0) for pp in range(pieces.layout.pp)]
    if any(collective.at_least for rank in firsts for collective in rank.collectives):
        yield "this schedule gathers some parameters more often than is counted (≥)"
    if parallel.pp > 1:
        yield "a pipeline sums gradients over data ranks once a step, whatever defer_gradient_sync says"
