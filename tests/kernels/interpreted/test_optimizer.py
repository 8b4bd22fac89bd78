"""adamw_step and spam_step as Triton kernels: the bits of the reference."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton.language as tl
from kernel_cases.accuracy import DEVICE, close
from torch import Tensor

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import IS_INTERPRETED, use_backend
from rung_kernels.reference.optimizer import Factor, Rounding
from rung_kernels.triton_kernels import launch
from rung_kernels.triton_kernels import optimizer as kernels

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # numpy's, interpreted

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(3,), (0, 5), (7, 11, 3), (), (1024,), (2, 1025), (1,), (0,)]
OPS = pytest.mark.parametrize("name", ["adamw_step", "spam_step"])
DTYPES = pytest.mark.parametrize(
    "dtypes",
    [(F32, F32, F32, F32), (F32, BF16, F32, F32), (BF16, BF16, F32, F32), (BF16,) * 4, (F16, F16, F32, F32)],
    ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes),
)
Lists = list[list[Tensor]]


def factors(**values: float) -> Tensor:
    """Of the third step of Adam, unless said otherwise."""
    adam = {
        "GRAD_SCALE": 3.0,
        "THRESHOLD": 1.5,
        "BETA1": 0.9,
        "COMPLEMENT1": 1 - 0.9,
        "BETA2": 0.999,
        "COMPLEMENT2": 1 - 0.999,
        "STEP_SIZE": 1e-3 / (1 - 0.9**3),
        "DIVISOR": math.sqrt(1 - 0.999**3),
        "EPS": 1e-8,
        "DECAY": 1 - 1e-4,
    }
    slots = torch.zeros(len(Factor), dtype=torch.float64)
    for key, value in (adam | values).items():
        slots[Factor[key]] = value
    return slots.to(DEVICE)


def lists(dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> Lists:
    """Parameters, gradients and both moments; some second moments are zero."""
    generator = torch.Generator().manual_seed(seed)
    result: Lists = []
    for kind, dtype in enumerate(dtypes):
        tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
        if kind == 2:
            tensors = [x / 10 for x in tensors]
        if kind == 3:
            tensors = [torch.where(x > 1, 0, x * x) for x in tensors]
        result.append([x.to(dtype).to(DEVICE) for x in tensors])
    return result


def clones(them: Lists, dtype: torch.dtype | None = None) -> Lists:
    return [[x.detach().clone().to(dtype or x.dtype) for x in tensors] for tensors in them]


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As kernels store float32: rounded, but bfloat16 is truncated in the interpreter."""
    if dtype == BF16 and IS_INTERPRETED:
        x = (x.view(torch.int32) & -0x10000).view(torch.float32)
    return x.to(dtype)


def same_bits(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for index, (x, y) in enumerate(zip(mine, theirs, strict=True)):
        assert x.dtype == y.dtype and x.shape == y.shape
        ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        equal = (x.contiguous().view(ints) == y.contiguous().view(ints)) | (x.isnan() & y.isnan())
        assert bool(equal.all()), f"tensor {index}: {int((~equal).sum())} of {equal.numel()} differ"


def compare(name: str, them: Lists, slots: Tensor, steps: int = 1, copies: bool = False, **options: Any) -> Lists:
    """The kernel against the reference in float32, whose results are rounded only afterwards."""
    counted = name == "spam_step" or "levels" in options
    mine, theirs = them, clones(them, F32)
    counts = torch.arange(len(them[0]), device=DEVICE)
    their_counts = counts.clone()
    narrow = [torch.full_like(x, 7, dtype=BF16) for x in mine[0]] if copies else None
    for _ in range(steps):
        with use_backend("triton"):
            getattr(rung_kernels, name)(*mine, slots, counts=counts if counted else None, copies=narrow, **options)
        getattr(reference, name)(*theirs, slots, counts=their_counts if counted else None, **options)
        theirs = [
            [stored(y, x.dtype).float() for x, y in zip(*pair, strict=True)] for pair in zip(mine, theirs, strict=True)
        ]
    for xs, ys in zip(mine, theirs, strict=True):
        same_bits(xs, [y.to(x.dtype) for x, y in zip(xs, ys, strict=True)])
    if narrow is not None and steps == 1 and them[0][0].dtype == F32:
        same_bits(narrow, [stored(y, BF16) for y in theirs[0]])
    assert torch.equal(counts, their_counts)
    return [*mine, narrow or []]


@OPS
@DTYPES
def test_the_bits_of_the_reference(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    compare(name, lists(dtypes), factors(), steps=2)
    compare(name, lists(dtypes), factors(GRAD_SCALE=1, DIVISOR=1), copies=True)


@OPS
@DTYPES
def test_as_near_the_truth_as_torch(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    them = lists(dtypes)
    mine, theirs, truth = clones(them), clones(them), clones(them, torch.float64)
    with use_backend("triton"):
        getattr(rung_kernels, name)(*mine, factors())
    getattr(reference, name)(*theirs, factors())
    getattr(reference, name)(*truth, factors())
    for kind in (0, 2, 3):
        for x, y, z in zip(mine[kind], theirs[kind], truth[kind], strict=True):
            close(x, y, z, what=f"list {kind}")


@OPS
def test_tensors_that_are_not_aligned(name: str) -> None:
    """Parts of one larger tensor, as sharded parameters may be, at any multiple of their element's size."""
    shapes = [(1030,), (5,), (1024,)]
    them = lists((F32, BF16, F32, F32), shapes)
    for tensors in them:
        flat = torch.zeros(sum(x.numel() for x in tensors) + 3, dtype=tensors[0].dtype, device=DEVICE)
        parts = flat[3:].split([x.numel() for x in tensors])
        for part, x in zip(parts, list(tensors), strict=True):
            part.copy_(x)
        tensors[:] = parts
    compare(name, them, factors(), copies=True)


@OPS
def test_lists_of_several_dtypes_and_one_launch_for_each(name: str) -> None:
    one, two = lists((F32, BF16, F32, F32), [(40,), (1500,)]), lists((BF16,) * 4, [(3, 5), (2048,)], seed=1)
    them = [[a[0], b[0], a[1], b[1]] for a, b in zip(one, two, strict=True)]
    before = launch.counts["_optimizer_step"]
    compare(name, them, factors())
    assert launch.counts["_optimizer_step"] == before + 2
    compare(name, lists((F32,) * 4), factors())
    assert launch.counts["_optimizer_step"] == before + 3


@OPS
def test_nothing_to_do(name: str) -> None:
    before = launch.counts["_optimizer_step"]
    compare(name, [[], [], [], []], factors())
    compare(name, lists((F32,) * 4, [(0,), (4, 0)]), factors())
    assert launch.counts["_optimizer_step"] == before


@OPS
@DTYPES
def test_a_step_that_is_skipped_writes_nothing(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    them = lists(dtypes)
    them[1] = [x.fill_(math.nan) for x in them[1]]
    them[0][0][1], them[3][0][0] = math.nan, -math.inf
    before, counts = clones(them), torch.arange(len(SHAPES), device=DEVICE)
    copies = [torch.full_like(x, 7, dtype=BF16) for x in them[0]]
    with use_backend("triton"):
        getattr(rung_kernels, name)(*them, factors(SKIP=1, RESET=1, GRAD_SCALE=math.nan), counts=counts, copies=copies)
    for xs, ys in zip(them, before, strict=True):
        same_bits(xs, ys)
    assert all(bool((x == 7).all()) for x in copies) and counts.tolist() == list(range(len(SHAPES)))


@OPS
def test_moments_count_as_zero_when_they_are_reset(name: str) -> None:
    them = lists((F32,) * 4)
    them[2][0][0], them[3][4][5] = math.nan, math.inf
    mine = compare(name, them, factors(RESET=1, GRAD_SCALE=1))
    assert bool(mine[2][0].isfinite().all() & mine[3][4].isfinite().all())


@OPS
def test_gradients_that_are_not_finite_stay_so(name: str) -> None:
    them = lists((F32,) * 4)
    them[1][4][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    compare(name, them, factors())


@pytest.mark.parametrize("threshold", [0.0, 1e-3, 2.0, 5000.0, math.inf])
def test_spikes(threshold: float) -> None:
    them = lists((F32,) * 4)
    them[3][4][:2] = torch.tensor([1e-45, 1e38])
    them[1][4][:2] = torch.tensor([1e-30, 1e30])
    compare("spam_step", them, factors(THRESHOLD=threshold))


def test_what_is_above_its_level_comes_down() -> None:
    them = lists((F32, BF16, F32, F32))
    levels = torch.linspace(0.1, 1.0, len(SHAPES), dtype=torch.float64, device=DEVICE)
    maxima = torch.linspace(1.0, 2.0, len(SHAPES), dtype=torch.float64, device=DEVICE)
    gains = torch.linspace(0.5, 3.0, len(SHAPES), dtype=torch.float64, device=DEVICE)
    compare("adamw_step", clones(them), factors(), levels=levels, maxima=maxima)
    compare("adamw_step", clones(them), factors(), levels=-levels, maxima=maxima)
    compare("adamw_step", clones(them), factors(), gains=gains)
    compare("adamw_step", them, factors(), levels=levels, maxima=maxima, gains=gains, copies=True)


FIRSTS = [0, 4, 2**34 - 512, 2**34 - 511, 2**62, 1, 6, 3]


@OPS
def test_stochastic_rounding_draws_the_same_integers(name: str) -> None:
    """Of whole counters, and of tensors that begin in the middle of one; around 2^32 counters."""
    them = lists((F32,) * 4, [(1024,), (2100,), (1030,), (1030,), (1024,), (1500,), (3,), ()])
    them[0][0][:4] = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38])
    them[1][0][:4] = 0
    keys = torch.tensor([[index, 2**32 - 1 - index] for index in range(len(FIRSTS))], device=DEVICE)
    rounding = Rounding(keys, torch.tensor(FIRSTS, device=DEVICE), torch.tensor(2**40 + 5, device=DEVICE))
    mine = clones(them)
    copies, expected = ([torch.zeros_like(x, dtype=BF16) for x in them[0]] for _ in range(2))
    with use_backend("triton"):
        getattr(rung_kernels, name)(*mine, factors(), copies=copies, rounding=rounding)
    getattr(reference, name)(*them, factors(), copies=expected, rounding=rounding)
    same_bits(copies, expected)
    same_bits(mine[0], them[0])
    assert not torch.equal(copies[1], mine[0][1].bfloat16())


def test_elements_beyond_two_to_the_31st() -> None:
    """Of tensors that begin so far ahead of those that are there that 32-bit offsets would lead elsewhere."""
    start = 3 * 2**31
    them = lists((F32, BF16, F32, F32), [(1024,)])
    theirs, copy, expected = clones(them), *(torch.zeros(1024, dtype=BF16, device=DEVICE) for _ in range(2))
    keys, firsts = torch.tensor([[3, 4]], device=DEVICE), torch.tensor([2**33], device=DEVICE)
    step = torch.tensor(9, device=DEVICE)
    addresses = [x.data_ptr() - start * x.element_size() for x in (*(xs[0] for xs in them), copy)]
    row = [*addresses, start + 1024, -(start // 1024), 0]
    launch.launch(
        kernels._optimizer_step,
        (1,),
        tensors=torch.tensor([row], device=DEVICE),
        tensor_of_block=torch.zeros(1, dtype=torch.int32, device=DEVICE),
        factors=factors(),
        levels=None,
        maxima=None,
        gains=None,
        counts=None,
        keys=keys,
        firsts=firsts,
        step=step,
        PARAM=tl.float32,
        GRAD=tl.bfloat16,
        EXP_AVG=tl.float32,
        EXP_AVG_SQ=tl.float32,
        COPY=tl.bfloat16,
        SPAM=True,
        BLOCK=1024,
        PART=256,
        VECTOR=4,
        enable_fp_fusion=False,
    )
    rounding = Rounding(keys, firsts + start, step)
    reference.spam_step(*theirs, factors(), copies=[expected], rounding=rounding)
    same_bits([x[0] for x in them] + [copy], [x[0] for x in theirs] + [expected])


def test_tables_are_made_once() -> None:
    kernels._tensors.cache_clear()  # addresses may come again
    kernels._tensor_of_block.cache_clear()
    them = lists((F32,) * 4)
    compare("adamw_step", them, factors())
    made = kernels._tensors.cache_info().misses, kernels._tensor_of_block.cache_info().misses
    with use_backend("triton"):
        rung_kernels.adamw_step(*them, factors())
        assert (kernels._tensors.cache_info().misses, kernels._tensor_of_block.cache_info().misses) == made
        them[1] = clones(them)[1]
        rung_kernels.adamw_step(*them, factors())
    assert kernels._tensors.cache_info().misses == made[0] + 1
    assert kernels._tensor_of_block.cache_info().misses == made[1]


@OPS
def test_float64_runs_the_reference(name: str) -> None:
    before, them = launch.counts.copy(), lists((torch.float64,) * 4)
    theirs = clones(them)
    with use_backend("triton"):
        getattr(rung_kernels, name)(*them, factors())
    getattr(reference, name)(*theirs, factors())
    assert launch.counts == before and all(torch.equal(x, y) for x, y in zip(them[0], theirs[0], strict=True))


@OPS
def test_tensors_that_the_kernel_cannot_go_through(name: str) -> None:
    step: Callable[..., None] = getattr(rung_kernels, name)
    wrong = lists((F32,) * 4, [(4, 6)])
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"gradient 0 is \[4, 6\] with strides \[1, 4\] .* contiguous"):
            step(wrong[0], [wrong[1][0].T.contiguous().T], *wrong[2:], factors())
        with pytest.raises(ValueError, match=r"exp_avg 0 is \[24\]"):
            step(*wrong[:2], [wrong[2][0].flatten()], wrong[3], factors())
        with pytest.raises(ValueError, match="1 of parameter, 0 of gradient"):
            step(wrong[0], [], *wrong[2:], factors())


def test_library_operator() -> None:
    them = lists((F32, BF16, F32, F32), [(5,), (3, 2)])
    copies = [x.bfloat16() for x in them[0]]
    counts = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    keys, numbers = (
        torch.zeros(2, 2, dtype=torch.int64, device=DEVICE),
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )
    gains = torch.ones(2, dtype=torch.float64, device=DEVICE)
    operator = torch.ops.rung.optimizer_step.default
    rest = (gains, gains, gains, keys, numbers, numbers[0].clone())
    torch.library.opcheck(operator, (*them, copies, factors(), counts, *rest, False))
    torch.library.opcheck(operator, (*them, [], factors(), None, *[None] * 6, True))


@OPS
def test_compiled_whole(name: str) -> None:
    them = lists((F32,) * 4, [(5,), (3, 2)])
    theirs = clones(them)

    def twice(params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], slots: Tensor) -> None:
        counts = torch.zeros(2, dtype=torch.int64, device=slots.device)
        for _ in range(2):
            getattr(rung_kernels, name)(params, grads, m, v, slots, counts=counts)

    with use_backend("triton"):
        torch.compile(twice, fullgraph=True, backend="aot_eager")(*them, factors())
        twice(*theirs, factors())
    for xs, ys in zip(them, theirs, strict=True):
        same_bits(xs, ys)
