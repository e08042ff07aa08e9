"""Tasks whose answers are written: evaluation, pruning end to end, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from model_kinds import make_model as make_kind
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed, write_task

from optimum_sieve import HealConfig, SievePruner, evaluate
from optimum_sieve.evaluation.comparison import compare
from optimum_sieve.evaluation.scores import Evaluation
from optimum_sieve.tasks import Task


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Example

WRITTEN: dict[str, Any] = {"kind": "generate", "labels": None, "max_new_tokens": 6}


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    return list(load_task(tmp_path, **WRITTEN).examples("test", make_tokenizer()))


def run(model: Any, examples: list[Example], metric: Any = "exact_match") -> Evaluation:
    return evaluate(model, examples, make_tokenizer(), metric=metric, batch_size=8, progress=False)


def test_evaluations_keep_the_texts_and_compare_them(examples: list[Example], tmp_path: Path) -> None:
    dense, other = run(make_model(), examples, "f1"), run(make_model(1), examples, "f1")
    assert len(set(dense.texts)) > 3
    assert dense.count == len(examples)
    dense.save(tmp_path / "dense.safetensors")
    loaded = Evaluation.load(tmp_path / "dense.safetensors")
    assert (loaded.texts, loaded.score, loaded.fingerprint) == (dense.texts, dense.score, dense.fingerprint)
    np.testing.assert_array_equal(loaded.values, dense.values)
    same, apart = compare(dense, loaded), compare(dense, other)
    assert (same.agreement, same.mean, same.kl) == (1.0, 0.0, None)
    assert apart.agreement < 1
    assert apart.kl is None
    assert apart.mean == pytest.approx(other.values.mean() - dense.values.mean())


def test_agreement_is_that_of_normalized_texts(examples: list[Example]) -> None:
    dense = run(make_model(), examples)
    shouted = replace(dense, texts=tuple(f"The {text.upper()}!" for text in dense.texts))
    assert compare(dense, shouted).agreement == 1.0


def test_a_metric_of_ones_own_scores_a_task(tmp_path: Path) -> None:
    def length(text: str, accepted: tuple[str, ...]) -> float:
        assert accepted in (("odd",), ("even",))
        return len(text.split())

    path = write_task(tmp_path, **WRITTEN, metric="f1")
    task = Task.from_file(path, metric=length)
    found = run(make_model(), task.examples("test", make_tokenizer()), task.metric)
    assert found.metric == "length"
    assert found.score == np.mean([len(text.split()) for text in found.texts])
    assert task.spec["metric"] == {"function": "length"}
    assert task.fingerprint() != Task.from_file(path).fingerprint()
    with pytest.raises(TypeError, match="`metric` must be a function of an answer and the accepted answers, got 'f1'"):
        Task.from_file(path, metric="f1")


def test_a_metric_of_ones_own_scores_labels_too(tmp_path: Path) -> None:
    task = Task.from_file(write_task(tmp_path), metric=lambda text, accepted: 2.0 * (text == accepted[0]))
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    report = pruner.prune(unhealed(pruning_ratio=0.3, rank_multiple=2), progress=False).report
    plain = run(pruner.model, load_task(tmp_path).examples("test", make_tokenizer()), "accuracy")
    assert report["pruned"]["score"] == 2 * plain.score
    assert report["majority_score"] == 2 * plain.majority_score
    assert report["metric"] == "<lambda>"
    saved = pruner.save_pretrained(tmp_path / "out")
    assert "`metric` was the function <lambda>" in (saved / "sieve.yaml").read_text()
    (stored,) = json.loads((saved / "sieve_task.json").read_text())["tasks"]
    # A prediction needs no metric.
    assert "metric" not in stored
    assert "sieve run" not in (saved / "README.md").read_text()


@pytest.fixture(scope="module")
def trained() -> PreTrainedModel:
    """A model that has learnt to write the parity of the last number."""
    tokenizer, model = make_tokenizer(), make_model(initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in range(150):
        rows = list(parity_rows(16, seed=step, length=1))
        ids = torch.tensor([tokenizer(f"Number: {r['text']} Parity: {r['label']}</s>").input_ids for r in rows])
        labels = ids.clone()
        labels[:, :3] = -100
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("allocation", ["energy", "uniform"])
def test_a_model_is_pruned_within_a_tolerance_of_what_it_writes(
    allocation: str, trained: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": str(i), "label": "odd" if i % 2 else "even"} for i in range(100)]
    task = load_task(tmp_path, rows, **WRITTEN)
    pruner = SievePruner(copy.deepcopy(trained), make_tokenizer(), task)
    config = unhealed(tolerance=0.1, confidence=0.5, allocation=allocation, rank_multiple=1)
    report = pruner.prune(config, work_dir=tmp_path / "work", progress=False).report
    assert "nothing to lose" not in caplog.text
    assert report["dense"]["score"] > 0.9
    assert report["majority_score"] < 0.7
    assert report["pruned"]["score"] > 0.75
    assert report["parameters"]["targets_after"] < 0.9 * report["parameters"]["targets_before"]
    assert 0.75 < report["agreement"] <= 1
    assert "kl" not in report
    directory = pruner.save_pretrained(tmp_path / "out")
    assert json.loads((directory / "sieve_report.json").read_text())["metric"] == "exact_match"
    card = (directory / "README.md").read_text()
    assert "max_new_tokens: 6" in card
    assert "Kullback" not in card
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert run(loaded, task.examples("test", make_tokenizer())).score == report["pruned"]["score"]


def test_what_a_model_writes_is_healed(trained: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": "odd" if i % 2 else "even"} for i in range(100)]
    task, scores = load_task(tmp_path, rows, **WRITTEN), []
    for heal in (None, HealConfig(steps=40, learning_rate=3e-2)):
        pruner = SievePruner(copy.deepcopy(trained), make_tokenizer(), task)
        config = unhealed(pruning_ratio=0.95, rank_multiple=1, rounds=1, heal=heal)
        scores.append(pruner.prune(config, progress=False).report["pruned"]["score"])
    assert scores[0] < 0.8 < scores[1]


def test_a_dense_model_with_nothing_to_lose_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pruner = SievePruner(make_model(), make_tokenizer(), load_task(tmp_path, **WRITTEN))
    with caplog.at_level(logging.WARNING):
        pruner.prune(unhealed(tolerance=0.1, search_steps=1, rank_multiple=2), progress=False)
    assert "there is nothing to lose" in caplog.text


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_are_pruned_on_what_they_write(name: str, tmp_path: Path) -> None:
    pruner = SievePruner(make_kind(name), make_tokenizer(after="</s>"), load_task(tmp_path, **WRITTEN, metric="rougeL"))
    report = pruner.prune(unhealed(pruning_ratio=0.4, rank_multiple=1), progress=False).report
    assert report["parameters"]["targets_after"] <= 0.6 * report["parameters"]["targets_before"]
    assert report["agreement"] < 1


def test_the_command_line_prunes_and_evaluates(
    trained: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from optimum.commands.optimum_cli import main

    trained.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": str(i), "label": "odd" if i % 2 else "even"} for i in range(100)]
    write_task(tmp_path, rows, **WRITTEN, metric="f1")
    monkeypatch.chdir(tmp_path)

    def sieve(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "sieve", *words, "--task", "task.json", "--device", "cpu"])
        main()
        return capsys.readouterr().out

    printed = sieve("prune", "--model", "model", "--pruning-ratio", "0.2", "--output", "out")
    assert "f1" in printed
    assert "KL" not in printed
    printed = sieve("evaluate", "--model", "out", "--compare-to", "model", "--json", "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["dense"]["score"] > 0.9
    assert "agreement" in scores
    assert "kl" not in scores


def test_a_prompt_must_leave_room_for_the_answer(tmp_path: Path) -> None:
    task = load_task(tmp_path, **WRITTEN | {"max_new_tokens": 61})
    message = r"`examples\[\d+\]` must leave room for an answer in the 64 tokens the model takes, got \d+ prompt tokens"
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    with pytest.raises(ValueError, match=message):
        pruner.plan(unhealed(pruning_ratio=0.5))
    with pytest.raises(ValueError, match=message):
        run(make_model(), task.examples("test", make_tokenizer()))


def test_gold_answers_longer_than_what_may_be_written_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = load_task(tmp_path, **WRITTEN | {"max_new_tokens": 2, "answer": "very very {{ label }}"})
    with caplog.at_level(logging.WARNING):
        SievePruner(make_model(), make_tokenizer(), task).plan(unhealed(pruning_ratio=0.5))
    assert "30 of 30 gold answers are longer than the 2 tokens of `max_new_tokens`, the longest has 4" in caplog.text


def test_classifiers_are_refused(tmp_path: Path) -> None:
    pruner = SievePruner(make_kind("bert"), make_tokenizer(), load_task(tmp_path, **WRITTEN))
    with pytest.raises(ValueError, match="`model` must be generative for a task of kind 'generate'"):
        pruner.plan(unhealed(pruning_ratio=0.5))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"answer": 3}, TypeError, r"`answer` must be a string or a list of strings, got 3. Put it in quotes"),
        (
            {"answer": "{{ text[:0] }} "},
            ValueError,
            r"`answer` must render to at least one text, none empty, got \[''\] in row \d+",
        ),
        (
            {"answer": "{{ [] if text else 1 }}"},
            ValueError,
            r"`answer` must render to at least one text, none empty, got \[\] in row",
        ),
        ({"answer": "{{ [none] if text else 1 }}"}, ValueError, r"`answer` must not hold a missing value"),
        ({"answer": "{{ lable }}"}, ValueError, r"`answer` must name fields of the data, got 'lable'"),
        ({"stop": 3}, TypeError, r"`stop` must be a string or a list of strings, got 3"),
        ({"stop": ["\n", ""]}, ValueError, r"`stop` must not hold empty strings"),
        ({"stop": "d"}, ValueError, r"`stop` must not occur in an answer, got 'd' in 'odd' in row \d+"),
        ({"max_new_tokens": None}, ValueError, r"`max_new_tokens` must be a whole number of at least 1, got None"),
        ({"max_new_tokens": True}, ValueError, r"`max_new_tokens` must be a whole number of at least 1, got True"),
        ({"max_new_tokens": 0}, ValueError, r"`max_new_tokens` must be a whole number of at least 1, got 0"),
        (
            {"metric": "numeric"},
            ValueError,
            r"`answer` must contain a number for the metric 'numeric', got '(odd|even)'",
        ),
        (
            {"metric": "entity_f1", "answer": ["{{ text }}", "b"]},
            ValueError,
            r"`answer` must render the whole list as one text for the metric 'entity_f1', got 2 texts",
        ),
        (
            {"metric": "accuracy"},
            ValueError,
            r"`metric` must be one of exact_match, f1, rougeL, .*Pass a custom metric in Python",
        ),
        ({"choices": "x"}, ValueError, r"`task` must have known keys only, got 'choices'"),
    ],
)
def test_bad_task_files(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_task(tmp_path, **WRITTEN | changes)
