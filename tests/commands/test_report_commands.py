"""`sieve report` and `sieve compare`: pages of outputs and work directories, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from reported_world import HOSTILE, of_two_tasks, prune_toy


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    prune_toy(folder)
    return folder


@pytest.fixture
def models(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make directories that hold what `compare` reads of a pruned model, with a changed report."""

    def make(name: str, **changes: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        shutil.copy(world / "out" / "config.json", directory)
        report = json.loads((world / "out" / "sieve_report.json").read_text())
        changed = {key: value for key, value in {**report, **changes}.items() if value is not None}
        (directory / "sieve_report.json").write_text(json.dumps(changed))
        return directory

    return make


def test_the_page_of_an_output_is_made_again(cli: Cli, world: Path, tmp_path: Path) -> None:
    status, out, err = cli("report", world / "out", "-o", tmp_path / "page.html")
    assert (status, err) == (0, "")
    assert out == f"written to {tmp_path / 'page.html'}\n"
    page = (world / "out" / "report.html").read_bytes()
    assert (tmp_path / "page.html").read_bytes() == page
    # A page is replaced.
    assert cli("report", world / "out", "-o", tmp_path / "page.html")[0] == 0
    assert cli("report", world / "out")[0] == 0
    assert (world / "out" / "report.html").read_bytes() == page


def test_the_page_of_a_work_directory_is_that_of_its_last_run(cli: Cli, world: Path, tmp_path: Path) -> None:
    assert cli("report", world / "work", "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "Score against size" in page
    assert "The run has not ended" not in page


def test_another_file_is_not_replaced(cli: Cli, world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("<html>my diary</html>")
    status, _, err = cli("report", world / "out", "-o", tmp_path / "mine.html")
    assert status == 1
    assert "error: `--output` must name a new file or a report to replace" in err
    assert (tmp_path / "mine.html").read_text() == "<html>my diary</html>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "which is no directory. Check the path."),
        ({}, "which holds nothing of a run."),
        ({"moments-0.safetensors": "", "bases-0.safetensors": ""}, "with bases, moments alone: no size was scored yet"),
        ({"search-0.json": "{}"}, "sieve report --work-dir"),
        ({"config.json": "{}"}, "a model without a report. `optimum-cli sieve evaluate` scores it."),
        ({"sieve_report.json": "{"}, "must be a report of optimum-sieve, got another or damaged content"),
        ({"sieve_report.json": '{"versions": {"npm": "1"}}'}, "must be a report of optimum-sieve"),
        ({"sieve_report.json": '{"versions": {"optimum-sieve": "1"}}'}, "one that cannot be shown (KeyError('task'))"),
        (
            {"sieve_report.json": '{"versions": {"optimum-sieve": "1"}, "task": 3, "metric": "a"}'},
            "a task called 3 with the metric 'a'",
        ),
        (
            {"sieve_report.json": '{"versions": {"optimum-sieve": "1"}, "task": "a", "metric": "a", "trials": [{}]}'},
            "one that cannot be shown (KeyError(",
        ),
        (
            {"sieve_report.json": '{"versions": {"optimum-sieve": "1"}, "task": "a", "metric": "", "parts": {"b": 3}}'},
            "one that cannot be shown (",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(cli: Cli, tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    directory = tmp_path / "directory"
    if files is not None:
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_text(content)
    status, _, err = cli("report", directory, "-o", tmp_path / "page.html")
    assert status == 1
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments DIR and --work-dir is required"),
        (["a", "--work-dir", "b"], "one of the arguments DIR and --work-dir is required"),
        (["--work-dir", "b"], "--work-dir requires --output"),
    ],
)
def test_words_that_do_not_fit_are_refused(cli: Cli, words: list[str], message: str) -> None:
    status, _, err = cli("report", *words)
    assert status == 2
    assert message in err


def test_several_models_are_on_one_page(cli: Cli, models: Callable[..., Path], tmp_path: Path) -> None:
    one, two = (
        models("one"),
        models("two", base_model="org/other", paired_difference={"mean": -0.5, "standard_error": 0.1}),
    )
    status, out, err = cli("compare", one, two, "-o", tmp_path / "compare.html")
    assert (status, err) == (0, "")
    assert out == f"written to {tmp_path / 'compare.html'}\n"
    page = (tmp_path / "compare.html").read_text()
    rows = re.findall(r'<tr><td class="text">(\w+)</td><td class="text">([\w/]+)</td>', page)
    assert rows == [("one", "toy/base"), ("two", "org/other")]
    assert "-0.500 ± 0.100" in page
    trials = json.loads((one / "sieve_report.json").read_text())["trials"]
    # Both runs on one plot, for wide and for narrow screens.
    assert page.count("<title>one: ") == page.count("<title>two: ") == 2 * (len(trials) + 1)
    assert "not comparable" not in page
    outside = re.sub(r'xmlns="[^"]*"', "", page)
    assert not re.search(r"https?:|<script|<link|src=|href=|url\(", outside)
    # Replaced by the same bytes.
    assert cli("compare", one, two, "-o", tmp_path / "compare.html")[0] == 0
    assert (tmp_path / "compare.html").read_text() == page


@pytest.mark.parametrize("other", ["0" * 64, None])
def test_different_test_examples_are_warned_of(
    cli: Cli, models: Callable[..., Path], tmp_path: Path, other: str | None
) -> None:
    status, _, err = cli("compare", models("one"), models("two", examples_sha256=other), "-o", tmp_path / "page.html")
    assert status == 0
    sentence = "The scores on parity are not comparable: the models were scored on different test examples (one / two)"
    assert f"warning: {sentence}" in err
    assert sentence in (tmp_path / "page.html").read_text()


def test_models_of_different_tasks_have_a_plot_for_each(
    cli: Cli, models: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    report = json.loads((world / "out" / "sieve_report.json").read_text())
    two = models("two")
    (two / "sieve_report.json").write_text(json.dumps(of_two_tasks(report, HOSTILE)))
    assert cli("compare", models("one"), two, "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert len(re.findall("<h3>", page)) == 2
    assert "<img" not in page
    assert page.count("<svg") == 2 * 2


def test_what_is_no_pruned_model_is_refused_by_name(cli: Cli, models: Callable[..., Path], tmp_path: Path) -> None:
    one, plain, unscored = models("one"), tmp_path / "plain", models("unscored", pruned=None)
    plain.mkdir()
    for words, message in [
        ([one], "`directories` must name at least two pruned models, got 1"),
        ([one, one], f"`directories` must differ, got {one} twice"),
        ([one, plain], f"must be those of pruned models, got {plain} with no readable config.json"),
        ([one, unscored], f"`{unscored}` must have scores of the pruned model"),
    ]:
        status, _, err = cli("compare", *words, "-o", tmp_path / "page.html")
        assert status == 1
        assert message in err
    (plain / "config.json").write_text('{"model_type": "llama"}')
    assert f"got {plain} with model_type 'llama'" in cli("compare", one, plain, "-o", tmp_path / "page.html")[2]
    (plain / "config.json").write_text('{"model_type": "sieve"}')
    assert "`directory` must hold sieve_report.json" in cli("compare", one, plain, "-o", tmp_path / "page.html")[2]
    assert not (tmp_path / "page.html").exists()


def test_two_directories_of_one_name_are_told_apart(cli: Cli, models: Callable[..., Path], tmp_path: Path) -> None:
    one = models("one")
    again = tmp_path / "again" / "one"
    shutil.copytree(one, again)
    assert cli("compare", one, again, "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "<title>again/one: " in page
    assert f"<title>{tmp_path.name}/one: " in page
