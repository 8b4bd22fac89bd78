"""The parts of a step: which samples, how many labels, forward and backward."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rung.data import Batch, DataSource
from rung.layout import Layout
from rung.loop.config import TrainConfig
from rung.objectives import Objective
from rung.parallel import SpreadModel, cut_context

__all__ = ["Progress", "StepBatch", "StepReader", "forward_backward", "samples_digest", "total_counts"]


@dataclass(frozen=True)
class Progress:
    """How far a run has come. What is read next follows from it alone, on any layout."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences that these steps read."""

    def after(self, step: int, global_batch_size: int) -> Progress:
        """The progress after a later ``step``."""
        return Progress(step, self.consumed_samples + (step - self.step) * global_batch_size)


@dataclass(frozen=True)
class StepBatch:
    """One step: the global batch's sample ids and this rank's micro-batches of it, on the device."""

    sample_ids: np.ndarray
    micro_batches: list[Batch]
    counts: dict[str, int]
    """Per loss component, its count over the *global* batch."""
    stop: bool
    """Some rank was asked to stop; every rank reads the same answer here, so all stop before the same step."""


class StepReader:
    """Reads this rank's slice of each step, one step ahead in a thread."""

    def __init__(
        self,
        source: DataSource,
        layout: Layout,
        rank: int,
        objective: Objective,
        settings: TrainConfig,
        device: torch.device,
        start: Progress,
    ) -> None:
        self._source, self._objective, self._device = source, objective, device
        self._size, self._micro, self._steps = settings.global_batch_size, settings.micro_batch_size, settings.steps
        self._start = start
        share = self._size // layout.data_size
        self._slice = slice(layout.data_rank(rank) * share, (layout.data_rank(rank) + 1) * share)
        self._layout, self._rank = layout, rank
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rung-data")
        self._ahead: tuple[int, Future[tuple[np.ndarray, list[Batch]]]] | None = None

    def read(self, step: int, *, stop: bool = False) -> StepBatch:
        """The batch of ``step`` (1-based). Collective: one message sums counts, a checksum of ids, and stops."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._thread.submit(self._load, step))
        sample_ids, batches = self._ahead[1].result()
        self._ahead = (step + 1, self._thread.submit(self._load, step + 1)) if step < self._steps else None
        read_ids = np.concatenate([batch.sample_ids_B.numpy() for batch in batches])
        if not self._layout.counts_samples(self._rank):
            read_ids = read_ids[:0]
        local = [self._objective.counts(batch) for batch in batches]
        if not self._layout.counts_tokens(self._rank):
            local = [{name: count * 0 for name, count in counts.items()} for counts in local]
        counts, stops = total_counts(local, sample_ids, read_ids, stop)
        on_device = [batch.to(self._device, non_blocking=True) for batch in batches]
        return StepBatch(sample_ids, on_device, counts, stops)

    def _load(self, step: int) -> tuple[np.ndarray, list[Batch]]:
        sample_ids = self._source.sample_ids(self._start.after(step - 1, self._size).consumed_samples, self._size)
        mine = sample_ids[self._slice]
        whole = [self._source.read(mine[i : i + self._micro]) for i in range(0, len(mine), self._micro)]
        batches = [cut_context(batch, self._layout, self._rank) for batch in whole]
        # From page-locked memory the copy to a GPU does not make the host wait.
        return sample_ids, [batch.pin_memory() for batch in batches] if self._device.type == "cuda" else batches


def total_counts(
    counts: Sequence[Mapping[str, Tensor]], expected_ids: np.ndarray, read_ids: np.ndarray, stop: bool = False
) -> tuple[dict[str, int], bool]:
    """Sum counts over micro-batches and ranks, exactly, before the first forward pass; and whether any rank stops.

    Of ranks that read the same tokens only one may bring counts, and of those that read the same samples only one their
    ids. The same message carries a checksum of the sample ids that ranks read, against the ids the order prescribes:
    ranks that read other samples than they should fail here instead of training on them.
    """
    names = list(counts[0])
    local = [sum(int(c[name]) for c in counts) for name in names]
    packed = torch.tensor([*local, int(stop), _checksum(read_ids)], dtype=torch.int64)
    if dist.get_world_size() > 1:
        dist.all_reduce(packed)
    *totals, stops, checksum = packed.tolist()
    if checksum != _checksum(expected_ids):
        raise RuntimeError("ranks read other samples than the data order prescribes for this step")
    return dict(zip(names, totals, strict=True)), stops > 0


def _checksum(sample_ids: np.ndarray) -> int:
    """A sum of mixed ids in wrapping int64 arithmetic: independent of order and of how ids are spread over ranks."""
    mixed = (sample_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return int(mixed.sum(dtype=np.uint64).astype(np.int64))


def samples_digest(sample_ids: np.ndarray) -> str:
    """Hex digest of the sorted sample ids of a step."""
    return hashlib.blake2b(np.sort(sample_ids).astype("<i8").tobytes(), digest_size=16).hexdigest()


def forward_backward(model: SpreadModel, objective: Objective, batch: StepBatch, step: Tensor) -> dict[str, Tensor]:
    """Run every micro-batch; leaves gradients of Σ_k weight_k · Σ_k / N_k. Returns the Σ_k that this rank counts.

    ``step`` is a 0-dim int64 tensor: the step number that keys this step's draws.
    """
    totals = {name: torch.zeros((), dtype=torch.float64, device=step.device) for name in objective.weights}

    def loss(outputs: Tensor, micro: Batch) -> Tensor:
        sums = objective.sums(outputs, micro)
        if model.counts_outputs:
            for name, value in sums.items():
                totals[name] += value.detach()
        total = sum(objective.weights[name] / max(batch.counts[name], 1) * value for name, value in sums.items())
        assert isinstance(total, Tensor)
        return total

    model.forward_backward(batch.micro_batches, step, loss)
    return totals
