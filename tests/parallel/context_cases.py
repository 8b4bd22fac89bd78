"""What one rank does in test_context.py: attention of its part of a window, held against dense attention of all of it.

Every rank draws the same window from a seed, so that each knows the whole truth and answers for its own part.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import rung_kernels
from rung.data.batch import Batch
from rung.layout import Layout
from rung.layout.context import Zigzag
from rung.parallel import context
from rung.parallel.context import ContextAttention, ContextMask, cut_context, gather_tokens
from rung.parallel.parallelize import _recomputed
from rung_kernels.block_attention import attention_forward, merge_lse

GRADED = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One attention: sizes, who sees whom, and how it is run."""

    degree: int = 1
    heads: int = 4
    kv_heads: int = 2
    seq_len: int = 56
    documents: tuple[tuple[int, ...], ...] | None = None  # lengths, per sequence
    window: int | None = None
    recompute: str = "none"  # none, plain (repeats everything) or saved (by a policy)
    compiled: bool = False
    dtype: torch.dtype = torch.float64
    ranks: tuple[int, ...] | None = None  # of the world; None: all
    mask_elements: int | None = None
    seed: int = 0

    @property
    def group(self) -> dist.ProcessGroup:
        return _group(self.ranks)


@functools.cache
def _group(ranks: tuple[int, ...] | None) -> dist.ProcessGroup:
    if ranks is None:
        return dist.group.WORLD
    world = range(dist.get_world_size())
    others = tuple(rank for rank in world if rank not in ranks)
    groups = [dist.new_group(list(members)) for members in sorted((ranks, others))]
    return groups[sorted((ranks, others)).index(ranks if dist.get_rank() in ranks else others)]


def draw(case: Case) -> tuple[list[Tensor], Tensor | None]:
    """(q, k, v, gradient of out) of the whole window and its document ids, two sequences."""
    generator = torch.Generator().manual_seed(case.seed)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    shapes = [(2, case.seq_len, number, 8) for number in heads]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype) for shape in shapes]
    if case.documents is None:
        return tensors, None
    ids = [torch.repeat_interleave(torch.arange(len(row)) + 2**40, torch.tensor(row)) for row in case.documents]
    return tensors, torch.stack(ids)


def dense(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, documents: Tensor | None, window: int | None) -> list[Tensor]:
    """out, dq, dk and dv of the whole window."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    seen = ((distance >= 0) & (distance < (window or q.shape[1])))[None, None]
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    out = rung_kernels.attention(*leaves, mask=seen)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def recomputed(function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """none, plain (repeats everything) or saved (keeps what came from other ranks), by what blocks of a run use."""
    forward: Callable[..., Tensor] = _recomputed(function, "none" if mode == "none" else "full", mode == "saved")
    return forward


@dataclass
class Sent:
    """What this rank sent."""

    messages: int = 0
    elements: int = 0
    num_bytes: int = 0

    def add(self, elements: int, tensor: Tensor) -> None:
        self.messages += 1
        self.elements += elements
        self.num_bytes += elements * tensor.element_size()


@contextmanager
def counted() -> Iterator[Sent]:
    """Count messages between ranks, and what of them is sent to others."""
    sent, batch, all_to_all = Sent(), dist.batch_isend_irecv, dist.all_to_all_single

    def counting_batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            if operation.op is dist.isend:
                sent.add(operation.tensor.numel(), operation.tensor)
        return batch(operations)

    def counting_all_to_all(output: Tensor, x: Tensor, out_splits: Any, splits: list[int], group: Any) -> Any:
        others = sum(split for rank, split in enumerate(splits) if rank != group.rank())
        sent.add(others * x[0].numel(), x)
        return all_to_all(output, x, out_splits, splits, group=group)

    dist.batch_isend_irecv, dist.all_to_all_single = counting_batch, counting_all_to_all
    try:
        yield sent
    finally:
        dist.batch_isend_irecv, dist.all_to_all_single = batch, all_to_all


def spread(case: Case) -> tuple[list[Tensor], list[Tensor], Sent, Sent]:
    """(ours, truth) for out, dq, dk, dv of this rank's tokens, and what was sent forward and backward."""
    (q, k, v, grad), documents = draw(case)
    group, size = case.group, case.group.size()
    mine = torch.from_numpy(Zigzag(case.seq_len, size).positions(group.rank()))
    attention = ContextAttention(group, case.degree, case.window)
    mask = ContextMask(group)(mine[None], None if documents is None else documents[:, mine])
    if documents is not None:
        assert torch.equal(mask, documents)

    # A little arithmetic around it, for recomputation to have something to do.
    def block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q * 2.0, k * 0.5, v * 1.0, mask).flatten(-2) * 1.0  # powers of two change no bits

    function = recomputed(block, case.recompute)
    if case.compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
    leaves = [x[:, mine].clone().requires_grad_() for x in (q, k, v)]
    with counted() as forward:
        out = function(*leaves, mask)
    with counted() as backward:
        grads = torch.autograd.grad(out, leaves, grad[:, mine].flatten(-2))
    ours = [out.detach().unflatten(-1, (case.heads, -1)), *grads]
    truth = [x[:, mine] for x in dense(q, k, v, grad, documents, case.window)]
    return ours, truth, forward, backward


@contextmanager
def small_masks(elements: int | None) -> Iterator[None]:
    before = context._MASK_ELEMENTS
    context._MASK_ELEMENTS = elements or before
    try:
        yield
    finally:
        context._MASK_ELEMENTS = before


def errors(cases: dict[str, Case]) -> dict[str, dict[str, float]]:
    """The largest absolute error of this rank's out, dq, dk and dv in each case; NaN counts as the worst."""
    found = {}
    for name, case in cases.items():
        with small_masks(case.mask_elements):
            ours, truth, _, _ = spread(case)
        worst = [(a - b).abs().nan_to_num(nan=torch.inf).max().item() for a, b in zip(ours, truth, strict=True)]
        found[name] = dict(zip(GRADED, worst, strict=True))
    return found


def narrow_errors(case: Case) -> dict[str, tuple[float, float]]:
    """Squared norms of the error in bf16, spread and dense, against float64 of the same numbers."""
    ours, dense_truth, _, _ = spread(replace(case, dtype=torch.bfloat16))
    (q, k, v, grad), documents = draw(replace(case, dtype=torch.bfloat16))
    exact = dense(q.double(), k.double(), v.double(), grad.double(), documents, case.window)
    mine = torch.from_numpy(Zigzag(case.seq_len, case.group.size()).positions(case.group.rank()))
    return {
        name: tuple((x.double() - truth[:, mine]).square().sum().item() for x in pair)
        for name, truth, *pair in zip(GRADED, exact, ours, dense_truth, strict=True)
    }


def rounded_once(case: Case) -> bool:
    """Whether the ring's output has the bits of blocks that are merged in float32 and rounded after the last."""
    (q, k, v, _), _ = draw(case)
    zigzag, rank = Zigzag(case.seq_len, case.group.size()), case.group.rank()
    mine = torch.from_numpy(zigzag.positions(rank))
    out = lse = None
    for step in range(zigzag.ranks):
        source = zigzag.source(rank, step)
        theirs = torch.from_numpy(zigzag.positions(source))
        (block,) = zigzag.blocks(rank, source)
        rows, columns = mine[block.rows], theirs[block.columns]
        part = attention_forward(q[:, rows], k[:, columns], v[:, columns], None, block.causal)
        if out is None:
            out, lse = part[0].float(), part[1]
        else:
            out[:, block.rows], lse[:, block.rows] = merge_lse(out[:, block.rows], lse[:, block.rows], *part)
    return torch.equal(spread(case)[0][0], out.to(case.dtype))


def traffic(case: Case) -> tuple[Sent, Sent]:
    """What this rank sent forward and backward."""
    return spread(case)[2:]


def check_operations() -> None:
    """torch's own checks of custom operations: schema, fake tensors, autograd."""
    group = dist.group.WORLD
    q, k, v = (torch.randn(2, 8, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    documents = torch.zeros(2, 8 * group.size(), dtype=torch.int64)
    arguments = (q, k, v, documents, 5, group.group_name, 1)
    torch.library.opcheck(torch.ops.rung.ring_attention.default, arguments, test_utils=tests)
    arguments = (torch.randn(group.size(), 3, requires_grad=True), group.group_name)
    torch.library.opcheck(torch.ops.rung.exchange_with_neighbours.default, arguments, test_utils=tests)
    out, lse = torch.ops.rung.ring_attention(q, k, v, None, None, group.group_name, 1)
    assert out.requires_grad and not lse.requires_grad


def order_of_events() -> tuple[str, str]:
    """Forward and backward on a ring: s messages sent, b a block computed, w a wait for messages."""
    events: list[str] = []

    def noted(function: Callable[..., Any], letter: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(letter)
            return function(*args)

        return call

    places = [
        (context, "attention_forward", "b"),
        (context, "attention_backward", "b"),
        (context._Hop, "wait", "w"),
        (dist, "batch_isend_irecv", "s"),
    ]
    before = [getattr(where, name) for where, name, _ in places]
    for (where, name, letter), function in zip(places, before, strict=True):
        setattr(where, name, noted(function, letter))
    try:
        q, k = torch.randn(1, 4, 2, 8, requires_grad=True), torch.randn(1, 4, 2, 8)
        out = ContextAttention(dist.group.WORLD)(q, k, k)
        events.append("|")
        out.sum().backward()
    finally:
        for (where, name, _), function in zip(places, before, strict=True):
            setattr(where, name, function)
    forward, backward = "".join(events).split("|")
    return forward, backward


def gathered(seq_len: int) -> None:
    """gather_tokens: logical order, and the gradient of a value that every rank makes of the whole window."""
    group = dist.group.WORLD
    mine = torch.from_numpy(Zigzag(seq_len, group.size()).positions(group.rank()))
    for tail in ((), (3,), (2, 2)):
        whole = torch.randn(2, seq_len, *tail, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        part = whole[:, mine].clone().requires_grad_()
        result = gather_tokens(part, group)
        assert torch.equal(result, whole)
        leaf = whole.clone().requires_grad_()
        (grad,) = torch.autograd.grad(result.cumsum(1).square().sum(), part)
        (truth,) = torch.autograd.grad(leaf.cumsum(1).square().sum(), leaf)
        assert torch.equal(grad, truth[:, mine])
        assert gather_tokens(whole, None) is whole


def cut(seq_len: int) -> None:
    """cut_context gives each rank its place, and the places make up the window."""
    size, rank = dist.get_world_size(), dist.get_rank()
    tokens = torch.arange(2 * seq_len).view(2, seq_len)
    positions = torch.arange(seq_len).expand(2, -1)
    batch = Batch(tokens, tokens + 1, torch.tensor([7, 8]), positions, tokens // 5)
    layout = Layout(cp=size, world_size=size)
    part = cut_context(batch, layout, rank)
    assert torch.equal(part.labels_BT, part.tokens_BT + 1) and torch.equal(part.sample_ids_B, batch.sample_ids_B)
    assert (part.positions_BT.diff(dim=1) > 0).all() and part.positions_BT.shape[1] == seq_len // size
    for field in ("tokens_BT", "labels_BT", "positions_BT", "document_ids_BT"):
        assert torch.equal(gather_tokens(getattr(part, field), dist.group.WORLD), getattr(batch, field)), field
    assert cut_context(replace(batch, document_ids_BT=None), layout, rank).document_ids_BT is None
    assert cut_context(batch, Layout(world_size=1), 0) is batch


def refusals() -> list[str]:
    """What a person is told, before anything is sent."""
    said = []
    group = dist.group.WORLD
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 1, 8)
    trials: list[Callable[[], Any]] = [
        lambda: ContextAttention(group, group.size())(q, k, k),
        lambda: ContextAttention(group, 3),
        lambda: ContextAttention(group)(q, k, k, torch.zeros(1, 4, dtype=torch.int64)),
        lambda: ContextAttention(group)(q[:, :3], k[:, :3], k[:, :3]),
    ]
    for trial in trials:
        try:
            trial()
        except ValueError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def random_case(seed: int, size: int) -> Case:
    """Sizes, documents and a window from a seed: cut anywhere, of any length."""
    generator = random.Random(seed)
    seq_len = 2 * size * generator.randint(1, 9)
    degree = generator.choice([degree for degree in range(1, size + 1) if size % degree == 0])
    kv_heads = generator.choice([1, 2, 3])
    heads = degree * kv_heads * generator.choice([1, 2])

    def lengths() -> tuple[int, ...]:
        cuts = sorted(generator.sample(range(1, seq_len), generator.randint(0, min(6, seq_len - 1))))
        return tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, seq_len], strict=True))

    return Case(
        degree=degree,
        heads=heads,
        kv_heads=kv_heads,
        seq_len=seq_len,
        documents=(lengths(), lengths()) if generator.random() < 0.7 else None,
        window=generator.randint(1, seq_len + 2) if generator.random() < 0.6 else None,
        recompute=generator.choice(["none", "saved"]),
        mask_elements=generator.choice([None, 1, 16 * seq_len]),
        seed=seed,
    )


class _Block(nn.Module):
    """Projections around attention, as a layer has them."""

    def __init__(self, attention: ContextAttention) -> None:
        super().__init__()
        self.qkv, self.out, self.attention = nn.Linear(16, 64), nn.Linear(32, 16), attention

    def forward(self, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (8, 8)).split((4, 2, 2), dim=-2)
        return x_BTD + self.out(self.attention(q, k, v, mask).flatten(-2))


def exchanges(degree: int, compiled: bool) -> dict[str, tuple[int, list[Tensor]]]:
    """Messages of two layers forward and backward, and the gradients, by the way of recomputation."""
    group, results = dist.group.WORLD, {}
    for mode in ("none", "saved", "plain"):
        torch.manual_seed(group.rank())
        layers = [_Block(ContextAttention(group, degree)).double() for _ in range(2)]
        x = torch.randn(2, 14, 16, dtype=torch.float64, requires_grad=True)
        y = x
        with counted() as sent:
            for layer in layers:
                forward = recomputed(layer.forward, mode)
                if compiled:
                    forward = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=False)
                y = forward(y, None)
            y.square().sum().backward()
        grads = [x.grad, *(parameter.grad for layer in layers for parameter in layer.parameters())]
        results[mode] = (sent.messages, grads)
    return results
