"""Rewrite what stands below the marker in docs/configuration.md: the options of every group, and every setting.

python docs/generate_configuration.py            writes the page
python docs/generate_configuration.py --check    exits with 1 where the page is out of date
"""

from __future__ import annotations

import json
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from rung.config import flatten, markdown
from rung.recipes.config import NODES, Config

PAGE = Path(__file__).with_name("configuration.md")
MARKER = "<!-- Below this line `python docs/generate_configuration.py` writes. -->\n"


def page() -> str:
    """The page as it should be: its own head, then what is generated."""
    head, found, _ = PAGE.read_text().partition(MARKER)
    if not found:
        raise SystemExit(f"{PAGE} has lost its marker: {MARKER}")
    reference = re.sub(r"^## ", "### ", markdown(Config, NODES), flags=re.M)
    return f"{head}{MARKER}\n{options()}\n## Every setting\n\n{reference}"


def options() -> str:
    """A table for each group: the files of configs/GROUP/, what their first comment says, and what they set."""
    lines = ["## Options of the groups", ""]
    for group in sorted((f for f in resources.files("rung.configs").iterdir() if f.is_dir()), key=lambda f: f.name):
        files = sorted((f for f in group.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
        if not files:
            continue
        lines += [f"### `{group.name}=`", "", "| option | what it is | what it sets |", "|---|---|---|"]
        for file in files:
            text = file.read_text()
            comment = re.search(r"^# (?!@)(.*?)[:.]?$", text, re.M)
            values = ", ".join(f"`{key}={_literal(value)}`" for key, value in _values(text).items())
            lines.append(f"| `{file.name[:-5]}` | {comment.group(1) if comment else ''} | {values} |")
        lines.append("")
    return "\n".join(lines)


def _values(text: str) -> dict[str, Any]:
    """What an option's file sets; the groups that an experiment chooses come first."""
    content = yaml.safe_load(text)
    chosen = [entry for entry in content.pop("defaults", []) if isinstance(entry, dict)]
    groups = {key.rpartition("/")[2]: option for entry in chosen for key, option in entry.items()}
    return groups | {key: value for key, value in flatten(content).items() if key != "name"}


def _literal(value: object) -> str:
    """A value as an override is written."""
    return value if isinstance(value, str) and value else json.dumps(value)


if __name__ == "__main__":
    new = page()
    if sys.argv[1:] == ["--check"]:
        sys.exit(PAGE.read_text() != new and f"{PAGE} is out of date: run python docs/generate_configuration.py")
    PAGE.write_text(new)
