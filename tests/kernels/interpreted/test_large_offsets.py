"""Tensors of more than 2³¹ elements: 32-bit offsets wrap round there, and a kernel reads and writes who knows where."""

import os
import subprocess
import sys

import kernel_cases.large_offsets as cases


def test_more_elements_than_32_bits_count() -> None:
    path = cases.__file__
    tests = os.path.dirname(os.path.dirname(path))
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": tests}
    command = [sys.executable, "-X", "faulthandler", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
