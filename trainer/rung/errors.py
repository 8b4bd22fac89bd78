"""The one exception that means: the user's input is wrong."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["LocalUserError", "UserError"]


class UserError(ValueError):
    """Input a person can correct. The message holds the values and the fix.

    The command line prints the message without a traceback and exits with status 2.
    """

    @classmethod
    def raise_all(cls, problems: Iterable[str]) -> None:
        """Raise one error that lists every problem; do nothing when there is none."""
        found = list(problems)
        if len(found) == 1:
            raise cls(found[0])
        if found:
            raise cls(f"{len(found)} problems:\n" + "\n".join(f"  - {problem}" for problem in found))


class LocalUserError(UserError):
    """A problem that one process has and others may not: each that has it says so."""
