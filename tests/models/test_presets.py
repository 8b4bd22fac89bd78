from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from rung.models import ModelConfig, num_parameters

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
# As their authors published them: GaLore (arXiv 2403.03507), the model cards of Llama 3 and Qwen3.
PUBLISHED = {
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_0_6b": 596_049_920,
}


def load(path: Path) -> ModelConfig:
    settings = yaml.safe_load(path.read_text())
    settings.pop("defaults")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), settings))


def test_all_are_here():
    assert {path.stem for path in PRESETS} >= {"tiny", *PUBLISHED}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset(path):
    config, (defaults, comment, *_) = load(path), path.read_text().splitlines()
    assert config.validate() == []
    assert defaults == "defaults: [model_schema, _self_]"
    assert comment.startswith(f"# {num_parameters(config):,} parameters: ")
    assert num_parameters(config) == PUBLISHED.get(path.stem, num_parameters(config))
    settings = yaml.safe_load(path.read_text())
    unneeded = [field.name for field in fields(ModelConfig) if settings.get(field.name, ...) == field.default]
    assert not unneeded, "a preset holds only what differs from the defaults"


def test_tiny_can_be_split_four_ways():
    tiny = load(next(path for path in PRESETS if path.stem == "tiny"))
    assert tiny.num_hidden_layers >= 4 and tiny.num_attention_heads >= 4


def test_sizes_left_open_follow_the_others():
    schema = OmegaConf.structured(ModelConfig)
    config = OmegaConf.to_object(OmegaConf.merge(schema, {"hidden_size": 96, "num_attention_heads": 3}))
    assert (config.num_key_value_heads, config.head_dim) == (3, 32)
