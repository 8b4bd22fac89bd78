"""Attention over context ranks is dense attention: ring, Ulysses and both, forward and every gradient."""

import itertools

import pytest
import torch
from parallel import context_cases
from parallel.context_cases import GRADED, Case

DOCUMENTS = ((13, 7, 1, 30, 5), (19, 37))
TOLERANCE = 1e-10


def assert_dense(workers, size, cases):
    """Every rank's out, dq, dk and dv, in all cases at once."""
    answers = workers.run(size, context_cases.errors, cases, timeout=600)
    wrong = [
        f"{name} rank {rank}: {what} off by {error:.1e}"
        for rank, found in enumerate(answers)
        for name, parts in found.items()
        for what, error in parts.items()
        if not error <= TOLERANCE
    ]
    assert not wrong, "\n".join(wrong)
    assert all(found.keys() == cases.keys() for found in answers)


def named(cases):
    return {repr(case): case for case in cases}


WAYS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
COMPILED_WAYS = [  # every process that compiles imports for ten seconds
    pytest.param(size, degree, marks=pytest.mark.slow if size > 2 else ()) for size, degree in WAYS
]


@pytest.mark.parametrize(("size", "degree"), WAYS)
def test_attention(workers, size, degree):
    """Grouped heads, documents cut anywhere, windows narrower and wider than a chunk, and recomputation."""
    combinations = itertools.product([1, 2, 4], [None, DOCUMENTS], [None, 1, 5, 11, 24], ["none", "saved"])
    cases = [
        Case(degree=degree, kv_heads=kv_heads, documents=documents, window=window, recompute=recompute)
        for index, (kv_heads, documents, window, recompute) in enumerate(combinations)
        if index % 3 == (size + degree) % 3 or window is None  # the ways together see every combination of choices
    ]
    cases += [
        Case(degree=degree, window=window, documents=documents, mask_elements=150)
        for window, documents in itertools.product([None, 9], [None, DOCUMENTS])
    ]
    cases.append(Case(degree=degree, seq_len=2 * size, documents=((1,) * 2 * size, (2 * size,))))
    assert_dense(workers, size, named(cases))


@pytest.mark.parametrize(("size", "degree"), COMPILED_WAYS)
def test_compiled(workers, size, degree):
    """One graph without breaks, with and without recomputation inside it."""
    assert_dense(
        workers,
        size,
        named(
            [
                Case(degree=degree, compiled=True),
                Case(degree=degree, compiled=True, documents=DOCUMENTS, window=20, kv_heads=1, recompute="saved"),
            ]
        ),
    )


@pytest.mark.parametrize("ranks", [(0, 1), (0, 2), (0, 3)])
def test_any_ranks_of_the_world(workers, ranks):
    """Two groups at once, of neighbours and of others: places in the group are not ranks of the world."""
    cases = [
        Case(ranks=ranks, degree=degree, documents=documents) for degree in (1, 2) for documents in (None, DOCUMENTS)
    ]
    assert_dense(workers, 4, named(cases))


def test_random_windows(workers):
    for size in (2, 4):
        assert_dense(workers, size, named(context_cases.random_case(seed, size) for seed in range(12)))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_many_random_windows(workers, size):
    for first in range(100, 500, 50):
        assert_dense(workers, size, named(context_cases.random_case(seed, size) for seed in range(first, first + 50)))


@pytest.mark.parametrize(("size", "degree"), WAYS)
def test_narrow_numbers_lose_no_more_than_dense_ones(workers, size, degree):
    for documents in (None, ((130, 70, 10, 302), (512,))):
        case = Case(degree=degree, seq_len=512, documents=documents)
        answers = workers.run(size, context_cases.narrow_errors, case)
        for name in GRADED:
            ours, dense = (sum(answer[name][which] for answer in answers) ** 0.5 for which in (0, 1))
            assert 0 < ours <= 2 * dense, (name, ours, dense)


def test_the_ring_rounds_once(workers):
    assert all(workers.run(4, context_cases.rounded_once, Case(dtype=torch.bfloat16)))


@pytest.mark.parametrize(("size", "degree"), WAYS)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_no_more_is_sent_than_must_be(workers, size, degree, kv_heads):
    """The least of each method, in elements per rank; K/V heads are repeated where they are too few to be dealt."""
    case = Case(degree=degree, kv_heads=kv_heads)
    tokens, h, k = 2 * case.seq_len, 8 * case.heads, 8 * max(kv_heads, degree)  # two sequences, heads of 8 features
    places = size // degree
    ring = 2 * tokens * (k // degree) * (places - 1) // places
    heads = (2 * h + 2 * k) * (tokens // size) * (degree - 1) // degree
    for forward, backward in workers.run(size, context_cases.traffic, case):
        assert (forward.elements, backward.elements) == (ring + heads, 2 * ring + heads)
        assert forward.messages == (places - 1) + 2 * (degree > 1)  # K and V in one; q, k and v in one, out in another
        assert backward.messages == 2 * (places - 1) + 2 * (degree > 1)


def test_messages_travel_while_blocks_are_computed(workers):
    for forward, backward in workers.run(4, context_cases.order_of_events):
        assert forward == "sb" + "wsb" * 2 + "wb"
        assert backward == "sbw" + "sbw" * 3 + "sw", "the gradients' way home has nothing to hide behind"


def assert_sent_once(workers, size, degree, compiled):
    places = size // degree
    for results in workers.run(size, context_cases.exchanges, degree, compiled, timeout=600):
        once = 2 * (3 * (places - 1) + 4 * (degree > 1))  # two layers
        assert results["none"][0] == results["saved"][0] == once
        assert results["plain"][0] > once, "the counter counts"
        for mode in ("saved", "plain"):
            torch.testing.assert_close(results[mode][1], results["none"][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "degree"), WAYS)
def test_recomputation_does_not_send_again(workers, size, degree):
    assert_sent_once(workers, size, degree, compiled=False)


@pytest.mark.parametrize(("size", "degree"), COMPILED_WAYS)
def test_compiled_recomputation_does_not_send_again(workers, size, degree):
    assert_sent_once(workers, size, degree, compiled=True)


def test_tokens_are_gathered_in_logical_order(workers):
    for size in (2, 4):
        workers.run(size, context_cases.gathered, 24)


def test_batches_are_cut(workers):
    for size in (2, 4):
        workers.run(size, context_cases.cut, 24)


def test_operations_are_what_they_declare(workers):
    workers.run(2, context_cases.check_operations)


def test_refusals(workers):
    for said in workers.run(4, context_cases.refusals):
        heads, degree, documents, odd = said
        assert heads.startswith("UserError: cp_ulysses_degree=4 does not divide the 3 attention heads")
        assert degree.startswith("ValueError: ulysses_degree=3 does not divide the 4 ranks")
        assert "those of the whole window" in documents
        assert odd.startswith("UserError: seq_len=12 is not a multiple of 2 · cp = 8")
