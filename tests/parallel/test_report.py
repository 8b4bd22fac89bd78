"""The report on a layout is true: bytes held and sent are those of a real step of the real loop."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from law.workers import Workers
from parallel.report_ranks import MEASURED_STEP, kept, measure, one_of_each

from rung.cli.doctor_layout import report_of
from rung.observe.traffic import Sent
from rung.parallel.report import LayoutReport
from rung.recipes.config import load_config

CASES: dict[str, tuple[int, list[str]]] = {
    "fsdp": (2, ["dp_shard=2"]),
    "fsdp, uneven, kept, deferred": (4, ["dp_shard=4", "reshard_after_forward=false", "defer_gradient_sync=true"]),
    "hsdp, bf16": (4, ["dp_replicate=2", "dp_shard=2", "precision=bf16", "train.micro_batch_size=1"]),
    "copies": (2, ["dp_replicate=2", "model.tie_word_embeddings=true"]),
    "tp": (2, ["tp=2", "model.qk_norm=true", "activation_checkpointing=selective"]),
    "tp, few K/V heads, whole stream": (4, ["tp=4", "sequence_parallel=false", "activation_checkpointing=full"]),
    "tp, fused, few K/V heads": (4, ["tp=4", "model.fused_qkv=true"]),
    "tp × fsdp": (4, ["tp=2", "dp_shard=2", "activation_checkpointing=full", "model.dropout=0.1"]),
    "tp × fsdp, compiled": (4, ["tp=2", "dp_shard=2", "compile=true"]),
    "tp × fsdp, muon": (4, ["tp=2", "dp_shard=2", "optim=muon", "model.num_key_value_heads=1"]),
    "tp × fsdp, spam": (4, ["tp=2", "dp_shard=2", "optim=spam", "optim.density=0.3", "model.num_key_value_heads=1"]),
    "1f1b × fsdp, tied, stable_spam": (
        4,
        ["pp=2", "dp_shard=2", "optim=stable_spam", "model.tie_word_embeddings=true"],
    ),
    "ring": (2, ["cp=2", "data.document_mask=true", "activation_checkpointing=full"]),
    "ulysses": (2, ["cp=2", "cp_method=ulysses", "model.num_key_value_heads=1"]),
    "ring of neighbours": (4, ["cp=4", "cp_ulysses_degree=2", "precision=bf16", "model.num_key_value_heads=1"]),
    "tp × cp": (4, ["cp=2", "tp=2"]),
    "1f1b, tied": (2, ["pp=2", "pp_schedule=1f1b", "model.tie_word_embeddings=true"]),
    "gpipe × tp": (4, ["pp=2", "tp=2", "pp_schedule=gpipe"]),
    "1f1b × fsdp, freed": (4, ["pp=2", "dp_shard=2", "reshard_after_forward=true", "train.micro_batch_size=1"]),
    "interleaved × fsdp": (4, ["pp=2", "dp_shard=2", "pp_schedule=interleaved_1f1b", "optim=muon"]),
    "zero bubble × hsdp": (4, ["pp=2", "dp_replicate=2", "pp_schedule=interleaved_zero_bubble", "precision=bf16"]),
    "zbv × ring, tied": (4, ["pp=2", "cp=2", "pp_schedule=zbv", "model.tie_word_embeddings=true", "optim=muon"]),
}


def overrides(corpus: Path, settings: list[str]) -> list[str]:
    """A small run; settings without a group are those of ``parallel``."""
    given = [
        s if "." in s.split("=")[0] or s.startswith(("optim", "precision", "compile")) else f"parallel.{s}"
        for s in settings
    ]
    defaults = [
        "data=corpus",
        f"data.paths=[{corpus}]",
        "data.seq_len=16",
        f"train.steps={MEASURED_STEP + 1}",
        f"train.global_batch_size={16 if any('dp_' in s for s in settings) else 8}",
        "train.micro_batch_size=2",
        "model=tiny",
        "model.vocab_size=311",
        "model.hidden_size=22",  # of which four shards are uneven
        "model.intermediate_size=20",
        "model.num_hidden_layers=5",
        "model.num_attention_heads=4",
        "model.num_key_value_heads=2",
        "model.head_dim=4",
        "schedule=constant",
        "precision=float64",
        "device=cpu",
    ]
    keys = {item.split("=")[0] for item in given}
    return [item for item in defaults if item.split("=")[0] not in keys] + given


def totals(report: LayoutReport, rank: int) -> dict[tuple[str, tuple[str, ...]], Sent]:
    """Messages of a rank by operation and the axes that have several ranks."""
    found: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(lambda: [0, 0])
    for collective in report.ranks[rank].collectives:
        total = found[collective.op, collective.axes]
        total[0] += collective.count
        total[1] += collective.sent_bytes
    return {key: Sent(*total) for key, total in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_report_says_what_a_real_step_holds_and_sends(case: str, corpus: Path, workers: Workers) -> None:
    world_size, settings = CASES[case]
    config, layout = load_config(overrides(corpus, settings), world_size)
    report = report_of(config, layout)
    for rank, found in enumerate(workers.run(world_size, measure, config, layout)):
        expected = report.ranks[rank]
        assert expected.parameter_bytes == found.parameter_bytes
        assert expected.gradient_bytes == found.gradient_bytes
        assert expected.optimizer_bytes == found.optimizer_bytes
        assert totals(report, rank) == found.sent


@pytest.mark.parametrize(
    "settings",
    [
        ["dp_shard=1"],
        ["dp_shard=1", "precision=bf16", "model.qk_norm=true", "model.dropout=0.1"],
        ["dp_shard=1", "activation_checkpointing=full", "model.sliding_window=5"],
        ["dp_shard=1", "data.document_mask=true"],
        ["tp=2"],
        ["tp=2", "sequence_parallel=false", "precision=float32"],
        ["cp=2"],
        ["cp=2", "cp_method=ulysses", "model.num_key_value_heads=1", "precision=float32"],
    ],
    ids=str,
)
def test_estimate_of_activations_is_close(settings: list[str], corpus: Path, workers: Workers) -> None:
    world_size = 1 if "dp_shard=1" in settings else 2
    sizes = ["train.micro_batch_size=8", "train.global_batch_size=8", "reshard_after_forward=false"]
    config, layout = load_config(overrides(corpus, settings + sizes), world_size)
    estimate = report_of(config, layout).ranks[0].activation_bytes
    for found in workers.run(world_size, kept, config, layout):
        assert abs(estimate - found) <= 0.03 * found


def test_traffic_counts_by_the_ring_formulas(workers: Workers) -> None:
    three, me = (0, 1, 3), {0: 0, 1: 1, 3: 2}
    found = workers.run(4, one_of_each)
    assert found[2] == []  # a group of one sends nothing
    for rank, place in me.items():
        to_others = 4 * (6 - (1, 2, 3)[place])
        expected = [
            ("all_reduce", three, 48 * 4 // 3),
            ("all_gather", three, 16 * 2),
            ("all_gather", three, 16 * 2),
            ("reduce_scatter", three, 48 * 2 // 3),
            ("all_to_all", three, to_others),
        ]
        assert found[rank] == expected + [("send", (0, 3), 16)] * (rank == 3)
