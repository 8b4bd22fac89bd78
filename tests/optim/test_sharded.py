"""The sharding never changes the answer: one group of four processes runs every case of sharded_ranks.py."""

import functools
from collections.abc import Iterator

import pytest
import torch
from law.workers import Workers
from optim import sharded_ranks as ranks

from rung.optim import Muon, MuonConfig
from rung.optim.exchange import assign_owners

Results = list[dict]
UNKNOWN = {True: float("nan"), False: -1}


@pytest.fixture(scope="module")
def results(workers: Workers) -> Results:
    return workers.run(4, ranks.every_case)


@functools.cache
def one_process(optimizer: str, dtype: str) -> list[tuple]:
    return ranks.run(ranks.CONFIGS[optimizer], ranks.chunked, ranks.DTYPES[dtype], 0, 1, None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers: matrix products round otherwise on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assemble(results: Results, case: tuple) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's boxes; copies of one box must agree."""
    whole: dict[str, torch.Tensor] = {}
    for rank in results:
        for name, box, _, array in rank["cases"].get(case, []):
            values = torch.from_numpy(array)
            parameter, _, state = name.partition("/")
            if parameter == "events":
                continue
            shape = () if state == "step" or "average" in state else ranks.SHAPES[parameter]
            target = whole.setdefault(name, torch.full(shape, UNKNOWN[values.is_floating_point()], dtype=values.dtype))
            there = target[box.slices()]
            unknown = there.isnan() if values.is_floating_point() else there == UNKNOWN[False]
            assert bool(unknown.all()) or torch.equal(there, values)
            target[box.slices()] = values
    return whole


def test_one_group_runs_every_case(results: Results) -> None:
    assert len(results[0]["cases"]) == len(ranks.CASES) * len(ranks.CONFIGS) * len(ranks.DTYPES)


@pytest.mark.parametrize("dtype", ranks.DTYPES)
@pytest.mark.parametrize("optimizer", ranks.CONFIGS)
@pytest.mark.parametrize(("sharding", "size"), ranks.CASES)
def test_sharding_does_not_change_the_answer(
    results: Results, sharding: str, size: int, optimizer: str, dtype: str
) -> None:
    alone = one_process(optimizer, dtype)
    spread = assemble(results, (sharding, size, optimizer, dtype))
    assert {*spread, "events"} == {name for name, *_ in alone}
    for name, _, _, values in alone:
        if name == "events":
            counted = [rank["cases"][sharding, size, optimizer, dtype][0][3] for rank in results[:size]]
            assert all(events.tolist()[1::2] == values.tolist()[1::2] for events in counted)
            # SPAM's ranks count what they own, Stable-SPAM's the whole; in "doubled" every copy says that it is owned.
            if optimizer == "stable_spam":
                assert all(events.tolist() == values.tolist() for events in counted)
            elif sharding != "doubled" or size == 2:
                assert sum(events[::2] for events in counted).tolist() == values[::2].tolist()
        elif "step" in name:
            assert values == ranks.STEPS - 1 == spread[name]
        elif "spam" in optimizer or (optimizer == "muon" and "_proj" in name):
            assert torch.equal(values, spread[name]), name
        else:  # torch's fused AdamW rounds the ragged end of each local tensor otherwise than its body
            bound = 1e-14 if dtype == "float64" else 1e-6
            torch.testing.assert_close(spread[name], values, rtol=bound, atol=bound)


@pytest.mark.parametrize("sharding", ["chunked", "ragged", "striped", "columns"])
def test_one_rank_owns_each_scalar_state(results: Results, sharding: str) -> None:
    for name in ranks.SHAPES:
        owners = [
            owned
            for rank in results
            for entry, _, owned, _ in rank["cases"][sharding, 4, "adamw", "float64"]
            if entry == f"{name}/step"
        ]
        assert sorted(owners) == [False, False, False, True], name


def test_two_messages_a_step(results: Results) -> None:
    for rank, result in enumerate(results):
        num_muon_runs = sum(key[2] == "muon" for key in result["cases"])
        num_stable_runs = sum(key[2] == "stable_spam" for key in result["cases"])
        assert result["messages"] == 2 * ranks.STEPS * num_muon_runs, rank
        assert result["reductions"] == 2 * ranks.STEPS * num_stable_runs, rank


def test_a_matrix_that_is_not_all_there_is_refused() -> None:
    parameters = ranks.local_parameters(ranks.chunked, torch.float32, 0, 2, None)
    with pytest.raises(RuntimeError, match=r"q_proj.*hold 63 of"):
        Muon([p for p in parameters if "q_proj" in p.name], MuonConfig())


def test_owners_share_the_work() -> None:
    assert assign_owners([5, 9, 5, 1, 4], 2) == [1, 0, 1, 1, 0]
    assert assign_owners([1, 1], 4) == [0, 1]
    assert assign_owners([], 3) == []
