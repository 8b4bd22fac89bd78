"""What one rank does in test_spread.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def generated(config: Any, layout: Any) -> list[int]:
    """Seven tokens after a prompt of five, sampled."""
    from rung.parallel import World
    from rung.recipes.pretrain import spread_model
    from rung.rollout import generate

    world = World(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return generate(spread_model(config, layout, world), [3, 1, 4, 1, 5], 7, temperature=0.8, seed=3, max_length=9)
