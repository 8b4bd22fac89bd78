"""Legal values, as messages tell them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["divisors", "listed"]


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, increasing."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def listed(numbers: Iterable[int]) -> str:
    """At least one number as text: 1, 2 or 4."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
