"""What README, CONTRIBUTING and docs/ show is true: commands run or compose, code runs, links and settings exist."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import pytest

from rung.config import settings
from rung.recipes.config import NODES, Config, load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# Programs of others, whose arguments are their own business.
OTHERS = {".", "cd", "docker", "echo", "git", "pip", "tensorboard", "wandb", ".venv/bin/pre-commit"}


class Block(NamedTuple):
    """A fenced block: `language` and `title` as written after the fence."""

    page: str
    language: str
    title: str
    text: str


def blocks(*languages: str) -> list[Block]:
    found = []
    for path in PAGES:
        for match in re.finditer(r"^( *)```(\w*)(?: title=\"(.*?)\")?\n(.*?)^\1```$", path.read_text(), re.M | re.S):
            page, text = path.relative_to(ROOT).as_posix(), textwrap.dedent(match.group(4))
            found.append(Block(page, match.group(2), match.group(3) or "", text))
    return [block for block in found if block.language in languages]


def commands() -> list[tuple[str, ...]]:
    """Every command once: lines joined, comments and environment variables in front dropped, `&&` and `|` split."""
    found: dict[tuple[str, ...], None] = {}
    for block in blocks("", "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word not in ("&&", "|"):
                    if words or not re.match(r"[A-Z_]+=", word):
                        words.append(word)
                elif words:
                    found[tuple(words)] = None
                    words = []
    return list(found)


def training(words: list[str]) -> tuple[int, list[str]] | None:
    """World size and overrides of a command that trains, however it starts its processes; else None."""
    if words[:3] == ["docker", "run", "--rm"]:
        return training(words[words.index("launch") - 1 :])
    if words[0] == "make" and "train" in words:
        variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        experiment = variables.get("EXPERIMENT", "quickstart")
        return 2, [f"experiment={experiment}", *shlex.split(variables.get("ARGS", ""))]
    launchers = (["rung", "train"], ["rung", "launch", "local"], ["rung", "launch", "slurm"], ["launch/local.sh"],
                 ["torchrun"], ["srun"], ["sbatch"])  # fmt: skip
    if not any(words[: len(start)] == start for start in launchers):
        return None
    size = 8 if words[0] == "sbatch" or "slurm" in words else 1
    for option in ("--nproc", "--nproc-per-node", "--ntasks", "--gpus-per-node", "--nodes"):
        for index, word in enumerate(words):
            if word == option or word.startswith(option + "="):
                number = int(word.partition("=")[2] or words[index + 1])
                size = size * number if option == "--nodes" else number
    return size, [w for w in words if re.match(r"[\w.]+=", w)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages speak of, at a toy size."""
    import pyarrow
    import pyarrow.parquet

    from rung.cli import main
    from rung.data import build_corpus

    folder = tmp_path_factory.mktemp("workplace")
    generator, words = random.Random(1), ["def", "return", "layout", "rank", "sum", "=", "(", ")", ":", "never", "\n"]
    texts = [" ".join(generator.choices(words, k=40)) for _ in range(400)]
    (folder / "my_texts").mkdir()
    for index, text in enumerate(texts):
        (folder / f"my_texts/{index}.txt").write_text(text)
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "archive.parquet")
    build_corpus(folder / "my_texts", folder / "corpora/mine", vocab_size=300, quiet=True)
    shutil.copy(folder / "corpora/mine/tokenizer.json", folder / "my_tokenizer.json")
    for block in blocks("yaml"):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text)
    run = folder / "runs/quickstart"
    sizes = ["train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=2", "data.seq_len=64", "device=cpu"]
    data = ["data=corpus", f"data.paths=[{folder / 'corpora/mine'}]"]
    assert main(["train", "model=tiny", *sizes, *data, f"run.dir={run}"]) == 0
    for copy in ("runs/one", "runs/two", "runs/mine", "runs/other", "experiments/first"):
        shutil.copytree(run, folder / copy)
    shutil.copytree(run / "export", folder / "weights/theirs")
    return folder


@pytest.fixture
def there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workplace, as the working directory."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PWD", str(workplace))
    return workplace


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command(command: tuple[str, ...], there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rung.cli import launch, main

    words = [os.path.expandvars(word) for word in command]
    options = [word for word in words[2:] if word.startswith("--")]
    if words[:2] == ["rung", "train"] and options:
        assert main(words[1:]) == 0
    elif started := training(words):
        size, overrides = started
        load_config(overrides, size)
        if words[:2] == ["rung", "launch"]:  # its own options
            monkeypatch.setattr(launch, "run_local", lambda nproc, given: given)
            monkeypatch.setattr(launch, "slurm", lambda given, **_: 0)
            launch.main(words[2:])
        for script in (word for word in words if word.startswith("launch/")):
            assert (ROOT / script).is_file()
    elif words[:3] == ["rung", "ckpt", "reshard"]:  # it becomes its own launcher
        from rung.recipes.reshard import ranks_to_start

        assert ranks_to_start(words[3], words[4], words[5:]) > 1
    elif words[0] == "rung":
        if "--out" in words and words[1] == "data":
            words[words.index("--out") + 1] = str(tmp_path / "corpus")
        if words[1] == "doctor" and "--layout" not in words:
            words.append("--quick")
        if words[-1] == "-":
            monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
        assert main(words[1:]) == 0
    elif words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
        assert targets and {word for word in words[1:] if "=" not in word} <= set(targets.group(1).split())
    elif words[0] in ("python", ".venv/bin/python"):
        scripts = [word for word in words[1:] if "/" in word]
        assert words[1:3] == ["-m", "pytest"] or scripts
        assert all((ROOT / script).exists() for script in scripts)
    else:
        assert words[0] in OTHERS, f"no test knows what {words[0]} is"


@pytest.mark.parametrize("page", sorted({block.page for block in blocks("python")}))
def test_python(page: str, there: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        if block.page == page:
            exec(compile(block.text, page, "exec"), names)


def known_keys() -> set[str]:
    rows = [*settings(Config), *(row for node in NODES for row in settings(node.type, f"{node.group}."))]
    return {row.key for row in rows}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_that_are_mentioned_exist(page: Path) -> None:
    text = page.read_text().partition("<!-- Below this line")[0]
    keys = known_keys()
    components = {key.partition(".")[0] for key in keys if "." in key}
    mentioned = set(re.findall(r"(?<![\w./-])((?:[a-z_]+\.)+[a-z_]+)=", text))
    inline = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:\.\*)?`", text)
    mentioned |= {key for key in inline if key.split(".")[0] in components}
    mentioned -= {"group.key", "hydra.searchpath"}
    file_names = {name for name in mentioned if name.endswith((".bin", ".idx", ".json", ".jsonl", ".safetensors"))}
    unknown = {key for key in mentioned - file_names if not any(f"{known}.".startswith(f"{key}.") for known in keys)}
    assert not unknown, f"{page.name} speaks of settings that do not exist: {unknown}"

    shipped = resources.files("rung.configs")
    groups = "|".join(folder.name for folder in shipped.iterdir() if folder.is_dir())
    for group, option in re.findall(rf"`({groups})=([a-z0-9_]+)`", text):
        assert (shipped / group / f"{option}.yaml").is_file(), f"{page.name}: there is no {group}={option}"


def anchors(page: Path) -> Iterator[str]:
    """The names that the site gives to a page's headings."""
    from markdown.extensions.toc import slugify

    for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M):
        yield slugify(heading.replace("`", ""), "-")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in set(anchors(linked)), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(navigation) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_configuration_page_is_what_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import generate_configuration

    assert generate_configuration.PAGE.read_text() == generate_configuration.page(), (
        "docs/configuration.md is out of date: run python docs/generate_configuration.py"
    )
