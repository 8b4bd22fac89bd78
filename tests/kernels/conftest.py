"""Tests in interpreted/ run Triton kernels: on a GPU, or in processes that set Triton's interpreter from the start."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["interpreted/*"]
