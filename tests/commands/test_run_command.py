"""`sieve.yaml`: the recipe beside every pruned model, and `optimum-cli sieve run`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml
from safetensors.torch import load_file
from toy import make_model, make_tokenizer, task_spec, write_task

from optimum_sieve import SieveConfig
from optimum_sieve.publish.recipe import Recipe, recipe_files, recipe_text


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]

SETTINGS = ("--pruning-ratio", 0.3, "--rank-multiple", 1, "--no-heal", "--no-tune", "--seed", 3, "--rounds", 1)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_model().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_of_a_pruned_model_repeats_it(world: Path, cli: Cli) -> None:
    assert cli("prune", "--model", "dense", "--task", "task.json", "--output", "first", *SETTINGS)[0] == 0
    recipe = yaml.safe_load((world / "first" / "sieve.yaml").read_text())
    # The model was a directory, which is not published.
    assert recipe["model"] is None
    assert recipe["settings"] == {
        **{"heal": None, "pruning_ratio": 0.3, "rank_multiple": 1, "rounds": 1, "seed": 3, "tune": None},
    }
    assert recipe["tasks"] == [task_spec()]
    words = ("run", "first/sieve.yaml", "--data-dir", ".", "--output", "second")
    assert "`--model` must be given for a recipe without a `model`" in cli(*words)[2]
    status, out, err = cli(*words, "--model", "dense")
    assert status == 0, err
    assert "saved in second" in out
    first, second = (load_file(world / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_a_recipe_names_task_files_beside_it(world: Path, cli: Cli) -> None:
    (world / "my").mkdir()
    content = {"model": "../dense", "tasks": ["../task.json"], "settings": {"pruning_ratio": 0.5, "heal": {"steps": 2}}}
    (world / "my" / "recipe.json").write_text(json.dumps(content))
    status, out, err = cli("run", "my/recipe.json", "--dry-run")
    assert status == 0, err
    assert "matrices to prune" in out
    assert "2 steps of 16 examples" in out


WRONG = {
    "unknown key": ("model: m\ntasks: [t]\nsettings: {}\ntask: t\n", "`recipe` must have no keys but .*, got 'task'"),
    "model": ("model: 3\ntasks: [t]\nsettings: {}\n", "`model` must be a Hub id or directory, got 3"),
    "no task": ("model: m\ntasks: []\nsettings: {}\n", "`tasks` must be a list of task files"),
    "tasks": ("model: m\ntasks: t\nsettings: {}\n", "`tasks` must be a list of task files"),
    "settings": ("model: m\ntasks: [t]\nsettings: 1\n", "`settings` must be a mapping of settings"),
    "no YAML": ("model: [", "`recipe` must be a valid YAML or JSON file, got an error"),
    "a list": ("[1]", "`recipe` must hold a mapping of keys"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_recipes_are_named(name: str, tmp_path: Path) -> None:
    text, message = WRONG[name]
    (tmp_path / "sieve.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.from_file(tmp_path / "sieve.yaml")


def test_settings_of_a_recipe_are_checked_before_the_model_is_loaded(world: Path, cli: Cli) -> None:
    (world / "sieve.yaml").write_text("model: missing\ntasks: [task.json]\nsettings: {tolerance: 2}\n")
    status, _, err = cli("run", "sieve.yaml", "--output", "out")
    assert status == 1
    assert "`tolerance` must be at least 0 and below 1" in err
    status, _, err = cli("run", "missing.yaml", "--output", "out")
    assert status == 1
    assert "`recipe` must be an existing file of a recipe (YAML or JSON)" in err


def test_the_words_of_a_task_survive_the_recipe(tmp_path: Path) -> None:
    spec = task_spec(labels={"yes": " odd", "1e5": "1e5", "2020-01-01": " even", "on": "true"})
    settings = {"pruning_ratio": 0.5, "damping": 5e-05}
    (tmp_path / "sieve.yaml").write_text(recipe_text("org/base", [spec], settings, {"revision": "abc"}))
    recipe = Recipe.from_file(tmp_path / "sieve.yaml")
    assert recipe.tasks == [spec]
    assert (recipe.model, recipe.loading) == ("org/base", {"revision": "abc"})
    assert recipe.config() == SieveConfig(**settings)
    # Written by hand, as YAML 1.2 has it.
    (tmp_path / "sieve.yaml").write_text("model: m\ntasks: [t]\nsettings: {pruning_ratio: 0.5, damping: 5e-5}\n")
    assert Recipe.from_file(tmp_path / "sieve.yaml").config().damping == 5e-5


def test_a_healed_model_has_no_recipe_of_its_pruning() -> None:
    report = {"settings": {"pruning_ratio": 0.5}, "healing": {"settings": {"steps": 3}}}
    assert not recipe_files(report, [task_spec()], base_model="org/base", revision=None)
    del report["healing"]["settings"]
    files = recipe_files(report, [task_spec()], base_model="org/base", revision="abc")
    assert yaml.safe_load(files["sieve.yaml"])["revision"] == "abc"


def test_the_output_is_apart_from_the_recipe(world: Path, cli: Cli) -> None:
    (world / "rows").mkdir()
    (world / "rows" / "sieve.yaml").write_text("model: m\ntasks: [task.json]\nsettings: {pruning_ratio: 0.5}\n")
    status, _, err = cli("run", "rows/sieve.yaml", "--output", "rows", "--overwrite")
    assert status == 1
    assert "`output_dir` must be apart from `recipe`" in err
