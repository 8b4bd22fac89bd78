"""Sampling token by token, one sequence at a time, each token from a full forward pass: simple and right, not fast.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rung.errors import UserError
from rung.random import name_key
from rung.random.philox import philox_numpy

__all__ = ["generate", "sample_token"]


class Spread(Protocol):
    """A model that is spread over ranks; every rank calls it together and gets the same."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        """Training mode on or off."""

    def next_token_logits(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """float64 [V] after these tokens."""


@torch.no_grad()
def generate(
    model: nn.Module | Spread,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    sample_id: int = 0,
    eos_id: int | None = None,
    max_length: int | None = None,
) -> list[int]:
    """The tokens that follow the prompt, at most ``max_new_tokens``, ending with ``eos_id`` if it comes.

    temperature 0 takes the likeliest token; top_k 0 and top_p 1.0 keep all tokens. The draw of a token depends on
    (seed, sample_id, its position) and on nothing else; give each of several answers to a prompt its own sample_id. The
    model reads the last ``max_length`` tokens, by default its config's max_position_embeddings. Of a spread model every
    rank calls this together, with the same arguments, and gets the same tokens.
    """
    config: Any = getattr(model, "config", None)
    limit: int = max_length if max_length is not None else config.max_position_embeddings
    problems = [
        f"{name}={value} must be {legal}"
        for name, value, legal, ok in (
            ("temperature", temperature, "at least 0", temperature >= 0),
            ("top_k", top_k, "at least 1, or 0 for all tokens", top_k >= 0),
            ("top_p", top_p, "above 0 and at most 1", 0 < top_p <= 1),
            ("max_length", limit, "at least 1", limit >= 1),
            ("the length of the prompt", len(prompt_ids), "at least 1 token", len(prompt_ids) >= 1),
        )
        if not ok
    ]
    UserError.raise_all(problems)
    was_training = model.training
    model.train(False)
    tokens = list(prompt_ids)
    try:
        while len(tokens) - len(prompt_ids) < max_new_tokens:
            window = tokens[-limit:]
            logits_V = _logits(model, window) if isinstance(model, nn.Module) else model.next_token_logits(window)
            uniform = _uniform(seed, sample_id, position=len(tokens))
            tokens.append(sample_token(logits_V, uniform, temperature, top_k, top_p))
            if tokens[-1] == eos_id:
                break
    finally:
        model.train(was_training)
    return tokens[len(prompt_ids) :]


def _logits(model: nn.Module, tokens: Sequence[int]) -> NDArray[np.float64]:
    window = torch.tensor([tokens], device=next(model.parameters()).device)
    result: NDArray[np.float64] = model(window)[0, -1].to("cpu", torch.float64).numpy()
    return result


def sample_token(
    logits_V: NDArray[np.float64], uniform: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> int:
    """One token id from float64 logits and a uniform number in [0, 1).

    The number is held against the cumulative sum of the probabilities in the order of the token ids, added one after
    another in float64: the same logits give the same token everywhere. Of equal logits the lower id goes first.
    """
    if temperature == 0:
        return int(np.argmax(logits_V))  # the first of equals
    weights_V = np.exp((logits_V - logits_V.max()) / temperature)
    if 0 < top_k < len(weights_V) or top_p < 1:
        order = np.argsort(-logits_V, kind="stable")
        if top_k > 0:
            order = order[:top_k]
        if top_p < 1:  # the fewest tokens that hold top_p of what top_k left
            cumulative = np.cumsum(weights_V[order])
            order = order[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1]
        kept_V = np.zeros(len(weights_V), dtype=bool)
        kept_V[order] = True
        weights_V = np.where(kept_V, weights_V, 0.0)
    cumulative_V = np.cumsum(weights_V)
    # The first id whose cumulative sum exceeds the draw; it has a weight above zero, because the sum grew there.
    return int(np.searchsorted(cumulative_V, uniform * cumulative_V[-1], side="right"))


def _uniform(seed: int, sample_id: int, position: int) -> float:
    """A multiple of 2^-53 in [0, 1), from 53 random bits counted by (position, sample_id)."""
    counter = np.array([[position], [0], [sample_id & 0xFFFFFFFF], [sample_id >> 32]], dtype=np.uint64)
    c0, c1, c2, c3 = counter
    high, low, _, _ = philox_numpy(c0, c1, c2, c3, name_key(seed, "sample"))
    return ((int(high[0]) << 21) | (int(low[0]) >> 11)) * 2.0**-53
