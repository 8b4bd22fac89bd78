"""`rung doctor --layout` shows a layout, or refuses it with every reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rung.models import ModelConfig, num_parameters

Rung = Callable[..., Any]

SMALL = ["model=tiny", "data.seq_len=32", "train.global_batch_size=16", "train.micro_batch_size=1"]


def test_ranks_bytes_messages_and_waiting(rung: Rung) -> None:
    result = rung(
        "doctor", "--layout", *SMALL, "parallel.pp=2", "parallel.tp=2", "--world-size", 8, "--ranks-per-node", 4
    )
    assert result.status == 0, result
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[0].startswith("pp 2 × dp_shard 2 × tp 2: 8 ranks on 2 nodes")
    # pp is outermost, tp innermost.
    assert "node 0: 0 (0,0,0) 1 (0,0,1) 2 (0,1,0) 3 (0,1,1)" in lines
    assert "node 1: 4 (1,0,0) … 7 (1,1,1)" in lines
    assert "tp: groups of 2, inside a node" in lines and "pp: groups of 2, across 2 nodes" in lines
    assert any(line.startswith("0-3 0 ") for line in lines) and any(line.startswith("4-7 1 ") for line in lines)
    assert any(line.startswith("dp_shard reduce_scatter gradients ") for line in lines)
    assert "pipeline: 1f1b, 8 micro-batches: ranks wait 11.1% of a step" in result.out  # (2 - 1) / (8 + 2 - 1)


def test_nodes_that_are_alike_are_shown_once(rung: Rung) -> None:
    words = ["parallel.tp=8", "model.num_attention_heads=8", "train.global_batch_size=128"]
    result = rung("doctor", "--layout", *SMALL[:2], *words, "train.micro_batch_size=1", "--world-size", 1024)
    assert result.status == 0, result
    assert "… 126 more like it …" in result.out and len(result.out.splitlines()) < 40


def test_json_is_in_bytes_and_covers_every_rank(rung: Rung) -> None:
    result = rung("doctor", "--layout", "--json", *SMALL, "parallel.dp_shard=4")
    report = json.loads(result.out)
    assert report["world_size"] == 4 and report["degrees"]["dp_shard"] == 4
    assert sorted(rank for entry in report["ranks"] for rank in entry["ranks"]) == [0, 1, 2, 3]
    held = sum(len(entry["ranks"]) * entry["parameter_bytes"] for entry in report["ranks"])
    tiny = ModelConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4
    )
    assert held == 4 * num_parameters(tiny)


def test_one_rank_sends_nothing(rung: Rung) -> None:
    result = rung("doctor", "--layout", *SMALL)
    assert result.status == 0 and "collectives of a step: none" in result.out


def test_every_reason_at_once(rung: Rung) -> None:
    result = rung("doctor", "--layout", *SMALL, "parallel.tp=3", "parallel.pp=8", "parallel.cp=5")
    assert result.status == 2 and not result.out
    for part in ("num_attention_heads=4", "8 stages", "2 · cp = 10", "cp · tp = 15"):
        assert part in result.err
    assert result.err.count("rung: error: ") == 1


def test_options_that_would_be_ignored(rung: Rung) -> None:
    for words in (["--json"], ["--world-size", 2], ["model=tiny"], ["--layout", "--quick"]):
        assert rung("doctor", *words).status == 2
    assert rung("doctor", "--layout", "--world-size", 0).status == 2
