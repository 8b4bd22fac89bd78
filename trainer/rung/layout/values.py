"""Legal values, as messages tell them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["divisors", "heads_of_rank", "listed", "nearest_multiples"]


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, increasing."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def listed(numbers: Iterable[int]) -> str:
    """At least one number as text: 1, 2 or 4."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def nearest_multiples(number: int, unit: int) -> str:
    """The positive multiples of ``unit`` beside ``number`` as text: 12 or 16."""
    below = number - number % unit
    return listed(multiple for multiple in (below, below + unit) if multiple)


def heads_of_rank(num_heads: int, tp: int) -> str:
    """Where the number of heads of a rank comes from, as text."""
    return f"num_attention_heads={num_heads}" if tp == 1 else f"num_attention_heads / tp = {num_heads} / {tp}"
