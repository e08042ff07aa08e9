"""Damaged parts of a `sieve` block are named by the commands that read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from edited_checkpoint import edit_config
from tiny_models import make_pruned_model, save
from toy import make_tokenizer
from transformers import AutoModelForCausalLM

from optimum_sieve.backbone.loading import load_model
from optimum_sieve.lora.merge import check_adapter
from optimum_sieve.modeling.block import check_block
from optimum_sieve.modeling.conversion import check_pruned
from optimum_sieve.publish.hub import check_folder


if TYPE_CHECKING:
    from pathlib import Path

SCORE = {"score": 0.5, "standard_error": 0.01}
TASK = {"task": "a", "metric": "accuracy", "split": "test", "count": 3, "dense": SCORE, "pruned": SCORE}
WHOLE: list[dict[str, Any]] = [
    {},
    {"results": None, "settings": None, "vocabulary": None, "base_model": None},
    {"results": {"score": 0.5}},
    {"results": {**TASK, "weights_sha256": "0"}, "settings": {"target_modules": ["*"], "exclude_modules": []}},
    {"results": {"tasks": [TASK, TASK]}, "vocabulary": {"before": 9, "after": 3}, "settings": {"heal": {"steps": 3}}},
]
DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"base_model": 5}, r"`base_model` .* must be a string, got 5"),
    ({"base_revision": ["a"]}, r"`base_revision` .* must be a string, got \['a'\]"),
    ({"settings": "x"}, r"`settings` .* must be an object, got 'x'"),
    ({"settings": {"target_modules": 5}}, r"`settings\.target_modules` .* must be a list of strings, got 5"),
    ({"settings": {"exclude_modules": [5]}}, r"`settings\.exclude_modules` .* must be a list of strings, got \[5\]"),
    ({"settings": {"heal": 5}}, r"`settings\.heal` .* must be an object, got 5"),
    ({"vocabulary": []}, r"`vocabulary` .* must be an object with whole numbers `before` and `after`, got \[\]"),
    ({"vocabulary": {"before": 5}}, r"`vocabulary` .* got \{'before': 5\}"),
    ({"vocabulary": {"before": 5, "after": True}}, r"`vocabulary` .* got \{'after': True, 'before': 5\}"),
    ({"results": 5}, r"`results` .* must be an object, got 5"),
    ({"results": {"tasks": 5}}, r"`results\.tasks` .* must be a list of objects, got 5"),
    ({"results": {"tasks": []}}, r"`results\.tasks` .* must be a list of objects, got \[\]"),
    ({"results": {"tasks": [5]}}, r"`results\.tasks\.0` .* must be an object, got 5"),
    ({"results": {"tasks": [TASK, {**TASK, "count": "3"}]}}, r"`results\.tasks\.1\.count` .* a whole number, got '3'"),
    ({"results": {**TASK, "task": 5}}, r"`results\.task` .* must be a string, got 5"),
    ({"results": {**TASK, "pruned": 5}}, r"`results\.pruned` .* must be an object, got 5"),
    (
        {"results": {**TASK, "pruned": {"score": "x"}}},
        r"`results\.pruned` .* with numbers `score` and ",
    ),
    ({"results": {**TASK, "dense": {**SCORE, "score": float("nan")}}}, r"`results\.dense` .* got \{'score': nan"),
    ({"results": "x" * 1000}, r"got 'x+\.\.\.x+'\. Remove it, or download the model again\."),
]


@pytest.mark.parametrize("block", WHOLE)
def test_whole_blocks_are_accepted(block: dict[str, Any]) -> None:
    check_block(block)


@pytest.mark.parametrize(("block", "message"), DAMAGED)
def test_damaged_blocks_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_block(block)


@pytest.mark.parametrize("block", [None, 5, []])
def test_a_block_that_is_no_object(block: object) -> None:
    with pytest.raises(ValueError, match=r"`sieve` in the `sieve` block of config\.json must be an object, got"):
        check_block(block)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(make_pruned_model("llama"), tmp_path_factory.mktemp("llama"))
    make_tokenizer().save_pretrained(directory)
    edit_config(directory, lambda config: config["sieve"].update(results=5))
    return directory


def test_every_reader_checks_the_block(saved: Path, tmp_path: Path) -> None:
    # transformers loads it.
    model = AutoModelForCausalLM.from_pretrained(saved)
    readers = [
        lambda: load_model(saved),
        lambda: check_pruned(model.config),
        lambda: check_adapter(tmp_path, model.config),
        lambda: check_folder(saved),
    ]
    for read in readers:
        with pytest.raises(
            ValueError, match=r"`results` in the `sieve` block of config\.json must be an object, got 5"
        ):
            read()
