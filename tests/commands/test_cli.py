"""`optimum-cli sieve`, run in this process where it may import torch and in one of its own where it must not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy import make_model, make_tokenizer, write_task

from optimum_sieve import SieveConfig
from optimum_sieve.commands.evaluate import EvaluateCommand
from optimum_sieve.run.contents import PAGE_WITH_EXAMPLES, page_kind


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with a tiny model, `model/`, and a task, `task.json`."""
    directory = tmp_path_factory.mktemp("world")
    make_model().save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")
    write_task(directory)
    return directory


def fresh_process(*words: str) -> subprocess.CompletedProcess[str]:
    """Run optimum-cli in a new process, from the checkout, which then is on its path beside the installed package."""
    code = (
        "import sys; from optimum.commands.optimum_cli import main\n"
        "try: main()\n"
        "finally: print('loaded:', [n for n in ('torch', 'transformers', 'datasets') if n in sys.modules])"
    )
    return subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "status", "shown"),
    [
        (["--help"], 0, "Prune a language model for one task."),
        (["sieve"], 0, "{prune,run,plan,evaluate,predict,tasks,search,heal,report,compare,push,export,merge}"),
        (["sieve", "prune", "--help"], 0, "--pruning-ratio"),
        (["sieve", "prune", "--help"], 0, "--help-all also shows the advanced ones"),
        (["sieve", "prune", "--help-all"], 0, "--heal-train-norms"),
        (["sieve", "evaluate", "--help"], 0, "--compare-to"),
        (["sieve", "tasks"], 0, "{check}"),
        (["sieve", "tasks", "check", "no.yaml"], 1, "error: `task` must be an existing task file"),
        (["sieve", "search", "--help"], 0, "--worker"),
        (["sieve", "search", "--work-dir", "w", "--task", "t"], 2, "required: --model (or --worker)"),
        (["sieve", "report", "--help"], 0, "--work-dir"),
        (["sieve", "report", "gone"], 1, "error: `directory` must hold sieve_report.json"),
        (["sieve", "compare", "gone", "lost"], 1, "error: `directories` must be those of pruned models, got gone with"),
        (
            ["sieve", "prune", "--model", "m", "--task", "t", "--output", "o", "--seed", "x"],
            2,
            "invalid int value: 'x'",
        ),
        (["sieve", "prune", "--model", "m", "--task", "t", "--output", "o"], 1, "error: Exactly one of `tolerance`"),
    ],
)
def test_command_line_is_read_without_torch(words, status, shown):
    done = fresh_process(*words)
    assert done.returncode == status
    assert shown in done.stdout + done.stderr
    assert "loaded: []" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tolerance", "0.1", "--pruning-ratio", "0.5"], "not allowed with argument"),
        (["--tolerance", "much"], "argument --tolerance: invalid float value: 'much'"),
        (["--tolerance", "0.1", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--tolerance", "0.1"], "the following arguments are required: --output (or --dry-run)"),
    ],
)
def test_bad_usage_is_status_2(cli, words, message):
    status, _, error = cli("prune", "--model", "m", "--task", "t", *words)
    assert status == 2
    assert message in error


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("prune --model m --task t --tolerence 0.02", "--tolerence 0.02. Did you mean --tolerance?"),
        ("prune --model m --task t --fisher-temprature=2", "=2. Did you mean --fisher-temperature?"),
        ("heal --model m --task t --output o --heal-stps 2", "--heal-stps 2. Did you mean --heal-steps?"),
        ("tasks check t --modle m", "--modle m. Did you mean --model?"),
        ("predict --model m --input - --output - x --other", "unrecognized arguments: x --other"),
    ],
)
def test_a_mistyped_option_is_told_the_closest_one(cli, words, hint):
    status, _, error = cli(*words.split())
    assert status == 2
    assert error.startswith(f"usage: optimum-cli sieve {words.split()[0]}")
    assert error.endswith(f"{hint}\n")


@pytest.mark.parametrize("command", [["prune", "--tolerance", "0.1", "--output", "out"], ["evaluate"]])
def test_an_error_is_one_line_and_status_1(cli, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, output, error = cli(*command, "--model", "m", "--task", "gone.yaml")
    assert status == 1
    assert output == ""
    assert error.startswith("error: `task` must be an existing task file")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(cli):
    with pytest.raises(FileNotFoundError, match="`task` must be an existing task file"):
        cli("evaluate", "--model", "m", "--task", "gone.yaml", "--debug")


@pytest.mark.parametrize(
    ("raised", "status", "printed"),
    [
        (ValueError("two\n  lines"), 1, "error: two lines\n"),
        (MemoryError(), 1, "error: MemoryError\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_a_command_raises_is_reported(cli, monkeypatch, raised, status, printed):
    def fail(self, arguments):
        raise raised

    monkeypatch.setattr(EvaluateCommand, "execute", fail)
    assert cli("evaluate", "--model", "m", "--task", "t") == (status, "", printed)


def test_a_mistake_of_ours_keeps_its_traceback(cli, monkeypatch):
    def fail(self, arguments):
        raise KeyError("a bug")

    monkeypatch.setattr(EvaluateCommand, "execute", fail)
    with pytest.raises(KeyError, match="a bug"):
        cli("evaluate", "--model", "m", "--task", "t")


def test_output_that_holds_files_is_refused_before_any_work(cli, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    words = ("prune", "--model", "no-such-model", "--task", "gone.yaml", "--tolerance", "0.1", "--output", tmp_path)
    status, _, error = cli(*words)
    assert status == 1
    assert error.startswith("error: `output_dir` must be new or empty")
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_a_json_file_without_a_directory_is_refused_before_any_work(cli, tmp_path):
    words = ("evaluate", "--model", "no-such-model", "--task", "gone.yaml", "--json", tmp_path / "gone" / "scores.json")
    status, _, error = cli(*words)
    assert status == 1
    assert error.startswith("error: `--json` must name a file in an existing, writable directory")


def test_dry_run_shows_the_plan_and_writes_nothing(cli, world):
    before = sorted(world.rglob("*"))
    status, output, _ = cli(
        "prune", "--model", world / "model", "--task", world / "task.json", "--pruning-ratio", "0.5", "--dry-run"
    )
    assert status == 0
    assert "matrices to prune" in output
    assert "candidates             2 of 1 token: " in output
    assert sorted(world.rglob("*")) == before


def test_prune_then_evaluate(cli, world, tmp_path):
    model, task, output = world / "model", world / "task.json", tmp_path / "pruned"
    prune = ("prune", "--model", model, "--task", task, "--pruning-ratio", "0.4", "--rank-multiple", "1", "--no-heal")
    status, table, error = cli(*prune, "--output", output, "--work-dir", tmp_path / "work", "--with-examples")
    assert status == 0, error
    assert page_kind(output / "report.html") == PAGE_WITH_EXAMPLES
    report = json.loads((output / "sieve_report.json").read_text())
    assert report["settings"] == SieveConfig(pruning_ratio=0.4, rank_multiple=1, heal=None, tune=None).to_dict()
    assert report["parameters"]["targets_after"] <= 0.6 * report["parameters"]["targets_before"]
    assert f"{report['pruned']['score']:.3f}" in table
    assert f"{report['parameters']['targets_after']:,}" in table
    assert (output / "README.md").read_text().startswith("---\n")

    scores = tmp_path / "scores.json"
    status, table, error = cli(
        "evaluate", "--model", output, "--task", task, "--compare-to", model, "--json", scores, "--batch-size", "5"
    )
    assert status == 0, error
    again = json.loads(scores.read_text())
    blocks = ("task", "split", "metric", "count", "majority_score", "examples_sha256", "dense", "pruned", "agreement")
    for key in (*blocks, "answers"):
        assert again[key] == report[key]
    assert again["paired_difference"] == report["paired_difference"]
    assert again["kl"] == pytest.approx(report["kl"], abs=1e-6)
    for key in ("model_before", "model_after"):
        assert again["parameters"][key] == report["parameters"][key]
    assert again["bytes"] == {
        "before": (model / "model.safetensors").stat().st_size,
        "after": (output / "model.safetensors").stat().st_size,
    }
    assert again["bytes"]["after"] == report["bytes"]["after"]
    assert "difference" in table

    status, table, error = cli("evaluate", "--model", output, "--task", task, "--json", scores)
    assert status == 0, error
    alone = json.loads(scores.read_text())
    assert alone["pruned"] == report["pruned"]
    assert "dense" not in alone
    assert "dense" not in table


def test_a_damaged_checkpoint_is_one_line(cli, world, tmp_path):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    status, _, error = cli("evaluate", "--model", tmp_path, "--task", world / "task.json")
    assert status == 1
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("split", ["selection", "test"])
def test_evaluate_scores_a_dense_model_alone(cli, world, tmp_path, split):
    scores = tmp_path / "scores.json"
    status, table, error = cli(
        "evaluate", "--model", world / "model", "--task", world / "task.json", "--split", split, "--json", scores
    )
    assert status == 0, error
    report = json.loads(scores.read_text())
    assert set(report) == {
        *("task", "split", "metric", "count", "majority_score", "dense", "parameters", "bytes"),
        *("seconds", "versions", "error_method", "examples_sha256"),
    }
    assert report["split"] == split
    assert report["count"] == 30
    assert "pruned" not in table
