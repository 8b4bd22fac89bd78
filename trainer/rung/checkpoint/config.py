"""Settings of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from rung.config import choice_problem, positive_problems

__all__ = ["CheckpointConfig"]


@dataclass
class CheckpointConfig:
    """When a run saves its state, where, and how much of it stays."""

    interval: int = 1000
    """Steps between checkpoints; 0 saves only where the run ends or is stopped, which it always does."""
    keep: int = 3
    """The newest so many committed checkpoints stay; 0 keeps all."""
    async_: bool = True
    """Training waits only for a copy of the state in memory, and a process of its own writes it. false: training waits
    until the checkpoint is committed."""
    when_busy: str = "wait"
    """When a checkpoint is due and the one before it is still being written: wait for that, or skip this one."""
    dir: str = "${run.dir}/checkpoints"
    """Folder of the checkpoints: a path, or an address such as s3://bucket/run."""
    write_timeout_seconds: float = 1800.0
    """How long rank 0's writer waits for the parts of the others once its own is written. A checkpoint that is not
    complete by then is given up; training goes on."""

    def validate(self) -> list[str]:
        """Problems with these settings."""
        problems = [
            f"checkpoint.{name}={value} must be 0 or more"
            for name in ("interval", "keep")
            if (value := getattr(self, name)) < 0
        ]
        if self.when_busy == "skip" and not self.async_:
            problems.append("checkpoint.when_busy=skip needs checkpoint.async=true: else nothing is ever being written")
        problems += choice_problem("checkpoint.when_busy", self.when_busy, ("wait", "skip"))
        return problems + positive_problems(checkpoint__write_timeout_seconds=self.write_timeout_seconds)
