"""Composition: presets, and one clear message for every mistake."""

from __future__ import annotations

from importlib import resources

import pytest

from rung.config import flatten, to_yaml
from rung.errors import UserError
from rung.recipes.config import changes_that_matter, load_config


def options(group: str) -> list[str]:
    return sorted(
        p.name[:-5] for p in resources.files("rung.configs").joinpath(group).iterdir() if p.name.endswith(".yaml")
    )


@pytest.mark.parametrize(
    "choice", [f"{g}={o}" for g in ("model", "data", "optim", "schedule", "recipe", "logging") for o in options(g)]
)
def test_every_option_composes(choice: str) -> None:
    extra = ["data.paths=[somewhere]"] if choice == "data=corpus" else []
    config, layout = load_config([choice, *extra], 1)
    assert layout.world_size == 1 and flatten(config)


@pytest.mark.parametrize("experiment", options("experiment"))
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_experiment_composes(experiment: str, world_size: int) -> None:
    config, _ = load_config([f"experiment={experiment}"], world_size)
    assert config.run.dir.endswith(f"runs/{config.run.name}")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.stpes=5"], ["train.stpes", "train.steps"]),
        (["modle=tiny"], ["modle", "model"]),
        (["trian.steps=5", "optim.lrr=1"], ["2 problems", "train.steps", "optim.lr"]),
        (["model=tinny"], ["tinny", "tiny"]),
        (["train.steps=many"], ["train.steps", "many", "Integer"]),
        (["optim.lr=fast"], ["optim.lr", "fast", "Float"]),
        (["train.steps"], ["not an override", "key=value"]),
        (["train.steps=0", "train.micro_batch_size=-1"], ["train.steps=0", "train.micro_batch_size=-1"]),
        (["precision=fp8"], ["precision=fp8", "float64", "bf16"]),
        (["engine=deepspede"], ["engine=deepspede", "native"]),
        (["parallel.tp=2"], ["tp=2", "world_size=1"]),
        (["data.seq_len=100000"], ["data.seq_len=100000", "max_position_embeddings"]),
        (["optim=adam"], ["adam", "adamw"]),
        (["run.resume="], ["run.resume is empty", "auto"]),
    ],
)
def test_mistakes_get_one_message_with_the_values(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(overrides, 1)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "Traceback" not in message and "HYDRA_FULL_ERROR" not in message


def test_all_problems_of_all_components_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load_config(["parallel.dp_shard=3", "model.num_key_value_heads=3", "train.global_batch_size=7"], 4)
    message = str(caught.value)
    assert all(part in message for part in ("dp_shard=3", "num_key_value_heads=3"))


def test_wrong_world_size_names_both_numbers() -> None:
    with pytest.raises(UserError, match=r"(?s)dp_shard.*4|4.*dp_shard"):
        load_config(["parallel.dp_shard=2"], 4)


def test_what_may_change_in_a_run_folder() -> None:
    old = flatten(load_config([], 1)[0])
    for override, serious in [
        ("train.micro_batch_size=4", False),
        ("train.steps=5", False),
        ("logging.console.interval=3", False),
        ("parallel.activation_checkpointing=full", False),
        ("run.seed=1", True),
        ("model.hidden_size=128", True),
        ("optim.lr=0.5", True),
        ("train.global_batch_size=32", True),
        ("data.seq_len=128", True),
        ("precision=bf16", True),
    ]:
        new = flatten(load_config([override], 1)[0])
        harmless, broken = changes_that_matter(old, new, [])
        assert bool(broken) is serious and bool(harmless) is not serious, override
        assert not changes_that_matter(
            old, new, ["model", "optim.*", "data.seq_len", "train.*", "run.seed", "precision"]
        )[1]


def test_yaml_holds_every_key() -> None:
    import yaml

    config, _ = load_config([], 1)
    assert flatten(yaml.safe_load(to_yaml(config))).keys() >= {"train.steps", "model.rope_theta", "optim.lr"}
