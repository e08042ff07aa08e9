"""Every command refuses an output that would lose something before it loads a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from toy import make_model, make_tokenizer, write_task
from writers import finish, start_and_wait, write_model

from optimum_sieve.backbone import loading
from optimum_sieve.export.dense import save_dense
from optimum_sieve.modeling.conversion import sieve_model


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]

_COMMANDS: dict[str, tuple[str, ...]] = {
    "prune": ("--model", "model", "--task", "task.json", "--pruning-ratio", "0.5", "--work-dir", "work"),
    "heal": ("--model", "pruned", "--dense", "model", "--task", "task.json", "--work-dir", "work"),
    "export": ("--model", "model", "--dense"),
    "merge": ("--model", "model", "--adapter", "adapter"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything that the commands name."""
    directory = tmp_path_factory.mktemp("world")
    make_model().save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")
    write_task(directory)
    for name in ("pruned", "adapter", "other"):
        write_model(directory / name)
    (directory / "notes").mkdir()
    (directory / "notes" / "notes.txt").write_text("mine")
    return directory


@pytest.fixture
def refused(world: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must be refused before a model is loaded and change nothing; return its error."""

    def load(*_: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(world)
    monkeypatch.setattr("optimum_sieve.pruner.load_model", load)
    monkeypatch.setattr("optimum_sieve.pipeline.heal.load_model", load)
    # Last: the modules above are imported here at the latest, and would keep the replacement.
    monkeypatch.setattr(loading, "load_model", load)

    def refused(command: str, *words: str, status: int = 1) -> str:
        before = {path: path.lstat() for path in world.rglob("*")}
        found, _, error = cli(command, *_COMMANDS.get(command, ()), *words)
        assert found == status, error
        after = {path: path.lstat() for path in world.rglob("*")}
        assert after.keys() == before.keys()
        assert all(os.path.samestat(after[path], before[path]) for path in before)
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return refused


@pytest.mark.parametrize("command", _COMMANDS)
def test_an_output_is_apart_from_every_input(refused: Callable[..., str], world: Path, command: str) -> None:
    words = dict(zip(_COMMANDS[command][::2], _COMMANDS[command][1::2], strict=False))
    for option, name in (
        ("model", "--model"),
        ("dense", "--dense"),
        ("adapter", "--adapter"),
        ("work_dir", "--work-dir"),
    ):
        for output in (words.get(name), f"{words.get(name)}/out") if name in words else ():
            error = refused(command, "--output", output, "--overwrite")
            assert f"`output_dir` must be apart from `{option}`, got {output}" in error
    if "--task" in words:
        error = refused(command, "--output", "task.json", "--overwrite")
        assert "`output_dir` must be a directory, got the file task.json" in error
        assert "`output_dir` must be apart from `model`, got ., which contains" in refused(command, "--output", ".")


@pytest.mark.parametrize("command", _COMMANDS)
def test_overwrite_replaces_only_what_a_run_wrote(refused: Callable[..., str], command: str) -> None:
    error = refused(command, "--output", "notes", "--overwrite")
    assert "`output_dir` must hold nothing but a model of `save_pretrained`" in error
    assert "got notes with 'notes.txt'" in error
    assert "`output_dir` must be new or empty, got other" in refused(command, "--output", "other")


@pytest.mark.parametrize("command", _COMMANDS)
def test_names_homes_and_special_files_are_refused(
    refused: Callable[..., str], world: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "x" * 250
    assert "`output_dir` must have a name of at most 231 bytes" in refused(command, "--output", name)
    if not (world / "fifo").exists():
        os.mkfifo(world / "fifo")
    assert "`output_dir` must be a directory, got the FIFO fifo" in refused(command, "--output", "fifo", "--overwrite")
    monkeypatch.setenv("HOME", str(world / "other"))
    error = refused(command, "--output", "notes/../other", "--overwrite")
    assert "`output_dir` must not be or contain the home directory, got notes/../other" in error
    if "--work-dir" in _COMMANDS[command]:
        error = refused(command, "--output", "out", "--work-dir", name)
        assert "`work_dir` must have a name of at most 231 bytes" in error


@pytest.mark.parametrize("command", _COMMANDS)
def test_a_second_run_to_one_output_is_refused(refused: Callable[..., str], world: Path, command: str) -> None:
    writer = start_and_wait("with reserved(output, False): wait()", world / "out")
    try:
        assert "`output_dir` must be written by one run at a time, got " in refused(command, "--output", "out")
    finally:
        finish(writer, kill=True)
        (world / ".out.sieve-lock").unlink()


def test_data_files_settings_and_the_study_are_inputs(refused: Callable[..., str], world: Path) -> None:
    task = json.loads((world / "task.json").read_text())
    data = world / "rows"
    data.mkdir()
    (world / "dataset.json").write_text(json.dumps({**task, "data": {"dataset": "rows", "split": "train"}}))
    error = refused("prune", "--task", "dataset.json", "--output", "rows/out")
    assert "`output_dir` must be apart from `task`, got rows/out, which is inside" in error
    (world / "sub").mkdir()
    (world / "sub" / "config.json").write_text('{"pruning_ratio": 0.5}')
    error = refused("prune", "--config", "sub/config.json", "--output", "sub", "--overwrite")
    assert "`output_dir` must be apart from `config`, got sub, which contains sub/config.json" in error
    error = refused("prune", "--study-storage", "sqlite:///out/study.db", "--output", "out")
    assert "`output_dir` must be apart from `study_storage`, got out, which contains out/study.db" in error


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("task.json", "`--json` must be apart from `task`, got task.json, which is "),
        ("model/config.json", "`--json` must be apart from `model`, got model/config.json, which is inside model"),
        ("model/new.json", "`--json` must be apart from `model`, got model/new.json, which is inside model"),
        ("notes/notes.txt", "`--json` must name a new file or a report to replace, got notes/notes.txt"),
        ("notes", "`--json` must be a regular file, got the directory notes"),
        ("queue", "`--json` must be a regular file, got the FIFO queue"),
        ("link", "`--json` must be a regular file, got the FIFO link"),
        ("x" * 250, "`--json` must have a name of at most 231 bytes"),
        ("gone/scores.json", "`--json` must name a file in an existing, writable directory, got gone/scores.json"),
    ],
)
def test_evaluate_writes_no_report_over_anything_else(
    refused: Callable[..., str], world: Path, file: str, message: str
) -> None:
    if not (world / "queue").exists():
        os.mkfifo(world / "queue")
        (world / "link").symlink_to("queue")
    assert message in refused("evaluate", "--model", "model", "--task", "task.json", "--json", file)


def test_the_page_of_a_search_is_apart_from_its_directory(refused: Callable[..., str], world: Path) -> None:
    (world / "searched").mkdir()
    summary = {"format_version": 1}
    (world / "searched" / "search-0.json").write_text(json.dumps(summary))
    for output, relation in (("searched", "is"), ("searched/page", "is inside"), (".", "contains")):
        error = refused("report", "--work-dir", "searched", "--output", output, "--overwrite")
        assert f"`output_dir` must be apart from `work_dir`, got {output}, which {relation} searched" in error
    assert "got notes with 'notes.txt'" in refused(
        "report", "--work-dir", "searched", "--output", "notes", "--overwrite"
    )


def test_json_goes_to_the_standard_output_alone(world: Path) -> None:
    words = ["evaluate", "--model", "model", "--task", "task.json", "--json", "/dev/stdout", "--device", "cpu"]
    code = "from optimum.commands.optimum_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "sieve", *words], cwd=world, capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert report["dense"]["score"] >= 0
    assert f"{report['dense']['score']:.3f}" in done.stderr


def test_a_link_to_a_report_is_followed(world: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("scores.json")
    words = ("evaluate", "--model", world / "model", "--task", world / "task.json", "--device", "cpu")
    for _ in range(2):
        assert cli(*words, "--json", tmp_path / "link")[0] == 0
        assert (tmp_path / "link").is_symlink()
        assert json.loads((tmp_path / "scores.json").read_text())["task"] == "parity"


def test_python_functions_refuse_the_directory_of_their_model(world: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = sieve_model(AutoModelForCausalLM.from_pretrained(world / "model"), base_model=None, settings={}, results={})
    before = (world / "model" / "config.json").read_bytes()
    for output in (world / "model", world / "model" / "out", world):
        with pytest.raises(ValueError, match="`output_dir` must be apart from `model`, got "):
            save_dense(model, make_tokenizer(), output, overwrite=True)
    assert (world / "model" / "config.json").read_bytes() == before
