"""Pipeline parallelism: a rank holds some stages of the model, and only activations travel.

Schedules are torch.distributed.pipelining's. Every rank of a pipeline reads the same micro-batches itself, so tokens,
positions, documents, sample ids and labels are never sent, and shapes need no messages.

Legend: B batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.microbatch import TensorChunkSpec, _Replicate

from rung.data import Batch
from rung.layout.stages import SINGLE_STAGE_SCHEDULES, rank_of_stage, splits_backward, stages_of

__all__ = ["Pipeline", "stage_part", "sum_tied_gradients"]

_Model = TypeVar("_Model", bound=nn.Module)

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def stage_part(model: _Model, layers: range, first: bool, last: bool) -> _Model:
    """A copy of ``model`` cut to one stage: these layers, the embedding if ``first``, the norm and head if ``last``.

    On the meta device that takes no memory. The model has ``embed_tokens``, ``norm`` and ``lm_head``, each of which it
    can do without, and a ModuleDict ``layers`` with the layer's number as key; what stays keeps its name. Parts of a
    model whose head is its embedding have a table each: ``sum_tied_gradients`` keeps them equal.
    """
    part = copy.deepcopy(model)
    blocks: Any = part.layers
    if missing := [layer for layer in layers if str(layer) not in blocks]:
        raise ValueError(f"the model has no layers {missing}; it has {', '.join(blocks)}")
    for name in list(blocks):
        if int(name) not in layers:
            del blocks[name]
    gone = ["embed_tokens"] * (not first) + ["norm", "lm_head"] * (not last)
    for name in gone:
        setattr(part, name, None)
    return part


class _Stage(PipelineStage):
    """A stage on a group that is connected already."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 has a rank with both sides of a boundary (zbv) send to itself here, which gloo refuses; later
        # versions do not ask.
        return []


class Pipeline:
    """The stages of one rank, and the schedule that runs them together with those of the other ranks.

    parts: the modules of this rank's stages, as a Decoder part takes its inputs: the tokens, or what the stage before
    returned, one tensor or several, then sample_ids_B, positions_BT, document_ids_BT and step by name. ``stages`` are
    their numbers among ``num_stages``, in increasing order. ``group`` holds the ranks of the pipeline, in order.

    boundary, logits: meta tensors with the shape and dtype, on one rank, of what crosses a boundary between stages and
    of what the last stage returns, for such a micro-batch.

    split_backward: whether zero-bubble schedules run gradients of weights apart from those of inputs. That is for parts
    whose backward graph can be cut: under recomputation each group of weights recomputes its block anew (measured, five
    blocks and four micro-batches: 220 block passes in place of 40), and a compiled block has but one backward pass, run
    each time. Turned off, the schedule's order stays, whole backward passes run in the place of those of inputs, and
    the bubbles that weights would fill stay empty: ``layout.stages.idle_slots`` says how many. Where it is on, parts
    under FSDP2 keep their parameters gathered from forward to backward. Other schedules do not look at it.

    Making one is collective over ``group``, and comes before other messages on it.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        stages: Sequence[int],
        num_stages: int,
        group: dist.ProcessGroup,
        schedule: str,
        num_micro_batches: int,
        device: torch.device,
        boundary: Callable[[Batch], tuple[Tensor, ...]],
        logits: Callable[[Batch], Tensor],
        *,
        split_backward: bool,
    ) -> None:
        pp, rank = group.size(), dist.get_rank(group)
        virtual = num_stages // pp
        if list(stages) != stages_of(schedule, pp, virtual, rank) or len(parts) != len(stages):
            raise ValueError(f"rank {rank} of {pp} cannot hold stages {list(stages)} of {num_stages} under {schedule}")
        self.parts = list(parts)
        self.has_first, self.has_last = 0 in stages, num_stages - 1 in stages
        self._stages, self._num_stages, self._virtual = list(stages), num_stages, virtual
        self._group, self._pp, self._rank = group, pp, rank
        self._schedule_name, self._num_micro_batches, self._device = schedule, num_micro_batches, device
        self._boundary, self._logits = boundary, logits
        self._split = split_backward and splits_backward(schedule)
        self._schedule: Any = None
        self._schedule_key: Any = None
        self._batches: Sequence[Batch] = ()
        self._loss: Callable[[Tensor, Batch], Tensor] | None = None
        for part in parts:
            part.register_forward_hook(self._ready_to_send)
            if not self._split:
                continue
            part.register_forward_pre_hook(_gradients_ready_to_send)
            if isinstance(part, FSDPModule):
                # A split backward looks for the graph's leaves among the parameters between forward and backward. Were
                # they resharded by then, it would not find them, and weights would silently be left without gradients.
                part.set_reshard_after_forward(False)
        # NCCL wants every rank in the first call on a group, and a pipeline's first message has but two.
        dist.all_reduce(torch.zeros((), device=device), group=group)

    def forward_backward(self, batches: Sequence[Batch], step: Tensor, loss: Callable[[Tensor, Batch], Tensor]) -> None:
        """Run every micro-batch of a step and add to the gradients those of the sum of ``loss`` over them.

        The batches, ``num_micro_batches`` of one shape, are the same on every rank; a shape that differs from the last
        call's allocates anew, for which the gradients have to be cleared. ``step`` is 0-dim int64. ``loss(outputs,
        batch)``, 0-dim, is called on the rank with the last stage only, in the order of the batches. Gradients are
        summed and reduced over the ranks of FSDP once, at the end; ``GradientSync`` is not needed.
        """
        if len(batches) != self._num_micro_batches:
            raise ValueError(
                f"{len(batches)} micro-batches were given, but the pipeline was made for {self._num_micro_batches}"
            )
        named = [_named(batch) for batch in batches]
        together = {name: torch.cat([one[name] for one in named]) for name in named[0]} | {"step": step}
        self._prepare(batches[0], list(together))
        self._batches, self._loss = batches, loss
        try:
            tokens = (torch.cat([batch.tokens_BT for batch in batches]),) if self.has_first else ()
            # The loss finds its batch by number. The numbers stay on the host, where reading them waits for nothing.
            numbers = torch.arange(len(batches))
            self._schedule.step(*tokens, target=numbers, return_outputs=False, **together)
        finally:
            self._batches, self._loss = (), None

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], consume: Callable[[Tensor, Batch], None]) -> None:
        """Run forward passes only: any number of batches, of any shapes, the same on every rank of the pipeline. Ranks
        that share parameters run equally many.

        ``consume(outputs, batch)`` is called on the rank with the last stage, in the order of the batches. The ranks
        advance in turns in which each runs one pass at most; parameters are left sharded.
        """
        arrived: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        sending: list[dist.Work] = []
        sent: tuple[Tensor, ...] = ()
        plan = self._forward_plan(len(batches))
        for turn in range(max(plan, default=-1) + 1):
            messages: list[dist.P2POp] = []
            outputs: tuple[Tensor, ...] = ()
            if (now := plan.get(turn)) is not None:
                stage, number = now
                batch = batches[number]
                inputs = arrived.pop(now) if stage else (batch.tokens_BT,)
                result = self.parts[self._stages.index(stage)](*inputs, **_named(batch))
                if stage == self._num_stages - 1:
                    consume(result, batch)
                else:
                    outputs = result if isinstance(result, tuple) else (result,)
                    there = self._rank_of(stage + 1)
                    if there == self._rank:
                        arrived[stage + 1, number] = outputs
                    else:
                        outputs = tuple(tensor.contiguous() for tensor in outputs)
                        messages += [self._message(dist.isend, tensor, there) for tensor in outputs]
            num_sends = len(messages)
            if (after := plan.get(turn + 1)) is not None and after[0] > 0 and after not in arrived:
                arrived[after] = tuple(
                    torch.empty_like(meta, device=self._device) for meta in self._boundary(batches[after[1]])
                )
                there = self._rank_of(after[0] - 1)
                messages += [self._message(dist.irecv, tensor, there) for tensor in arrived[after]]
            for work in sending:
                work.wait()
            # One call for both directions: two ranks that send to each other cannot wait for one another.
            works = dist.batch_isend_irecv(messages) if messages else []
            # One work for each message, or one for all of them where the backend joins them.
            sending, waiting = (works[:num_sends], works[num_sends:]) if len(works) == len(messages) else ([], works)
            sent = outputs  # kept until the next turn has waited for it
            for work in waiting:
                work.wait()
        for work in sending:
            work.wait()
        del sent
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # what is gathered would outlive the next update of the parameters

    def _forward_plan(self, num_batches: int) -> dict[int, tuple[int, int]]:
        """Turn -> (stage, number of the batch) that this rank runs in it.

        A batch advances by a stage in every turn, and no rank has two passes in one. Looped: batches enter pp in a row,
        then wait until those have left the first rank for the last time. V: every second turn, so that a rank's two
        stages, an odd number of stages apart, alternate.
        """
        if self._schedule_name == "zbv":
            starts = [2 * number for number in range(num_batches)]
        else:
            starts = [n // self._pp * self._pp * self._virtual + n % self._pp for n in range(num_batches)]
        return {start + stage: (stage, number) for number, start in enumerate(starts) for stage in self._stages}

    def _prepare(self, batch: Batch, names: list[str]) -> None:
        """Make the stages and the schedule, unless those of the last step fit: receive buffers have fixed shapes."""
        boundary, logits = self._boundary(batch), self._logits(batch)
        tokens = torch.empty_like(batch.tokens_BT, device="meta")
        key = [(tuple(meta.shape), meta.dtype) for meta in (tokens, *boundary, logits)], names
        if self._schedule_key == key:
            return
        self._schedule = None  # its buffers are free before the new ones are made
        # With the shapes known beforehand torch runs no extra forward pass to find them. That they need gradients is
        # what makes it send them.
        activations = tuple(meta.detach().to("meta").requires_grad_() for meta in boundary)
        made = [
            _Stage(
                part,
                stage,
                self._num_stages,
                self._device,
                input_args=activations if stage else (tokens,),
                output_args=activations if stage < self._num_stages - 1 else (logits.detach().requires_grad_(),),
                group=self._group,
                # A builder of gradients of weights that has nothing left to do: torch then runs the whole backward pass
                # where the schedule asks for the gradient of the inputs.
                dw_builder=None if self._split else _nothing_left,
            )
            for stage, part in zip(self._stages, self.parts, strict=True)
        ]
        single = self._schedule_name in SINGLE_STAGE_SCHEDULES
        # In the order in which the fields are passed: torch pairs them by place.
        chunks = {name: _Replicate() if name == "step" else TensorChunkSpec(0) for name in names}
        self._schedule = _SCHEDULES[self._schedule_name](
            made[0] if single else made,
            self._num_micro_batches,
            loss_fn=self._loss_of,
            kwargs_chunk_spec=chunks,
            scale_grads=False,  # gradients are summed; the loss was divided by the count of the whole step
        )
        self._schedule_key = key

    def _loss_of(self, outputs: Tensor, number: Tensor) -> Tensor:
        assert self._loss is not None
        loss = self._loss(outputs, self._batches[int(number)])
        return loss.clone() if self._split and loss._is_view() else loss  # as in _ready_to_send

    def _ready_to_send(self, _part: nn.Module, _inputs: Any, outputs: Any) -> Any:
        """Messages need contiguous tensors, and a split backward ends by detaching in place, which views refuse."""
        if not torch.is_grad_enabled():
            return outputs
        if isinstance(outputs, tuple):
            return tuple(self._ready_to_send(_part, _inputs, tensor) for tensor in outputs)
        if outputs.is_contiguous() and not (self._split and outputs._is_view()):
            return outputs
        return outputs.clone(memory_format=torch.contiguous_format)

    def _rank_of(self, stage: int) -> int:
        return rank_of_stage(self._schedule_name, self._pp, self._virtual, stage)

    def _message(self, operation: Any, tensor: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, group=self._group, group_peer=rank)


def sum_tied_gradients(first: Tensor | None, last: Tensor | None, group: dist.ProcessGroup, last_rank: int) -> None:
    """Make both gradients of a table that the first and the last stage share their sum, in place and bit-identical.

    ``first`` is given on rank 0 of ``group``, which holds the first stage, and ``last`` on ``last_rank``, which holds
    the last; None elsewhere. They are plain tensors of one shape and dtype: local shards of tables sharded alike.
    """
    rank = dist.get_rank(group)
    if (first is not None) != (rank == 0) or (last is not None) != (rank == last_rank):
        raise ValueError(
            f"rank {rank} of {group.size()}: the first gradient belongs to rank 0, the last to {last_rank}"
        )
    if first is not None and last is not None:
        first.add_(last)
        last.copy_(first)
        return
    mine, peer = (first, last_rank) if first is not None else (last, 0)
    if mine is None:
        return
    theirs = torch.empty_like(mine, memory_format=torch.contiguous_format)
    messages = [
        dist.P2POp(dist.isend, mine.contiguous(), group=group, group_peer=peer),
        dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
    ]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    mine.add_(theirs)  # a + b and b + a are the same bits


def _named(batch: Batch) -> dict[str, Tensor]:
    """What a part takes by name. Every stage has it from its own copy of the batch."""
    fields = {name: getattr(batch, name) for name in ("sample_ids_B", "positions_BT", "document_ids_BT")}
    return {name: tensor for name, tensor in fields.items() if tensor is not None}


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _gradients_ready_to_send(_part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A whole backward pass leaves gradients in the layout of the inputs, one of inputs alone in any."""
    return tuple(_ContiguousGradient.apply(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)


def _nothing_left() -> Callable[[], None]:
    return lambda: None
