"""Boxes and runs against the tensors they stand for."""

import pytest
import torch

from rung.layout import Box
from rung.layout.boxes import Run, split


def test_box_arithmetic():
    whole, a, b = torch.arange(42).view(6, 7), Box((1, 2), (4, 3)), Box((3, 0), (3, 4))
    both = a.intersect(b)
    assert (both, both.numel) == (Box((3, 2), (2, 2)), 4)
    assert torch.equal(whole[both.slices()], whole[a.slices()][both.within(a).slices()])
    assert a.intersect(Box((5, 0), (1, 7))).numel == 0
    assert Box((), ()).numel == 1 and Box((), ()).slices() == ()
    with pytest.raises(ValueError, match="none negative"):
        Box((0, -1), (1, 1))


@pytest.mark.parametrize("size", range(8))
@pytest.mark.parametrize("parts", range(1, 6))
def test_split_is_torch_chunk(size, parts):
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(parts)] if size else []
    mine = [
        [run.start + i for run in split([Run(0, size)], parts, index) for i in range(run.length)]
        for index in range(parts)
    ]
    assert [part for part in mine if part] == chunks
