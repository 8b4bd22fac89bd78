"""The reference of all settings, read from the docstrings that stand under the fields of settings dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, get_type_hints

from rung.config.compose import Node

__all__ = ["Setting", "field_docs", "markdown", "settings"]


class Setting(NamedTuple):
    """One key: its type as written, its default, and what it means."""

    key: str
    type: str
    default: Any
    doc: str


def field_docs(settings_type: type) -> dict[str, str]:
    """Field name -> the string literal under it, on one line; inherited fields included."""
    docs: dict[str, str] = {}
    for kind in reversed(settings_type.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, follower in zip(definition.body, definition.body[1:], strict=False):
            match statement, follower:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def settings(settings_type: type, prefix: str = "") -> Iterator[Setting]:
    """Every leaf below a settings dataclass, in the order of its fields."""
    docs, hints = field_docs(settings_type), get_type_hints(settings_type)
    instance = settings_type()
    for field in dataclasses.fields(settings_type):
        kind, value = hints[field.name], getattr(instance, field.name)
        if dataclasses.is_dataclass(kind):
            yield from settings(type(value), f"{prefix}{field.name}.")
        else:
            name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
            yield Setting(prefix + field.name, name.replace("typing.", ""), value, docs.get(field.name, ""))


def markdown(settings_type: type, nodes: Iterable[Node] = ()) -> str:
    """The whole reference as Markdown: a table per component, and one per option that has settings of its own."""
    sections: dict[str, list[Setting]] = {}
    for setting in settings(settings_type):
        sections.setdefault(setting.key.partition(".")[0] if "." in setting.key else "top level", []).append(setting)
    for node in nodes:
        own = list(settings(node.type, f"{node.group}."))
        base = sections.get(node.group, [])
        if {s.key for s in own} - {s.key for s in base}:
            sections[f"{node.group}={node.name.removesuffix('_schema')}"] = own
    lines = []
    for title, rows in sections.items():
        lines += [f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for row in rows:
            default = "null" if row.default is None else str(row.default)
            kind = row.type.replace("|", "\\|")
            lines.append(f"| `{row.key}` | {kind} | `{default}` | {row.doc} |".replace("``", "` `"))
        lines.append("")
    return "\n".join(lines)
