"""Objectives: what is minimised, as named sums and counts. A mean is made once, over the whole step, by the loop."""

from rung.objectives.causal_lm import CausalLM
from rung.objectives.objective import Objective

__all__ = ["CausalLM", "Objective"]
