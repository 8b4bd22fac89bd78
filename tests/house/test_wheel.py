"""What a user installs: the wheel holds two packages, their data, and nothing that shadows somebody else's package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("LICENSE", "README.md", "configs", "kernels", "launch", "pyproject.toml", "setup.py", "trainer")

# Runs without site-packages: no torch, no rung but the one beside it.
USE_THE_WHEEL = """
import sys
sys.path.insert(0, sys.argv[1])
import rung
from importlib import resources
import rung.cli, rung.errors
assert rung.__file__.startswith(sys.argv[1]), rung.__file__
assert "torch" not in sys.modules
assert resources.files("rung.configs").joinpath("train.yaml").is_file()
assert resources.files("rung.configs").joinpath("experiment", "quickstart.yaml").is_file()
assert resources.files("rung.launch_templates").joinpath("slurm", "train.sbatch").is_file()
sys.exit(rung.cli.main(["launch", "slurm", "--print", "train.steps=1"]))
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy: a build writes into its source tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "out"), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (copy / "out").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_only_two_packages_at_the_top(names: set[str]) -> None:
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"rung", "rung_kernels"}


def test_everything_of_the_source_is_in_the_wheel(names: set[str]) -> None:
    shipped_as = {"trainer/rung": "rung", "kernels/rung_kernels": "rung_kernels", "configs": "rung/configs"}
    shipped_as["launch"] = "rung/launch_templates"
    suffixes = {".py", ".yaml", ".npy", ".json", ".sh", ".sbatch", ".example", ".typed"}
    missing = [
        str(path.relative_to(ROOT))
        for source, package in shipped_as.items()
        for path in (ROOT / source).rglob("*")
        if path.suffix in suffixes or path.name == "py.typed"
        if f"{package}/{path.relative_to(ROOT / source).as_posix()}" not in names
    ]
    assert not missing, (
        f"not in the wheel: {missing} (a package without __init__.py, or data that pyproject.toml omits?)"
    )


def test_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    command = [sys.executable, "-I", "-S", "-c", USE_THE_WHEEL, str(tmp_path / "site")]
    used = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert used.returncode == 0, used.stderr
    assert (ROOT / "launch/slurm/train.sbatch").read_text() in used.stdout
