"""Label offsets: the labels keep their shares, on prompts alone, and travel with the model."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from healed_world import TOKENIZER, learn, split
from toy import load_task, parity_rows, unhealed
from transformers import AutoModelForCausalLM

from optimum_sieve import SievePruner, evaluate
from optimum_sieve.evaluation.likelihoods import match_prior
from optimum_sieve.modeling.block import check_block
from optimum_sieve.modeling.label_offsets import shared_candidates, stored_offsets
from optimum_sieve.pipeline.heal import heal_pruned


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.tasks import Task

FAR: dict[str, Any] = {"pruning_ratio": 0.97, "rank_multiple": 1, "rounds": 1, "label_offsets": "prior"}


def softmax(scores: Any) -> Any:
    return np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(600))


@pytest.mark.parametrize("prior", [[0.5, 0.5], [0.9, 0.1], [0.2, 0.3, 0.5]])
def test_the_mean_probability_of_every_label_is_its_prior(prior: list[float]) -> None:
    scores = np.random.default_rng(0).normal(size=(200, len(prior))) * 2 + np.arange(len(prior))
    log_probs = np.log(softmax(scores))
    offsets = match_prior(log_probs, np.array(prior))
    assert softmax(log_probs + offsets).mean(axis=0) == pytest.approx(prior, abs=1e-5)
    assert offsets.mean() == pytest.approx(0)


def test_certain_predictions_get_finite_offsets() -> None:
    offsets = match_prior(np.array([[0.0, -800.0]] * 5), np.array([0.5, 0.5]))
    assert np.isfinite(offsets).all()


def test_scores_have_the_offsets_before_saving_and_after_loading(task: Task, tmp_path: Path) -> None:
    dense = learn(task)
    with_offsets, without = (
        SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(unhealed(**settings), progress=False)
        for settings in (FAR, {**FAR, "label_offsets": "none"})
    )
    (entry,) = with_offsets.report["label_offsets"]
    assert entry["candidates"] == list(task.examples("test", TOKENIZER)[0].candidates)
    assert "label_offsets" not in without.report
    assert "label_offsets" not in without.model.config.sieve
    shares = [result.scores[0].pruned.log_probs for result in (with_offsets, without)]
    gold = np.bincount([example.target for example in split(task, "calibration")], minlength=2) + 1
    errors = [abs(np.exp(log_probs).mean(axis=0)[0] - gold[0] / gold.sum()) for log_probs in shares]
    assert errors[0] < errors[1]
    assert with_offsets.scores[0].pruned.log_probs == pytest.approx(
        np.log(softmax(without.scores[0].pruned.log_probs + np.array(entry["offsets"])))
    )

    pruner = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    pruner.prune(unhealed(**FAR), progress=False)
    directory = pruner.save_pretrained(tmp_path / "out")
    assert 'model.config.sieve["label_offsets"]' in (directory / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    found = evaluate(loaded, split(task, "test"), TOKENIZER, metric="accuracy", batch_size=16, progress=False)
    assert found.log_probs == pytest.approx(with_offsets.scores[0].pruned.log_probs, abs=1e-5)
    assert found.score == with_offsets.report["pruned"]["score"]


def test_the_offsets_of_healed_weights_replace_those_before(task: Task, tmp_path: Path) -> None:
    from optimum_sieve import HealConfig

    dense = learn(task)
    dense.save_pretrained(tmp_path / "dense")
    TOKENIZER.save_pretrained(tmp_path / "dense")
    pruner = SievePruner.from_pretrained(tmp_path / "dense", task=task)
    pruner.prune(unhealed(**FAR), progress=False)
    directory = pruner.save_pretrained(tmp_path / "pruned")
    result, _ = heal_pruned(directory, tmp_path / "dense", [task], HealConfig(steps=8, learning_rate=3e-2),
                            progress=False)  # fmt: skip
    (entry,) = result.model.config.sieve["label_offsets"]
    gold = np.bincount([example.target for example in split(task, "calibration")], minlength=2) + 1
    selection = evaluate(result.model, split(task, "selection"), TOKENIZER, metric="accuracy", batch_size=16,
                         progress=False)  # fmt: skip
    assert np.exp(selection.log_probs).mean(axis=0) == pytest.approx(gold / gold.sum(), abs=1e-4)
    assert np.isfinite(entry["offsets"]).all()


def test_only_the_same_candidates_get_them(task: Task) -> None:
    stored = {"label_offsets": [{"candidates": [" even", " odd"], "offsets": [0.5, -0.5]}]}
    model = SimpleNamespace(config=SimpleNamespace(sieve=stored))
    examples = [replace(example, candidates=(" even", " odd")) for example in split(task, "test")]
    assert stored_offsets(model, examples).tolist() == [0.5, -0.5]
    assert stored_offsets(model, [replace(example, candidates=(" odd", " even")) for example in examples]).tolist() == [
        0
    ]
    mixed = [*examples[:1], replace(examples[1], candidates=(" odd", " even"))]
    assert (shared_candidates(mixed), stored_offsets(model, mixed).tolist()) == ((), [0])
    assert stored_offsets(object(), examples).tolist() == [0]


@pytest.mark.parametrize(
    "stored", [3, [{"candidates": [" a"], "offsets": []}], [{"candidates": [" a"], "offsets": ["1"]}]]
)
def test_damaged_offsets_are_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match=r"`label_offsets` in the `sieve` block of .* must be a list of objects"):
        check_block({"label_offsets": stored})
    check_block({"label_offsets": [{"candidates": [" a", " b"], "offsets": [0.5, -0.5]}]})
