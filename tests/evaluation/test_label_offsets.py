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

from optimum_sieve import HealConfig, SievePruner, evaluate
from optimum_sieve.evaluation import stage
from optimum_sieve.evaluation.likelihoods import fit_offsets
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


def drawn_log_probs(labels: int) -> Any:
    scores = np.random.default_rng(0).normal(size=(200, labels)) * 2 + np.arange(labels)
    return np.log(softmax(scores))


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.9, 0.1], [0.2, 0.3, 0.5]])
def test_many_counts_give_every_label_its_share(shares: list[float]) -> None:
    log_probs = drawn_log_probs(len(shares))
    offsets = fit_offsets(log_probs, 1e8 * np.array(shares))
    assert softmax(log_probs + offsets).mean(axis=0) == pytest.approx(shares, abs=1e-5)
    assert offsets.mean() == pytest.approx(0)


def test_no_other_offsets_fit_better() -> None:
    log_probs, counts = drawn_log_probs(3), np.array([40.0, 0.0, 60.0])
    offsets = fit_offsets(log_probs, counts)

    def fit(offsets: Any) -> float:
        return float(counts @ np.log(softmax(log_probs + offsets).mean(axis=0)) - offsets @ offsets / 2)

    best, rng = fit(offsets), np.random.default_rng(0)
    assert best > fit(np.zeros(3)) + 1
    for scale in (1e-3, 0.1, 1.0):
        for _ in range(20):
            moved = offsets + scale * rng.normal(size=3)
            assert fit(moved - moved.mean()) < best


def test_fewer_counts_move_the_offsets_less() -> None:
    """The same shares, farther from the model's than any of these numbers of examples shows by chance."""
    log_probs = drawn_log_probs(2)
    sizes = [float(np.abs(fit_offsets(log_probs, count * np.array([0.6, 0.4]))).max()) for count in (4, 32, 256, 10**6)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.4 * sizes[-1]
    assert sizes[2] > 0.9 * sizes[-1]


def test_certain_predictions_get_finite_offsets() -> None:
    offsets = fit_offsets(np.array([[0.0, -800.0]] * 5), np.array([5.0, 5.0]))
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
    gold = np.bincount([example.target for example in split(task, "calibration")], minlength=2)
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
    gold = np.bincount([example.target for example in split(task, "calibration")], minlength=2)
    selection = evaluate(result.model, split(task, "selection"), TOKENIZER, metric="accuracy", batch_size=16,
                         progress=False)  # fmt: skip
    offsets = np.array(entry["offsets"])
    assert np.abs(offsets).max() > 0.01
    assert fit_offsets(selection.log_probs - offsets, gold.astype(float)) == pytest.approx(offsets, abs=1e-4)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("heal", [None, HealConfig(steps=16, learning_rate=3e-3)])
def test_they_are_fitted_to_the_scores_that_accepted_the_size(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heal: HealConfig | None, stored: bool
) -> None:
    scored: list[str] = []

    def recording(*args: Any, **options: Any) -> Any:
        scored.append(options["description"])
        return evaluate(*args, **options)

    monkeypatch.setattr(stage, "evaluate", recording)

    def offsets(model: Any, work_dir: Path | None, **settings: Any) -> Any:
        scored.clear()
        pruner = SievePruner(copy.deepcopy(model), TOKENIZER, task)
        config = unhealed(rank_multiple=1, rounds=1, search_steps=2, label_offsets="prior", **settings)
        result = pruner.prune(config, work_dir=work_dir, progress=False)
        assert (result.report.get("healing", {}).get("kept") is not None) == (heal is not None)
        return result.report["label_offsets"]

    dense = learn(task)
    work = tmp_path / "work" if stored else None
    found = offsets(dense, work, tolerance=0.1, heal=heal)
    assert scored.count("pruned model on test") == 1
    # Without healing, sizes are compared before their layers are stored as they are saved.
    assert scored.count("pruned model on selection") == (1 if heal is None else 0)
    assert np.abs(found[0]["offsets"]).max() > 0
    again = offsets(dense, work, tolerance=0.1, heal=heal)
    assert again[0]["offsets"] == pytest.approx(found[0]["offsets"], abs=1e-6)


def test_only_the_same_candidates_get_them(task: Task) -> None:
    stored = {"label_offsets": [{"candidates": [" even", " odd"], "offsets": [0.5, -0.5]}]}
    model = SimpleNamespace(config=SimpleNamespace(sieve=stored))
    first, second, third, *_ = split(task, "test")
    same, others = replace(first, candidates=(" even", " odd")), replace(second, candidates=(" odd", " even"))
    more = replace(third, candidates=(" even", " odd", " very"))
    assert stored_offsets(model, [same, others]).tolist() == [[0.5, -0.5], [0, 0]]
    # Each by its own candidates, as in `predict`.
    assert stored_offsets(model, [more, same]).tolist() == [[0, 0, 0], [0.5, -0.5, 0]]
    assert shared_candidates([same, others]) == ()
    assert stored_offsets(object(), [same]).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    "stored", [3, [{"candidates": [" a"], "offsets": []}], [{"candidates": [" a"], "offsets": ["1"]}]]
)
def test_damaged_offsets_are_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match=r"`label_offsets` in the `sieve` block of .* must be a list of objects"):
        check_block({"label_offsets": stored})
    check_block({"label_offsets": [{"candidates": [" a", " b"], "offsets": [0.5, -0.5]}]})
