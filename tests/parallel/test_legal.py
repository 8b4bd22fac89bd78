"""A layout that cannot run is refused with every reason, each with values, legal values and the fix."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rung.errors import UserError
from rung.layout import Layout
from rung.models import ModelConfig
from rung.parallel import ParallelConfig
from rung.parallel.legal import layout_problems
from rung.recipes.config import load_config

MODEL = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 4, "intermediate_size": 48}


def problems(model: dict[str, Any] | None = None, world_size: int | None = None, **settings: Any) -> list[str]:
    """What is wrong with these settings of ``parallel``; those of the run by their own names."""
    run = {"seq_len": 48, "num_micro_batches": 8, "compile": False, "device": "auto", "precision": "float32"}
    run |= {name: settings.pop(name) for name in list(settings) if name in run}
    parallel = ParallelConfig(**settings)
    layout: Layout | None = None if world_size is None else parallel.layout(world_size)
    return layout_problems(parallel, ModelConfig(**{**MODEL, **(model or {})}), layout, **run)


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"tp": 5, "sequence_parallel": False, "model": {"num_key_value_heads": 1, "intermediate_size": 50}},
     ["tp=5 does not divide num_attention_heads=12; legal values: 1, 2, 3, 4, 6 or 12"]),
    ({"tp": 6}, ["tp=6 neither divides num_key_value_heads=4 nor is a multiple of it", "legal values: 1, 2, 4 or 12"]),
    ({"tp": 4, "model": {"intermediate_size": 50}},
     ["tp=4 does not divide intermediate_size=50; legal values: 1 or 2"]),
    ({"tp": 4, "seq_len": 50}, ["seq_len=50 is not a multiple of tp = 4", "use 48 or 52", "sequence_parallel=false"]),
    ({"tp": 4, "cp": 2, "seq_len": 44}, ["seq_len=44 is not a multiple of cp · tp = 8", "use 40 or 48"]),
    ({"cp": 2, "seq_len": 50}, ["seq_len=50 is not a multiple of 2 · cp = 4", "use 48 or 52"]),
    ({"cp": 4, "cp_ulysses_degree": 3}, ["cp_ulysses_degree=3 does not divide cp=4; legal values: 1, 2 or 4"]),
    ({"cp": 4, "cp_ulysses_degree": 2, "tp": 4}, ["cp_ulysses_degree=2 does not divide the 3 heads of a rank"]),
    ({"cp": 8, "cp_method": "ulysses"}, ["deals the 12 heads", "to cp=8 ranks", "cp_ulysses_degree=2 or 4"]),
    ({"cp": 4, "cp_method": "ulysses", "cp_ulysses_degree": 2}, ["denies", "a ring of 2 places of 2 ranks"]),
    ({"cp": 4, "cp_method": "ulysses", "cp_ulysses_degree": 1}, ["denies", "cp_method=ring"]),
    ({"cp": 4, "cp_ulysses_degree": 4}, ["leaves no ring; use cp_method=ulysses"]),
    ({"cp_ulysses_degree": 2}, ["cp_ulysses_degree=2 has no meaning with cp=1"]),
    ({"cp": 2, "cp_ulysses_degree": -1}, ["cp_ulysses_degree=-1 must be 0"]),
    ({"pp": 16, "num_micro_batches": 16}, ["16 stages need a layer each", "num_hidden_layers=8", "pp up to 8"]),
    ({"pp": 4, "pp_virtual_stages": 3, "pp_schedule": "interleaved_1f1b"}, ["12 stages need a layer each"]),
    ({"pp": 2, "pp_virtual_stages": 2}, ["pp_virtual_stages=2 is not what pp_schedule=1f1b can run"]),
    ({"pp": 2, "pp_layers": [3, 4]}, ["pp_layers=[3, 4] sums to 7, not to num_hidden_layers=8"]),
    ({"pp": 4, "num_micro_batches": 3}, ["3 micro-batches", "needs at least 4", "pp_schedule=gpipe"]),
    ({"pp_layers": [8]}, ["pp_layers=[8] has no meaning with pp=1"]),
    ({"pp_virtual_stages": 2}, ["pp_virtual_stages=2 has no meaning with pp=1"]),
    ({"pp": 2, "pp_schedule": "zbv", "reshard_after_forward": True, "world_size": 4},
     ["reshard_after_forward=true with pp_schedule=zbv would lose gradients", "reshard_after_forward=null"]),
    ({"pp": 2, "pp_schedule": "interleaved_zero_bubble", "reshard_after_forward": True, "cp": 2, "world_size": 4},
     ["reshard_after_forward=true with pp_schedule=interleaved_zero_bubble would lose gradients"]),
    ({"pp": 2, "pp_schedule": "zbv", "reshard_after_forward": True, "precision": "bf16", "world_size": 2},
     ["reshard_after_forward=true with pp_schedule=zbv would lose gradients"]),
    ({"async_tp": True}, ["async_tp=true needs tp of 2 or more", "compile=true"]),
    ({"async_tp": True, "tp": 2, "compile": True, "device": "cpu"}, ["async_tp=true needs CUDA (device is cpu)"]),
    ({"async_tp": True, "tp": 2, "compile": True, "sequence_parallel": False}, ["needs sequence_parallel=true"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "parts"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_each_reason_has_values_and_the_fix(settings: dict[str, Any], parts: list[str]) -> None:
    (problem,) = problems(**settings)
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tp": 12},
        {"tp": 4, "seq_len": 50, "sequence_parallel": False},
        {"tp": 4, "model": {"vocab_size": 3}},  # a rank may have no row of the table
        {"tp": 2, "async_tp": True, "compile": True},
        {"cp": 4, "cp_ulysses_degree": 2},
        {"cp": 4, "cp_method": "ulysses"},
        {"cp": 4, "cp_method": "ulysses", "cp_ulysses_degree": 4},
        {"cp_ulysses_degree": 1},
        {"cp_method": "ulysses"},
        {"pp_schedule": "zbv"},
        {"pp": 2, "defer_gradient_sync": True},
        {"pp": 8},
        {"pp": 2, "pp_schedule": "zbv", "reshard_after_forward": True, "world_size": 2},  # no FSDP
        {"pp": 2, "pp_schedule": "zbv", "reshard_after_forward": True, "world_size": 4, "compile": True},
        {"pp": 2, "pp_schedule": "zbv", "reshard_after_forward": True, "activation_checkpointing": "full"},
        {"pp": 2, "reshard_after_forward": True, "world_size": 4},
        {"pp": 4, "num_micro_batches": None},  # the batch has problems of its own
    ],
    ids=str,
)
def test_what_can_run_is_not_refused(settings: dict[str, Any]) -> None:
    assert problems(**settings) == []


@pytest.mark.parametrize("heads", [1, 6, 8, 12])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_values_called_legal_are_those_that_are_accepted(heads: int, groups: int) -> None:
    if heads % groups:
        return
    model = {"num_attention_heads": heads, "num_key_value_heads": heads // groups, "intermediate_size": 24}
    found = {tp: problems(model, tp=tp, sequence_parallel=False) for tp in range(1, 14)}
    accepted = {tp for tp, messages in found.items() if not messages}
    called = [set(re.findall(r"\d+", message.split("legal values: ")[1])) for m in found.values() for message in m]
    assert accepted == set.intersection(set(range(1, 14)), *({int(word) for word in words} for words in called))


def test_reasons_of_the_layout_the_batch_and_the_model_come_together() -> None:
    words = [
        "parallel.tp=3",
        "parallel.cp=2",
        "parallel.pp=8",
        "parallel.pp_schedule=interleaved_1f1b",
        "data.seq_len=26",
        "model=tiny",
        "model.dropout=2.0",
    ]
    with pytest.raises(UserError) as error:  # no layout can be made of 8 ranks
        load_config(words, 8)
    for part in (
        "model.dropout=2.0",
        "does not divide world_size=8",
        "num_attention_heads=4",
        "2 · cp = 4",
        "cp · tp = 6",
        "16 stages need a layer each",
    ):
        assert part in str(error.value)


def test_reasons_come_with_those_of_the_batch() -> None:
    with pytest.raises(UserError) as error:
        load_config(["model=tiny", "parallel.pp=2", "parallel.tp=3", "train.global_batch_size=7"], 12)
    assert "global_batch_size=7" in str(error.value) and "num_attention_heads=4" in str(error.value)
    assert "micro-batches" not in str(error.value)  # how many is not known
