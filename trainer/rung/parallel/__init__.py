"""How a model is spread over ranks: the world, its groups, one `parallelize()`, and sums over logical tensors."""

from rung.parallel.config import PRECISIONS, ParallelConfig, dtypes
from rung.parallel.context import cut_context
from rung.parallel.gradients import squared_norm
from rung.parallel.initialize import initialize
from rung.parallel.mesh import Groups
from rung.parallel.parallelize import parallelize
from rung.parallel.spread import SpreadModel
from rung.parallel.sums import all_reduce_sums
from rung.parallel.world import World, world_size_from_environment

__all__ = [
    "PRECISIONS",
    "Groups",
    "ParallelConfig",
    "SpreadModel",
    "World",
    "all_reduce_sums",
    "cut_context",
    "dtypes",
    "initialize",
    "parallelize",
    "squared_norm",
    "world_size_from_environment",
]
