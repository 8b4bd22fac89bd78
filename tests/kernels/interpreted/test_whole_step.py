"""One training step through every operation, kernels against torch, launches counted."""

import pytest
import torch
from kernel_cases import whole_step
from kernel_cases.accuracy import DEVICE, DTYPES, close

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch

LAUNCHES = {
    "rms_norm_forward": 3,
    "rms_norm_backward": 3,
    "rope": 2,
    "swiglu_forward": 1,
    "swiglu_backward": 1,
    "router_forward": 1,
    "router_backward": 1,
    "merge_lse_forward": 1,
    "merge_lse_backward": 1,
}
"""Kernels by part of their names, and how often a step runs them; of others at least once."""
AT_LEAST_ONCE = [
    "cross_entropy_facts",
    "cross_entropy_in_place",
    "copy_rows",
    "combine_rows",
    "grouped_mm",
    "optimizer_step",
]


@DTYPES
@pytest.mark.parametrize("step", ["spam_step", "adamw_step"])
def test_every_operation_in_one_step(dtype: torch.dtype, step: str) -> None:
    with use_backend("torch"):
        theirs = whole_step.run(dtype, DEVICE, getattr(reference, step))
        truth = whole_step.run(torch.float64, DEVICE, getattr(reference, step))
    before = launch.counts.copy()
    with use_backend("triton"):
        ours = whole_step.run(dtype, DEVICE, getattr(rung_kernels, step))
    launched = {name.lstrip("_"): count for name, count in (launch.counts - before).items()}
    for part, count in LAUNCHES.items():
        assert sum(n for name, n in launched.items() if part in name) == count, (part, launched)
    for part in AT_LEAST_ONCE:
        assert any(part in name for name in launched), (part, launched)
    assert ours.keys() == theirs.keys()
    if dtype == torch.float32:  # in bfloat16 rounding sends some tokens to other experts
        for name, value in ours.items():
            close(value, theirs[name], truth[name], factor=4, ulps=4, what=name)
    assert float(ours["loss"]) == pytest.approx(float(truth["loss"]), rel=1e-5 if dtype == torch.float32 else 0.05)
