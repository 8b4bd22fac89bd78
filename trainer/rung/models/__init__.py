"""Models: settings, the decoder, its sizes and operation counts, and Hugging Face's names for all of it."""

from rung.models.config import InitRule, ModelConfig, RopeScaling, num_parameters, parameter_shapes
from rung.models.decoder import Decoder, build
from rung.models.flops import forward_flops, stage_costs, train_flops_per_token

__all__ = [
    "Decoder",
    "InitRule",
    "ModelConfig",
    "RopeScaling",
    "build",
    "forward_flops",
    "num_parameters",
    "parameter_shapes",
    "stage_costs",
    "train_flops_per_token",
]
