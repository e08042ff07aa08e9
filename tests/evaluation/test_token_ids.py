"""Tokens that the model has no embedding for: padding takes another id, real tokens are refused by name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from healed_world import learn
from tiny_models import make_tiny_model
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed
from transformers import T5Config, T5ForConditionalGeneration

from optimum_sieve import SievePruner, evaluate
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.evaluation.token_ids import padding_id


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.tasks import Task

OPTIONS: dict[str, Any] = {"metric": "accuracy", "batch_size": 8, "progress": False}
REMEDY = r"Use the model's own tokenizer, or call `model\.resize_token_embeddings\(len\(tokenizer\)\)`"


def with_padding() -> PreTrainedTokenizerBase:
    """Make a tokenizer with a padding token that was added without resizing the model."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<added_pad>"})
    assert tokenizer.pad_token_id == len(make_tokenizer())
    return tokenizer


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return load_task(tmp_path, parity_rows(60))


def test_an_added_padding_token_changes_nothing(task: Task) -> None:
    model = learn(task, steps=20)
    plain, padded = make_tokenizer(), with_padding()
    assert padding_id(padded, input_format(model)) < model.config.vocab_size
    expected = evaluate(model, task.examples("test", plain), plain, **OPTIONS)
    found = evaluate(model, task.examples("test", padded), padded, **OPTIONS)
    torch.testing.assert_close(torch.tensor(found.log_probs), torch.tensor(expected.log_probs))


def test_a_model_is_pruned_with_an_added_padding_token(task: Task) -> None:
    result = SievePruner(make_model(), with_padding(), task).prune(
        unhealed(pruning_ratio=0.5, rank_multiple=1, rounds=1), progress=False
    )
    assert result.report["count"] == len(task.examples("test", make_tokenizer()))


def test_written_answers_with_an_added_padding_token(tmp_path: Path) -> None:
    changes = {"kind": "generate", "labels": None, "stop": "\n", "max_new_tokens": 3, "metric": "exact_match"}
    task = load_task(tmp_path, parity_rows(60), **changes)
    tokenizer = with_padding()
    found = evaluate(make_model(), task.examples("test", tokenizer), tokenizer, **{**OPTIONS, "metric": "exact_match"})
    assert len(found.texts) == found.count


@pytest.mark.parametrize("kind", ["labels", "generate"])
@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_a_token_that_was_added_without_resizing_is_named(kind: str, where: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    number = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    changes: dict[str, Any] = {}
    if where == "prompt":
        changes["prompt"] = "<extra> {{ text }} is"
    elif kind == "labels":
        changes["labels"] = {"even": " even <extra>", "odd": " odd <extra>"}
    else:
        changes["answer"] = "<extra> {{ label }}"
    if kind == "generate":
        changes |= {"kind": "generate", "labels": None, "stop": "\n", "max_new_tokens": 3, "metric": "exact_match"}
    task = load_task(tmp_path, parity_rows(60), **changes)
    message = (
        rf"^`tokenizer` must have no tokens beyond the model's {number} embeddings, got '<extra>' \({number}\) in "
        rf"`examples\[0\]`\. {REMEDY}"
    )
    # Before any work, and not only in the run.
    with pytest.raises(ValueError, match=message):
        SievePruner(make_model(), tokenizer, task).plan(unhealed(pruning_ratio=0.5))
    if kind == "labels" or where == "prompt":
        metric = "accuracy" if kind == "labels" else "exact_match"
        with pytest.raises(ValueError, match=message):
            evaluate(make_model(), task.examples("test", tokenizer), tokenizer, **{**OPTIONS, "metric": metric})
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    assert SievePruner(model, tokenizer, task).plan(unhealed(pruning_ratio=0.5)).num_targets


def test_an_encoder_decoder_checks_its_input_too(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)).eval()
    tokenizer.add_tokens(["<extra>"])
    task = load_task(tmp_path, parity_rows(60), prompt="<extra> {{ text }} is")
    with pytest.raises(ValueError, match=r"`tokenizer` must have .* got '<extra>' \(\d+\) in `examples\[0\]`"):
        evaluate(model, task.examples("test", tokenizer), tokenizer, **OPTIONS)


def test_a_classifier_whose_own_padding_token_has_no_embedding(task: Task) -> None:
    """It finds the last token of a row by this id, so another one would give other results."""
    tokenizer = with_padding()
    model = make_tiny_model("bert", vocab_size=len(make_tokenizer()), num_labels=2)
    model.config.id2label, model.config.label2id = {0: "even", 1: "odd"}, {"even": 0, "odd": 1}
    model.config.pad_token_id = tokenizer.pad_token_id
    message = rf"got the padding token {tokenizer.pad_token_id} of its configuration\. {REMEDY}"
    with pytest.raises(ValueError, match=message):
        evaluate(model, task.examples("test", tokenizer), tokenizer, **OPTIONS)


@pytest.mark.parametrize("number", [-1, 10**9])
def test_padding_ids_that_no_model_has(number: int, task: Task) -> None:
    model = make_model()
    model.config.pad_token_id = number
    tokenizer = make_tokenizer()
    found = evaluate(model, task.examples("test", tokenizer), tokenizer, **OPTIONS)
    assert re.fullmatch(r"[0-9a-f]{64}", found.fingerprint)
