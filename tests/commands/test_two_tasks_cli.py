"""Several tasks on the command line: prune, search with a worker, heal and export."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from toy import parity_rows, task_spec, write_rows
from two_tasks import SIZE, TOKENIZER, learn_both, make_tasks

from optimum_sieve.publish.table import format_table


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dense model that does two tasks, `parity.json` and `size.json`."""
    directory = tmp_path_factory.mktemp("world")
    learn_both(make_tasks(directory, 300), steps=150).save_pretrained(directory / "dense")
    TOKENIZER.save_pretrained(directory / "dense")
    write_rows(directory / "rows.jsonl", parity_rows(300))
    for spec in (task_spec(), task_spec(**SIZE)):
        (directory / f"{spec['name']}.json").write_text(json.dumps(spec))
    return directory


def tasks_of(world: Path) -> tuple[object, ...]:
    return ("--task", world / "parity.json", "--task", world / "size.json")


def test_prune_evaluate_heal_and_export(run: Callable[..., int], world: Path, tmp_path: Path, capsys: Any) -> None:
    source = ("--model", world / "dense", *tasks_of(world), "--device", "cpu")
    size = ("--pruning-ratio", 0.9, "--rank-multiple", 1, "--rounds", 1, "--no-heal", "--task-weights", 1, 3)
    assert run("prune", *source, *size, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "examples               parity: calibration 150, selection 75, test 75" in shown
    assert "examples               size: calibration 150, selection 75, test 75" in shown

    assert run("prune", *source, *size, "--output", tmp_path / "pruned") == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "pruned" / "sieve_report.json").read_text())
    assert report["settings"]["task_weights"] == [1.0, 3.0]
    shown = capsys.readouterr().out
    assert format_table(report).rpartition("seconds: ")[0] in shown
    for own in report["tasks"]:
        assert f"{own['task']}: 75 examples of the test split" in shown
        assert f"\n{own['task']}: accuracy  " in shown
        assert f"{own['task']}: KL to dense  " in shown
    assert shown.count("parameters of the model") == 1

    assert run("evaluate", "--model", tmp_path / "pruned", "--task", world / "size.json", "--compare-to",
               world / "dense", "--json", tmp_path / "size.json") == 0  # fmt: skip
    alone = json.loads((tmp_path / "size.json").read_text())
    assert alone["pruned"] == report["tasks"][1]["pruned"]

    words = ("--model", tmp_path / "pruned", "--dense", world / "dense", *tasks_of(world), "--task-weights", 1, 1)
    # Held to the dense model alone, so that the divergence is what falls.
    quick = ("--heal-steps", 48, "--heal-learning-rate", 0.001, "--heal-gold-weight", 0)
    assert run("heal", *words, *quick, "--output", tmp_path / "healed") == 0, capsys.readouterr().err
    healed = json.loads((tmp_path / "healed" / "sieve_report.json").read_text())
    assert [own["task"] for own in healed["tasks"]] == ["parity", "size"]
    assert max(own["kl"] for own in healed["tasks"]) < max(own["kl"] for own in report["tasks"])
    assert healed["healing"]["examples"] == 300
    assert healed["healing"]["settings"]["task_weights"] == [1.0, 1.0]
    card = (tmp_path / "healed" / "README.md").read_text()
    command = "sieve heal --model pruned --dense dense --task task_1.yaml --task task_2.yaml --task-weights 1.0 1.0 "
    assert command in card

    assert run("export", "--model", tmp_path / "pruned", "--dense", "--output", tmp_path / "exported") == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "pruned for `parity`, `size`" in card
    for own in report["tasks"]:
        assert f"Measured before this export, `{own['task']}`, accuracy on 75 examples of the test split: dense" in card


def test_a_worker_reads_the_tasks_of_a_search(
    run: Callable[..., int], world: Path, tmp_path: Path, capsys: Any
) -> None:
    words = ("--model", world / "dense", *tasks_of(world), "--device", "cpu", "--work-dir", tmp_path)
    size = ("--tolerance", 0.9, "--confidence", 0.5, "--rank-multiple", 2, "--rounds", 1, "--population-size", 4)
    assert run("search", *words, *size, "--generations", 2) == 0, capsys.readouterr().err
    assert "  size: " in capsys.readouterr().out
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["task"] == [str(world / name) for name in ("parity.json", "size.json")]
    # The search has ended: there is nothing left to score.
    assert run("search", "--worker", "--work-dir", tmp_path, "--device", "cpu") == 0, capsys.readouterr().err
    assert "scored 0 candidates" in capsys.readouterr().out


def test_errors_are_one_line_before_any_work(run: Callable[..., int], world: Path, tmp_path: Path, capsys: Any) -> None:
    words = ("prune", "--model", world / "dense", "--device", "cpu", "--tolerance", 0.1, "--output", tmp_path / "out")
    twice = ("--task", world / "size.json", "--task", world / "size.json")
    for more, message in (
        (twice, "error: `task` must be tasks with unique names, got 2 called 'size'"),
        ((*tasks_of(world), "--task-weights", 1), "error: `task_weights` must have one number per task, got 1 for"),
        ((*tasks_of(world), "--task-weights", 1, 0), "error: `task_weights` must be above 0"),
        (("--task", world / "size.json", "--task", "gone.yaml"), "error: `task` must be an existing task file"),
    ):
        assert run(*words, *more) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    heal = ("heal", "--model", tmp_path, "--dense", world / "dense", *tasks_of(world), "--output", tmp_path / "out")
    assert run(*heal, "--heal-steps", 1) == 1
