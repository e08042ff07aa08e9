"""The dense model's own answers for gold: for calibration, and for data without labels."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy import VOCABULARY, load_task, make_model, make_tokenizer, parity_rows, unhealed, write_task

from optimum_sieve import SievePruner, evaluate
from optimum_sieve.evaluation.generation import write_answers
from optimum_sieve.evaluation.labelling import label_by_model


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.tasks import Example, Task

LABELS: dict[str, Any] = {}
CHOICES: dict[str, Any] = {
    "kind": "choices",
    "labels": None,
    "choices": ["odd", "very {{ text }}", "even"],
    "candidate": " {{ choice }}",
    "answer": "{{ label }}",
}
WRITTEN: dict[str, Any] = {"kind": "generate", "labels": None, "max_new_tokens": 4}
KINDS = {"labels": LABELS, "choices": CHOICES, "generate": WRITTEN}
METRICS = {"labels": "accuracy", "choices": "accuracy", "generate": "exact_match"}


def labelled(examples: list[Example], **options: Any) -> list[Example]:
    given = {"batch_size": 8, "progress": False, **options}
    return label_by_model(make_model(), examples, make_tokenizer(), **given)


def examples_of(task: Task) -> list[Example]:
    return task.examples("test", make_tokenizer())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_answers", [True, False])
def test_the_model_is_right_on_its_own_answers(kind: str, has_answers: bool, tmp_path: Path) -> None:
    task = load_task(tmp_path, **KINDS[kind] | ({} if has_answers else {"answer": None}))
    assert task.labelled == has_answers
    examples = labelled(examples_of(task))
    found = evaluate(make_model(), examples, make_tokenizer(), metric=METRICS[kind], batch_size=5, progress=False)
    assert found.score == 1.0
    assert found.majority_score < 1
    # Any other model is not.
    other = evaluate(make_model(1), examples, make_tokenizer(), metric=METRICS[kind], batch_size=5, progress=False)
    assert other.score < 1


def test_written_answers_end_where_the_model_ended_them(tmp_path: Path) -> None:
    examples = examples_of(load_task(tmp_path, **WRITTEN))
    word = write_answers(make_model(), examples, make_tokenizer(), batch_size=8)[0].text.split()[1]
    task = load_task(tmp_path, **WRITTEN, stop=word)
    whole = labelled(examples_of(load_task(tmp_path, **WRITTEN)))
    written = write_answers(make_model(), whole, make_tokenizer(), batch_size=8)
    assert [example.answer.endswith("</s>") for example in whole] == [one.ended for one in written]
    for cut, long in zip(labelled(examples_of(task)), whole, strict=True):
        (text,) = cut.accepted
        if word in long.accepted[0]:
            assert cut.answer in (f" {text}{word}", word)
        else:
            assert cut.answer.removesuffix(word) == long.answer.removesuffix("</s>")


def test_an_answer_of_which_nothing_can_be_read_ends_at_once(tmp_path: Path) -> None:
    example = examples_of(load_task(tmp_path, **WRITTEN | {"max_new_tokens": 1}))[0]
    model = make_model()
    with torch.no_grad():
        # Whatever is read, the unknown token is the likeliest, which is not shown.
        model.lm_head.weight.zero_()
    (found,) = label_by_model(model, [example], make_tokenizer(), batch_size=1, progress=False)
    assert (found.accepted, found.answer) == (("",), "</s>")


def test_drawn_candidates_follow_the_models_distribution(tmp_path: Path) -> None:
    examples = examples_of(load_task(tmp_path))[:2]
    dense = evaluate(make_model(), examples, make_tokenizer(), metric="accuracy", batch_size=8, progress=False)
    drawn = np.array([[e.target for e in labelled(examples, seed=seed)] for seed in range(400)])
    probability = np.exp(dense.log_probs[:, 1])
    np.testing.assert_allclose(drawn.mean(axis=0), probability, atol=4 * 0.5 / np.sqrt(400))
    assert probability.min() > 0.02


@torch.no_grad()
def test_drawn_texts_follow_the_models_distribution_in_any_batch(tmp_path: Path) -> None:
    task = load_task(tmp_path, **WRITTEN | {"max_new_tokens": 1})
    example, model, tokenizer = examples_of(task)[0], make_model(initializer_range=0.1), make_tokenizer()
    written = write_answers(model, [example] * 2000, tokenizer, batch_size=500, seed=0)
    probability = model(**tokenizer(example.prompt, return_tensors="pt")).logits[0, -1].softmax(-1).numpy()
    counts = Counter(one.text for one in written)
    for token in np.argsort(-probability)[:5]:
        if VOCABULARY[token] not in ("<unk>", "<s>", "</s>"):
            expected = probability[token]
            error = np.sqrt(expected * (1 - expected) / 2000)
            assert counts[VOCABULARY[token]] / 2000 == pytest.approx(expected, abs=float(4 * error))
    assert write_answers(model, [example] * 50, tokenizer, batch_size=7, seed=0) == written[:50]


def pruned_weights(task: Task, directory: Path, **settings: Any) -> dict[str, torch.Tensor]:
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    config = unhealed(**{"pruning_ratio": 0.5, "rank_multiple": 1, **settings})
    pruner.prune(config, progress=False)
    pruner.save_pretrained(directory, overwrite=True)
    return load_file(directory / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_on_the_models_answers_does_not_look_at_the_datas(kind: str, tmp_path: Path) -> None:
    rows = parity_rows(40)
    swapped = [{**row, "label": "odd" if row["label"] == "even" else "even"} for row in rows]
    settings = {"loss": "answer" if kind == "generate" else "labels", "storage": "factors"}

    def weights(rows: list[dict[str, str]], source: str) -> dict[str, torch.Tensor]:
        task = load_task(tmp_path, rows, **KINDS[kind])
        return pruned_weights(task, tmp_path / "out", label_source=source, **settings)

    model = weights(rows, "model")
    assert same(weights(swapped, "model"), model)
    assert same(weights(swapped, "sampled"), weights(rows, "sampled"))
    data = weights(rows, "data")
    assert not same(data, model)
    assert not same(weights(swapped, "data"), data)


@pytest.mark.parametrize("loss", ["labels", "answer"])
def test_calibration_on_the_models_answers_is_that_on_data_that_holds_them(loss: str, tmp_path: Path) -> None:
    rows = parity_rows(40)
    task = load_task(tmp_path, rows)
    settings = {"loss": loss, "storage": "factors"}
    model = pruned_weights(task, tmp_path / "out", label_source="model", **settings)
    found = {
        example.prompt: example.answer.strip()
        for split in task.splits
        for example in labelled(task.examples(split, make_tokenizer()))
    }
    held = [{**row, "label": found[f"Number: {row['text']} Parity:"]} for row in rows]
    assert held != rows
    assert same(pruned_weights(load_task(tmp_path, held), tmp_path / "out", **settings), model)


@pytest.mark.parametrize(
    ("kind", "allocation"),
    [("labels", "energy"), ("labels", "genetic"), ("choices", "genetic"), ("generate", "energy")],
)
def test_data_without_labels_prunes_to_agree_with_the_dense_model(kind: str, allocation: str, tmp_path: Path) -> None:
    rows = [{"text": row["text"]} for row in parity_rows(80)]
    task = load_task(tmp_path, rows, **KINDS[kind] | {"answer": None})
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    config = unhealed(
        tolerance=0.6, confidence=0.5, allocation=allocation, label_source="model", rank_multiple=1,
        generations=2, search_fraction=0.5,
    )  # fmt: skip
    report = pruner.prune(config, progress=False).report
    assert report["dense"] == {"score": 1.0, "standard_error": 0.0}
    assert report["pruned"]["score"] == pytest.approx(report["agreement"])
    assert report["references"] == "dense model"
    assert "against the dense model's own answers" in (pruner.save_pretrained(tmp_path / "o") / "README.md").read_text()


def test_reports_of_labelled_data_say_nothing_of_references(tmp_path: Path) -> None:
    pruner = SievePruner(make_model(), make_tokenizer(), load_task(tmp_path))
    result = pruner.prune(unhealed(pruning_ratio=0.5, label_source="model"), progress=False)
    assert "references" not in result.report


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_labels_needs_the_models(kind: str, tmp_path: Path) -> None:
    pruner = SievePruner(make_model(), make_tokenizer(), load_task(tmp_path, **KINDS[kind] | {"answer": None}))
    with pytest.raises(ValueError, match="`answer` must be given in the task file where label_source='data', got none"):
        pruner.plan(unhealed(pruning_ratio=0.5))


def test_other_sources_of_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="`label_source` must be one of 'data', 'model', 'sampled', got 'teacher'"):
        unhealed(pruning_ratio=0.5, label_source="teacher")


def test_the_command_line_scores_a_model_against_anothers_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from optimum.commands.optimum_cli import main

    for seed, name in enumerate(("dense", "other")):
        make_model(seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    write_task(tmp_path, **WRITTEN | {"answer": None})
    monkeypatch.chdir(tmp_path)
    words = ["optimum-cli", "sieve", "evaluate", "--model", "other", "--task", "task.json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        main()
    assert "error: `answer` must be given in the task file, or `--compare-to`" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, "--compare-to", "dense", "--json", "scores.json"])
    main()
    assert "scored against the dense model's own answers" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["dense"]["score"] == 1.0
    assert scores["pruned"]["score"] == scores["agreement"] < 1
