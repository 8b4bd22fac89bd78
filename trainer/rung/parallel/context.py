"""Context parallelism: attention of a window whose tokens are spread over ranks, exact and without padding.

Tokens are dealt by ``rung.layout.context.Zigzag`` in every method. N context ranks are a ring of N/u places by u
neighbours that exchange heads; u = 1 is the plain ring (Liu et al. 2023, "Ring Attention with Blockwise Transformers"),
u = N is Ulysses (Jacobs et al. 2023, "DeepSpeed Ulysses"), between them is Fang & Zhao 2024, "USP". Both run on the one
process group of the context axis.

Legend: B sequences, T tokens of this rank (of a place of the ring, inside the ring), S tokens of the whole window, H
heads, K key/value heads, E head size, U neighbours that exchange heads, n heads of one neighbour.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rung.data.batch import Batch
from rung.errors import UserError
from rung.layout import Layout
from rung.layout.context import Block, Zigzag
from rung.parallel.collectives import all_gather_single, group_by_name
from rung_kernels.block_attention import attention_backward, attention_forward, merge_lse

__all__ = ["SAVED_UNDER_RECOMPUTE", "ContextAttention", "ContextMask", "cut_context", "gather_tokens"]

_MASK_ELEMENTS = 2**27
"""Rows are taken in pieces whose mask has at most so many elements."""


class _Ring:
    """Every ``stride``-th rank of a group, this one among them. Messages go to the next, and come from the previous."""

    def __init__(self, group_name: str, stride: int) -> None:
        self._group = group_by_name(group_name)
        size, rank = self._group.size(), self._group.rank()
        self.size, self.place = size // stride, rank // stride
        self._next, self._previous = (rank + stride) % size, (rank - stride) % size

    def pass_on(self, messages: Sequence[Tensor]) -> _Hop:
        """Send contiguous tensors to the next rank and receive as many of the same shapes, in the background.

        Nothing may write to ``messages`` before ``wait``: the receiver would get what was written.
        """
        arriving = [torch.empty_like(message) for message in messages]
        operations = []
        for message, buffer in zip(messages, arriving, strict=True):
            operations.append(dist.P2POp(dist.isend, message, group=self._group, group_peer=self._next))
            operations.append(dist.P2POp(dist.irecv, buffer, group=self._group, group_peer=self._previous))
        return _Hop(messages, arriving, dist.batch_isend_irecv(operations) if operations else [])


class _Hop:
    """Messages on their way; keeps them alive until they have arrived."""

    def __init__(self, leaving: Sequence[Tensor], arriving: list[Tensor], works: Sequence[dist.Work]) -> None:
        self._leaving, self._arriving, self._works = leaving, arriving, works

    def wait(self) -> list[Tensor]:
        """What came, in the order of what was sent. On CUDA the stream waits, not the host."""
        for work in self._works:
            work.wait()
        return self._arriving


class _Blocks:
    """What one place of the ring computes in each step, and the masks of it."""

    def __init__(self, q_BTHE: Tensor, documents_BS: Tensor | None, window: int | None, ring: _Ring) -> None:
        batch, tokens = q_BTHE.shape[:2]
        self._zigzag = Zigzag(tokens * ring.size, ring.size)
        if documents_BS is not None and documents_BS.shape[1] != self._zigzag.seq_len:
            raise ValueError(
                f"document ids of {documents_BS.shape[1]} tokens for a window of {self._zigzag.seq_len}: attention "
                "over context ranks needs those of the whole window, as ContextMask gathers them"
            )
        self._documents, self._window, self._place, self._device = documents_BS, window, ring.place, q_BTHE.device
        self._max_rows = max(1, _MASK_ELEMENTS // (batch * tokens))

    def __call__(self, step: int) -> Iterator[tuple[slice, slice, Tensor | None, bool]]:
        """(rows, columns, mask or None, causal) of each block, rows increasing, one mask at a time."""
        source = self._zigzag.source(self._place, step)
        documents = self._documents is not None
        for block in _blocks(self._zigzag, self._place, source, self._window, documents, self._max_rows):
            yield block.rows, block.columns, self._mask(source, block), block.causal

    def _mask(self, source: int, block: Block) -> Tensor | None:
        """bool [B or 1, 1, rows, columns], made on the device without asking it anything; None: all is seen."""
        mask = None
        if block.compare_positions:
            rows, columns = self._positions(self._place)[block.rows], self._positions(source)[block.columns]
            distance = rows.unsqueeze(-1) - columns
            mask = distance >= 0
            if self._window is not None:
                mask = mask & (distance < self._window)
            mask = mask.unsqueeze(0)
        if self._documents is not None:
            rows, columns = self._held(self._place)[:, block.rows], self._held(source)[:, block.columns]
            same = rows.unsqueeze(-1) == columns.unsqueeze(-2)
            mask = same if mask is None else mask & same
        return None if mask is None else mask.unsqueeze(1)

    def _positions(self, place: int) -> Tensor:
        ranges = self._zigzag.ranges(place)
        return torch.cat([torch.arange(part.start, part.stop, device=self._device) for part in ranges])

    def _held(self, place: int) -> Tensor:
        """The document ids of the tokens of a place."""
        assert self._documents is not None
        return torch.cat([self._documents[:, part.start : part.stop] for part in self._zigzag.ranges(place)], dim=1)


@functools.lru_cache(maxsize=1024)
def _blocks(zigzag: Zigzag, place: int, source: int, window: int | None, documents: bool, max_rows: int) -> list[Block]:
    return zigzag.blocks(place, source, window, documents, max_rows)


@torch.library.custom_op("rung::ring_attention", mutates_args=())
def _ring_attention(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    documents_BS: Tensor | None,
    window: int | None,
    group_name: str,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the tokens of a place over the whole ring -> (out_BTHE, lse_BTH in fp32).

    The ring is every ``stride``-th rank of the group. K and V travel as one message, N-1 hops of it, each while the
    block of the hop before is computed. Outputs are merged in fp32 and rounded once. The log-sum-exp has no gradient.
    """
    ring = _Ring(group_name, stride)
    blocks = _Blocks(q_BTHE, documents_BS, window, ring)
    fp32 = torch.promote_types(q_BTHE.dtype, torch.float32)

    def part(rows: slice, columns: slice, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
        return attention_forward(q_BTHE[:, rows], k[:, columns], v[:, columns], mask, causal)

    k, v = k_BTKE, v_BTKE
    kv = torch.stack((k, v)) if ring.size > 1 else None
    hop = None if kv is None else ring.pass_on([kv])
    # Every token sees itself, so that the rows of the local blocks are all rows.
    outs, lses = zip(*(part(*block) for block in blocks(0)), strict=True)
    out, lse = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in (outs, lses))
    out, lse = out.to(fp32 if ring.size > 1 else out.dtype), lse.contiguous()
    for step in range(1, ring.size):
        assert hop is not None
        (kv,) = hop.wait()
        k, v = kv.unbind(0)
        hop = ring.pass_on([kv] if step < ring.size - 1 else [])
        for rows, columns, mask, causal in blocks(step):
            merged = merge_lse(out[:, rows], lse[:, rows], *part(rows, columns, mask, causal))
            out[:, rows], lse[:, rows] = merged
    return out.to(q_BTHE.dtype).contiguous(), lse


@torch.library.custom_op("rung::ring_attention_backward", mutates_args=())
def _ring_attention_backward(
    grad_BTHE: Tensor,
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    out_BTHE: Tensor,
    lse_BTH: Tensor,
    documents_BS: Tensor | None,
    window: int | None,
    group_name: str,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. K and V go round again; their gradients follow one hop behind and arrive at home.

    A rank's own share of dK and dV never leaves it, which makes N-1 hops of the rest. Gradients travel in fp32: with N
    ranks to add to them, rounding on the way would show.
    """
    ring = _Ring(group_name, stride)
    blocks = _Blocks(q_BTHE, documents_BS, window, ring)
    fp32 = torch.promote_types(q_BTHE.dtype, torch.float32)
    grad_BTHE = grad_BTHE.contiguous()
    dq = torch.zeros(q_BTHE.shape, dtype=fp32, device=q_BTHE.device)

    def share(step: int, k: Tensor, v: Tensor) -> Tensor:
        """dK and dV of the tokens that are here in this step, by the queries of this rank: fp32 [2, B, T, K, E]."""
        dkv = torch.zeros((2, *k.shape), dtype=fp32, device=k.device)
        for rows, columns, mask, causal in blocks(step):
            dq_rows, dk, dv = attention_backward(
                grad_BTHE[:, rows],
                q_BTHE[:, rows],
                k[:, columns],
                v[:, columns],
                out_BTHE[:, rows],
                lse_BTH[:, rows],
                mask,
                causal,
            )
            dq[:, rows] += dq_rows
            dkv[0, :, columns] += dk
            dkv[1, :, columns] += dv
        return dkv

    if ring.size == 1:
        own = share(0, k_BTKE, v_BTKE)
    else:
        hop = ring.pass_on([torch.stack((k_BTKE, v_BTKE))])
        own = share(0, k_BTKE, v_BTKE)
        (kv,) = hop.wait()
        behind: list[Tensor] = []  # what the step before left of the gradients of the tokens that were here then
        for step in range(1, ring.size):
            hop = ring.pass_on([kv, *behind] if step < ring.size - 1 else behind)
            ours = share(step, *kv.unbind(0))
            arrived = hop.wait()
            if behind:
                ours += arrived.pop()
            behind = [ours]
            if arrived:
                (kv,) = arrived
        (home,) = ring.pass_on(behind).wait()
        own += home
    # Copies: results of an operation must not share memory.
    dk, dv = (grad.to(x.dtype, copy=True) for grad, x in zip(own, (k_BTKE, v_BTKE), strict=True))
    return dq.to(q_BTHE.dtype), dk, dv


@_ring_attention.register_fake
def _(q_BTHE: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    fp32 = torch.promote_types(q_BTHE.dtype, torch.float32)
    return q_BTHE.new_empty(q_BTHE.shape), q_BTHE.new_empty(q_BTHE.shape[:3], dtype=fp32)


@_ring_attention_backward.register_fake
def _(grad_BTHE: Tensor, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q_BTHE.new_empty(q_BTHE.shape), k_BTKE.new_empty(k_BTKE.shape), v_BTKE.new_empty(v_BTKE.shape)


def _keep_for_ring_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, ctx.window, ctx.group_name, ctx.stride = inputs
    ctx.save_for_backward(q, k, v, documents, *output)
    ctx.mark_non_differentiable(output[1])


def _ring_backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, documents, out, lse = ctx.saved_tensors
    grads = _ring_attention_backward(grad_out, q, k, v, out, lse, documents, ctx.window, ctx.group_name, ctx.stride)
    return (*grads, None, None, None, None)


_ring_attention.register_autograd(_ring_backward, setup_context=_keep_for_ring_backward)


@torch.library.custom_op("rung::exchange_with_neighbours", mutates_args=())
def _exchange(x: Tensor, group_name: str) -> Tensor:
    """x [U, ...] -> [U, ...]: piece d goes to the d-th of U neighbours on the group, and piece s comes from the s-th.

    Neighbours are ranks 0..U-1 of the group, U..2U-1, and so on. It is its own transpose, and so its own backward pass.
    """
    group = group_by_name(group_name)
    degree, rank = x.shape[0], group.rank()
    members = range(rank - rank % degree, rank - rank % degree + degree)
    splits = [int(rank in members) for rank in range(group.size())]  # nothing for the others: no group of their own
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dist.all_to_all_single(result, x.contiguous(), splits, splits, group=group)
    return result


@_exchange.register_fake
def _(x: Tensor, group_name: str) -> Tensor:
    return x.new_empty(x.shape)


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    _, ctx.group_name = inputs


def _exchange_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _exchange(grad, ctx.group_name), None


_exchange.register_autograd(_exchange_backward, setup_context=_keep_group)


SAVED_UNDER_RECOMPUTE = frozenset(
    {torch.ops.rung.ring_attention.default, torch.ops.rung.exchange_with_neighbours.default}
)
"""Operations whose results recomputation keeps, whatever else it drops: to make them again, ranks would have to send
again. Per token and layer that is the output and a log-sum-exp (h + heads elements), and where heads are exchanged
2h + 2k more (q, k and v as they arrived, and the output as it came back)."""


def _assemble(pieces: Tensor) -> Tensor:
    """[U, B, T, ...], what U neighbours hold -> [B, U·T, ...]: all their early chunks, then all their late ones.

    That is the order of a place of the ring; of all ranks of the group, it is the order of the window.
    """
    pieces = pieces.unflatten(2, (2, -1))
    halves = torch.stack((pieces[:, :, 0], pieces.flip(0)[:, :, 1]))  # late chunks count backwards
    return halves.permute(2, 0, 1, *range(3, halves.dim())).flatten(1, 3)


def _deal(x: Tensor, degree: int) -> Tensor:
    """The inverse of ``_assemble``: [B, U·T, ...] -> [U, B, T, ...]."""
    halves = x.unflatten(1, (2, degree, -1))
    pieces = torch.stack((halves[:, 0], halves[:, 1].flip(1)))
    return pieces.permute(2, 1, 0, *range(3, pieces.dim())).flatten(2, 3)


class ContextAttention(nn.Module):
    """Causal attention over a window whose tokens are dealt over ``group``; takes the place of DotProductAttention.

    ``ulysses_degree`` neighbours exchange heads for tokens, the rest is a ring; it divides the size of the group.
    ``window``: a token sees itself and what is less than ``window`` before it. All ranks of the group must call it
    together, in the same order.
    """

    def __init__(self, group: dist.ProcessGroup, ulysses_degree: int = 1, window: int | None = None) -> None:
        super().__init__()
        if group.size() % ulysses_degree:
            raise ValueError(f"ulysses_degree={ulysses_degree} does not divide the {group.size()} ranks of the group")
        self.group_name = group.group_name
        self.degree = ulysses_degree
        self.window = window

    def forward(self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Tensor | None = None) -> Tensor:
        """This rank's tokens -> out_BTHE. ``mask``: what ``ContextMask`` returned.

        Positions are those of the zigzag. Raises UserError where the heads do not divide among the neighbours.
        """
        if self.degree == 1:
            out_BTHE, _ = _ring_attention(q_BTHE, k_BTKE, v_BTKE, mask, self.window, self.group_name, 1)
            return out_BTHE
        heads, kv_heads = q_BTHE.shape[2], k_BTKE.shape[2]
        if heads % self.degree:
            raise UserError(
                f"cp_ulysses_degree={self.degree} does not divide the {heads} attention heads of a rank; use a divisor "
                f"of {heads}, with a ring over the other context ranks"
            )
        # Fewer K/V heads than neighbours: each is repeated just so often that all get the ones their queries read.
        copies = self.degree // math.gcd(self.degree, kv_heads)
        if copies > 1:
            k_BTKE, v_BTKE = (x.repeat_interleave(copies, dim=2) for x in (k_BTKE, v_BTKE))
        # One message for all three.
        dealt = [x.unflatten(2, (self.degree, -1)).permute(2, 0, 1, 3, 4) for x in (q_BTHE, k_BTKE, v_BTKE)]
        arrived = _assemble(_exchange(torch.cat(dealt, dim=3), self.group_name))
        q, k, v = arrived.split([x.shape[3] for x in dealt], dim=2)
        out, _ = _ring_attention(q, k, v, mask, self.window, self.group_name, self.degree)
        out_UBTnE = _exchange(_deal(out, self.degree), self.group_name)
        return out_UBTnE.permute(1, 2, 0, 3, 4).flatten(2, 3)


class ContextMask(nn.Module):
    """Takes the place of the model's AttentionMask: what ``ContextAttention`` needs to know beside positions.

    Positions need no telling: every window has 0..S-1, dealt by the zigzag. Document ids are gathered once for all
    layers, rather than sent round with the keys in each.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group_name = group.group_name

    def forward(self, positions_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor | None:
        """int64 document ids of the whole window [B, S], or None where attention may cross documents."""
        return None if document_ids_BT is None else _gather(document_ids_BT, group_by_name(self.group_name))


def _gather(x_BT: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T, ...] of each rank -> [B, S, ...] in the order of the window."""
    pieces = x_BT.new_empty((group.size(), *x_BT.shape))
    all_gather_single(pieces.flatten(0, 1), x_BT.contiguous(), group=group)
    return _assemble(pieces)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BT: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size, ctx.rank = group.size(), group.rank()
        return _gather(x_BT, group)

    @staticmethod
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None]:
        return _deal(grad_BS, ctx.size)[ctx.rank], None


def gather_tokens(x_BT: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B, T, ...] of each context rank -> [B, S, ...] of the whole window in logical order, on every rank.

    The backward pass takes this rank's part of the gradient and sums nothing: every rank makes the same values of the
    whole window from it, so each already has the whole gradient of its own tokens (Megatron's gather, Shoeybi et al.
    2019). Parameters used after it get the same gradient on every context rank and must be counted on one of them.
    ``group`` None: the tokens are all here.
    """
    return x_BT if group is None else _GatherTokens.apply(x_BT, group)


def cut_context(batch: Batch, layout: Layout, rank: int) -> Batch:
    """The tokens of every window that this rank of the world holds, positions increasing; sample ids stay whole.

    Raises UserError where the windows do not divide into 2 · cp chunks.
    """
    if layout.cp == 1:
        return batch
    ranges = Zigzag(batch.tokens_BT.shape[1], layout.cp).ranges(layout.coordinate(rank)["cp"])
    device = batch.tokens_BT.device
    return batch.take(torch.cat([torch.arange(part.start, part.stop, device=device) for part in ranges]))
