"""Bugs that a framework like this one really has. Each must turn the law red, or a test is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

MUTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {}
CASES: dict[str, dict[str, Any]] = {}
"""Per mutant, the choices under which its bug shows; the rest is the mutant test's plain case."""


def mutant(**choices: Any) -> Callable[[Callable[[], Iterator[None]]], None]:
    """Register a mutant under its function's name, with the choices that its case needs."""

    def register(function: Callable[[], Iterator[None]]) -> None:
        MUTANTS[function.__name__] = contextlib.contextmanager(function)
        CASES[function.__name__] = choices

    return register


@mutant()
def gradients_averaged_over_ranks() -> Iterator[None]:
    """FSDP's default divide factor."""
    from torch.distributed.fsdp import FSDPModule

    with mock.patch.object(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None):
        yield


@mutant()
def mean_of_micro_batch_means() -> Iterator[None]:
    """Each micro-batch divides by its own count."""
    parts = import_module("rung.loop.step")
    page = import_module("rung.loop.train")

    real = parts.forward_backward

    def wrong(model: Any, objective: Any, batch: Any, step: Any) -> Any:
        totals: dict[str, Any] = {}
        for micro in batch.micro_batches:
            counts = {
                k: int(v) * len(batch.micro_batches) * dist.get_world_size() for k, v in objective.counts(micro).items()
            }
            part = parts.StepBatch(batch.sample_ids, [micro], counts, batch.stop)
            for name, value in real(model, objective, part, step).items():
                totals[name] = totals.get(name, 0) + value
        return totals

    with mock.patch.object(page, "forward_backward", wrong):
        yield


@mutant()
def counts_stay_local() -> Iterator[None]:
    """The count of labels is this rank's times the number of ranks, not the sum over ranks."""
    parts = import_module("rung.loop.step")

    real = parts.total_counts

    def wrong(counts: Any, expected: Any, read: Any, stop: bool = False) -> Any:
        _, stops = real(counts, expected, read, stop)
        return {k: sum(int(c[k]) for c in counts) * dist.get_world_size() for k in counts[0]}, stops

    with mock.patch.object(parts, "total_counts", wrong):
        yield


@mutant(accumulation=2)
def last_micro_batch_overwrites_gradients() -> Iterator[None]:
    """Gradients are cleared between micro-batches."""
    parts = import_module("rung.parallel.spread")

    real = parts.run_model

    def wrong(model: Any, batch: Any, step: Any = None) -> Any:
        model.zero_grad()
        return real(model, batch, step)

    with mock.patch.object(parts, "run_model", wrong):
        yield


@mutant(accumulation=2, defer_sync=True)
def deferred_sum_never_happens() -> Iterator[None]:
    """The last micro-batch is not told that it is the last."""
    from rung.parallel import SpreadModel

    real = SpreadModel._synchronize
    with mock.patch.object(SpreadModel, "_synchronize", lambda self, *, is_last: real(self, is_last=False)):
        yield


@mutant(dp_replicate=2, dp_shard=2)
def copies_never_summed() -> Iterator[None]:
    """Hybrid sharding without the sum over copies."""
    from torch.distributed.fsdp import FSDPModule

    real = FSDPModule.set_requires_all_reduce
    with mock.patch.object(FSDPModule, "set_requires_all_reduce", lambda self, wanted, **kw: real(self, False, **kw)):
        yield


@mutant()
def gradients_kept_over_steps() -> Iterator[None]:
    """zero_grad is forgotten."""
    from torch import nn

    with mock.patch.object(nn.Module, "zero_grad", lambda self, set_to_none=True: None):
        yield


@mutant()
def ranks_read_the_same_slice() -> Iterator[None]:
    """Every data rank reads the first rank's samples."""
    from rung.layout import Layout

    with mock.patch.object(Layout, "data_rank", lambda self, rank: 0):
        yield


@mutant()
def order_depends_on_the_world() -> Iterator[None]:
    """Consumed samples are counted in ranks."""
    from law.harness import UnevenLabels

    real = UnevenLabels.__getattr__

    def wrong(self: Any, name: str) -> Any:
        value = real(self, name)
        return (lambda first, count: value(first * dist.get_world_size(), count)) if name == "sample_ids" else value

    with mock.patch.object(UnevenLabels, "__getattr__", wrong):
        yield


@mutant()
def labels_not_shifted() -> Iterator[None]:
    """Labels are the inputs themselves."""
    from law.harness import UnevenLabels

    real = UnevenLabels.read

    def wrong(self: Any, sample_ids: Any) -> Any:
        batch = real(self, sample_ids)
        batch.labels_BT[:] = torch.where(batch.labels_BT == -100, -100, batch.tokens_BT)
        return batch

    with mock.patch.object(UnevenLabels, "read", wrong):
        yield


@mutant()
def start_drawn_per_shard() -> Iterator[None]:
    """Each shard draws its own numbers from zero."""
    from rung.layout import Box

    module = import_module("rung.parallel.initialize")

    real = module.normals_box
    wrong = lambda key, shape, box: real(key, box.sizes, Box((0,) * len(box.sizes), box.sizes))  # noqa: E731
    with mock.patch.object(module, "normals_box", wrong):
        yield


@mutant(tied=True, dp_shard=1, dp_replicate=1)
def tie_lost_when_materialised() -> Iterator[None]:
    """The head gets storage of its own, with the same values, and nobody ties it again."""
    recipe = import_module("rung.recipes.pretrain")
    real = recipe.initialize

    def wrong(model: Any, device: Any, seed: int) -> None:
        real(model, device, seed)
        part = model.parts[0]
        part.lm_head.weight = torch.nn.Parameter(part.embed_tokens.weight.detach().clone())

    with mock.patch.object(recipe, "initialize", wrong):
        yield


@mutant(dropout=0.25)
def dropout_by_row_of_the_micro_batch() -> Iterator[None]:
    """Draws are keyed by the row in the micro-batch instead of the sample."""
    parts = import_module("rung.parallel.spread")

    real = parts.run_model

    def wrong(model: Any, batch: Any, step: Any = None) -> Any:
        batch.sample_ids_B[:] = torch.arange(len(batch.sample_ids_B))
        return real(model, batch, step)

    with mock.patch.object(parts, "run_model", wrong):
        yield


@mutant(dropout=0.25)
def dropout_same_in_every_step() -> Iterator[None]:
    """Draws do not know the step."""
    parts = import_module("rung.parallel.spread")

    real = parts.run_model
    with mock.patch.object(
        parts,
        "run_model",
        lambda model, batch, step=None: real(model, batch, torch.zeros_like(step) if step is not None else None),
    ):
        yield


@mutant(dropout=0.25, recompute="full")
def recompute_draws_again() -> Iterator[None]:
    """The recomputed forward pass sees other draws than the first."""
    module = import_module("rung.models.decoder")

    real = module.dropout_mask

    def wrong(key: Any, sample_ids: Any, *args: Any, **kwargs: Any) -> Any:
        in_backward = torch._C._current_graph_task_id() != -1
        return real(key, sample_ids + int(in_backward), *args, **kwargs)

    with mock.patch.object(module, "dropout_mask", wrong):
        yield


@mutant(packed=True)
def documents_see_each_other() -> Iterator[None]:
    """Document ids are dropped on the way to the model."""
    parts = import_module("rung.parallel.spread")

    real = parts.run_model

    def wrong(model: Any, batch: Any, step: Any = None) -> Any:
        if batch.document_ids_BT is not None:
            batch.document_ids_BT[:] = 0
        return real(model, batch, step)

    with mock.patch.object(parts, "run_model", wrong):
        yield


@mutant(dp_replicate=2, dp_shard=1)
def norm_counts_copies() -> Iterator[None]:
    """Every copy of a gradient element enters the norm."""
    page = import_module("rung.loop.train")

    def wrong(parameters: Any, device: Any) -> Any:
        return sum((p.grad.double() ** 2).sum() for p in parameters if p.grad is not None)

    with mock.patch.object(page, "squared_norm", wrong):
        yield


@mutant()
def norm_of_one_rank() -> Iterator[None]:
    """The norm is this rank's share, scaled up."""
    page = import_module("rung.loop.train")

    def wrong(sums: Any, device: Any) -> Any:
        result = {k: v.detach().double() for k, v in sums.items()}
        for k in result:
            if k == "norm²":
                result[k] = result[k] * dist.get_world_size()
            else:
                dist.all_reduce(result[k])
        return result

    with mock.patch.object(page, "all_reduce_sums", wrong):
        yield


@mutant()
def loss_of_one_rank() -> Iterator[None]:
    """The reported loss is this rank's."""
    page = import_module("rung.loop.train")

    real = page.all_reduce_sums

    def wrong(sums: Any, device: Any) -> Any:
        local = {k: v.detach().double() * dist.get_world_size() for k, v in sums.items()}
        return real(sums, device) | {k: v for k, v in local.items() if k != "norm²"}

    with mock.patch.object(page, "all_reduce_sums", wrong):
        yield


@mutant(optim="muon", clip=0.0)
def muon_orthogonalises_shards() -> Iterator[None]:
    """Each rank orthogonalises the rows it holds."""
    from dataclasses import replace

    from rung.layout import LogicalTensor

    module = import_module("rung.optim.muon")
    real = module.Muon.__init__

    def alone(p: Any) -> Any:
        logical = LogicalTensor.from_spec(p.name, tuple(p.local.shape), p.local.dtype, {}, {}, {})
        return replace(p, logical=logical, group=None) if p.local.ndim == 2 and p.local.numel() else p

    with mock.patch.object(
        module.Muon, "__init__", lambda self, ps, config: real(self, [alone(p) for p in ps], config)
    ):
        yield


@mutant(optim="spam")
def subset_drawn_per_shard() -> Iterator[None]:
    """Each shard numbers its own elements from zero."""
    from rung.layout import LogicalTensor

    module = import_module("rung.optim.spam")
    real = module.kept_elements

    def wrong(key: Any, epoch: Any, density: float, logical: Any, local_shape: Any) -> Any:
        alone = LogicalTensor.from_spec(logical.name, tuple(local_shape), logical.dtype, {}, {}, {})
        return real(key, epoch, density, alone, local_shape)

    with mock.patch.object(module, "kept_elements", wrong):
        yield


@mutant(optim="spam", dp_replicate=2, dp_shard=1)
def spikes_of_every_copy_counted() -> Iterator[None]:
    """What is reported of spikes grows with the number of copies."""
    module = import_module("rung.optim.spam")
    with mock.patch.object(module, "_runs", lambda member, local: [(0, local.numel(), True)] if local.numel() else []):
        yield


@mutant(optim="stable_spam")
def largest_element_of_one_shard() -> Iterator[None]:
    """Each shard clips by its own largest element."""
    module = import_module("rung.optim.stable_spam")
    real = module._all_reduce
    with mock.patch.object(module, "_all_reduce", lambda m, rows, op: rows if op == "max" else real(m, rows, op)):
        yield


@mutant(optim="stable_spam")
def norm_of_one_shard() -> Iterator[None]:
    """Each shard is scaled by its own norm."""
    module = import_module("rung.optim.stable_spam")
    real = module._all_reduce
    with mock.patch.object(module, "_all_reduce", lambda m, rows, op: rows if op == "sum" else real(m, rows, op)):
        yield


@mutant(optim="stable_spam", tensor="4", dp_shard=1, kv_heads=2)
def shared_heads_counted_twice() -> Iterator[None]:
    """A tensor's norm counts K/V heads as often as there are ranks that hold them."""
    module = import_module("rung.optim.stable_spam")
    with mock.patch.object(
        module, "_counted", lambda members: {m.tensor: [p for p in m.logical.pieces() if p.box.numel] for m in members}
    ):
        yield


@mutant(clip=0.5)
def clipping_forgotten() -> Iterator[None]:
    """The scale never reaches the optimizer."""
    from law.harness import RecordingOptimizer

    real = RecordingOptimizer.step

    def wrong(self: Any, lr: float, *, grad_scale: Any = None, skip: Any = None) -> None:
        real(self, lr, grad_scale=None, skip=skip)

    with mock.patch.object(RecordingOptimizer, "step", wrong):
        yield


@mutant()
def evaluation_counts_padding() -> Iterator[None]:
    """Windows that only keep ranks in step are counted."""
    module = import_module("rung.loop.evaluate")

    class Short:
        def __init__(self, source: Any) -> None:
            self._source = source

        def __getattr__(self, name: str) -> Any:
            return getattr(self._source, name)

        @property
        def num_eval_windows(self) -> int:
            return self._source.num_eval_windows + 1

        def read_eval(self, windows: Any) -> Any:
            return self._source.read_eval([w % self._source.num_eval_windows for w in windows])

    real = module.evaluate
    page = import_module("rung.loop.train")

    def wrong(model: Any, objective: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        return real(model, objective, Short(source), *args, **kwargs)

    with mock.patch.object(page, "evaluate", wrong):
        yield


@mutant(dropout=0.25)
def model_left_in_evaluation_mode() -> Iterator[None]:
    """Nobody turns dropout on again after an evaluation."""
    from rung.models.decoder import Decoder

    with mock.patch.object(
        Decoder, "train", lambda self, mode=True: torch.nn.Module.train(self, mode and self.training)
    ):
        yield


@mutant()
def evaluation_batches_counted_in_ranks() -> Iterator[None]:
    """How much is evaluated follows the number of ranks."""
    page = import_module("rung.loop.train")
    real = page.evaluate

    def wrong(*args: Any, max_windows: float, **kwargs: Any) -> Any:
        return real(*args, max_windows=max_windows * dist.get_world_size(), **kwargs)

    with mock.patch.object(page, "evaluate", wrong):
        yield


@mutant()
def schedule_counts_samples_of_one_rank() -> Iterator[None]:
    """The schedule runs faster on more ranks."""
    recipe = import_module("rung.recipes.pretrain")
    real = recipe.lr_at

    def wrong(schedule: Any, step: int, steps: int, lr: float) -> float:
        return real(schedule, min(step * dist.get_world_size(), steps), steps, lr)

    with mock.patch.object(recipe, "lr_at", wrong):
        yield


@mutant(clip=1000.0)
def small_gradients_scaled_up() -> Iterator[None]:
    """Gradients below the clipping norm are scaled up instead of left alone."""
    from law.harness import RecordingOptimizer

    real = RecordingOptimizer.step

    def wrong(self: Any, lr: float, *, grad_scale: Any = None, skip: Any = None) -> None:
        real(self, lr, grad_scale=torch.full_like(grad_scale, 1e-3), skip=skip)

    with mock.patch.object(RecordingOptimizer, "step", wrong):
        yield


@mutant(tensor="2", dp_shard=1)
def norms_keep_their_tokens_gradients() -> Iterator[None]:
    """Gradients of what is a copy on every tensor rank stay each rank's own."""
    module = import_module("rung.parallel.spread")

    with mock.patch.object(module, "add_partial_gradients", lambda partial, group: None):
        yield


@mutant(tensor="4", dp_shard=1, kv_heads=2)
def shared_heads_summed_over_all() -> Iterator[None]:
    """K/V heads that two ranks share get the gradients of all four."""
    module = import_module("rung.parallel.spread")
    real = module.add_partial_gradients

    def wrong(partial: Any, group: Any) -> None:
        real([p._replace(spread=replace(p.spread, replicas=group.size())) for p in partial], group)

    with mock.patch.object(module, "add_partial_gradients", wrong):
        yield


@mutant(tensor="2-whole-stream", dp_shard=1)
def region_gradients_stay_partial() -> Iterator[None]:
    """What enters a split region gets the gradient of this rank's features only."""
    module = import_module("rung.parallel.tensor")

    with mock.patch.object(module, "all_reduce_backward", lambda x, group: x):
        yield


@mutant(tensor="2", dp_shard=1, tied=True)
def head_input_gradient_not_summed() -> Iterator[None]:
    """The gradient of what the head reads is this rank's columns', scaled up."""
    module = import_module("rung.parallel.collectives")
    real = module._reduce_scatter

    def wrong(x: Any, dim: int, name: str) -> Any:
        if torch._C._current_graph_task_id() == -1:
            return real(x, dim, name)
        group = module.group_by_name(name)
        return x.chunk(group.size(), dim)[group.rank()].contiguous() * group.size()

    with mock.patch.object(module, "_reduce_scatter", wrong):
        yield


@mutant(tensor="2", dp_shard=1, dropout=0.25)
def stream_dropout_by_local_position() -> Iterator[None]:
    """Every tensor rank draws for the first part of the tokens."""
    module = import_module("rung.models.decoder")
    real = module.dropout_mask

    def wrong(key: Any, sample_ids: Any, positions: Any, *args: Any) -> Any:
        return real(key, sample_ids, positions - positions[:, :1], *args)

    with mock.patch.object(module, "dropout_mask", wrong):
        yield


@mutant(tensor="2", dp_shard=1)
def vocabulary_starts_at_zero() -> Iterator[None]:
    """Every rank takes its columns for the first of the vocabulary."""
    from rung.parallel import SpreadModel

    real = SpreadModel._vocabulary
    with mock.patch.object(SpreadModel, "_vocabulary", lambda self: (0, real(self)[1])):
        yield


@mutant(tensor="2", dp_shard=1)
def loss_counted_by_every_tensor_rank() -> Iterator[None]:
    """Ranks that share a vocabulary each report the loss."""
    from rung.parallel import SpreadModel

    with mock.patch.object(SpreadModel, "counts_outputs", property(lambda self: self.has_last_stage)):
        yield


@mutant(pipeline="1f1b-2", accumulation=2, dp_shard=1)
def labels_counted_by_every_stage() -> Iterator[None]:
    """Ranks that read the same tokens each count them."""
    from rung.layout import Layout

    with mock.patch.object(Layout, "counts_tokens", lambda self, rank: True):
        yield


@mutant(context="ring-2", dp_shard=1)
def norm_counts_one_context_rank() -> Iterator[None]:
    """Context ranks are taken for copies: only the first one's share enters the norm."""
    page = import_module("rung.loop.train")
    real = page.squared_norm

    def wrong(parameters: Any, device: Any) -> Any:
        return real(parameters, device) * (2 if dist.get_rank() == 0 else 0)

    with mock.patch.object(page, "squared_norm", wrong):
        yield


@mutant(pipeline="gpipe-2", accumulation=2, dp_shard=1)
def schedule_divides_by_micro_batches() -> Iterator[None]:
    """torch's default: gradients are scaled by the number of micro-batches."""
    module = import_module("rung.parallel.pipeline")
    real = module.ScheduleGPipe

    def wrong(*args: Any, scale_grads: bool, **kwargs: Any) -> Any:
        return real(*args, **kwargs)

    with mock.patch.dict(module._SCHEDULES, {"gpipe": wrong}):
        yield


@mutant(pipeline="1f1b-2", accumulation=2, dp_shard=1, tied=True)
def tied_stages_learn_apart() -> Iterator[None]:
    """The embedding and the head of different stages keep their own gradients."""
    module = import_module("rung.parallel.pipeline")

    with mock.patch.object(module, "sum_tied_gradients", lambda *args: None):
        yield


@mutant(pipeline="zbv-2", accumulation=2, dp_shard=1, tied=True)
def tied_table_counted_twice() -> Iterator[None]:
    """The norm counts the table of the first stage and that of the last."""
    from rung.parallel import SpreadModel

    real = SpreadModel.logical_tensors

    def wrong(self: Any) -> Any:
        from rung.layout import LogicalTensor

        found = real(self)
        alias = found.get("lm_head.weight")
        if alias is not None:
            shape = alias.shape
            found["lm_head.weight"] = LogicalTensor.from_spec("lm_head.weight", shape, alias.dtype, {}, {}, {})
        return found

    recipe = SpreadModel.local_parameters

    def parameters(self: Any, **kwargs: Any) -> Any:
        with mock.patch.object(SpreadModel, "logical_tensors", wrong):
            return recipe(self, **kwargs)

    with mock.patch.object(SpreadModel, "local_parameters", parameters):
        yield


@mutant(pipeline="interleaved-2", accumulation=2, dp_shard=1)
def loss_of_another_micro_batch() -> Iterator[None]:
    """The last stage holds outputs against the labels of the next micro-batch."""
    from rung.parallel.pipeline import Pipeline

    real = Pipeline._loss_of
    with mock.patch.object(
        Pipeline, "_loss_of", lambda self, outputs, number: real(self, outputs, (number + 1) % len(self._batches))
    ):
        yield


@mutant(pipeline="1f1b-2", accumulation=2, dp_shard=1, dropout=0.25)
def stages_forget_the_step() -> Iterator[None]:
    """Draws inside a pipeline do not know the step."""
    from rung.parallel.pipeline import Pipeline

    real = Pipeline.forward_backward
    with mock.patch.object(
        Pipeline,
        "forward_backward",
        lambda self, batches, step, loss: real(self, batches, torch.zeros_like(step), loss),
    ):
        yield


@mutant(context="ring-2", dp_shard=1)
def tokens_dealt_in_order() -> Iterator[None]:
    """Context ranks get one stretch of tokens each, while attention believes in the zigzag."""
    from rung.layout.context import Zigzag

    module = import_module("rung.loop.step")
    real = module.cut_context

    def stretch(self: Any, place: int) -> Any:
        starts = (2 * place * self.chunk, (2 * place + 1) * self.chunk)
        return [range(start, start + self.chunk) for start in starts]

    def wrong(batch: Any, layout: Any, rank: int) -> Any:
        with mock.patch.object(Zigzag, "ranges", stretch):
            return real(batch, layout, rank)

    with mock.patch.object(module, "cut_context", wrong):
        yield


@mutant(context="ring-2", dp_shard=1)
def ring_parts_averaged() -> Iterator[None]:
    """Parts of attention are averaged instead of weighted by their log-sum-exp."""
    module = import_module("rung.parallel.context")

    with mock.patch.object(module, "merge_lse", lambda out_a, lse_a, out_b, lse_b: ((out_a + out_b) / 2, lse_a)):
        yield


@mutant(context="ring-2", dp_shard=1)
def ring_gradients_stay_where_they_were_made() -> Iterator[None]:
    """Gradients of keys and values are never sent home."""
    module = import_module("rung.parallel.context")
    real = module._Ring.pass_on

    def wrong(self: Any, messages: Any) -> Any:
        if torch._C._current_graph_task_id() != -1 and len(messages) == 1 and messages[0].dim() == 5 and self.sent:
            return module._Hop(messages, list(messages), [])
        self.sent = True
        return real(self, messages)

    with mock.patch.object(module._Ring, "pass_on", wrong), mock.patch.object(module._Ring, "sent", False, create=True):
        yield


@mutant(context="ring-2", dp_shard=1, packed=True)
def ring_forgets_documents() -> Iterator[None]:
    """Attention over the ring does not compare documents."""
    module = import_module("rung.parallel.context")

    with mock.patch.object(module.ContextMask, "forward", lambda self, positions, documents: None):
        yield


@mutant(context="ulysses-2", dp_shard=1)
def exchanged_tokens_out_of_order() -> Iterator[None]:
    """What neighbours exchange is joined rank by rank, not in the order of the window."""
    module = import_module("rung.parallel.context")

    with mock.patch.object(module, "_assemble", lambda pieces: pieces.movedim(0, 1).flatten(1, 2)):
        yield


@mutant(context="ring-2", dp_shard=1, dropout=0.25)
def context_dropout_by_local_position() -> Iterator[None]:
    """Draws know the index among the tokens of a rank, not in the window."""
    module = import_module("rung.models.decoder")
    real = module.dropout_mask

    def wrong(key: Any, sample_ids: Any, positions: Any, *args: Any) -> Any:
        local = torch.arange(positions.shape[1]).expand_as(positions)
        return real(key, sample_ids, local, *args)

    with mock.patch.object(module, "dropout_mask", wrong):
        yield
