"""Text from a model."""

from rung.rollout.generate import generate

__all__ = ["generate"]
