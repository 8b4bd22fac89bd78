"""Dropout masks: who a value belongs to decides, not where it is computed."""

import numpy as np
import pytest
import torch

from rung.random import dropout_mask, name_key, philox_numpy, step_key

B, T, F = 3, 5, 24
KEY = step_key(name_key(0, "layers.0.mlp"), 7)
SAMPLE_IDS = torch.tensor([0, 9, (3 << 40) | 2**31 | 4])
POSITIONS = torch.arange(T).expand(B, T) + torch.tensor([[0], [2], [100]])


def test_counter_and_threshold():
    mask = dropout_mask(KEY, SAMPLE_IDS, POSITIONS, F, 0, 0.3).numpy()
    assert mask.shape == (B, T, F) and mask.dtype == bool
    ids, features = SAMPLE_IDS.numpy()[:, None, None], np.arange(F)
    words = np.stack(philox_numpy(features // 4, POSITIONS.numpy()[:, :, None], ids % 2**32, ids >> 32, KEY))
    expected = np.take_along_axis(words, (features % 4).reshape(1, 1, 1, F), 0)[0] >= int(0.3 * 2**32)
    np.testing.assert_array_equal(mask, expected)


def test_masks_do_not_depend_on_batch_order_or_on_the_split_of_tokens_and_features():
    whole = dropout_mask(KEY, SAMPLE_IDS, POSITIONS, F, 0, 0.5)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(dropout_mask(KEY, SAMPLE_IDS[order], POSITIONS[order], F, 0, 0.5), whole[order])
    assert torch.equal(dropout_mask(KEY, SAMPLE_IDS, POSITIONS[:, 2:4], F, 0, 0.5), whole[:, 2:4])
    for first, features in ((0, 3), (4, 20), (20, 4), (8, 7)):
        assert torch.equal(
            dropout_mask(KEY, SAMPLE_IDS, POSITIONS, features, first, 0.5), whole[..., first : first + features]
        )


def test_rates_and_errors():
    ids, positions = torch.arange(64), torch.arange(64).expand(64, 64)
    for p in (0.0, 0.1, 0.9, 1.0):
        kept = dropout_mask(KEY, ids, positions, 64, 0, p).double().mean().item()
        assert abs(kept - (1 - p)) <= 4 * (p * (1 - p)) ** 0.5 / 64**1.5
    with pytest.raises(ValueError, match="first_feature=2 must be a multiple of 4"):
        dropout_mask(KEY, ids, positions, 64, 2, 0.1)
    with pytest.raises(ValueError, match=r"p=1\.5"):
        dropout_mask(KEY, ids, positions, 64, 0, 1.5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_masks_are_the_same(device):
    key = name_key(0, "layers.0.mlp")

    def draw(step, sample_ids, positions):
        return dropout_mask(step_key(key, step), sample_ids, positions, F + 2, 4, 0.1)

    compiled = torch.compile(draw, fullgraph=True)
    for step in (1, 2**33 + 5):
        arguments = (torch.tensor(step), SAMPLE_IDS, POSITIONS)
        expected, on_device = draw(*arguments), [argument.to(device) for argument in arguments]
        assert torch.equal(draw(*on_device).cpu(), expected)
        assert torch.equal(compiled(*on_device).cpu(), expected)
