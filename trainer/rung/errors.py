"""Exceptions whose message is all that a person needs: wrong input, and checkpoints that cannot be read or written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["CheckpointError", "LocalUserError", "NewerCheckpointError", "UserError"]


class UserError(ValueError):
    """Input a person can correct. The message holds the values and the fix.

    The command line prints the message without a traceback and exits with status 2.
    """

    @classmethod
    def raise_all(cls, problems: Iterable[str]) -> None:
        """Raise one error that lists every problem; do nothing when there is none."""
        found = list(problems)
        if found:
            raise cls(cls.one_text(found))

    @staticmethod
    def one_text(problems: Sequence[str]) -> str:
        """One message for one problem or more."""
        if len(problems) == 1:
            return problems[0]
        return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


class LocalUserError(UserError):
    """A problem that one process has and others may not: each that has it says so."""


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, missing, too new, or could not be written. The message names file and tensor.

    The command line prints the message without a traceback and exits with status 1.
    """


class NewerCheckpointError(CheckpointError):
    """A checkpoint of a format that this version does not know. It is not damaged: nothing older may take its place."""
