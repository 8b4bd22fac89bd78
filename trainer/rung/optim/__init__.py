"""Optimizers and learning-rate schedules. They work on each rank's plain local tensors and know the logical ones."""

from rung.optim.adamw import AdamW, AdamWConfig
from rung.optim.base import Events, LocalParameter, OptimConfig, Optimizer, Packed, StateTensor
from rung.optim.build import OPTIMIZERS, build_optimizer, needs_whole_tensors
from rung.optim.muon import Muon, MuonConfig, is_hidden_matrix
from rung.optim.schedule import ScheduleConfig, lr_at
from rung.optim.spam import SPAM, SpamConfig
from rung.optim.stable_spam import StableSPAM, StableSpamConfig

__all__ = [
    "OPTIMIZERS",
    "SPAM",
    "AdamW",
    "AdamWConfig",
    "Events",
    "LocalParameter",
    "Muon",
    "MuonConfig",
    "OptimConfig",
    "Optimizer",
    "Packed",
    "ScheduleConfig",
    "SpamConfig",
    "StableSPAM",
    "StableSpamConfig",
    "StateTensor",
    "build_optimizer",
    "is_hidden_matrix",
    "lr_at",
    "needs_whole_tensors",
]
