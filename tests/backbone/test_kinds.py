"""Encoder-decoders and sequence classifiers are scored, pruned and saved as causal language models are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from model_kinds import MODELS, make_model
from toy import load_task, make_tokenizer, unhealed
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from optimum_sieve import SievePruner, evaluate
from optimum_sieve.backbone.kinds import InputFormat, input_format
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.calibration.collect import collect_moments
from optimum_sieve.calibration.losses import calibration_loss
from optimum_sieve.evaluation.batches import log_likelihoods, make_batches


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Example, Task


def is_classifier(name: str) -> bool:
    return MODELS[name][0].endswith("Classification")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return load_task(tmp_path)


@pytest.fixture
def examples(task: Task) -> list[Example]:
    return list(task.examples("test", make_tokenizer()))


def score(model: PreTrainedModel, examples: list[Example], batch_size: int = 5) -> torch.Tensor:
    tokenizer = make_tokenizer(after="</s>")
    batches = make_batches(examples, tokenizer, batch_size=batch_size, inputs=input_format(model))
    rows = [(i, row) for batch in batches for i, row in zip(batch.indices, log_likelihoods(model, batch), strict=True)]
    return torch.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])])


def score_alone(model: PreTrainedModel, example: Example) -> torch.Tensor:
    """Score the candidates of one example by the model's own way, without batches or padding."""
    tokenizer = make_tokenizer(after="</s>")
    ids = tokenizer(example.prompt, return_tensors="pt").input_ids
    if type(model).__name__.endswith("Classification"):
        return model(ids).logits[0].log_softmax(-1)[[model.config.label2id[c.strip()] for c in example.candidates]]
    sums = []
    for candidate in example.candidates:
        target = tokenizer(candidate, add_special_tokens=False).input_ids
        decoder = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
        log_probs = model(input_ids=ids, decoder_input_ids=decoder).logits[0].log_softmax(-1)
        sums.append(log_probs[range(len(target)), target].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_batches_score_what_the_model_scores_alone(name: str, examples: list[Example]) -> None:
    model = make_model(name)
    expected = torch.stack([score_alone(model, example) for example in examples[:8]])
    torch.testing.assert_close(score(model, examples[:8]), expected, rtol=1e-4, atol=1e-4)
    # Otherwise anything would pass.
    assert expected.std(dim=0).max() > 0.1


@torch.no_grad()
def test_answers_of_several_tokens_go_through_the_decoder(tmp_path: Path) -> None:
    task = load_task(tmp_path, labels={"odd": " very odd", "even": " even : odd"})
    examples = list(task.examples("test", make_tokenizer()))[:6]
    model = make_model("t5")
    expected = torch.stack([score_alone(model, example) for example in examples])
    torch.testing.assert_close(score(model, examples), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart", "bert"])
def test_moments_do_not_depend_on_padding(name: str, examples: list[Example]) -> None:
    model = make_model(name)
    targets = find_targets(model)

    def moments(batch_size: int) -> dict[str, dict[str, torch.Tensor]]:
        loss, by_candidate = calibration_loss("fisher", examples, 0)
        batches = make_batches(
            examples, make_tokenizer(after="</s>"), batch_size=batch_size, candidates=by_candidate,
            inputs=input_format(model),
        )  # fmt: skip
        found = collect_moments(model, targets, batches, loss, num_examples=len(examples))
        return {name: each.tensors() for name, each in found.items()}

    single, padded = moments(1), moments(16)
    for layer, tensors in single.items():
        for key, tensor in tensors.items():
            scale = max(float(tensor.abs().max()), 1e-6)
            torch.testing.assert_close(
                padded[layer][key] / scale, tensor / scale, rtol=0, atol=1e-3, msg=f"{layer} {key}"
            )


@pytest.mark.parametrize("name", MODELS)
def test_pruned_saved_and_loaded_by_plain_transformers(name: str, task: Task, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(after="</s>")
    pruner = SievePruner(make_model(name), tokenizer, task)
    config = unhealed(pruning_ratio=0.4, rank_multiple=1, batch_size=16, rounds=1)
    result = pruner.prune(config, progress=False)
    assert result.report["parameters"]["targets_after"] <= 0.6 * result.report["parameters"]["targets_before"]
    directory = pruner.save_pretrained(tmp_path / "pruned")
    auto_class = AutoModelForSequenceClassification if is_classifier(name) else AutoModelForSeq2SeqLM
    loaded = auto_class.from_pretrained(directory)
    assert type(loaded).__name__ == f"Sieve{MODELS[name][0]}"
    examples = task.examples("test", tokenizer)
    found = evaluate(loaded, examples, tokenizer, metric="accuracy", batch_size=8, progress=False)
    assert found.score == result.report["pruned"]["score"]
    assert auto_class.__name__ in (directory / "README.md").read_text()
    with pytest.raises(ValueError, match=r"`model` must .*pruned already"):
        SievePruner.from_pretrained(directory, task=task)


@pytest.mark.parametrize("allocation", ["energy", "genetic"])
def test_classifiers_are_pruned_within_a_tolerance(allocation: str, task: Task) -> None:
    pruner = SievePruner(make_model("bert"), make_tokenizer(after="</s>"), task)
    config = unhealed(
        tolerance=0.4,
        confidence=0.6,
        allocation=allocation,
        rank_multiple=2,
        rounds=1,
        generations=3,
        search_fraction=0.5,
    )
    report = pruner.prune(config, progress=False).report
    assert report["parameters"]["targets_after"] < report["parameters"]["targets_before"]


def test_dense_classifiers_load_from_a_directory(task: Task, tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path / "model")
    make_tokenizer(after="</s>").save_pretrained(tmp_path / "model")
    assert type(SievePruner.from_pretrained(tmp_path / "model", task=task).model).__name__ == MODELS["bert"][0]


def test_labels_are_found_by_name_or_by_place() -> None:
    named = InputFormat(kind="classification", label_ids={"even": 0, "odd": 1})
    assert named.classes([" odd", " even"]) == [1, 0]
    unnamed = InputFormat(kind="classification", label_ids={"LABEL_0": 0, "LABEL_1": 1})
    assert unnamed.classes([" odd", " even"]) == [0, 1]
    with pytest.raises(ValueError, match="`labels` must be the model's own, 'even', 'odd', got 'good', 'bad'"):
        named.classes(["good", "bad"])
    with pytest.raises(ValueError, match="`labels`"):
        unnamed.classes(["a", "b", "c"])


def test_regressions_are_refused(task: Task) -> None:
    labels = {"id2label": {0: "value"}, "label2id": {"value": 0}}
    with pytest.raises(ValueError, match=r"`model` must .*at least two labels"):
        SievePruner(make_model("bert", **labels), make_tokenizer(), task)


def test_texts_longer_than_a_classifier_takes_are_refused(task: Task) -> None:
    pruner = SievePruner(make_model("roberta", max_position_embeddings=6), make_tokenizer(after="</s>"), task)
    with pytest.raises(ValueError, match="`examples` must fit in the 5 tokens"):
        pruner.plan(unhealed(pruning_ratio=0.5))
