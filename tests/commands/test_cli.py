"""`optimum-cli sieve`, run in this process where it may import torch and in one of its own where it must not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy import make_model, make_tokenizer, write_task

from optimum_sieve import SieveConfig
from optimum_sieve.commands.evaluate import EvaluateCommand
from optimum_sieve.commands.heal import HealCommand
from optimum_sieve.commands.options import add_settings, heal_settings_from, settings_from
from optimum_sieve.commands.plan import PlanCommand
from optimum_sieve.commands.prune import PruneCommand
from optimum_sieve.commands.search import SearchCommand
from optimum_sieve.config.heal import HealConfig


RUN_OPTIONS = {
    *("help", "model", "task", "dtype", "device", "revision", "gguf_file", "trust_remote_code", "debug"),
    *("output", "overwrite", "work_dir", "study_storage", "dry_run", "config", "help_all"),
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with a tiny model, `model/`, and a task, `task.json`."""
    directory = tmp_path_factory.mktemp("world")
    make_model().save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")
    write_task(directory)
    return directory


def settings_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    add_settings(parser)
    return parser


def parse_settings(*words: str) -> SieveConfig:
    return settings_from(settings_parser().parse_args(words))


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
        (["sieve"], 0, "{prune,plan,evaluate,search,heal,report,push,export,merge}"),
        (["sieve", "prune", "--help"], 0, "--pruning-ratio"),
        (["sieve", "prune", "--help"], 0, "--help-all also shows the advanced ones"),
        (["sieve", "prune", "--help-all"], 0, "--heal-train-norms"),
        (["sieve", "evaluate", "--help"], 0, "--compare-to"),
        (["sieve", "search", "--help"], 0, "--worker"),
        (["sieve", "search", "--work-dir", "w", "--task", "t"], 2, "required: --model (or --worker)"),
        (["sieve", "report", "--help"], 0, "--work-dir"),
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


def test_options_are_the_settings():
    parser = argparse.ArgumentParser()
    PruneCommand.parse_args(parser)
    options = {action.dest: action for action in parser._actions}
    fields = {field.name: field for field in dataclasses.fields(SieveConfig) if field.name != "heal"}
    fields |= {f"heal_{field.name}": field for field in dataclasses.fields(HealConfig)}
    assert set(options) == RUN_OPTIONS | fields.keys()
    for name, field in fields.items():
        assert options[name].option_strings[0] == f"--{name.replace('_', '-')}"
        assert options[name].default is argparse.SUPPRESS
        assert len(options[name].help) > 20
        if field.default not in (None, (), False):
            assert options[name].help.endswith(f"(default: {field.default})")
    assert all(action.help for action in parser._actions)


def helps(command, capsys) -> tuple[str, str]:
    """Return what `--help` and `--help-all` of a command print."""
    printed = []
    for option in ("--help", "--help-all"):
        parser = argparse.ArgumentParser()
        command.parse_args(parser)
        with pytest.raises(SystemExit) as end:
            parser.parse_args([option])
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
    return printed[0], printed[1]


def shows(text: str, name: str) -> bool:
    """Whether a help text names an option."""
    return re.search(rf"--{name.replace('_', '-')}(?![a-z-])", text) is not None


@pytest.mark.parametrize("command", [PruneCommand, PlanCommand, SearchCommand])
def test_help_all_shows_what_help_hides(command, capsys):
    everyday, everything = helps(command, capsys)
    for settings, prefix in ((SieveConfig, ""), (HealConfig, "heal_")):
        for field in dataclasses.fields(settings):
            if field.name != "heal":
                assert shows(everyday, prefix + field.name) == (field.name not in settings.ADVANCED)
                assert shows(everything, prefix + field.name)
    assert "--help-all" in everyday
    assert "advanced settings:" not in everyday
    assert "advanced settings:" in everything


def test_help_all_of_heal(capsys):
    everyday, everything = helps(HealCommand, capsys)
    for field in dataclasses.fields(HealConfig):
        if field.name != "rounds":
            assert shows(everyday, field.name) == (field.name not in HealConfig.ADVANCED)
            assert shows(everything, field.name)


def test_option_help_has_no_markup(capsys):
    text = helps(PruneCommand, capsys)[1]
    for markup in ("`", "\\", "\n\n\n", "%%"):
        assert markup not in text


def test_defaults_are_those_of_the_config():
    assert parse_settings("--tolerance", "0.02") == SieveConfig(tolerance=0.02)
    assert parse_settings("--pruning-ratio", "0.5") == SieveConfig(pruning_ratio=0.5)


# A value other than the default for each setting but the two stop criteria.
VALUES = {
    "latency_target": 0.5,
    "confidence": 0.8,
    "allocation": "uniform",
    "label_source": "model",
    "target_modules": ("q_proj", "*.mlp.*"),
    "exclude_modules": ("o_proj",),
    "batch_size": 4,
    "memory_limit": "24GB",
    "seed": 3,
    "vocabulary": "task",
    "projection": "svd",
    "storage": "factors",
    "loss": "labels",
    "rounds": 1,
    "weighting": "norms",
    "rank_multiple": 4,
    "damping": 0.5,
    "task_weights": (1.0, 2.0),
    "search_steps": 3,
    "search_preset": "paper",
    "population_size": 5,
    "generations": 2,
    "search_fraction": 0.5,
}
HEAL_VALUES = {
    "steps": 9,
    "learning_rate": 0.01,
    "rounds": 3,
    "batch_size": 4,
    "rows_per_pass": 2,
    "loss": "vocabulary",
    "gold_weight": 0.25,
    "eval_steps": 2,
    "patience": 1,
    "monitor_fraction": 0.5,
    "train_norms": True,
    "gradient_checkpointing": True,
}


def words_of(name: str, value: object) -> list[str]:
    values = () if value is True else value if isinstance(value, tuple) else (value,)
    return [f"--{name.replace('_', '-')}", *map(str, values)]


@pytest.mark.parametrize(
    "changes", [*({name: value} for name, value in VALUES.items()), {"vocabulary": "task", "vocabulary_size": 9}]
)
def test_an_option_reaches_its_setting(changes):
    words = [word for name, value in changes.items() for word in words_of(name, value)]
    assert parse_settings("--tolerance", "0.1", *words) == SieveConfig(tolerance=0.1, **changes)
    assert SieveConfig(tolerance=0.1, **changes) != SieveConfig(tolerance=0.1)


@pytest.mark.parametrize(("name", "value"), HEAL_VALUES.items())
def test_an_option_of_healing_reaches_its_setting(name, value):
    heal = HealConfig(**{name: value})
    assert parse_settings("--tolerance", "0.1", *words_of(f"heal_{name}", value)).heal == heal != HealConfig()
    parser = argparse.ArgumentParser()
    HealCommand.parse_args(parser)
    if name != "rounds":
        given = parser.parse_args(
            ["--model", "m", "--dense", "d", "--task", "t", "--output", "o", *words_of(name, value)]
        )
        assert heal_settings_from(given) == {name: value}


def test_the_values_are_those_of_all_settings():
    assert VALUES.keys() | {"tolerance", "pruning_ratio", "vocabulary_size", "heal"} == field_names(SieveConfig)
    assert HEAL_VALUES.keys() == field_names(HealConfig)


def field_names(settings: type) -> set[str]:
    return {field.name for field in dataclasses.fields(settings)}


def test_options_take_precedence_over_the_config_file(tmp_path):
    path = tmp_path / "settings.json"
    SieveConfig(tolerance=0.05, damping=0.25, seed=3).to_json_file(path)
    assert parse_settings("--config", str(path)) == SieveConfig(tolerance=0.05, damping=0.25, seed=3)
    assert parse_settings("--config", str(path), "--seed", "4", "--pruning-ratio", "0.5") == SieveConfig(
        pruning_ratio=0.5, damping=0.25, seed=4
    )


def test_a_config_file_may_leave_the_stop_criterion_to_the_command_line(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('{"seed": 3}')
    assert parse_settings("--config", str(path), "--tolerance", "0.1") == SieveConfig(tolerance=0.1, seed=3)
    with pytest.raises(ValueError, match="Exactly one of `tolerance`"):
        parse_settings("--config", str(path))


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
    assert sorted(world.rglob("*")) == before


def test_prune_then_evaluate(cli, world, tmp_path):
    model, task, output = world / "model", world / "task.json", tmp_path / "pruned"
    prune = ("prune", "--model", model, "--task", task, "--pruning-ratio", "0.4", "--rank-multiple", "1")
    status, table, error = cli(*prune, "--output", output, "--work-dir", tmp_path / "work")
    assert status == 0, error
    report = json.loads((output / "sieve_report.json").read_text())
    assert report["settings"] == SieveConfig(pruning_ratio=0.4, rank_multiple=1).to_dict()
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
    for key in ("task", "split", "metric", "count", "majority_score", "dense", "pruned", "agreement"):
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
        *("seconds", "versions"),
    }
    assert report["split"] == split
    assert report["count"] == 30
    assert "pruned" not in table
