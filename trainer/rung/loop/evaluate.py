"""Evaluation on held-out text: one number whatever the layout, the uneven tail included."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rung.data import IGNORED
from rung.loop.step import run_model
from rung.parallel import all_reduce_sums

if TYPE_CHECKING:
    from rung.data import DataSource
    from rung.layout import Layout
    from rung.objectives import Objective

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
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
    model.eval()
    totals = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("sum", "count", "bytes")}
    for turn in range(rounds):
        first = turn * layout.data_size * micro_batch_size + layout.data_rank(rank)
        mine = [first + layout.data_size * i for i in range(micro_batch_size)]
        batch = source.read_eval([min(w, windows - 1) * source.num_eval_windows // windows for w in mine])
        batch.labels_BT[[w >= windows for w in mine]] = IGNORED
        labels = batch.labels_BT[batch.labels_BT != IGNORED]
        totals["count"] += len(labels)
        if token_bytes is not None:
            totals["bytes"] += int(token_bytes[labels].sum())
        batch = batch.to(device)
        for value in objective.sums(run_model(model, batch), batch).values():
            totals["sum"] += value
    model.train(was_training)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the root stays gathered after a forward pass without a backward pass
    total = {name: float(value) for name, value in all_reduce_sums(totals, device).items()}
    loss = total["sum"] / max(total["count"], 1)
    bits = total["sum"] / math.log(2) / total["bytes"] if total["bytes"] else None
    return {"eval_loss": loss} | ({"bits_per_byte": bits} if bits is not None else {})
