"""What one rank does in test_vocab_parallel.py: its columns held against one process that has all of them."""

from itertools import accumulate
from unittest import mock

import torch
from live_bytes import LiveBytes
from torch import distributed
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from rung_kernels import reference
from rung_kernels.reference import rows

IGNORED = -100
ROWS = 23


class Messages(TorchDispatchMode):
    """Names and bytes sent of everything that goes to other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            self.sent.append((func.name(), tensors[-1].nbytes))
        return func(*args, **(kwargs or {}))


def columns(sizes: list[int], rank: int) -> slice:
    first = [0, *accumulate(sizes)][rank]
    return slice(first, first + sizes[rank])


def random_case(vocab_size: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    """The same on every rank: logits, labels of which some are ignored, and a gradient of the losses."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(ROWS, vocab_size, generator=generator, dtype=torch.float64).mul_(scale).to(dtype)
    labels = torch.randint(vocab_size, (ROWS,), generator=generator)
    labels[::5] = IGNORED
    outer = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return logits, labels, outer.to(torch.promote_types(dtype, torch.float32))


def run(loss, logits: torch.Tensor, outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    losses = loss(leaf)
    (gradient,) = torch.autograd.grad(losses, leaf, outer)
    return losses, gradient


def alone(logits, labels, outer):
    return run(lambda leaf: reference.cross_entropy(leaf, labels, IGNORED), logits, outer)


def spread(logits, labels, outer, sizes: list[int], group: ProcessGroup):
    """This rank's losses and its columns of the gradient; checks that every rank has the same bits of the losses."""
    mine = columns(sizes, distributed.get_rank(group))
    losses, gradient = run(
        lambda leaf: reference.cross_entropy(leaf, labels, IGNORED, group=group, first=mine.start),
        logits[:, mine],
        outer,
    )
    everyone = [torch.empty_like(losses) for _ in sizes]
    distributed.all_gather(everyone, losses.detach(), group=group)
    assert all(torch.equal(a.view(torch.uint8), losses.detach().view(torch.uint8)) for a in everyone)
    assert losses.dtype == torch.promote_types(logits.dtype, torch.float32) and gradient.dtype == logits.dtype
    return losses, gradient, mine


def check_parity(sizes: list[int], group: ProcessGroup) -> None:
    tolerances = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-6, 2e-6), torch.bfloat16: (2e-6, 1e-2)}
    for dtype, (of_losses, of_gradient) in tolerances.items():
        logits, labels, outer = random_case(sum(sizes), dtype)
        whole_losses, whole_gradient = alone(logits, labels, outer)
        losses, gradient, mine = spread(logits, labels, outer, sizes, group)
        torch.testing.assert_close(losses, whole_losses, rtol=of_losses, atol=of_losses)
        torch.testing.assert_close(gradient, whole_gradient[:, mine], rtol=of_gradient, atol=1e-2 * of_gradient)
        assert losses[0] == 0 and not gradient[0].any()  # ignored


def check_chunks(group: ProcessGroup) -> None:
    """The same bits whatever the number of rows that are done at once, also one alone on several threads."""
    sizes = [40_000, 11][: distributed.get_world_size(group)] + [7] * (distributed.get_world_size(group) - 2)
    logits, labels, outer = random_case(sum(sizes), torch.float32)
    found = []
    torch.set_num_threads(4)
    for elements in (1, 4 * sizes[0], 2**40):
        rows.CHUNK_ELEMENTS["cpu"] = elements
        found.append(spread(logits[:6], labels[:6], outer[:6], sizes, group)[:2])
    torch.set_num_threads(1)
    for losses, gradient in found[1:]:
        assert torch.equal(losses, found[0][0]) and torch.equal(gradient, found[0][1])
    rows.CHUNK_ELEMENTS["cpu"] = 4 * 64


def check_extremes(sizes: list[int], group: ProcessGroup) -> None:
    size = len(sizes)
    logits, labels, outer = random_case(sum(sizes), torch.float64)

    losses, gradient, _ = spread(logits, torch.full_like(labels, IGNORED), outer, sizes, group)
    assert not losses.any() and not gradient.any()

    losses, gradient, mine = spread(logits[:0], labels[:0], outer[:0], sizes, group)
    assert losses.shape == (0,) and gradient.shape == (0, sizes[distributed.get_rank(group)])

    # A whole rank's logits, and single ones, are -inf.
    masked = logits.clone()
    masked[:, columns(sizes, size - 2)] = -torch.inf
    masked[:, 0] = -torch.inf
    labels = labels.masked_fill(torch.isinf(masked.gather(1, labels.clamp(min=0)[:, None])[:, 0]), IGNORED)
    assert (labels != IGNORED).any()
    whole_losses, whole_gradient = alone(masked, labels, outer)
    losses, gradient, mine = spread(masked, labels, outer, sizes, group)
    torch.testing.assert_close(losses, whole_losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, whole_gradient[:, mine], rtol=1e-12, atol=1e-14)

    # Far from zero nothing is lost: the largest logit is taken off before anything is rounded.
    far = (logits + 3e5).float()
    exact_losses, exact_gradient = alone(far.double(), labels, outer)
    losses, gradient, mine = spread(far, labels, outer.float(), sizes, group)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient[:, mine], rtol=1e-5, atol=1e-7)

    beyond = torch.full_like(labels, sum(sizes))
    assert torch.isposinf(spread(logits, beyond, outer, sizes, group)[0]).all()


def check_messages_and_memory(sizes: list[int], group: ProcessGroup) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        logits, labels, outer = random_case(sum(sizes), dtype)
        mine = columns(sizes, distributed.get_rank(group))
        leaf = logits[:, mine].clone().requires_grad_()
        with Messages() as messages:
            losses = reference.cross_entropy(leaf, labels, IGNORED, group=group, first=mine.start)
            losses.backward(outer)
        assert [name for name, _ in messages.sent] == ["c10d::_allgather_base_"]
        assert messages.sent[0][1] == 3 * ROWS * losses.element_size()

    num_rows, vocab_size, chunk_rows, size = 256, 512, 4, len(sizes)
    rows.CHUNK_ELEMENTS["cpu"] = chunk_rows * vocab_size
    leaf = torch.randn(num_rows, vocab_size).bfloat16().requires_grad_()
    first = distributed.get_rank(group) * vocab_size
    labels = torch.arange(num_rows) * size * vocab_size // num_rows
    with LiveBytes() as live:
        reference.cross_entropy(leaf, labels, group=group, first=first).sum().backward()
    chunk, per_row = 4 * chunk_rows * vocab_size, 4 * num_rows
    assert chunk <= live.peak[torch.float32] <= 3 * chunk + (6 * size + 6) * per_row  # all logits would be 64 chunks
    assert live.peak[torch.bfloat16] <= 2 * (
        2 * num_rows * vocab_size
    )  # the logits, seen by slices, and their gradient
    rows.CHUNK_ELEMENTS["cpu"] = 4 * 64


def check_everything() -> None:
    """Two and four of the four ranks that call it."""
    spreads = {2: ([156, 155], [3, 2]), 4: ([78, 78, 78, 77], [2, 2, 1, 0], [0, 200, 100, 11])}
    for size, cases in spreads.items():
        group = distributed.new_group(list(range(size)))
        if distributed.get_rank() >= size:
            continue
        with mock.patch.dict(rows.CHUNK_ELEMENTS, cpu=4 * 64):
            for sizes in cases:
                check_parity(sizes, group)
            check_extremes(cases[0], group)
            check_messages_and_memory(cases[0], group)
            check_chunks(group)
