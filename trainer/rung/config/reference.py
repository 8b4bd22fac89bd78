"""The reference of all settings, read from the docstrings that stand under the fields of settings dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, get_type_hints

from rung.config.compose import Node
from rung.config.tree import key_of

__all__ = ["Setting", "field_docs", "literal", "markdown", "settings"]


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
    """Every leaf below a settings dataclass, in the order of its fields, with the default that its field declares."""
    docs, hints = field_docs(settings_type), get_type_hints(settings_type)
    for field in dataclasses.fields(settings_type):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from settings(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
        yield Setting(prefix + key_of(field.name), name.replace("typing.", ""), default, docs.get(field.name, ""))


def literal(value: Any) -> str:
    """A value as an override is written: true, null, [a, b], a bare word."""
    return value if isinstance(value, str) and value else json.dumps(value)


def markdown(settings_type: type, nodes: Iterable[Node] = ()) -> str:
    """The whole reference as Markdown: a table for each component, or for each option with settings of its own."""
    nodes, hints = list(nodes), get_type_hints(settings_type)
    lines: list[str] = []
    for field in dataclasses.fields(settings_type):
        kind = hints[field.name]
        if not dataclasses.is_dataclass(kind):
            continue
        own = [node for node in nodes if node.group == field.name and node.type is not kind]
        for node in own or [Node(field.name, "", kind)]:  # type: ignore[arg-type]
            title = f"{field.name}={node.name.removesuffix('_schema')}" if own else field.name
            summary = (inspect.getdoc(node.type) or "").partition("\n\n")[0].replace("``", "`")
            lines += [f"## {title}", "", " ".join(summary.split()), "", *_table(settings(node.type, f"{field.name}."))]
    lines += ["## Top level", "", *_table(row for row in settings(settings_type) if "." not in row.key)]
    return "\n".join(lines)


def _table(rows: Iterable[Setting]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = f"`{row.key}`", row.type, f"`{literal(row.default)}`", row.doc
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]
