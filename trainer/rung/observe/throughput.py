"""Tokens per second, model FLOP/s utilisation, memory."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["memory_gib", "model_flops_utilization", "peak_flops", "tokens_per_second"]

# Dense bf16 matrix FLOP/s of one device from the makers' data sheets (which print the 2:4-sparse figure, twice this,
# in larger type). The first name found in the device's name counts, so the special case comes before the family.
_PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500e12),
    ("GB200", 2500e12),
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800 PCIE", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A30", 165e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("MI355X", 2500e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("MI250X", 191.5e12),  # one of the two chips, which is what torch calls a device
)

_GIB = 2.0**30


def peak_flops(device_name: str, precision: str = "bf16") -> float | None:
    """Peak dense FLOP/s of the device that torch calls `device_name`; None where we do not know it.

    Only bf16 is known: a share of the bf16 peak says nothing about a float32 or float64 run.
    """
    if precision != "bf16":
        return None
    words = f" {device_name.upper().replace('-', ' ').replace('_', ' ')} "
    for name, flops in _PEAK_BF16_FLOPS:
        if f" {name} " in words:
            return flops
    return None


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Tokens of the whole job per second; 0.0 where no time has passed."""
    return tokens / seconds if seconds > 0 else 0.0


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, num_devices: int, peak: float | None
) -> float | None:
    """Model FLOP/s over the peak of all devices, in 0..1 (PaLM, arXiv 2204.02311, appendix B); None without a peak.

    `flops_per_token` counts the mathematics of forward and backward, not what recomputation adds.
    """
    if not peak or num_devices < 1:
        return None
    return tokens_per_second * flops_per_token / (num_devices * peak)


def memory_gib(device: torch.device | str | None = None, *, reset: bool = False) -> dict[str, float]:
    """This rank's peak memory in GiB: CUDA `max_allocated` and `max_reserved`, elsewhere `max_resident` of the process.

    `reset` starts the CUDA peaks afresh, so that the next reading is the peak since this one.
    """
    kind = getattr(device, "type", str(device or "cpu").partition(":")[0])
    if kind == "cuda":
        import torch

        reading = {
            "max_allocated": torch.cuda.max_memory_allocated(device) / _GIB,
            "max_reserved": torch.cuda.max_memory_reserved(device) / _GIB,
        }
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return reading
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"max_resident": resident * (1 if sys.platform == "darwin" else 1024) / _GIB}  # KiB except on macOS
