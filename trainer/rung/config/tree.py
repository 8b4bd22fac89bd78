"""A configuration as a flat mapping: written to disk, compared, shown."""

from __future__ import annotations

import dataclasses
import keyword
from collections.abc import Mapping
from typing import Any

__all__ = ["differences", "flatten", "key_of", "nested", "to_yaml"]


def key_of(field_name: str) -> str:
    """The key of a field: its name, without the underscore that one needs where the key is a word of Python's."""
    bare = field_name.removesuffix("_")
    return bare if keyword.iskeyword(bare) else field_name


def nested(config: Any) -> Any:
    """A dataclass as plain mappings by key, down to its leaves."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {key_of(field.name): nested(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: nested(value) for key, value in config.items()}
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a dataclass or mapping under its dotted key; lists are leaves."""
    config = nested(config)
    if not isinstance(config, Mapping):
        return {prefix[:-1]: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}."))
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two flat configurations, as key -> (old, new); absent counts as None."""
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML text, in the order of the fields."""
    import yaml

    text: str = yaml.safe_dump(nested(config), sort_keys=False, allow_unicode=True)
    return text
