"""The training loop: what a step is, in the order in which it happens."""

from rung.loop.config import EvalConfig, RunConfig, TrainConfig
from rung.loop.evaluate import evaluate
from rung.loop.step import Progress
from rung.loop.train import Outcome, Stateful, Training, train

__all__ = ["EvalConfig", "Outcome", "Progress", "RunConfig", "Stateful", "TrainConfig", "Training", "evaluate", "train"]
