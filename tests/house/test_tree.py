"""The checkout: what is found where, and what must not stand in any file."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {".git", ".venv", "build", "dist", "runs", "site", "__pycache__"}
SHELL_SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / ".ci/run", *ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch")]
)


def own_files() -> Iterator[Path]:
    """Every file of the project, also where there is no git."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            f for f in folders if f not in NOT_OURS and not f.endswith((".egg-info", "_cache", ".hypothesis"))
        ]
        yield from (Path(folder, file) for file in files)


def python(code: str, cwd: Path) -> str:
    """Output of a fresh interpreter of this environment; `-c` puts the working directory on its path, as `-m` does."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_editable_install_finds_configs_and_templates(tmp_path: Path) -> None:
    code = "from importlib.resources import files; print(files('rung.configs'), files('rung.launch_templates'))"
    assert python(code, tmp_path).split() == [str(ROOT / "configs"), str(ROOT / "launch")]


@pytest.mark.parametrize("name", ["kernels", "trainer"])
def test_source_roots_are_no_packages(name: str) -> None:
    """A package `kernels` of ours would break Hugging Face's, and with it transformers."""
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s.origin if s and s.has_location else '')"
    origin = python(code, ROOT)
    assert not origin or not Path(origin).is_relative_to(ROOT / name)


def test_every_yaml_parses() -> None:
    paths = [path for path in own_files() if path.suffix in {".yaml", ".yml"} and path.name != "mkdocs.yml"]
    assert paths
    for path in paths:
        yaml.safe_load(path.read_text())


FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w.$}~:-])/(?:home|root|Users|work|farm|mnt|scratch)/[\w.-]",
    "the host of a package index (which one is used is the user's choice)": (
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|deb\.debian\.org"
    ),
    "the number of an issue (say the reason instead)": r"(?i)\bissues? #?\d{1,3}\b",
}


def test_nothing_that_belongs_to_one_machine() -> None:
    found = []
    for path in own_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for what, pattern in FORBIDDEN.items():
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: {what}: {match.group()!r}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_shell_script_parses(script: str) -> None:
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("target", ["train", "test", "setup", "checks", "docs", "clean"])
def test_make_target(target: str) -> None:
    """`make --dry-run` prints what it would do; a target that does not exist is an error."""
    shown = subprocess.run(["make", "--dry-run", target], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr


def test_ci_runs_what_the_readme_says() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "for target in test checks docs" in (ROOT / ".ci/run").read_text()


def test_torch_range_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch_range,) = (line for line in project["dependencies"] if line.startswith("torch"))
    assert torch_range == "torch>=2.11,<2.14"
    assert "torch>=2.11$(comma)<2.14,torch==2.13.0" in (ROOT / "Makefile").read_text()
    assert "torch==2.13.0" in (ROOT / "docker/Dockerfile.cpu").read_text()
