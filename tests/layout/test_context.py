"""The zigzag: who holds what, what each ring step computes, and that all ranks work alike."""

import subprocess
import sys

import numpy as np
import pytest

from rung.errors import UserError
from rung.layout.context import Zigzag, context_problems


def test_imports_no_torch():
    code = "import sys, rung.layout.context; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_two_ranks_by_hand():
    zigzag = Zigzag(12, 2)
    assert zigzag.positions(0).tolist() == [0, 1, 2, 9, 10, 11]
    assert zigzag.positions(1).tolist() == [3, 4, 5, 6, 7, 8]
    assert [zigzag.source(0, step) for step in (0, 1)] == [0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_position_has_one_place(ranks):
    zigzag = Zigzag(48, ranks)
    order = zigzag.order()
    assert sorted(order) == list(range(48))
    assert np.array_equal(order[zigzag.inverse()], np.arange(48))
    for rank in range(ranks):
        assert (np.diff(zigzag.positions(rank)) > 0).all()


@pytest.mark.parametrize(("ranks", "degree"), [(4, 2), (8, 2), (8, 4), (6, 3), (4, 4)])
def test_neighbours_hold_together_what_a_rank_of_the_smaller_ring_holds(ranks, degree):
    fine, coarse = Zigzag(96, ranks), Zigzag(96, ranks // degree)
    for group in range(ranks // degree):
        members = range(group * degree, (group + 1) * degree)
        early = [position for member in members for position in fine.ranges(member)[0]]
        late = [position for member in reversed(members) for position in fine.ranges(member)[1]]
        assert [*early, *late] == coarse.positions(group).tolist()


def visible(seq_len, window, lengths):
    """bool [seq_len, seq_len]: the mask of the whole window."""
    rows, columns = np.arange(seq_len)[:, None], np.arange(seq_len)[None]
    documents = np.repeat(np.arange(len(lengths)), lengths) if lengths else np.zeros(seq_len)
    seen = (columns <= rows) & (documents[:, None] == documents[None])
    return seen if window is None else seen & (rows - columns < window)


LENGTHS = {"none": None, "odd": [13, 7, 1, 5, 22], "one": [48]}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 17, 47, 48])
@pytest.mark.parametrize("documents", LENGTHS)
@pytest.mark.parametrize("max_rows", [None, 1, 4])
def test_blocks_hold_every_visible_pair_once(ranks, window, documents, max_rows):
    zigzag, lengths = Zigzag(48, ranks), LENGTHS[documents]
    truth = visible(48, window, lengths)
    by_position = visible(48, window, None)
    found = np.zeros((48, 48), dtype=int)
    for rank in range(ranks):
        for step in range(ranks):
            source = zigzag.source(rank, step)
            for block in zigzag.blocks(rank, source, window, lengths is not None, max_rows):
                rows, columns = zigzag.positions(rank)[block.rows], zigzag.positions(source)[block.columns]
                inside = np.ix_(rows, columns)
                assert by_position[inside].any(), "a block that nobody sees"
                if block.causal:
                    assert np.array_equal(by_position[inside], np.tri(len(rows), dtype=bool))
                    assert np.array_equal(rows, columns) and lengths is None
                elif not block.compare_positions:
                    assert by_position[inside].all()
                if max_rows and (lengths or block.compare_positions):
                    assert len(rows) <= max_rows
                found[inside] += by_position[inside]
    assert np.array_equal(found, by_position.astype(int))
    work = zigzag.work(window, lengths)
    assert work.sum() == truth.sum()
    for rank in range(ranks):
        for step in range(ranks):
            pairs = truth[np.ix_(zigzag.positions(rank), zigzag.positions(zigzag.source(rank, step)))]
            assert work[rank, step] == pairs.sum()


def imbalance(counts):
    """The worst over ring steps of the busiest rank to the mean, since every step waits for the slowest."""
    return (counts.max(0) / counts.mean(0)).max()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_work_is_balanced(ranks):
    zigzag = Zigzag(4096, ranks)
    assert imbalance(zigzag.work()) == 1.0, "plain causal attention: the same number of pairs in every step"
    steps = zigzag.work().mean(0)
    assert steps.max() / steps.mean() < 1.02 and (zigzag.work() == zigzag.computed()).all()
    whole = zigzag.work(document_lengths=[4096]).sum(1)
    assert whole.max() / whole.mean() == 1.0
    # What a kernel computes: rectangles, whatever the documents in them are.
    computed = zigzag.computed(documents=True)
    assert imbalance(computed) == 1.0 and computed.sum() < 1.35 * zigzag.work().sum()


def test_a_window_leaves_blocks_out():
    zigzag = Zigzag(64, 4)  # chunks of 8
    assert zigzag.blocks(0, 2, window=8) == []
    assert len(zigzag.blocks(1, 0, window=8)) == 1  # chunk 1 sees the end of chunk 0, chunk 6 does not
    assert zigzag.computed(window=8).sum() < zigzag.computed().sum() / 2


def test_problems_have_values_and_a_fix():
    assert context_problems(64, 4, 2, 8) == [] == context_problems(63, 1)
    (problem,) = context_problems(60, 4)
    assert "seq_len=60" in problem and "2 · cp = 8" in problem and "use 56 or 64" in problem
    problems = context_problems(60, 4, 3, 32, tp=4)
    assert len(problems) == 3
    assert "legal values: 1, 2 or 4" in problems[1] and "8 heads of a rank" in problems[2]
    assert context_problems(64, 4, 4, 8, tp=4)[0].endswith("legal values: 1 or 2")
    with pytest.raises(UserError, match="seq_len=60"):
        Zigzag(60, 4)
    with pytest.raises(ValueError, match="do not fill"):
        Zigzag(64, 4).work(document_lengths=[3])
