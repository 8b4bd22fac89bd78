"""rope as a Triton kernel."""

import pytest
import torch
from kernel_cases import rope as cases
from kernel_cases.accuracy import DEVICE, DTYPES, check, randn, strided
from law.workers import Workers

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch

# Batch, tokens, query heads, key heads, head size.
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 4, 2, 8),
        (2, 3, 6, 3, 10),  # half a head is odd, and no number is a power of two
        (1, 2, 2, 2, 96),
        (1, 3, 1, 4, 2),  # more keys than queries
        (2, 300, 2, 1, 8),  # the second tile of a sequence is not full
        (1, 1, 40, 8, 256),  # heads over more than one program
        (0, 3, 2, 1, 4),
        (2, 0, 2, 1, 4),
        (2, 3, 2, 0, 4),
        (2, 3, 0, 2, 4),
        (2, 3, 2, 1, 0),
    ],
    ids=str,
)


def _heads(batch: int, tokens: int, heads: int, kv_heads: int, size: int) -> list[torch.Tensor]:
    return [randn(batch, tokens, heads, size), randn(batch, tokens, kv_heads, size, seed=1)]


@DTYPES
@SHAPES
@pytest.mark.parametrize("one_table", [False, True], ids=["a table each", "one table"])
def test_rope(shape: tuple[int, ...], dtype: torch.dtype, one_table: bool) -> None:
    tables = cases.tables(1 if one_table else shape[0], shape[1], shape[4])
    check(rung_kernels.rope, reference.rope, _heads(*shape), dtype, *tables)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str)
def test_other_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(rung_kernels.rope, reference.rope, _heads(2, 3, 4, 2, 8), dtypes, *cases.tables(2, 3, 8))


def test_tables_as_narrow_as_heads() -> None:
    tables = [table.bfloat16() for table in cases.tables(2, 3, 8)]
    check(rung_kernels.rope, reference.rope, _heads(2, 3, 4, 2, 8), torch.bfloat16, *tables)


@DTYPES
def test_features_that_are_not_contiguous(dtype: torch.dtype) -> None:
    tables = [strided(table) for table in cases.tables(1, 3, 8)]
    check(rung_kernels.rope, reference.rope, _heads(2, 3, 4, 2, 8), dtype, *tables, make=strided)


def _heads_first(x_BTHE: torch.Tensor) -> torch.Tensor:
    return x_BTHE.transpose(1, 2).contiguous().transpose(1, 2)


@DTYPES
def test_heads_and_gradients_with_heads_before_tokens(dtype: torch.dtype) -> None:
    tables = [table.expand(2, -1, -1) for table in cases.tables(1, 3, 8)]
    check(rung_kernels.rope, reference.rope, _heads(2, 3, 4, 2, 8), dtype, *tables, make=_heads_first)


def _of_one_projection(op, qkv_BTX, *tables):
    q, k, _ = qkv_BTX.split([4 * 8, 2 * 8, 2 * 8], -1)
    return op(q.unflatten(-1, (4, 8)), k.unflatten(-1, (2, 8)), *tables)


@DTYPES
def test_heads_of_one_projection(dtype: torch.dtype) -> None:
    check(
        lambda *a: _of_one_projection(rung_kernels.rope, *a),
        lambda *a: _of_one_projection(reference.rope, *a),
        [randn(2, 3, 8 * 8)],
        dtype,
        *cases.tables(2, 3, 8),
    )


def test_views_are_read_where_they_lie() -> None:
    qkv = torch.randn(2, 3, 8 * 8, device=DEVICE, requires_grad=True)
    tables = [table.to(DEVICE) for table in cases.tables(1, 3, 8)]
    with use_backend("triton"), launch.recording() as launches:
        q, k = _of_one_projection(rung_kernels.rope, qkv, *tables)
        grads = [_heads_first(torch.randn_like(x)) for x in (q, k)]
        torch.autograd.grad((q, k), qkv, grads)
    there, back = (one.arguments for one in launches)  # a single one in each direction
    assert there["q"].data_ptr() == qkv.data_ptr() and there["q"].stride() == (3 * 64, 64, 8, 1)
    assert there["k"].data_ptr() == qkv[..., 32:].data_ptr() and there["k"].stride() == (3 * 64, 64, 8, 1)
    assert [back["q"].data_ptr(), back["k"].data_ptr()] == [grad.data_ptr() for grad in grads]
    for arguments in (there, back):
        assert [arguments["cos"].data_ptr(), arguments["sin"].data_ptr()] == [table.data_ptr() for table in tables]


@pytest.mark.parametrize("pick", [0, 1])
def test_one_output_that_nobody_reads(pick: int) -> None:
    tables = cases.tables(2, 3, 8)
    check(
        lambda *a: rung_kernels.rope(*a)[pick],
        lambda *a: reference.rope(*a)[pick],
        _heads(2, 3, 4, 2, 8),
        torch.float32,
        *tables,
    )
    q, k = (t.float().to(DEVICE).requires_grad_() for t in _heads(2, 3, 4, 2, 8))
    with use_backend("triton"):
        one = rung_kernels.rope(q, k, *(table.to(DEVICE) for table in tables))[pick]
        grads = torch.autograd.grad(one.sum(), (q, k), allow_unused=True)
    assert [grad is None for grad in grads] == [pick != 0, pick != 1]


def test_inputs_and_gradients_may_be_read_again() -> None:
    """As a ladder does: nothing is overwritten."""

    def twice(op, q, k, *tables):
        q_turned, k_turned = op(q, k, *tables)
        return (*op(q_turned, k_turned, *tables), q_turned * q, k + k_turned)

    heads, tables = _heads(2, 3, 4, 2, 8), cases.tables(2, 3, 8)
    check(lambda *a: twice(rung_kernels.rope, *a), lambda *a: twice(reference.rope, *a), heads, torch.float32, *tables)
    inputs = [t.float().to(DEVICE).requires_grad_() for t in heads]
    there = [*inputs, *(table.to(DEVICE) for table in tables)]
    outer = [torch.randn_like(x) for x in inputs]
    before = [t.detach().clone() for t in (*there, *outer)]
    with use_backend("triton"):
        torch.autograd.grad(rung_kernels.rope(*there), inputs, outer)
    assert all(torch.equal(a, b) for a, b in zip((*there, *outer), before, strict=True))


def test_tables_with_a_gradient_run_the_reference() -> None:
    q, k = (t.float().to(DEVICE) for t in _heads(2, 3, 4, 2, 8))
    cos, sin = (table.to(DEVICE).requires_grad_() for table in cases.tables(1, 3, 8))
    before = launch.counts.copy()
    with use_backend("triton"):
        grads = torch.autograd.grad(sum(x.sum() for x in rung_kernels.rope(q, k, cos, sin)), (cos, sin))
        assert launch.counts == before and all(bool(grad.any()) for grad in grads)
        with torch.no_grad():
            rung_kernels.rope(q, k, cos, sin)
    assert launch.counts.total() == before.total() + 1


def test_float64_runs_the_reference() -> None:
    before = launch.counts.copy()
    with use_backend("triton"):
        rung_kernels.rope(*(t.to(DEVICE) for t in (*_heads(2, 3, 4, 2, 8), *cases.tables(1, 3, 8))))
    assert launch.counts == before


def test_library_operators() -> None:
    q, k = (t.float().to(DEVICE) for t in _heads(2, 3, 4, 2, 8))
    tables = [table.to(DEVICE) for table in cases.tables(1, 3, 8)]
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    torch.library.opcheck(torch.ops.rung.rope.default, (*leaves, *tables))
    torch.library.opcheck(torch.ops.rung.rope.default, (*(_heads_first(x.detach()) for x in leaves), *tables))
    torch.library.opcheck(torch.ops.rung.rope_backward.default, (_heads_first(q), k, *tables))
    torch.library.opcheck(torch.ops.rung.rope_backward.default, (q, k[:, :, :0], *tables))


def test_compiled_whole() -> None:
    compiled = torch.compile(rung_kernels.rope, fullgraph=True, backend="aot_eager")
    check(compiled, reference.rope, _heads(2, 3, 4, 2, 8), torch.float32, *cases.tables(1, 3, 8))
    one = torch.compile(lambda *a: rung_kernels.rope(*a)[1], fullgraph=True, backend="aot_eager")
    check(one, lambda *a: reference.rope(*a)[1], _heads(2, 3, 4, 2, 8), torch.float32, *cases.tables(1, 3, 8))


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_dtensors_on_two_ranks(workers: Workers) -> None:
    for differences, launches in workers.run(2, cases.spread_over_two_ranks):
        assert max(differences) < 1e-5
        assert launches > 0
