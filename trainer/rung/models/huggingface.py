"""Hugging Face's names for a Decoder: parameter names and config.json, as plain dictionaries (no transformers needed).

A Decoder is Qwen3 when it norms queries and keys, else Mistral when its window slides, else Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rung.errors import UserError
from rung.models.config import ModelConfig, RopeScaling

__all__ = ["from_huggingface_config", "from_huggingface_name", "to_huggingface_config", "to_huggingface_name"]

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "max_position_embeddings",
)
# What these architectures assume when config.json leaves a field out and a Decoder's own default would be another.
_THEIR_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 4096 * 32, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128},
}


def to_huggingface_name(name: str) -> str:
    """layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj.weight; lm_head.weight stays."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_huggingface_name(name: str) -> str:
    """The inverse of ``to_huggingface_name``."""
    return name.removeprefix("model.")


def to_huggingface_config(
    config: ModelConfig, *, dtype: str = "float32", bos_id: int | None = None, eos_id: int | None = None
) -> dict[str, Any]:
    """The contents of config.json. Dropout is a setting of training and is left out."""
    model_type = "qwen3" if config.qk_norm else "mistral" if config.sliding_window is not None else "llama"
    result: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    result |= {name: getattr(config, name) for name in _SAME_NAME}
    if model_type == "llama":
        result["mlp_bias"] = False
    else:
        result["sliding_window"] = config.sliding_window
    if model_type == "qwen3":
        result["use_sliding_window"] = config.sliding_window is not None
        result["max_window_layers"] = config.num_hidden_layers if config.sliding_window is None else 0
    scaling = config.rope_scaling
    if scaling.factor != 1:
        result["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return result


def from_huggingface_config(source: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from the contents of config.json, as transformers 4 or 5 writes it.

    Raises UserError with every feature that a Decoder does not have.
    """
    model_type = source.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise UserError(f"model_type={model_type!r} cannot be read; legal values: {', '.join(_ARCHITECTURES)}")
    source = {**_THEIR_DEFAULTS[model_type], **source}
    problems = [
        f"{name}={source[name]!r} is not supported; only {only!r} is"
        for name, only in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items()
        if source.get(name, only) != only
    ]

    # transformers 5 keeps everything about RoPE in rope_parameters; 4 spreads it over rope_theta and rope_scaling.
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = RopeScaling()
    if rope_type == "llama3":
        known = (field for field in RopeScaling.__dataclass_fields__ if field in rope)
        scaling = RopeScaling(**{field: rope[field] for field in known})
    elif rope_type != "default":
        problems.append(f"rope_type={rope_type!r} is not supported; legal values: default, llama3")
    if rope.get("partial_rotary_factor", source.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor other than 1.0 is not supported")

    num_layers = source["num_hidden_layers"]
    window = source.get("sliding_window") if model_type != "llama" else None
    if model_type == "qwen3" and not source.get("use_sliding_window", False):
        window = None
    if window is not None:
        first = source.get("max_window_layers", 28) if model_type == "qwen3" else 0
        by_rule = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
        sliding = [kind == "sliding_attention" for kind in source.get("layer_types") or by_rule]
        if not any(sliding):
            window = None
        elif not all(sliding):
            problems.append("a sliding window in some layers only is not supported; all layers or none must have it")
    UserError.raise_all(problems)
    fields = {name: source[name] for name in _SAME_NAME if source.get(name) is not None}
    config = ModelConfig(
        rope_theta=float(rope.get("rope_theta", source.get("rope_theta", 10000.0))),
        rope_scaling=scaling,
        qk_norm=model_type == "qwen3",
        sliding_window=window,
        **fields,
    )
    UserError.raise_all(config.validate())
    return config
