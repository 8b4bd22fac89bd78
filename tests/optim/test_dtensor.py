"""SPAM and Stable-SPAM over DTensors: the same bits as over plain tensors, and torch's distributed state dicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from law.workers import Workers
from optim import dtensor_ranks as ranks


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, workers: Workers) -> list[dict[str, Any]]:
    return workers.run(request.param, ranks.every_case, request.param)


@pytest.mark.parametrize("optimizer", ranks.MAKERS)
def test_every_way_gives_the_same_bits(results: list[dict[str, Any]], optimizer: str) -> None:
    ways = [key.split()[1] for key in results[0] if key.startswith(f"{optimizer} ")]
    assert set(ways) >= {"plain", "fsdp", "tensor_parallel", "resumed", "full"}
    truth = {name: values for name, _, values in results[0][f"{optimizer} plain"]}
    for way in ways:
        seen = {name: np.zeros(values.shape, bool) for name, values in truth.items()}
        for rank in results:
            for name, box, values in rank[f"{optimizer} {way}"]:
                assert np.array_equal(values, truth[name][box]), (way, name)
                seen[name][box] = True
        assert all(cells.all() for cells in seen.values()), way
