"""ARCHITECTURE.md draws the tree as it is, and the tree keeps its limits."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "optimum_sieve"
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


def modules(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.py") if path.name != "__init__.py"]


def drawing(heading: str) -> list[str]:
    """Return the lines of the first text block under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1]
    return re.search(r"^```text\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)[1].splitlines()


def entries(line: str) -> list[str]:
    """Return the folders (`search/`) and modules (`pruner.py`) at the beginning of a line."""
    return re.match(r"\s*(\S+(?: \| \S+)*)", line)[1].split(" | ")


def without_ending(entry: str) -> str:
    return entry.removesuffix("/").removesuffix(".py")


def test_the_drawing_has_every_folder_and_root_module_once():
    drawn = [entry for line in drawing("Layers") for entry in entries(line)]
    folders = [f"{folder.relative_to(PACKAGE).as_posix()}/" for folder in FOLDERS]
    assert sorted(drawn) == sorted([*folders, *(path.name for path in modules(PACKAGE))])


def test_the_drawing_has_the_layers_of_the_import_contract_in_order():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    drawn = [entries(line) for line in drawing("Layers") if not line.startswith(" ")]
    assert [sorted(map(without_ending, line)) for line in drawn] == [sorted(line.split(" | ")) for line in layers]


def test_folders_inside_a_folder_are_drawn_below_it():
    above = ""
    for line in drawing("Layers"):
        if line.startswith(" "):
            assert entries(line)[0].startswith(above)
        else:
            above = entries(line)[-1]


def test_the_data_passes_through_the_folders_in_order():
    text = "\n".join(drawing("The data's way"))
    named = re.findall(r"([a-z_]+)/", text)
    assert {name for name in named if not (PACKAGE / name).is_dir()} == set()
    way = ["tasks", "calibration", "factorization", "allocation", "search", "surgery", "healing", "publish"]
    assert [name for name in named if name in way] == way


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`((?:[a-z_]+/)*[\w]+\.(?:py|md|toml))`", PAGE)) - {"evaluate.py", "allocate.py", "vllm.py"}
    places = (ROOT, PACKAGE, PACKAGE / "modeling")
    assert {name for name in named if not any((place / name).exists() for place in places)} <= {"stage.py"}


def test_every_name_in_brackets_after_a_file_is_in_that_file():
    pairs = re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", PAGE)
    assert len(pairs) > 3
    assert [(file, name) for file, name in pairs if name not in (PACKAGE / file).read_text(encoding="utf-8")] == []


def test_the_files_that_travel_are_those_that_remote_code_imports():
    reached, waiting = set(), ["modeling_sieve"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            tree = ast.parse((PACKAGE / "modeling" / f"{name}.py").read_text(encoding="utf-8"))
            waiting += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    sentence = PAGE.split("for `trust_remote_code=True`:\n")[1].split(".\n")[0]
    assert set(re.findall(r"`(\w+)\.py`", sentence)) == reached


def test_the_page_is_one_page():
    assert len(PAGE.splitlines()) <= 130


def test_the_root_has_at_most_six_modules():
    assert len(modules(PACKAGE)) <= 6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(PACKAGE).as_posix())
def test_a_folder_says_what_it_is_for_and_has_at_most_fourteen_modules(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert len(modules(folder)) <= 14


def test_no_module_has_more_than_300_lines():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.relative_to(PACKAGE).as_posix(): count for path, count in lines.items() if count > 300} == {}
