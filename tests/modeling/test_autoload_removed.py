"""An installation whose package was removed or moved breaks neither `import torch` nor `optimum-cli`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from clean_environment import make_clean_environment


ROOT = Path(__file__).parents[2]

# `sys.argv[1]` says whether transformers must know the model type.
SCRIPT = """
import importlib.metadata, sys, torch
assert [entry.value for entry in importlib.metadata.entry_points(group="torch.backends") if "sieve" in entry.value]
assert torch.ones(2).sum() == 2
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert ("sieve" in CONFIG_MAPPING) == (sys.argv[1] == "known"), list(sys.path)
"""

COMMAND = """
import runpy, sys
commands = runpy.run_path(sys.argv[1])["REGISTER_COMMANDS"]
assert [command.COMMAND.name for command in commands] == (["sieve"] if sys.argv[2] == "known" else []), commands
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment that has everything but optimum-sieve."""
    return make_clean_environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(root)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(root.glob("*.whl"))


@pytest.fixture
def site(wheel: Path, tmp_path: Path) -> Path:
    """Make a folder with all files of the wheel: the package, and what is installed outside it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


def run(python: Path, code: str, *arguments: object, site: Path) -> None:
    """Run `code` where the files of `site` are installed."""
    result = subprocess.run(
        [python, "-c", code, *map(str, arguments)],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_the_whole_installation_registers(python: Path, site: Path) -> None:
    run(python, SCRIPT, "known", site=site)


@pytest.mark.parametrize(
    "removed",
    [
        pytest.param(["optimum_sieve"], id="package"),
        pytest.param(["optimum_sieve/__init__.py", "optimum_sieve/_autoload.py"], id="two files"),
        pytest.param(["optimum_sieve/_lazy.py"], id="one file"),
        pytest.param(["optimum_sieve/modeling"], id="one folder"),
    ],
)
def test_torch_is_imported_without(removed: list[str], python: Path, site: Path) -> None:
    for name in removed:
        path = site / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(python, SCRIPT, "unknown", site=site)


def test_an_editable_installation_whose_source_was_moved(python: Path, tmp_path: Path) -> None:
    """The installer's files stay in the environment, and lead to a folder that is not there."""
    source, built, site = tmp_path / "source", tmp_path / "built", tmp_path / "site"
    shutil.copytree(ROOT / "optimum_sieve", source / "optimum_sieve", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "optimum_sieve_autoload.py"):
        shutil.copy(ROOT / name, source)
    built.mkdir()
    code = "import hatchling.build, sys; hatchling.build.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, built], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(site)
    assert not (site / "optimum_sieve").exists()
    assert [path.read_text().strip() for path in site.glob("*.pth")] == [str(source)]
    source.rename(tmp_path / "moved")
    run(python, SCRIPT, "unknown", site=site)


@pytest.mark.parametrize(
    ("removed", "known"), [(None, "known"), ("optimum_sieve", "unknown"), ("optimum_sieve/commands", "unknown")]
)
def test_the_other_commands_of_optimum_stay(removed: str | None, known: str, python: Path, site: Path) -> None:
    if removed is not None:
        shutil.rmtree(site / removed)
    run(python, COMMAND, site / "optimum/commands/register/register_sieve.py", known, site=site)


def test_the_hook_is_in_the_record_so_that_it_is_uninstalled(site: Path) -> None:
    found = Distribution.at(next(site.glob("*.dist-info")))
    assert {"optimum_sieve_autoload.py", "optimum_sieve/_autoload.py"} <= set(map(str, found.files or ()))
    assert [entry.value for entry in found.entry_points.select(group="torch.backends")] == [
        "optimum_sieve_autoload:register"
    ]
