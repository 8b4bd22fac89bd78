"""``rung train``."""

from __future__ import annotations

from collections.abc import Sequence

from rung.errors import UserError

__all__ = ["main"]

HELP = """usage: rung train [key=value ...]        (also: torchrun ... -m rung.train [key=value ...])

Settings are Hydra overrides: train.steps=100, model=llama_60m, experiment=quickstart, optim=muon optim.lr=0.01 ...
  --cfg            print the composed configuration and stop
  --help           this page
  --help PREFIX    every setting below PREFIX with its type, default and meaning (--help train, --help parallel.dp)
"""


def main(argv: Sequence[str]) -> int:
    """Compose, check, train. A mistake in the settings is refused before a process group exists, one in run.dir or the
    data before run.dir is changed."""
    overrides = [a for a in argv if not a.startswith("-")]
    flags = [a for a in argv if a.startswith("-")]
    if set(flags) & {"-h", "--help"}:
        prefixes = [override.partition("=")[0] for override in overrides]
        print("\n".join(_settings(prefixes)) if prefixes else HELP + _groups())
        return 0
    if unknown := set(flags) - {"--cfg"}:
        raise UserError(
            f"unknown option {', '.join(sorted(unknown))}; settings are written key=value, see rung train --help"
        )
    from rung.parallel.world import world_size_from_environment
    from rung.recipes.config import load_config

    config, layout = load_config(overrides, world_size_from_environment())
    if "--cfg" in flags:
        from rung.config import to_yaml

        print(to_yaml(config), end="")
        return 0
    from rung.recipes.pretrain import pretrain

    return pretrain(config, layout)


def _settings(prefixes: Sequence[str]) -> list[str]:
    import textwrap

    from rung.config import literal, settings
    from rung.recipes.config import NODES, Config

    rows = {row.key: row for row in settings(Config)}
    for node in NODES:
        rows |= {row.key: row for row in settings(node.type, f"{node.group}.") if row.key not in rows}
    found = [row for key, row in rows.items() if key.startswith(tuple(prefixes))]
    if not found:
        raise UserError(f"no setting begins with {' or '.join(prefixes)}; `rung train --help` lists the groups")
    lines = []
    for row in found:
        lines.append(f"{row.key} ({row.type}, default {literal(row.default)})")
        lines += textwrap.wrap(row.doc, 100, initial_indent="    ", subsequent_indent="    ")
    return lines


def _groups() -> str:
    from importlib import resources

    root = resources.files("rung.configs")
    lines = ["Groups and their options:"]
    for group in sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.name):
        options = sorted(option.name[:-5] for option in group.iterdir() if option.name.endswith(".yaml"))
        if options:
            lines.append(f"  {group.name + '=':12} {', '.join(options)}")
    return "\n".join(lines)
