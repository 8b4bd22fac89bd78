"""The optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rung.config import choice_problem
from rung.errors import UserError
from rung.optim.adamw import AdamW, AdamWConfig
from rung.optim.base import LocalParameter, OptimConfig, Optimizer
from rung.optim.muon import Muon, MuonConfig
from rung.optim.spam import SpamConfig, spam_for_run
from rung.optim.stable_spam import StableSpamConfig, stable_spam_for_run

__all__ = ["OPTIMIZERS", "build_optimizer", "needs_whole_tensors"]


class Entry(NamedTuple):
    """An optimizer's settings, and what makes it."""

    config: type[OptimConfig]
    build: Callable[[Sequence[LocalParameter], Any, int], Optimizer]
    """From parameters, settings and the seed of its random draws."""
    whole_tensors: bool = False
    """Whether parameters must know the group of ranks that together hold the whole of them."""


def _adamw(parameters: Sequence[LocalParameter], config: AdamWConfig, seed: int) -> AdamW:
    del seed
    return AdamW(parameters, betas=(config.betas[0], config.betas[1]), eps=config.eps, weight_decay=config.weight_decay)


OPTIMIZERS = {
    "adamw": Entry(AdamWConfig, _adamw),
    "muon": Entry(MuonConfig, lambda parameters, config, seed: Muon(parameters, config), whole_tensors=True),
    "spam": Entry(SpamConfig, spam_for_run),
    "stable_spam": Entry(
        StableSpamConfig, lambda parameters, config, seed: stable_spam_for_run(parameters, config), whole_tensors=True
    ),
}
"""A further optimizer is one line here and a file in configs/optim/."""


def build_optimizer(config: OptimConfig, parameters: Sequence[LocalParameter], *, seed: int = 0) -> Optimizer:
    """The optimizer that ``config`` names, over these parameters. Collective over the parameters' groups.

    ``seed`` is of the draws that some optimizers make.

    Raises UserError with every problem of ``config``.
    """
    UserError.raise_all(choice_problem("optim.name", config.name, tuple(OPTIMIZERS)) or config.validate())
    return OPTIMIZERS[config.name].build(parameters, config, seed)


def needs_whole_tensors(config: OptimConfig) -> bool:
    """Whether the optimizer that ``config`` names exchanges whole tensors."""
    return OPTIMIZERS[config.name].whole_tensors
