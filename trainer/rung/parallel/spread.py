"""A spread model as a training loop sees it: one thing to run, whatever the number of parts and ranks behind it.

Legend: B sequences, T tokens, D hidden size, N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import rung_kernels
from rung.data import Batch
from rung.layout import Facts, LogicalTensor, chunk, clean_name, local_view, logical_tensors
from rung.layout.stages import rank_of_stage
from rung.models import Decoder, ModelConfig
from rung.optim import LocalParameter, StateTensor
from rung.parallel.config import Dtypes, ParallelConfig
from rung.parallel.context import cut_context
from rung.parallel.gradients import Partial, add_partial_gradients
from rung.parallel.mesh import FSDP, Groups
from rung.parallel.tensor import TensorPlan

if TYPE_CHECKING:
    from rung.parallel.pipeline import Pipeline

__all__ = ["SpreadModel", "run_model"]


class SpreadModel:
    """What of a model is on this rank: ``parts``, one for each of ``stages``; the whole model where nothing is staged.

    Collective over the ranks that share the model: ``materialize``, ``forward_backward``, ``forward`` and
    ``finish_gradients``; over those of tp: ``cross_entropy``; over the world: ``next_token_logits``, and
    ``local_parameters`` of whole tensors the first time. The rest is local.
    """

    def __init__(
        self,
        parts: Sequence[Decoder],
        stages: Sequence[int],
        num_stages: int,
        groups: Groups,
        config: ParallelConfig,
        dtypes: Dtypes,
        plans: Sequence[TensorPlan],
        ties: dict[str, str],
        *,
        num_micro_batches: int,
        split_backward: bool,
    ) -> None:
        self.parts, self.stages, self.num_stages = list(parts), list(stages), num_stages
        self.groups, self.layout = groups, groups.layout
        self._config, self._dtypes, self._plans, self._ties = config, dtypes, plans, ties
        self._num_micro_batches, self._split_backward = num_micro_batches, split_backward
        self._pipeline: Pipeline | None = None

    @property
    def config(self) -> ModelConfig:
        """The settings of the whole model."""
        return self.parts[0].config

    @property
    def has_last_stage(self) -> bool:
        """Whether the outputs of the model are here."""
        return self.stages[-1] == self.num_stages - 1

    @property
    def counts_outputs(self) -> bool:
        """Whether this rank, of those that have the outputs for the same tokens, is the one that counts them."""
        return self.has_last_stage and self.groups.place["tp"] == 0

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their logical names; of names that are tied within a part, the first."""
        for part in self.parts:
            for name, parameter in part.named_parameters():
                yield clean_name(name), parameter

    def logical_tensors(self) -> dict[str, LogicalTensor]:
        """Where this rank's parts of the parameters sit in the whole, by logical name."""
        found: dict[str, LogicalTensor] = {}
        for part, plan in zip(self.parts, self._plans, strict=True):
            names = {clean_name(name) for name, _ in part.named_parameters()}
            facts: dict[str, Facts] = {name: dict(fact) for name, fact in plan.facts.items()}  # type: ignore[misc]
            for alias in names & self._ties.keys():
                facts.setdefault(alias, {})["tied_to"] = self._ties[alias]
            found |= logical_tensors(part, holders=[self.groups.rank], facts=facts)
        return found

    def local_parameters(self, *, whole_tensors: bool = False) -> list[LocalParameter]:
        """What an optimizer updates: this rank's part of each trainable parameter, plain tensors on its storage.

        With ``whole_tensors`` each knows the group of ranks that hold the whole of it.
        """
        logical = self.logical_tensors()
        group = self.groups.group(*FSDP, "tp") if whole_tensors else None
        return [
            LocalParameter(name, local_view(parameter).detach(), logical[name], group)
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        ]

    def state_tensors(self) -> dict[str, StateTensor]:
        """What a checkpoint holds of the model, on its live storage: every parameter, trainable or not, and every
        persistent buffer, of which the ranks of a stage have copies. Buffers must change only where parameters do: a
        copy of them may run beside forward and backward passes."""
        logical = self.logical_tensors()
        tensors = {name: StateTensor(local_view(p).detach(), logical[name]) for name, p in self.named_parameters()}
        of_stage = [rank for rank in range(self.layout.world_size) if self._shares_stages(rank)]
        for part in self.parts:
            for name, buffer in _persistent_buffers(part):
                tensors[name] = StateTensor(buffer, LogicalTensor.from_tensor(name, buffer, holders=of_stage))
        return tensors

    def _shares_stages(self, rank: int) -> bool:
        """Whether another rank holds the same stages as this one."""
        return self.layout.coordinate(rank)["pp"] == self.groups.place["pp"]

    def materialize(self, device: torch.device) -> None:
        """Give the parts storage on ``device``, with undefined values."""
        for part in self.parts:
            part.to_empty(device=device)
            part.tie_weights()  # to_empty gives tied names storage of their own
        group = self.groups.group("pp")
        if group is not None:
            from rung.parallel.pipeline import Pipeline  # a second of imports that most runs can do without

            self._pipeline = Pipeline(
                self.parts,
                self.stages,
                self.num_stages,
                group,
                self._config.pp_schedule,
                self._num_micro_batches,
                device,
                boundary=self._boundary,
                logits=self._logits,
                split_backward=self._split_backward,
            )

    def train(self, mode: bool = True) -> None:
        """Training mode, in which dropout draws, or evaluation mode."""
        for part in self.parts:
            part.train(mode)

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.parts[0].training

    def forward_backward(self, batches: Sequence[Batch], step: Tensor, loss: Callable[[Tensor, Batch], Tensor]) -> None:
        """Run all micro-batches of a step; gradients of the sum of losses are added up.

        ``loss`` turns a micro-batch's outputs into a scalar, on the ranks that have outputs. ``step`` is a 0-dim int64
        tensor, the step number that keys draws.
        """
        if self._pipeline is not None:
            self._pipeline.forward_backward(batches, step, loss)
            return
        for index, batch in enumerate(batches):
            self._synchronize(is_last=index == len(batches) - 1)
            loss(run_model(self.parts[0], batch, step), batch).backward()

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], consume: Callable[[Tensor, Batch], None]) -> None:
        """Run batches without gradients; ``consume`` gets their outputs in order, on the ranks that have outputs."""
        if self._pipeline is not None:
            self._pipeline.forward(batches, consume)
            return
        for batch in batches:
            consume(run_model(self.parts[0], batch), batch)
        for module in self.parts[0].modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root stays gathered after a forward pass without a backward pass

    @torch.no_grad()
    def next_token_logits(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """float64 [V]: what the model says comes after ``tokens``, the same on every rank. Collective over the world.

        Tokens that only fill the last piece of a window follow the last one, which does not see them.
        """
        unit = self.layout.tp * (2 * self.layout.cp if self.layout.cp > 1 else 1)
        length = -(-len(tokens) // unit) * unit
        row = torch.tensor([[*tokens, *([0] * (length - len(tokens)))]])
        batch = Batch(row, row, torch.zeros(1, dtype=torch.int64), torch.arange(length).unsqueeze(0))
        device = next(self.parts[0].parameters()).device
        logits_V = torch.zeros(self.config.vocab_size, dtype=torch.float64, device=device)

        def consume(outputs_BTV: Tensor, batch: Batch) -> None:
            first, number = self._vocabulary()
            at_last_T = batch.positions_BT[0] == len(tokens) - 1  # on one context rank
            logits_V[first : first + number] = outputs_BTV[0, at_last_T].double().sum(0)

        self.forward([cut_context(batch, self.layout, self.groups.rank).to(device)], consume)
        if self.layout.world_size > 1:
            if self.layout.data_rank(self.groups.rank) > 0:  # the data ranks have all said the same
                logits_V.zero_()
            dist.all_reduce(logits_V)
        result: NDArray[np.float64] = logits_V.cpu().numpy()
        return result

    def finish_gradients(self, parameters: Sequence[LocalParameter]) -> None:
        """Point every local parameter's ``grad`` at what it holds of the step's gradient, and add what several ranks
        have of the same elements: one message for tensor parallelism, one for an embedding tied across stages."""
        trainable = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        for (_, parameter), local in zip(trainable, parameters, strict=True):
            local.local.grad = None if parameter.grad is None else local_view(parameter.grad)
        by_name = {local.name: local for local in parameters}
        group = self.groups.group("tp")
        if group is not None:
            partial = [
                Partial(by_name[known.name], known)
                for plan in self._plans
                for known in plan.partial
                if known.name in by_name
            ]
            add_partial_gradients(partial, group)
        self._sum_tied(by_name)

    def zero_grad(self) -> None:
        """Forget gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def cross_entropy(self, logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> Tensor:
        """``rung_kernels.cross_entropy`` of logits whose vocabulary may be spread over tp."""
        group = self.groups.group("tp")
        if group is None:
            return rung_kernels.cross_entropy(logits_NV, labels_N, ignore_index)
        first, _ = self._vocabulary()
        return rung_kernels.cross_entropy(logits_NV, labels_N, ignore_index, group=group, first=first)

    def _vocabulary(self) -> tuple[int, int]:
        """First column and number of columns of the logits that are here."""
        return chunk(self.config.vocab_size, self.layout.tp, self.groups.place["tp"])

    def _synchronize(self, *, is_last: bool) -> None:
        """Sharded sums happen every micro-batch unless deferred; sums over copies only after the last."""
        root = self.parts[0]
        if not isinstance(root, FSDPModule):
            return
        if self._config.defer_gradient_sync:
            root.set_requires_gradient_sync(is_last)
        else:
            root.set_requires_all_reduce(is_last)
        root.set_is_last_backward(is_last)

    def _sum_tied(self, by_name: dict[str, LocalParameter]) -> None:
        """A table that the first and the last stage share gets the sum of their gradients, on both."""
        group = self.groups.group("pp")
        if group is None:
            return
        from rung.parallel.pipeline import sum_tied_gradients

        last_rank = rank_of_stage(self._config.pp_schedule, self.layout.pp, len(self.stages), self.num_stages - 1)
        for alias, name in self._ties.items():
            ends = [by_name.get(name), by_name.get(alias)]
            for parameter in ends:
                if parameter is not None:
                    parameter.local.grad = parameter.gradient()
            first, last = (None if parameter is None else parameter.grad for parameter in ends)
            sum_tied_gradients(first, last, group, last_rank)

    def _boundary(self, batch: Batch) -> tuple[Tensor, ...]:
        """The residual stream as it goes from stage to stage, on the meta device."""
        num_sequences, num_tokens = batch.tokens_BT.shape
        if self._config.sequence_parallel:
            num_tokens //= self.layout.tp
        width = self.config.hidden_size
        return (torch.empty(num_sequences, num_tokens, width, dtype=self._dtypes.compute, device="meta"),)

    def _logits(self, batch: Batch) -> Tensor:
        """The outputs of the last stage, on the meta device."""
        return torch.empty(*batch.tokens_BT.shape, self._vocabulary()[1], dtype=self._dtypes.compute, device="meta")


def _persistent_buffers(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a state_dict would hold, by clean name."""
    for path, module in part.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield clean_name(f"{path}.{name}" if path else name), buffer


def run_model(model: nn.Module, batch: Batch, step: Tensor | None = None) -> Tensor:
    """One forward pass of a whole model on a batch."""
    outputs: Tensor = model(
        batch.tokens_BT,
        sample_ids_B=batch.sample_ids_B,
        positions_BT=batch.positions_BT,
        document_ids_BT=batch.document_ids_BT,
        step=step,
    )
    return outputs
