"""`optimum-cli sieve heal`, and the options of healing of `prune`."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from healed_world import TOKENIZER, learn
from toy import load_task, parity_rows, unhealed, write_task
from transformers import AutoModelForCausalLM

from optimum_sieve import SieveConfig, SievePruner, compare, evaluate
from optimum_sieve.commands.base.settings import add_settings, settings_from
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.publish.card import reproduction_command
from optimum_sieve.publish.recipe import Recipe


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Task

FAR = {"pruning_ratio": 0.97, "rank_multiple": 1, "rounds": 1}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(600))


@pytest.fixture(scope="module")
def dense(task: Task) -> PreTrainedModel:
    return learn(task)


def test_settings_go_through_json_the_command_line_and_the_card(tmp_path: Path) -> None:
    import argparse

    config = SieveConfig(pruning_ratio=0.5, heal=HealConfig(steps=7, train_norms=True, learning_rate=1e-3))
    (tmp_path / "settings.json").write_text(json.dumps(config.to_dict()))
    assert SieveConfig.from_file(tmp_path / "settings.json") == config
    with pytest.raises(ValueError, match=r"`step` is not a setting of HealConfig\. Did you mean `steps`"):
        SieveConfig.from_dict({"pruning_ratio": 0.5, "heal": {"step": 3}})

    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    add_settings(parser)
    words = reproduction_command("org/base", config.to_dict()).split()
    assert settings_from(parser.parse_args(words[7:-2])) == config
    overridden = settings_from(parser.parse_args(["--config", str(tmp_path / "settings.json"), "--heal-steps", "9"]))
    assert overridden.heal == HealConfig(steps=9, train_norms=True, learning_rate=1e-3)
    assert settings_from(parser.parse_args(["--pruning-ratio", "0.5"])).heal == "auto"
    for heal in (None, HealConfig(), HealConfig(steps=9, shrink=0.6)):
        config = SieveConfig(pruning_ratio=0.5, heal=heal)
        words = reproduction_command("org/base", config.to_dict()).split()
        assert settings_from(parser.parse_args(words[7:-2])) == config


@pytest.fixture(scope="module")
def world(dense: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dense model, one pruned from it, and their task."""
    directory = tmp_path_factory.mktemp("world")
    load_task(directory, parity_rows(600))
    dense.save_pretrained(directory / "dense")
    TOKENIZER.save_pretrained(directory / "dense")
    pruner = SievePruner.from_pretrained(directory / "dense", task=directory / "task.json", device="cpu")
    pruner.prune(unhealed(**FAR), progress=False)
    return pruner.save_pretrained(directory / "pruned").parent


def source(world: Path, **others: object) -> list[object]:
    options = {"model": world / "pruned", "dense": world / "dense", "task": world / "task.json", "device": "cpu"}
    return [word for name, value in {**options, **others}.items() for word in (f"--{name}", value)]


def test_the_command_heals_a_pruned_directory(
    run: Callable[..., int], world: Path, dense: PreTrainedModel, task: Task, tmp_path: Path, capsys: Any
) -> None:
    settings = ("--heal-steps", 40, "--heal-learning-rate", 0.03, "--work-dir", tmp_path / "work")
    assert run("heal", *source(world), "--output", tmp_path / "healed", *settings) == 0, capsys.readouterr().err
    plain, report = (json.loads((directory / "sieve_report.json").read_text())
                     for directory in (world / "pruned", tmp_path / "healed"))  # fmt: skip
    assert report["kl"] < 0.5 * plain["kl"]
    for key in ("parameters", "dense", "settings", "majority_score"):
        assert report[key] == plain[key]
    assert report["healing"]["settings"]["steps"] == 40
    pruned, healed = (AutoModelForCausalLM.from_pretrained(path) for path in (world / "pruned", tmp_path / "healed"))
    assert healed.config.sieve["rank_pattern"] == pruned.config.sieve["rank_pattern"]
    examples = task.examples("test", TOKENIZER)
    scores = [evaluate(model, examples, TOKENIZER, metric="accuracy", batch_size=16, progress=False)
              for model in (dense, healed)]  # fmt: skip
    assert compare(*scores).kl == pytest.approx(report["kl"], abs=1e-6)
    card = (tmp_path / "healed" / "README.md").read_text()
    words = "optimum-cli sieve heal --model pruned --dense dense --task task.yaml"
    assert f"{words} --heal-steps 40 --heal-learning-rate 0.03" in card
    assert f"{report['pruned']['score']:.3f}" in capsys.readouterr().out


def test_the_command_refuses_what_does_not_fit(
    run: Callable[..., int], world: Path, dense: PreTrainedModel, tmp_path: Path, capsys: Any
) -> None:
    other = type(dense)(type(dense.config)(**{**dense.config.to_dict(), "intermediate_size": 40}))
    other.save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    unanswered = write_task(tmp_path, answer=None)
    for words, message in (
        ((*source(world), "--output", world), "`output_dir` must be apart from `model`"),
        ((*source(world), "--output", tmp_path / "out", "--heal-steps", 0), "`heal.steps` must be at least 1, got 0"),
        ((*source(world, model=world / "dense"), "--output", tmp_path / "out"), "must be a pruned model"),
        ((*source(world, dense=world / "pruned"), "--output", tmp_path / "out"), "must be a dense model"),
        ((*source(world, dense=tmp_path / "other"), "--output", tmp_path / "out"), "`dense` must be the model that"),
        ((*source(world, task=unanswered), "--output", tmp_path / "out"), "`task` must have an `answer` to heal"),
    ):
        assert run("heal", *words) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_prune_command_heals_unless_it_is_told_not_to(
    run: Callable[..., int], world: Path, tmp_path: Path, capsys: Any
) -> None:
    words = ("prune", "--model", world / "dense", "--task", world / "task.json", "--device", "cpu", "--rounds", 1)
    ratio = ("--pruning-ratio", 0.6, "--heal-steps", 4)
    assert run(*words, *ratio, "--dry-run") == 0
    assert "healing                2 x 4 steps of 16 examples, 128 forward and backward" in capsys.readouterr().out
    assert run(*words, *ratio, "--output", tmp_path / "ratio") == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "ratio" / "sieve_report.json").read_text())
    assert report["healing"]["steps"] == 8
    assert report["settings"]["heal"] == HealConfig(steps=4).to_dict()
    assert "smallest size within the tolerance" not in capsys.readouterr().out

    within = ("--tolerance", 0.3, "--search-steps", 2, "--rank-multiple", 1, "--time-limit", "1h")
    within += ("--heal-steps", 2, "--heal-shrink", 0.7)
    assert run(*words, *within, "--output", tmp_path / "within") == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    sizes = re.search(r"smallest size within the tolerance: (.+)% without healing, (.+)% with it", shown)
    assert sizes is not None
    assert float(sizes[2]) < float(sizes[1]) < 26
    assert re.search(rf"^kept +{re.escape(sizes[2])}% healed  accuracy .*: accepted$", shown, flags=re.MULTILINE)

    assert run(*words, "--pruning-ratio", 0.6, "--no-heal", "--output", tmp_path / "unhealed") == 0
    report = json.loads((tmp_path / "unhealed" / "sieve_report.json").read_text())
    assert "healing" not in report
    assert report["settings"]["heal"] is None
    assert Recipe.from_file(tmp_path / "unhealed" / "sieve.yaml").config().heal is None
    capsys.readouterr()
    assert run(*words, "--pruning-ratio", 0.6, "--no-heal", "--heal-steps", 4, "--output", tmp_path / "none") == 1
    assert "`--no-heal` must not go with `--heal-steps`, which" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_dense_model_is_the_one_that_the_pruned_one_names(
    run: Callable[..., int], world: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def heal_pruned(model: Any, dense: Any, *others: Any, **options: Any) -> Any:
        asked.append(dense)
        raise ValueError("enough")

    monkeypatch.setattr("optimum_sieve.pipeline.heal.heal_pruned", heal_pruned)
    words = ["heal", *source(world), "--output", tmp_path / "out"]
    at = words.index("--dense")
    del words[at : at + 2]
    assert run(*words) == 1
    assert "`--dense` must be given for a pruned model that names no model on the Hub" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(world / "pruned", copy)
    config = json.loads((copy / "config.json").read_text())
    config["sieve"]["base_model"] = "org/base"
    (copy / "config.json").write_text(json.dumps(config))
    words[words.index("--model") + 1] = copy
    assert run(*words) == 1
    assert asked == ["org/base"]
