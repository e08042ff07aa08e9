"""Options of the command line: one for each setting, with its default, its help and its group."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re

import pytest

from optimum_sieve import SieveConfig
from optimum_sieve.commands.base.settings import add_settings, heal_settings_from, settings_from
from optimum_sieve.commands.heal import HealCommand
from optimum_sieve.commands.plan import PlanCommand
from optimum_sieve.commands.prune import PruneCommand
from optimum_sieve.commands.search import SearchCommand
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.tune import TuneConfig


RUN_OPTIONS = {
    *("help", "model", "task", "dtype", "device", "revision", "gguf_file", "trust_remote_code", "debug"),
    *("output", "overwrite", "work_dir", "study_storage", "dry_run", "config", "help_all", "no_heal", "no_tune"),
    *("with_examples", "report_to", "quiet"),
}
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
    "label_offsets": "none",
    "time_limit": 720.0,
    "projection": "svd",
    "storage": "factors",
    "loss": "labels",
    "fisher_temperature": 2.0,
    "rounds": 1,
    "weighting": "norms",
    "rank_multiple": 4,
    "damping": 0.5,
    "written_prompts": 7,
    "task_weights": (1.0, 2.0),
    "search_steps": 3,
    "search_preset": "paper",
    "population_size": 5,
    "generations": 2,
    "search_fraction": 0.5,
}
TUNE_VALUES = {
    "rank": 2,
    "steps": 9,
    "learning_rate": 0.01,
    "batch_size": 4,
    "max_candidates": 5,
    "gradient_checkpointing": True,
}
HEAL_VALUES = {
    "steps": 9,
    "learning_rate": 0.01,
    "shrink": 0.6,
    "adapter_rank": 4,
    "batch_size": 4,
    "rows_per_pass": 2,
    "loss": "vocabulary",
    "gold_weight": 0.25,
    "written_share": 0.25,
    "crossed_prompts": 7,
    "prompt_sites": 2,
    "train_norms": True,
    "max_candidates": 5,
    "gradient_checkpointing": True,
}


def settings_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    add_settings(parser)
    return parser


def parse_settings(*words: str) -> SieveConfig:
    return settings_from(settings_parser().parse_args(words))


def test_options_are_the_settings():
    parser = argparse.ArgumentParser()
    PruneCommand.parse_args(parser)
    options = {action.dest: action for action in parser._actions}
    fields = {field.name: field for field in dataclasses.fields(SieveConfig) if field.name != "heal"}
    fields |= {f"heal_{field.name}": field for field in dataclasses.fields(HealConfig)}
    fields |= {f"tune_{field.name}": field for field in dataclasses.fields(TuneConfig)}
    assert set(options) == RUN_OPTIONS | fields.keys()
    for name, field in fields.items():
        assert options[name].option_strings[0] == f"--{name.replace('_', '-')}"
        assert options[name].default is argparse.SUPPRESS
        assert len(options[name].help) > 20
        # `--tune` is a flag.
        if field.default not in (None, (), False, "auto"):
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
    for settings, prefix in ((SieveConfig, ""), (HealConfig, "heal_"), (TuneConfig, "tune_")):
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
        # A saved model has its size.
        if field.name == "shrink":
            assert not shows(everything, f"heal_{field.name}")
        else:
            assert shows(everyday, f"heal_{field.name}") == (field.name not in HealConfig.ADVANCED)
            assert shows(everything, f"heal_{field.name}")


def test_option_help_has_no_markup(capsys):
    text = helps(PruneCommand, capsys)[1]
    for markup in ("`", "\\", "\n\n\n", "%%"):
        assert markup not in text


def test_defaults_are_those_of_the_config():
    assert parse_settings("--tolerance", "0.02") == SieveConfig(tolerance=0.02)
    assert parse_settings("--pruning-ratio", "0.5") == SieveConfig(pruning_ratio=0.5)


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
    if name != "shrink":
        given = parser.parse_args(
            ["--model", "m", "--dense", "d", "--task", "t", "--output", "o", *words_of(f"heal_{name}", value)]
        )
        assert heal_settings_from(given) == {name: value}


def test_healing_is_on_unless_it_is_turned_off(tmp_path):
    assert parse_settings("--tolerance", "0.1").heal == "auto"
    assert parse_settings("--tolerance", "0.1", "--no-heal").heal is None
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(SieveConfig(tolerance=0.1, heal=HealConfig(steps=5, shrink=0.6)).to_dict()))
    assert parse_settings("--config", str(path)).heal == HealConfig(steps=5, shrink=0.6)
    assert parse_settings("--config", str(path), "--no-heal").heal is None
    assert parse_settings("--config", str(path), "--heal-steps", "9").heal == HealConfig(steps=9, shrink=0.6)
    path.write_text(json.dumps(SieveConfig(tolerance=0.1, heal=None).to_dict()))
    assert parse_settings("--config", str(path)).heal is None
    assert parse_settings("--config", str(path), "--heal-train-norms").heal == HealConfig(train_norms=True)
    with pytest.raises(ValueError, match="`--no-heal` must not go with `--heal-learning-rate`, which"):
        parse_settings("--tolerance", "0.1", "--no-heal", "--heal-learning-rate", "0.01")


@pytest.mark.parametrize(("name", "value"), TUNE_VALUES.items())
def test_an_option_of_tuning_reaches_its_setting_and_turns_it_on(name, value):
    tune = TuneConfig(**{name: value})
    assert parse_settings("--tolerance", "0.1", *words_of(f"tune_{name}", value)).tune == tune != TuneConfig()


def test_a_flag_tunes_with_the_default_settings(tmp_path):
    assert parse_settings("--tolerance", "0.1").tune == "auto"
    assert parse_settings("--tolerance", "0.1", "--no-tune").tune is None
    assert parse_settings("--tolerance", "0.1", "--tune").tune == TuneConfig()
    assert parse_settings("--tolerance", "0.1", "--tune", "--reference", "tuned").reference == "tuned"
    with pytest.raises(ValueError, match="`--no-tune` must not go with `--tune`, which turns it on"):
        parse_settings("--tolerance", "0.1", "--no-tune", "--tune")
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(SieveConfig(tolerance=0.1, tune=TuneConfig(rank=2)).to_dict()))
    assert parse_settings("--config", str(path), "--tune").tune == TuneConfig(rank=2)
    assert parse_settings("--config", str(path), "--tune-steps", "9").tune == TuneConfig(rank=2, steps=9)


def test_the_values_are_those_of_all_settings():
    others = {"tolerance", "pruning_ratio", "vocabulary_size", "heal", "tune", "reference"}
    assert VALUES.keys() | others == field_names(SieveConfig)
    assert HEAL_VALUES.keys() == field_names(HealConfig)
    assert TUNE_VALUES.keys() == field_names(TuneConfig)


def field_names(settings: type) -> set[str]:
    return {field.name for field in dataclasses.fields(settings)}


def test_options_take_precedence_over_the_config_file(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(SieveConfig(tolerance=0.05, damping=0.25, seed=3).to_dict()))
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
