"""Checks that many settings share. Each returns problems instead of raising, so that all are told at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

__all__ = ["choice_problem", "positive_problems"]


def choice_problem(key: str, value: str, legal: Sequence[str]) -> list[str]:
    """[] when ``value`` is one of ``legal``, else one sentence with the nearest legal value."""
    if value in legal:
        return []
    near = difflib.get_close_matches(str(value), legal, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return [f"{key}={value} is not one of: {', '.join(legal)}{hint}"]


def positive_problems(**values: float) -> list[str]:
    """One sentence for every value that is not finite and above zero; double underscores in names stand for dots."""
    return [
        f"{key.replace('__', '.')}={value} must be a finite number above zero"
        for key, value in values.items()
        if not (value > 0 and math.isfinite(value))
    ]
