"""Cross-entropy whose vocabulary is spread over two and four gloo ranks, against one process that has all of it."""

import pytest
import torch
from parallel import vocab_ranks

from rung_kernels import reference


def test_vocabulary_spread_over_ranks(workers):
    workers.run(4, vocab_ranks.check_everything)


def test_one_process_needs_all_columns():
    with pytest.raises(ValueError, match="first=3 without a group"):
        reference.cross_entropy(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), first=3)
    assert reference.cross_entropy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)
