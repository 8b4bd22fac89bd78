"""Evaluation on held-out text: one number whatever the layout, the uneven tail included."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rung.data import IGNORED
from rung.parallel import SpreadModel, all_reduce_sums, cut_context

if TYPE_CHECKING:
    from rung.data import Batch, DataSource
    from rung.layout import Layout
    from rung.objectives import Objective

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: SpreadModel,
    objective: Objective,
    source: DataSource,
    layout: Layout,
    rank: int,
    *,
    micro_batch_size: int,
    max_windows: float,
    device: torch.device,
) -> dict[str, float]:
    """``eval_loss`` (mean nats per label) and ``bits_per_byte`` over the held-out windows, or ``max_windows`` of
    them, evenly spread over the split: its beginning alone may be easier or harder than the rest.

    Windows are dealt to data ranks in turn. Every rank makes the same number of forward passes, since FSDP gathers in
    step; where windows run out a rank repeats one with its labels ignored. bits_per_byte is left out where labels stand
    for no bytes (a corpus without a tokenizer). Empty where nothing is held out.
    """
    windows = int(min(max_windows, source.num_eval_windows))
    if windows == 0:
        return {}
    rounds = math.ceil(windows / (layout.data_size * micro_batch_size))
    token_bytes = source.token_bytes
    was_training = model.training
    model.train(False)
    totals = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("sum", "count", "bytes")}

    def consume(outputs: Tensor, batch: Batch) -> None:
        sums = objective.sums(outputs, batch)  # all ranks that share the vocabulary take part
        if model.counts_outputs:
            for value in sums.values():
                totals["sum"] += value

    waiting: list[Batch] = []
    for turn in range(rounds):
        first = turn * layout.data_size * micro_batch_size + layout.data_rank(rank)
        mine = [first + layout.data_size * i for i in range(micro_batch_size)]
        batch = source.read_eval([min(w, windows - 1) * source.num_eval_windows // windows for w in mine])
        batch.labels_BT[[w >= windows for w in mine]] = IGNORED
        batch = cut_context(batch, layout, rank)
        if layout.counts_tokens(rank):
            labels = batch.labels_BT[batch.labels_BT != IGNORED]
            totals["count"] += len(labels)
            if token_bytes is not None:
                totals["bytes"] += int(token_bytes[labels].sum())
        waiting.append(batch.to(device))
        if len(waiting) == layout.pp or turn == rounds - 1:  # a pipeline is full with one batch for each of its ranks
            model.forward(waiting, consume)
            waiting.clear()
    model.train(was_training)
    total = {name: float(value) for name, value in all_reduce_sums(totals, device).items()}
    loss = total["sum"] / max(total["count"], 1)
    bits = total["sum"] / math.log(2) / total["bytes"] if total["bytes"] else None
    return {"eval_loss": loss} | ({"bits_per_byte": bits} if bits is not None else {})
