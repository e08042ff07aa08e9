"""Moments of tasks with many candidates: a random part of them gives the Fisher information of all in the mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed

from optimum_sieve import SievePruner, Task
from optimum_sieve.calibration.sampled import PAIRS, CalibrationExamples, draw_candidates
from optimum_sieve.calibration.stage import calibration_examples
from optimum_sieve.evaluation.batches import make_batches
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.tasks import Example


if TYPE_CHECKING:
    from pathlib import Path

MANY = 40


def example(count: int = MANY, **changes: Any) -> Example:
    texts = tuple(f" {number}" for number in range(count))
    return Example(**{"prompt": "Number:", "answer": texts[0], "candidates": texts, "target": 0, **changes})


def many_task(directory: Path, count: int = MANY) -> Task:
    """Return a task whose label is one of `count` numbers, in two tokens."""
    rows = [{**row, "label": str(number % count)} for number, row in enumerate(parity_rows(90))]
    return load_task(directory, rows, labels={str(number): f" {number} very" for number in range(count)})


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_mean_over_draws_is_the_fisher_information_of_all_candidates(temperature: float) -> None:
    scores = 2 * np.random.default_rng(0).normal(size=MANY)
    p = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    names = {text: number for number, text in enumerate(example().candidates)}
    total, draws = np.zeros((MANY, MANY)), 20_000
    for seed in range(draws):
        fewer, direction = draw_candidates(example(), scores, seed=(0, seed), temperature=temperature)
        places = [names[text] for text in fewer.candidates]
        assert len(places) <= 2 * PAIRS
        total[np.ix_(places, places)] += np.outer(direction, direction)
    expected = np.diag(p) - np.outer(p, p)
    # The error of a mean over so many draws.
    np.testing.assert_allclose(total / draws, expected, atol=5 * expected.max() / draws**0.5)


def test_an_example_keeps_what_belongs_to_its_candidates() -> None:
    divisors = tuple(range(1, MANY + 1))
    fewer, direction = draw_candidates(example(normalized=divisors), np.zeros(MANY), seed=(0, 0))
    places = [int(text) for text in fewer.candidates]
    assert places == sorted(places)
    assert fewer.normalized == tuple(divisors[place] for place in places)
    assert np.count_nonzero(direction) == len(direction)
    assert direction.sum() == pytest.approx(0)
    again = draw_candidates(example(normalized=divisors), np.zeros(MANY), seed=(0, 0))
    assert again[0] == fewer
    assert draw_candidates(example(), np.zeros(MANY), seed=(0, 1))[0].candidates != fewer.candidates


def test_few_candidates_have_the_exact_root() -> None:
    scores = np.random.default_rng(1).normal(size=2)
    p = np.exp(scores) / np.exp(scores).sum()
    fewer, direction = draw_candidates(example(2, target=1), scores, seed=(0, 0))
    assert fewer == example(2, target=1)
    # With two candidates nothing is random.
    np.testing.assert_allclose(np.outer(direction, direction), np.diag(p) - np.outer(p, p), atol=1e-12)
    total = sum(
        np.outer(root, root)
        for seed in range(2000)
        for root in [draw_candidates(example(5), np.arange(5.0), seed=(0, seed))[1]]
    )
    p = np.exp(np.arange(5.0)) / np.exp(np.arange(5.0)).sum()
    np.testing.assert_allclose(total / 2000, np.diag(p) - np.outer(p, p), atol=0.02)


def test_a_sure_model_leaves_two_candidates_without_effect() -> None:
    scores = np.full(MANY, -1e3)
    scores[7] = 0.0
    fewer, direction = draw_candidates(example(), scores, seed=(0, 0))
    assert len(fewer.candidates) == 2
    assert direction.tolist() == [0.0, 0.0]


def moments(directory: Path, task: Task, **settings: Any) -> dict[str, Any]:
    config = unhealed(pruning_ratio=0.5, rounds=1, **settings)
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    pruner.prune(config, work_dir=directory, progress=False)
    (path,) = directory.glob("moments-*.safetensors")
    return load_file(path)


def test_moments_of_many_seeds_approach_those_of_all_candidates(tmp_path: Path, monkeypatch: Any) -> None:
    task = many_task(tmp_path)
    seeds = [moments(tmp_path / str(seed), task, seed=seed) for seed in range(8)]
    names = {path.name for path in tmp_path.glob("0/moments-*")}
    monkeypatch.setattr("optimum_sieve.calibration.sampled.PAIRS", MANY)
    whole = [moments(tmp_path / f"whole-{seed}", task, seed=seed) for seed in range(8)]

    def distance(first: Any, second: Any) -> float:
        pairs = [(np.mean([each[name] for each in first], 0), np.mean([each[name] for each in second], 0))
                 for name in first[0]]  # fmt: skip
        return float(np.mean([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]))

    assert names != {path.name for path in tmp_path.glob("whole-0/moments-*")}
    # The random signs of the loss over all candidates have a noise of their own.
    noise = distance(whole[:4], whole[4:])
    assert 0 < distance(seeds, whole) < 2 * noise


def test_few_of_the_tokens_are_computed(tmp_path: Path) -> None:
    task, tokenizer = many_task(tmp_path), make_tokenizer()
    examples = task.examples("calibration", tokenizer)
    fewer = [draw_candidates(each, np.zeros(MANY), seed=(0, number))[0] for number, each in enumerate(examples)]
    whole, part = (
        sum(batch.input_ids.numel() for batch in make_batches(each, tokenizer, batch_size=16))
        for each in (examples, fewer)
    )
    assert part < whole / 2


def drawn(task: Task, directory: Path, **settings: Any) -> CalibrationExamples:
    config = unhealed(pruning_ratio=0.5, **settings)
    options: dict[str, Any] = {"work_dir": directory, "study_storage": None, "progress": False}
    run = prepare(make_model(), make_tokenizer(), [task], config, **options)
    assert run.by_block == ("memory_limit" in settings)
    return calibration_examples(run, run.tasks[0])


def test_blocks_one_at_a_time_draw_the_same(tmp_path: Path) -> None:
    task = many_task(tmp_path)
    limit = SievePruner(make_model(), make_tokenizer(), task).plan(unhealed(pruning_ratio=0.5)).whole_bytes - 1
    whole, blocks = drawn(task, tmp_path / "whole"), drawn(task, tmp_path / "blocks", memory_limit=limit)
    assert whole.examples == blocks.examples
    assert whole.directions is not None
    assert blocks.directions is not None
    for one, other in zip(whole.directions, blocks.directions, strict=True):
        np.testing.assert_array_equal(one, other)
    assert max(len(each.candidates) for each in whole.examples) <= 2 * PAIRS < MANY


def test_every_process_takes_the_scores_of_the_first(tmp_path: Path, monkeypatch: Any) -> None:
    task = many_task(tmp_path)
    alone = drawn(task, tmp_path / "one")
    # Another process, whose own scores differ.
    flat = np.zeros((len(alone.examples), MANY))

    def agree(value: Any) -> Any:
        return flat if isinstance(value, np.ndarray) else value

    monkeypatch.setattr("optimum_sieve.run.distributed.agree", agree)
    assert drawn(task, tmp_path / "two").examples != alone.examples


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({}, {str(number): f" {number}" for number in range(MANY)}),
        ({"loss": "labels"}, None),
        ({"projection": "activation"}, None),
    ],
)
def test_nothing_is_drawn_where_it_saves_nothing_or_counts_otherwise(
    tmp_path: Path, settings: dict[str, Any], labels: dict[str, str] | None
) -> None:
    task = many_task(tmp_path)
    if labels:
        # One token each, which the model predicts after the prompt.
        task = load_task(tmp_path, [{**row, "label": row["text"].split()[-1]} for row in parity_rows(90)],
                         labels={str(number): f" {number}" for number in range(100)})  # fmt: skip
    assert drawn(task, tmp_path / "work", **settings).directions is None


def test_few_candidates_are_all_computed(tmp_path: Path, monkeypatch: Any) -> None:
    task = many_task(tmp_path, 2 * PAIRS)
    found = moments(tmp_path / "one", task)
    monkeypatch.setattr("optimum_sieve.calibration.sampled.PAIRS", MANY)
    whole = moments(tmp_path / "two", task)
    for name, values in found.items():
        np.testing.assert_array_equal(values, whole[name])
    (one,), (two,) = ([path.name for path in (tmp_path / part).glob("moments-*")] for part in ("one", "two"))
    # Work directories of earlier versions stay valid.
    assert one == two
