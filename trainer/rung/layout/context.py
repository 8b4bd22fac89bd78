"""How the tokens of a window are dealt to context ranks, and which blocks of attention each ring step is made of.

The window is cut into 2N equal chunks, and rank i of N owns chunks i and 2N-1-i ("zigzag"): under causal order an early
chunk sees little and its late partner sees much, so that all ranks work alike in every step of a ring. Brandon et al.
2023, "Striped Attention", say why balance is needed; the zigzag is from zhuzilin's ring-flash-attention and Llama 3's
training (Grattafiori et al. 2024, section 3.3.2).

Arithmetic only: imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rung.errors import UserError
from rung.layout.values import divisors, heads_of_rank, listed, nearest_multiples

__all__ = ["Block", "Zigzag", "context_problems"]

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """A rectangle of one rank's attention: its own tokens ``rows`` look at tokens ``columns`` of the source rank.

    Both are slices of what a rank holds (positions in increasing order).
    """

    rows: slice
    columns: slice
    causal: bool = False
    """The rectangle is a square on the diagonal, and causal order is all there is to compare inside it."""
    compare_positions: bool = False
    """Some of the pairs are invisible by their positions, in a pattern that is not ``causal``."""


@dataclass(frozen=True)
class Zigzag:
    """The tokens of a window of ``seq_len`` over ``ranks``. Raises UserError where they do not divide evenly.

    Context ranks that exchange heads (Ulysses over u neighbours) hold together what one rank of a ring of N/u holds:
    ``Zigzag(seq_len, N // u)`` describes that ring.
    """

    seq_len: int
    ranks: int

    def __post_init__(self) -> None:
        UserError.raise_all(context_problems(self.seq_len, self.ranks))

    @property
    def chunk(self) -> int:
        """Tokens of one chunk; a rank holds two."""
        return self.seq_len // (2 * self.ranks)

    def ranges(self, rank: int) -> tuple[range, range]:
        """The positions that a rank holds: its early and its late chunk."""
        early, late = rank * self.chunk, (2 * self.ranks - 1 - rank) * self.chunk
        return range(early, early + self.chunk), range(late, late + self.chunk)

    def positions(self, rank: int) -> Indices:
        """The positions that a rank holds, increasing: int64 [seq_len / ranks]."""
        return np.concatenate([np.arange(part.start, part.stop, dtype=np.int64) for part in self.ranges(rank)])

    def order(self) -> Indices:
        """The positions of all ranks one after another: int64 [seq_len]."""
        return np.concatenate([self.positions(rank) for rank in range(self.ranks)])

    def inverse(self) -> Indices:
        """Where each position stands in ``order()``: int64 [seq_len]."""
        return np.argsort(self.order())

    def source(self, rank: int, step: int) -> int:
        """Whose keys a rank looks at in a step of the ring, in which each rank sends to the next."""
        return (rank - step) % self.ranks

    def blocks(
        self, rank: int, source: int, window: int | None = None, documents: bool = False, max_rows: int | None = None
    ) -> list[Block]:
        """What ``rank`` computes of its tokens against those of ``source``; blocks that nobody sees are left out.

        Plain causal attention needs no comparison of positions, and the same number of pairs in every step: its own
        tokens causally; of an earlier rank, the early chunk for all rows; of a later rank, everything for the late
        rows. With a sliding ``window`` (a token sees itself and what is less than ``window`` before it) or with
        ``documents``, which are to be compared by the caller, rows are cut at the chunk and into pieces of at most
        ``max_rows``, each with the columns that some row of it can see.
        """
        chunk, width = self.chunk, 2 * self.chunk
        if (window is None or window >= self.seq_len) and not documents:
            if source == rank:
                return [Block(slice(0, width), slice(0, width), causal=True)]
            if source < rank:
                return [Block(slice(0, width), slice(0, chunk))]
            return [Block(slice(chunk, width), slice(0, width))]
        step = min(max_rows or chunk, chunk)
        pieces = [
            slice(start, min(start + step, half + chunk))
            for half in (0, chunk)
            for start in range(half, half + chunk, step)
        ]
        blocks = [self._block(rank, source, rows, window or self.seq_len, documents) for rows in pieces]
        return _joined([block for block in blocks if block is not None], max_rows or width)

    def work(self, window: int | None = None, document_lengths: Sequence[int] | None = None) -> npt.NDArray[np.int64]:
        """Number of visible (query, key) pairs of each rank in each step of the ring: int64 [ranks, steps].

        ``document_lengths`` are those of the documents that fill the window, in order.
        """
        first = self._first_visible(window, document_lengths)
        counts = np.zeros((self.ranks, self.ranks), dtype=np.int64)
        for rank in range(self.ranks):
            queries = self.positions(rank)
            for step in range(self.ranks):
                for keys in self.ranges(self.source(rank, step)):
                    seen = np.minimum(queries + 1, keys.stop) - np.maximum(first[queries], keys.start)
                    counts[rank, step] += np.maximum(seen, 0).sum()
        return counts

    def computed(self, window: int | None = None, documents: bool = False) -> npt.NDArray[np.int64]:
        """Number of (query, key) pairs that the blocks of each rank and step span, seen or not: int64 [ranks, steps].

        What a kernel spends its time on when it skips what is above the diagonal of a causal square and nothing else.
        """
        counts = np.zeros((self.ranks, self.ranks), dtype=np.int64)
        for rank in range(self.ranks):
            for step in range(self.ranks):
                for block in self.blocks(rank, self.source(rank, step), window, documents):
                    rows, columns = block.rows.stop - block.rows.start, block.columns.stop - block.columns.start
                    counts[rank, step] += rows * (rows + 1) // 2 if block.causal else rows * columns
        return counts

    def _first_visible(self, window: int | None, document_lengths: Sequence[int] | None) -> Indices:
        """For each position the first one that it sees."""
        positions = np.arange(self.seq_len, dtype=np.int64)
        first = np.zeros(self.seq_len, dtype=np.int64)
        if document_lengths is not None:
            if sum(document_lengths) != self.seq_len:
                raise ValueError(f"documents of {sum(document_lengths)} tokens do not fill a window of {self.seq_len}")
            starts = np.cumsum([0, *document_lengths[:-1]])
            first = np.repeat(starts, document_lengths).astype(np.int64)
        return first if window is None else np.maximum(first, positions - window + 1)

    def _position(self, rank: int, index: int) -> int:
        """Position of the ``index``-th token of a rank."""
        early, late = self.ranges(rank)
        return early[index] if index < self.chunk else late[index - self.chunk]

    def _index(self, rank: int, position: int) -> int:
        """Number of tokens of a rank before ``position``."""
        return sum(min(max(position - part.start, 0), self.chunk) for part in self.ranges(rank))

    def _block(self, rank: int, source: int, rows: slice, window: int, documents: bool) -> Block | None:
        """``rows``, of one chunk, and the columns between the first and the last that one of them sees."""
        oldest, newest = self._position(rank, rows.start), self._position(rank, rows.stop - 1)
        columns = slice(self._index(source, oldest - window + 1), self._index(source, newest + 1))
        if columns.start >= columns.stop:
            return None
        first, last = self._position(source, columns.start), self._position(source, columns.stop - 1)
        if last <= oldest and newest - first < window:
            return Block(rows, columns)
        if not documents and (source, columns) == (rank, rows) and newest - first < window:
            return Block(rows, columns, causal=True)
        return Block(rows, columns, compare_positions=True)


def _joined(blocks: list[Block], max_rows: int) -> list[Block]:
    """The same with neighbours of equal columns made one, where no positions are compared: fewer kernels."""
    joined: list[Block] = []
    for block in blocks:
        last = joined[-1] if joined else block
        plain = not (block.causal or block.compare_positions or last.causal or last.compare_positions)
        rows = slice(last.rows.start, block.rows.stop)
        touches = last.rows.stop == block.rows.start and rows.stop - rows.start <= max_rows
        if plain and touches and last.columns == block.columns:
            joined[-1] = Block(rows, block.columns)
        else:
            joined.append(block)
    return joined


def context_problems(
    seq_len: int, cp: int, ulysses_degree: int = 1, num_heads: int | None = None, tp: int = 1
) -> list[str]:
    """What is wrong with these sizes, one message per problem; ``num_heads`` are the model's query heads.

    Key/value heads need not divide: they are repeated where they are fewer than the ranks they are dealt to.
    """
    problems = []
    if cp > 1 and seq_len % (2 * cp):
        problems.append(
            f"seq_len={seq_len} is not a multiple of 2 · cp = {2 * cp}: each of cp={cp} ranks holds an early and a "
            f"late chunk of every window; use {nearest_multiples(seq_len, 2 * cp)}"
        )
    if cp % ulysses_degree:
        legal = divisors(cp)
        problems.append(f"cp_ulysses_degree={ulysses_degree} does not divide cp={cp}; legal values: {listed(legal)}")
    if num_heads is not None and num_heads % tp == 0 and (num_heads // tp) % ulysses_degree:
        heads = num_heads // tp
        legal = [degree for degree in divisors(cp) if heads % degree == 0]
        where = heads_of_rank(num_heads, tp)
        problems.append(
            f"cp_ulysses_degree={ulysses_degree} does not divide the {heads} heads of a rank ({where}); "
            f"legal values: {listed(legal)}"
        )
    return problems
