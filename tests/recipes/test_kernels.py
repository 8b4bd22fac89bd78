"""The setting `kernels`."""

from collections.abc import Callable
from typing import Any

import pytest

import rung_kernels
from rung.recipes.config import Config, changes_that_matter
from rung_kernels.dispatch import HAS_TRITON, IS_INTERPRETED

Rung = Callable[..., Any]


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter runs kernels on the CPU")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["kernels=triton"], "kernels=triton needs a GPU"),
        (["kernels=cuda"], "kernels=cuda is not one of: auto, triton, torch"),
        (["kernels=triton", "precision=float64"], "precision=float64"),
    ],
)
def test_what_cannot_run_is_refused(rung: Rung, tiny: list[str], setting: list[str], message: str) -> None:
    done = rung("train", *tiny, *setting)
    assert done.status == 2 and message in done.err and "Traceback" not in done.err


def test_a_run_may_go_on_with_other_kernels() -> None:
    harmless, serious = changes_that_matter({"kernels": "auto"}, {"kernels": "torch"}, [])
    assert harmless == ["kernels: auto -> torch"] and not serious
    assert Config().kernels == "auto"


def test_the_choice_holds_for_the_process() -> None:
    assert rung_kernels.backend() in ("auto", "torch")
    with rung_kernels.use_backend("torch"):
        assert rung_kernels.backend() == "torch"
    with pytest.raises(ValueError, match=r"'cuda'.*auto, triton, torch"):
        rung_kernels.set_backend("cuda")
    if HAS_TRITON:
        with pytest.raises(ZeroDivisionError), rung_kernels.use_backend("triton"):
            raise ZeroDivisionError
    assert rung_kernels.backend() != "triton"
