"""The project's own files agree with each other. Part of `make check`, and quick."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import optimum_sieve


ROOT = Path(__file__).parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_changelog_begins_with_the_package_version():
    heading = re.search(r"^## \[([^\]]+)\] - (.+)$", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert heading is not None
    assert heading[1] == optimum_sieve.__version__
    assert heading[2] == "unreleased" if "dev" in heading[1] else re.fullmatch(r"\d{4}-\d\d-\d\d", heading[2])


def test_the_page_of_other_versions_shows_the_runs():
    sys.path.insert(0, str(ROOT / "tests" / "compatibility"))
    try:
        import run
    finally:
        sys.path.pop(0)
    results = json.loads(run.RESULTS.read_text(encoding="utf-8"))
    assert read("docs/compatibility.md").partition(run.MARK)[2] == run.render(results)
    environments = run.read_environments()
    assert [name for name in environments if name in results] == list(results)
    assert all(results[name]["tests"] == list(environments[name].tests) for name in results)
    jobs = yaml.safe_load(read(".github/workflows/nightly.yml"))["jobs"]
    assert jobs["packages"]["strategy"]["matrix"]["environment"] == list(environments)


def test_every_requirement_has_a_tested_version():
    names = r'^ {4}"([A-Za-z0-9_.-]+)[><=]|"([a-z-]+)[><=][^"]*"[,\]]'
    required = {first or second for first, second in re.findall(names, read("pyproject.toml"), flags=re.MULTILINE)}
    pinned = set(re.findall(r"^([a-z0-9-]+)==", read("constraints.txt"), flags=re.MULTILINE))
    assert {"torch", "transformers", "ruff", "mkdocs"} <= required
    assert {name.lower().replace("_", "-") for name in required} <= pinned


def test_extras_that_texts_name_exist_and_are_quoted_for_every_shell():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    paths = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "optimum_sieve").rglob("*.py")]
    named = [match for path in paths for match in re.findall(r"(.)optimum-sieve\[(\S+?)\](.)", path.read_text("utf-8"))]
    assert len(named) >= 6
    for before, extras, after in named:
        assert before == after == "'", extras
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("name", optimum_sieve.__all__)
def test_every_public_name_is_in_the_documentation(name):
    assert re.search(rf"^::: optimum_sieve\.(\w+\.)*{name}$", read("docs/api.md"), flags=re.MULTILINE)


def test_the_documentation_has_five_groups_and_at_most_twenty_four_pages():
    # The custom tags of mkdocs.yml are none of the navigation's.
    navigation = yaml.safe_load(re.search(r"^nav:\n(?:[ -].*\n)+", read("mkdocs.yml"), flags=re.MULTILINE)[0])["nav"]
    assert [title for group in navigation for title in group] == ["Start", "Guides", "Method", "Results", "Reference"]
    pages = [page for group in navigation for entries in group.values() for entry in entries for page in entry.values()]
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert len(pages) <= 24


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_benchmark_that_is_gone_is_named_with_the_commit_that_holds_it(page):
    text = page.read_text(encoding="utf-8")
    gone = [name for name in re.findall(r"benchmarks/\w+\.py", text) if not (ROOT / name).exists()]
    assert not gone or "b04263d" in text


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 120


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"])
def test_the_links_of_a_page_outside_the_documentation_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", read(name)):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        headings = re.findall(r"^#+ (.+)$", read(path or name), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings]


def test_the_wheel_brings_the_command_and_the_hook(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points, metadata = (
            archive.read(next(name for name in names if name.endswith(end))).decode()
            for end in ("entry_points.txt", "/METADATA")
        )
    assert {name for name in names if name.startswith("optimum/")} == {"optimum/commands/register/register_sieve.py"}
    data = {"py.typed", "publish/card_template.md", "search/page/page.html"}
    assert {f"optimum_sieve/{name}" for name in data} <= names
    assert "[torch.backends]\noptimum_sieve = optimum_sieve_autoload:register" in entry_points
    # Torch finds it there without the package.
    assert "optimum_sieve_autoload.py" in names
    # The page of the package index: the whole README, and no link that is dead there.
    links = re.findall(r"\]\(([^)]*)\)", metadata)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert set(re.findall(r"^## .*$", read("README.md"), re.MULTILINE)) <= set(metadata.splitlines())
