"""Compose a configuration with Hydra and turn every mistake in it into one message with a suggestion.

Hydra's own messages name neither the nearest key nor every mistake at once, so override keys are checked against the
schema before Hydra sees them; Hydra and OmegaConf then check options and types.
"""

from __future__ import annotations

import dataclasses
import difflib
import keyword
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import NamedTuple, TypeVar, get_type_hints

from rung.config.tree import key_of
from rung.errors import UserError

__all__ = ["Node", "compose"]

CONFIG_MODULE = "rung.configs"

T = TypeVar("T")


class Node(NamedTuple):
    """A dataclass that types one option of a config group, as ``optim/adamw.yaml`` names ``adamw_schema``."""

    group: str
    name: str
    type: type


def compose(schema: type[T], overrides: Sequence[str], *, nodes: Iterable[Node] = (), config_name: str = "train") -> T:
    """Compose ``config_name`` from the shipped groups and return an instance of ``schema``.

    ``overrides`` are Hydra's (``key=value``, ``+key=value``, ``~key``, ``group=option``); nothing is instantiated and
    the working directory stays. Raises UserError for unknown keys (with the nearest known ones, all at once), unknown
    options and wrong types.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    nodes = list(nodes)
    UserError.raise_all(_unknown_keys(schema, overrides, nodes))
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    for node in nodes:
        store.store(group=node.group, name=node.name, node=node.type)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3", job_name="rung"):
            composed = hydra_compose(config_name, [_quoted(_of_fields(override)) for override in overrides])
        result: T = OmegaConf.to_object(composed)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_readable(error)) from error
    return result


def _of_fields(override: str) -> str:
    """An override with the names of fields in the place of keys (see ``key_of``)."""
    key, equals, value = override.partition("=")
    parts = [part + "_" if keyword.iskeyword(part) else part for part in key.split(".")]
    return ".".join(parts) + equals + value


def _quoted(override: str) -> str:
    """Quote a plain value with characters that Hydra's grammar has no place for, such as a path with an umlaut."""
    key, equals, value = override.partition("=")
    plain = value and value[0] not in "[{\"'" and not re.match(r"\w+\(", value) and "${" not in value
    if equals and plain and re.search(r"[^\x00-\x7f]|^~|[()=#;&|!?*<>]", value):
        return key + '="' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return override


def _unknown_keys(schema: type, overrides: Sequence[str], nodes: Sequence[Node]) -> list[str]:
    known = _schema_keys(schema)
    for node in nodes:
        known |= {f"{node.group}.{key}" for key in _schema_keys(node.type)}
    groups = _groups()
    problems = []
    for override in overrides:
        match = re.match(r"[+~]{0,2}([^=@:]+)", override)
        if ("=" not in override and not override.startswith("~")) or match is None:
            problems.append(f"{override!r} is not an override; write key=value, as in train.steps=100")
            continue
        key = match.group(1).strip()
        if (
            key.startswith("hydra")
            or key in known
            or key in groups
            or any(key.startswith(k + ".") for k in _open(known))
        ):
            continue
        near = difflib.get_close_matches(key, sorted({k.rstrip("*") for k in known} | groups), n=3, cutoff=0.6)
        last = key.rsplit(".", 1)[-1]
        near += [k for k in sorted(known) if k.rsplit(".", 1)[-1] == last and k not in near][: 3 - len(near)]
        hint = f"did you mean {' or '.join(near)}?" if near else "run `rung train --help` for every key"
        problems.append(f"unknown key {key!r}; {hint}")
    return problems


def _open(known: set[str]) -> list[str]:
    """Keys below which anything may stand (fields that are free mappings)."""
    return [key[:-1] for key in known if key.endswith("*")]


def _schema_keys(schema: type, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = f"{prefix}{key_of(field.name)}"
        keys.add(key)
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            keys |= _schema_keys(kind, key + ".")  # type: ignore[arg-type]
        elif getattr(kind, "__origin__", None) is dict:
            keys.add(key + "*")
    return keys


def _groups() -> set[str]:
    root = resources.files(CONFIG_MODULE)
    return {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(("_", "."))}


def _readable(error: Exception) -> str:
    """The innermost sentence that speaks of the user's value, with the key it belongs to."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    telling = next((e for e in causes if "full_key:" in str(e)), error)
    key = next((m.group(1) for e in causes for m in [re.search(r"full_key: (\S+)", str(e))] if m), None)
    text = " ".join(_lines(telling))
    text = re.sub(r"\s*(full_key|object_type|reference_type)[:=] ?\S*", "", text).strip()
    if key:
        key = ".".join(map(key_of, key.split(".")))
    return f"{key}: {text}" if key and key not in text else text


def _lines(error: BaseException) -> list[str]:
    """The sentences of a message that help: Hydra's advice about search paths and stack traces is dropped."""
    text = re.sub(r"\nConfig search path:.*", "", str(error), flags=re.S)
    text = re.sub(r"\nSet the environment variable HYDRA_FULL_ERROR=1.*", "", text, flags=re.S)
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.endswith("_schema")]  # schemas are no options of a user's
