"""How kernels.py measures: a device's speed limits, and works that take turns on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Work = Callable[[], object]

FLUSH_BYTES = 2**28  # several times any cache
HZ = 2e9  # at least a GPU's clock: what is to wait for a while waits no less


class Clock:
    """Seconds that the device works on something, without the time the host takes to ask for it.

    Before each work the caches are overwritten, as other layers would between two uses of a kernel: what it finds there
    is another's, and must be written back; what it leaves there, others pay for. Then the device waits until the host
    has queued everything. On the CPU it is the clock on the wall.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES if self.on_gpu else 1, dtype=torch.uint8, device=device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def once(self, work: Work, host_seconds: float = 0.0) -> float:
        """One run; ``host_seconds``: how long it takes to queue."""
        if not self.on_gpu:
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(int(HZ * host_seconds))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def host_seconds(self, work: Work) -> float:
        """How long the host takes to queue it, with room to spare; compiles and allocates whatever it needs first."""
        for _ in range(2):
            work()
        if not self.on_gpu:
            return 0.0
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        taken = time.perf_counter() - begun
        torch.cuda.synchronize()
        return min(2e-4 + 2 * taken, 2e-2)

    def interleaved(self, works: Mapping[str, Work], seconds: float, most: int) -> dict[str, list[float]]:
        """Seconds of each in every round; the order changes. About so many seconds in all, 3 to ``most`` rounds."""
        waits = {name: self.host_seconds(work) for name, work in works.items()}
        times: dict[str, list[float]] = {name: [] for name in works}
        names, begun = list(works), time.monotonic()
        for turn in range(most):
            if turn >= min(3, most) and time.monotonic() - begun > seconds:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(self.once(works[name], waits[name]))
        return times


def quartiles(times: Sequence[float]) -> dict[str, Any]:
    """Median, the two quartiles, and how many there were."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times[:1]
    return {**{k: float(f"{v:.4g}") for k, v in (("median", median), ("low", low), ("high", high))}, "runs": len(times)}


def limits(clock: Clock, toy: bool) -> dict[str, float]:
    """What this device can do at best, as measured: bytes per second of a large copy, FLOP/s of a large bf16 product.

    A copy by the device's own engine and one by a kernel; whichever is faster counts.
    """
    size = 2**12 if toy else 2**30
    side = 64 if toy else 8192
    source, target = (torch.ones(size, dtype=torch.bfloat16, device=clock.device) for _ in range(2))
    a, b = (torch.randn(side, side, device=clock.device).bfloat16() for _ in range(2))
    works: dict[str, Work] = {
        "copy": lambda: target.copy_(source),
        "negation": lambda: torch.neg(source, out=target),
        "product": lambda: torch.mm(a, b),
    }
    times = {name: statistics.median(t) for name, t in clock.interleaved(works, 2.0, 2 if toy else 20).items()}
    return {
        "copy_bytes_per_second": 4 * size / min(times["copy"], times["negation"]),
        "product_flops_per_second": 2 * side**3 / times["product"],
    }
