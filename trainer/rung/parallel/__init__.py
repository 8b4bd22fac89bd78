"""How a model is spread over ranks: the world, the mesh, one `parallelize()`, and sums over logical tensors."""

from rung.parallel.config import PRECISIONS, ParallelConfig, dtypes
from rung.parallel.gradients import attach_gradients, local_parameters, squared_norm
from rung.parallel.initialize import initialize
from rung.parallel.mesh import build_mesh
from rung.parallel.parallelize import GradientSync, parallelize
from rung.parallel.sums import all_reduce_sums
from rung.parallel.world import World, world_size_from_environment

__all__ = [
    "PRECISIONS",
    "GradientSync",
    "ParallelConfig",
    "World",
    "all_reduce_sums",
    "attach_gradients",
    "build_mesh",
    "dtypes",
    "initialize",
    "local_parameters",
    "parallelize",
    "squared_norm",
    "world_size_from_environment",
]
