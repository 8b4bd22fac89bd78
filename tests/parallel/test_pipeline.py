"""Pipelines against one process, in float64; and real runs of every schedule against its formulas."""

from __future__ import annotations

import pytest
from law.workers import Workers
from parallel import pipeline_ranks as ranks
from parallel.pipeline_ranks import Case

from rung.layout.stages import SCHEDULES, SINGLE_STAGE_SCHEDULES, idle_slots, peak_live_micro_batches

TOLERANCE = 1e-10
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv")


def train(workers: Workers, case: Case) -> list[dict]:
    """Run a case and hold gradients, loss and evaluation against one process."""
    found = workers.run(4, ranks.train, case)
    for rank, outcome in enumerate(found):
        assert max(outcome["gradients"].values()) <= TOLERANCE, (rank, outcome["gradients"])
        assert outcome["loss"] <= TOLERANCE, rank
        assert outcome["evaluation"] <= TOLERANCE, rank
    return found


CASES = [
    Case("gpipe", 2, 3, layers=(2, 6)),
    Case("gpipe", 4, 2, tied=True),
    Case("1f1b", 2, 4, steps=2, lengths=(8, 5)),  # receive buffers are of one shape: the schedule is made anew
    Case("1f1b", 4, 5, tied=True),
    Case("interleaved_1f1b", 2, 4, layers=(1, 3, 2, 2), tied=True),
    Case("interleaved_1f1b", 2, 4, virtual=3, layers=(1, 1, 2, 1, 2, 1)),
    Case("interleaved_1f1b", 4, 4),
    Case("interleaved_zero_bubble", 2, 4, virtual=1),
    Case("interleaved_zero_bubble", 2, 4, steps=2, tied=True),
    Case("interleaved_zero_bubble", 4, 8),
    Case("zbv", 2, 4, steps=2, lengths=(4, 7), tied=True),
    Case("zbv", 4, 2, layers=(1,) * 8),
    Case("zbv", 4, 7),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pipeline_is_one_process(workers: Workers, case: Case) -> None:
    """Dropout, documents, uneven ignored labels; forward passes are one per block and micro-batch, none to find shapes;
    both ends of a tied table get the same bits."""
    found = train(workers, case)
    for outcome in found:
        assert outcome["calls"] == [case.micro_batches * outcome["blocks"]] * case.steps
    if case.tied:
        for step in range(case.steps):
            ends = [bits for outcome in found for bits in outcome["tied"][step]]
            assert len(ends) == 2 * (4 // case.pp) and len(set(ends)) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_recomputation_runs_every_block_twice(workers: Workers, schedule: str) -> None:
    """Zero-bubble schedules too, where recomputing for every group of weights would take many times that."""
    case = Case(schedule, 2, 4, recompute=True, split_backward=False)
    for outcome in train(workers, case):
        assert outcome["calls"] == [2 * case.micro_batches * outcome["blocks"]]


@pytest.mark.parametrize("schedule", ZERO_BUBBLE)
def test_recomputation_in_a_split_backward_is_right_but_dear(workers: Workers, schedule: str) -> None:
    """What ``split_backward`` off is there for."""
    case = Case(schedule, 2, 4, recompute=True)
    found = train(workers, case)
    assert max(outcome["calls"][0] / (case.micro_batches * outcome["blocks"]) for outcome in found) > 4


@pytest.mark.parametrize("schedule", ["1f1b", *ZERO_BUBBLE])
def test_compiled_blocks(workers: Workers, schedule: str) -> None:
    train(workers, Case(schedule, 2, 4, compile=True, split_backward=False))


@pytest.mark.parametrize(
    ("schedule", "reshard"), [*((schedule, True) for schedule in SCHEDULES), ("1f1b", False), ("zbv", False)]
)
def test_parameters_shared_inside_a_stage(workers: Workers, schedule: str, reshard: bool) -> None:
    """FSDP2 with parameters kept after forward or not: a split backward must find them. One reduction of each block and
    of the rest of a part, whatever the number of micro-batches."""
    found = train(workers, Case(schedule, 2, 4, data="fsdp", reshard=reshard, steps=2, tied=not reshard))
    parts = 1 if schedule in SINGLE_STAGE_SCHEDULES else 2
    for outcome in found:
        # The root of a part in the middle has no parameters of its own.
        (reductions,) = outcome["reductions"]
        assert outcome["blocks"] <= reductions <= outcome["blocks"] + parts


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_parameters_copied_and_shared(workers: Workers, schedule: str) -> None:
    train(workers, Case(schedule, 2, 4, data="hsdp", steps=2))


@pytest.mark.parametrize("schedule", ZERO_BUBBLE)
def test_resharding_and_recomputation(workers: Workers, schedule: str) -> None:
    train(workers, Case(schedule, 2, 4, data="fsdp", reshard=True, recompute=True, split_backward=False, steps=2))


@pytest.mark.parametrize("split_backward", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_several_tensors_at_a_boundary(workers: Workers, schedule: str, split_backward: bool) -> None:
    """One of them a view, one not contiguous."""
    assert max(workers.run(4, ranks.several, schedule, split_backward)) <= TOLERANCE


TIMES = [
    *[("gpipe", pp, 1, m) for pp in (2, 4) for m in (1, 2, 5)],
    *[("1f1b", pp, 1, m) for pp in (2, 4) for m in (4, 5, 9)],
    *[("interleaved_1f1b", 2, v, m) for v in (2, 3) for m in (1, 2, 3, 6)],
    *[("interleaved_1f1b", 4, 2, m) for m in (2, 4, 7, 8)],
    *[("interleaved_zero_bubble", 2, v, m) for v in (1, 2, 3) for m in (1, 2, 3, 6)],
    *[("interleaved_zero_bubble", 4, 2, m) for m in (1, 3, 4, 7, 8)],
    *[("zbv", pp, 2, m) for pp in (2, 4) for m in (1, 2, 3, 5, 8)],
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_real_runs_keep_and_wait_what_the_formulas_say(workers: Workers, schedule: str) -> None:
    """Nothing is simulated: a real run's messages carry the slot in which each was ready."""
    for _, pp, virtual, m in (case for case in TIMES if case[0] == schedule):
        for split in (True, False) if schedule in ZERO_BUBBLE else (True,):
            found = workers.run(4, ranks.times, schedule, pp, virtual, m, split)
            idle = idle_slots(schedule, pp, virtual, m, split_backward=split)
            for rank, outcome in enumerate(found):
                peak = peak_live_micro_batches(schedule, pp, virtual, m, rank // (4 // pp), split_backward=split)
                assert outcome == {"idle": idle, "peak": peak}, (pp, virtual, m, split, rank)


def test_wrong_calls_are_refused(workers: Workers) -> None:
    for said in workers.run(4, ranks.wrong_calls):
        assert len(said) == 4
        assert "3 micro-batches were given" in said[0]
        assert "cannot hold stages" in said[1]
        assert "belongs to rank 0" in said[2]
        assert "no layers [8]" in said[3]
