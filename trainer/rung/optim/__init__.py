"""Optimizers and learning-rate schedules. They work on each rank's plain local tensors and know the logical ones."""

from rung.optim.adamw import AdamW, AdamWConfig
from rung.optim.base import LocalParameter, OptimConfig, Optimizer, StateTensor
from rung.optim.build import OPTIMIZERS, build_optimizer, needs_whole_tensors
from rung.optim.muon import Muon, MuonConfig, is_hidden_matrix
from rung.optim.schedule import ScheduleConfig, lr_at

__all__ = [
    "OPTIMIZERS",
    "AdamW",
    "AdamWConfig",
    "LocalParameter",
    "Muon",
    "MuonConfig",
    "OptimConfig",
    "Optimizer",
    "ScheduleConfig",
    "StateTensor",
    "build_optimizer",
    "is_hidden_matrix",
    "lr_at",
    "needs_whole_tensors",
]
