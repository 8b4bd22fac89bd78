"""The YAML files against the dataclasses that type them, and the messages of wrong settings."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from rung.errors import UserError
from rung.layout import LogicalTensor
from rung.optim import (
    OPTIMIZERS,
    AdamWConfig,
    LocalParameter,
    MuonConfig,
    OptimConfig,
    ScheduleConfig,
    SpamConfig,
    StableSpamConfig,
    build_optimizer,
)
from rung.optim.logical_optimizer import RunOptimizer

CONFIGS = Path(__file__).parents[2] / "configs"


def load(path: Path, schema: type) -> tuple[list[str], object]:
    written = OmegaConf.load(path)
    defaults = written.pop("defaults")
    return list(defaults), OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), written))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_file_repeats_the_defaults_of_its_dataclass(name: str) -> None:
    schema = OPTIMIZERS[name].config
    defaults, config = load(CONFIGS / "optim" / f"{name}.yaml", schema)
    assert defaults == [f"{name}_schema", "_self_"]
    assert config == schema()
    assert config.validate() == []


@pytest.mark.parametrize("name", ["cosine", "wsd", "linear", "constant"])
def test_schedule_file(name: str) -> None:
    defaults, config = load(CONFIGS / "schedule" / f"{name}.yaml", ScheduleConfig)
    assert defaults == ["schedule_schema", "_self_"]
    assert config == ScheduleConfig(name=name)
    assert config.validate(100) == []


def test_every_file_is_tested() -> None:
    assert {path.stem for path in (CONFIGS / "optim").glob("*.yaml")} == set(OPTIMIZERS)
    assert {path.stem for path in (CONFIGS / "schedule").glob("*.yaml")} == {"cosine", "wsd", "linear", "constant"}


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (AdamWConfig(lr=-1.0, weight_decay=float("nan"), betas=[0.9], eps=0.0), "lr weight_decay betas eps"),
        (MuonConfig(momentum=1.0, ns_steps=0, adjust_lr="orignal"), "momentum ns_steps adjust_lr"),
        (MuonConfig(lr=0.0, adamw_lr=1e-3), "adamw_lr"),
        (SpamConfig(density=0.0, reset_interval=0, grace_steps=-1, warmup_steps=-1), "density reset_interval"),
        (SpamConfig(grace_steps=-1, warmup_steps=-1, spike_threshold=-1.0), "grace_steps warmup_steps spike_threshold"),
        (StableSpamConfig(gamma1=1.0, gamma2=-1.0, gamma3=2.0, eta_min=2.0), "gamma1 gamma2 gamma3 eta_min"),
        (StableSpamConfig(reset_interval=0, total_steps=0), "reset_interval total_steps"),
        (OptimConfig(name="adam"), "name"),
    ],
)
def test_all_problems_are_told_at_once(config: OptimConfig, keys: str) -> None:
    with pytest.raises(UserError) as error:
        build_optimizer(config, [])
    assert all(f"optim.{key}=" in str(error.value) for key in keys.split())


def test_build_optimizer_makes_what_is_named() -> None:
    weight = torch.ones(4, 4)
    parameter = LocalParameter("w.weight", weight, LogicalTensor.from_tensor("w.weight", weight))
    for name, (schema, *_) in OPTIMIZERS.items():
        optimizer = build_optimizer(schema(), [parameter])
        made = optimizer.inner if isinstance(optimizer, RunOptimizer) else optimizer
        assert type(made).__name__.lower() == name.replace("_", "")
        assert build_optimizer(schema(), []).named_state() == {}
