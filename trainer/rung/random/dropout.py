"""Dropout masks that depend on who a value belongs to, and not on where or with what it is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from rung.random.philox import philox_torch

# B batch, T tokens, F features, Q quadruples of features


def dropout_mask(
    key: tuple[Tensor | int, Tensor | int],
    sample_ids_B: Tensor,
    positions_BT: Tensor,
    features: int,
    first_feature: int,
    p: float,
) -> Tensor:
    """What dropout with probability ``p`` keeps of features first_feature to first_feature + features: bool [B, T, F].

    Feature f is dropped where word f % 4 of the Philox counter (f // 4, position, low and high 32 bits of the sample
    id) is below floor(p 2^32). ``key`` is the ``step_key`` of the place in the model; ids and positions are int64.
    ``first_feature``, a multiple of 4, lets a rank that holds some of the features draw its own part.
    Runs eagerly and under torch.compile with the same bits, without host synchronisation.
    """
    if first_feature % 4:
        raise ValueError(f"first_feature={first_feature} must be a multiple of 4: four features share a counter")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p} must be a probability, from 0 to 1")
    sample_ids_B11 = sample_ids_B[:, None, None]
    quadruples_Q = torch.arange(first_feature // 4, (first_feature + features + 3) // 4, device=sample_ids_B.device)
    words = philox_torch(quadruples_Q, positions_BT[:, :, None], sample_ids_B11, sample_ids_B11 >> 32, *key)
    threshold = int(p * 2**32)
    kept0, kept1, kept2, kept3 = ((word >= threshold).to(torch.int32) for word in words)
    # Four bytes of an int32 are four flags. torch.stack says the same, but compiles to code five times as slow; a view
    # as bool is what inductor of torch 2.11 cannot lower.
    four_kept_BTQ = kept0 | kept1 << 8 | kept2 << 16 | kept3 << 24
    return four_kept_BTQ.view(torch.uint8)[..., :features] != 0
