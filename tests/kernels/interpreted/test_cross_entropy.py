"""cross_entropy as Triton kernels."""

import subprocess
import sys
import textwrap

import pytest
import torch
from kernel_cases import cross_entropy as cases
from kernel_cases.accuracy import DEVICE, DTYPES, check, randn, strided
from kernel_cases.cross_entropy import IGNORED, SETTINGS, labels_of
from law.workers import Workers
from torch import Tensor

import rung_kernels
from rung_kernels import reference
from rung_kernels.dispatch import use_backend
from rung_kernels.triton_kernels import launch

EACH = pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]], ids=["plain", "penalties"])
SHAPES = pytest.mark.parametrize("shape", [(5, 17), (3, 300), (4, 1), (2, 20001), (1, 8192), (0, 8)], ids=str)


def run(logits: Tensor, labels: Tensor, outer: Tensor | None = None, **settings: float) -> tuple[Tensor, Tensor]:
    """Losses and gradient of the kernels."""
    leaf = logits.to(DEVICE).requires_grad_()
    with use_backend("triton"):
        losses = rung_kernels.cross_entropy(leaf, labels.to(DEVICE), **settings)
        (gradient,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses) if outer is None else outer.to(DEVICE))
    return losses.detach().cpu(), gradient.cpu()


@DTYPES
@SHAPES
@EACH
def test_cross_entropy(shape: tuple[int, int], dtype: torch.dtype, settings: dict[str, float]) -> None:
    labels = labels_of(*shape)
    check(rung_kernels.cross_entropy, reference.cross_entropy, [randn(*shape, scale=3.0)], dtype, labels, **settings)


@pytest.mark.parametrize("settings", SETTINGS[1:3], ids=["z_loss", "smoothing"])
def test_one_penalty(settings: dict[str, float]) -> None:
    ours, theirs = rung_kernels.cross_entropy, reference.cross_entropy
    check(ours, theirs, [randn(5, 123, scale=3.0)], torch.float16, labels_of(5, 123), **settings)


@DTYPES
@EACH
def test_rows_that_are_not_contiguous(dtype: torch.dtype, settings: dict[str, float]) -> None:
    """Apart, transposed, or columns of something larger: a row and its gradient then lie at different offsets."""
    views = [strided, lambda t: t.T.contiguous().T if t.ndim == 2 else t]
    for first, width in ((0, 64), (3, 64), (8, 67)):
        views.append(lambda t, f=first, w=width: torch.nn.functional.pad(t, (f, w))[..., f : f + t.shape[-1]])
    for make in views:
        logits, labels = randn(4, 43, scale=3.0), labels_of(4, 43)
        check(rung_kernels.cross_entropy, reference.cross_entropy, [logits], dtype, labels, make=make, **settings)


def test_inputs_stay_as_they_were() -> None:
    logits, labels, outer = randn(4, 33).float(), labels_of(4, 33), randn(4, seed=1).float()
    before = [t.clone() for t in (logits, labels, outer)]
    run(logits, labels, outer)
    assert all(torch.equal(t, b) for t, b in zip((logits, labels, outer), before, strict=True))


@EACH
def test_every_row_has_a_gradient_of_its_own(settings: dict[str, float]) -> None:
    """Also one that is the same number for all rows, expanded."""
    logits, labels = randn(5, 33).float(), labels_of(5, 33)
    _, ones = run(logits, labels, **settings)
    _, expanded = run(logits, labels, torch.tensor(2.0).expand(5), **settings)
    factors = torch.tensor([1.0, -3.0, 0.0, 0.5, 1e4])
    _, each = run(logits, labels, factors, **settings)
    torch.testing.assert_close(expanded, 2 * ones)
    torch.testing.assert_close(each, factors[:, None] * ones, rtol=1e-5, atol=1e-7)


@DTYPES
@EACH
def test_ignored_rows_are_not_read(dtype: torch.dtype, settings: dict[str, float]) -> None:
    logits, labels = randn(5, 33).to(dtype), labels_of(5, 33)
    logits[1], logits[4], labels[4] = torch.nan, -torch.inf, IGNORED
    losses, gradient = run(logits, labels, **settings)
    assert torch.equal(losses[[1, 4]], torch.zeros(2)) and torch.equal(gradient[[1, 4]], torch.zeros(2, 33).to(dtype))
    assert losses[[0, 2, 3]].isfinite().all() and (gradient[[0, 2, 3]].float().abs().sum(1) > 0).all()
    labels[:] = IGNORED
    losses, gradient = run(logits, labels, **settings)
    assert torch.equal(losses, torch.zeros(5)) and torch.equal(gradient, torch.zeros(5, 33).to(dtype))
    labels[:] = 3  # and a label may be the one to ignore
    assert not any(t.any() for t in run(logits, labels, ignore_index=3, **settings))


def test_logits_without_hope() -> None:
    """Some are -inf, also whole blocks of them; a label among them costs infinitely much. A row of nothing else is no
    distribution: no number, as torch says."""
    logits, labels = randn(6, 10_000, scale=3.0), torch.tensor([7, 9_000, 0, 3, 9_999, 1])
    logits[0, :9_000:2] = -torch.inf
    labels[0] = 7
    logits[1, :8_500] = -torch.inf
    logits[2, 5:] = -torch.inf
    logits[3, 3] = -torch.inf
    check(rung_kernels.cross_entropy, reference.cross_entropy, [logits], torch.float32, labels)
    check(rung_kernels.cross_entropy, reference.cross_entropy, [logits], torch.bfloat16, labels)
    logits[1] = -torch.inf
    losses, gradient = run(logits.float(), labels)
    assert losses[1].isnan() and gradient[1].isnan().all()
    assert losses[[0, 2, 4, 5]].isfinite().all() and gradient[[0, 2, 3, 4, 5]].isfinite().all()
    losses, gradient = run(logits.float(), labels, label_smoothing=0.1)
    assert losses[[0, 2, 3]].isposinf().all() and gradient[[0, 2, 3, 4, 5]].isfinite().all()


def test_logits_far_from_zero() -> None:
    """The largest logit is taken off before anything is rounded."""
    far, labels, outer = (randn(5, 9_001) + 3e5).float(), labels_of(5, 9_001), randn(5, seed=1)
    exact = far.double().requires_grad_()
    for settings in SETTINGS[:3:2]:
        expected = reference.cross_entropy(exact, labels, **settings)
        (gradient,) = torch.autograd.grad(expected, exact, outer)
        found = run(far, labels, outer.float(), **settings)
        torch.testing.assert_close(found[0].double(), expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1].double(), gradient, rtol=1e-5, atol=1e-8)


def test_labels_outside_of_the_vocabulary() -> None:
    """An infinite loss, which nobody overlooks."""
    logits, labels = randn(4, 33).float(), torch.tensor([33, 5, -1, 2**40])
    losses, gradient = run(logits, labels)
    assert losses[[0, 2, 3]].isposinf().all() and losses[1].isfinite()
    torch.testing.assert_close(gradient[[0, 2, 3]], logits[[0, 2, 3]].softmax(1))


def test_narrow_labels() -> None:
    logits, labels = randn(5, 33).float(), labels_of(5, 33)
    for found, expected in zip(run(logits, labels.to(torch.int32)), run(logits, labels), strict=True):
        assert torch.equal(found, expected)


def test_rows_that_are_far_apart() -> None:
    """More than 2³¹ elements, of which few are ever touched. In a process of its own: what goes wrong crashes."""
    code = """
        import torch, rung_kernels
        device = "cuda" if torch.cuda.is_available() else "cpu"
        stride = 2**30 + 24
        rung_kernels.set_backend("triton")
        try:
            far = torch.empty(2 * stride + 40, dtype=torch.bfloat16, device=device).as_strided((3, 40), (stride, 1))
        except RuntimeError:
            raise SystemExit("no memory")
        far.copy_(torch.randn(3, 40))
        near, labels = far.clone(), torch.tensor([3, 39, 0], device=device)
        found = []
        for logits in (far, near):
            leaf = logits.detach().requires_grad_()
            losses = rung_kernels.cross_entropy(leaf, labels)
            found.append((losses, *torch.autograd.grad(losses.sum(), leaf)))
        assert all(torch.equal(a, b) for a, b in zip(*found))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    if "no memory" in done.stderr:
        pytest.skip("4 GiB cannot even be promised")
    assert done.returncode == 0, done.stderr


def test_float64_runs_the_reference() -> None:
    before = launch.counts.copy()
    run(randn(3, 8), labels_of(3, 8))
    assert launch.counts == before


def test_arguments_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match=r"first=3.*smoothing=1.0.*z_loss=-1"):
        run(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), first=3, label_smoothing=1.0, z_loss=-1)
    with pytest.raises(ValueError, match="one label for each row"):
        run(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))


@EACH
def test_library_operators(settings: dict[str, float]) -> None:
    logits, labels = randn(4, 33).float().to(DEVICE), labels_of(4, 33).to(DEVICE)
    numbers = settings.get("z_loss", 0.0), settings.get("label_smoothing", 0.0)
    arguments = (logits.clone().requires_grad_(), labels, IGNORED, *numbers)
    torch.library.opcheck(torch.ops.rung.cross_entropy.default, arguments)
    losses, *state = torch.ops.rung.cross_entropy(logits, labels, IGNORED, *numbers)
    for vocab_size in (None, torch.tensor(50.0, device=DEVICE)):
        arguments = (losses, logits, labels, *state, vocab_size, IGNORED, 0, *numbers)
        torch.library.opcheck(torch.ops.rung.cross_entropy_backward.default, arguments)


@EACH
def test_compiled_whole(settings: dict[str, float]) -> None:
    """Also where all rows are ignored: what is not read is still written."""

    def loss(op):
        return lambda logits, labels: op(logits * 2, labels, **settings).sum().reshape(1) / 7

    compiled = torch.compile(loss(rung_kernels.cross_entropy), fullgraph=True, backend="aot_eager")
    for labels in (labels_of(5, 33), torch.full((5,), IGNORED)):
        check(compiled, loss(reference.cross_entropy), [randn(5, 33)], torch.float32, labels)


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_dtensors_on_two_ranks(workers: Workers) -> None:
    for differences in workers.run(2, cases.rows_over_two_ranks):
        assert max(differences) < 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
def test_a_vocabulary_that_two_ranks_share(workers: Workers) -> None:
    workers.run(2, cases.vocabulary_over_two_ranks, "triton")
