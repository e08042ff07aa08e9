"""With a tolerance, the model without the other tokens is scored before any pruning, and the vocabulary grows."""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from healed_world import learn
from tiny_models import make_tiny_model
from toy import unhealed, write_rows
from vocabulary_world import BAD, GOOD, THINGS, byte_level

from optimum_sieve import SievePruner, compare, evaluate
from optimum_sieve.allocation.tolerance import ToleranceError
from optimum_sieve.publish.table import format_table
from optimum_sieve.tasks import Task
from optimum_sieve.vocabulary import stage, task_vocabulary
from optimum_sieve.vocabulary.closure import needed_tokens


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.evaluation.comparison import Comparison
    from optimum_sieve.evaluation.scores import Evaluation

QUIET = {"progress": False}
SETTINGS: dict[str, Any] = {"vocabulary": "task", "rank_multiple": 1, "rounds": 1, "search_steps": 2, "confidence": 0.5}
SIZE = 960


def write_task(directory: Path, words: dict[str, slice], count: int = 40, name: str = "reviews") -> Task:
    """Write reviews whose splits judge with words of their own."""
    for seed, (split, part) in enumerate(words.items()):
        rng, found = random.Random(seed), dict[str, str]()
        while len(found) < count:
            label = rng.choice(["good", "bad"])
            word = rng.choice((GOOD if label == "good" else BAD)[part])
            found[f"The {rng.choice(THINGS)} of {100 * seed + rng.randrange(100)} is {word}."] = label
        rows = [{"text": text, "label": label} for text, label in found.items()]
        write_rows(directory / f"{name}-{split}.jsonl", rows)
    spec = {
        "name": name,
        "kind": "labels",
        "data": {"files": {split: f"{name}-{split}.jsonl" for split in words}},
        "prompt": "Review: {{ text }}\nSentiment:",
        "answer": "{{ label }}",
        "labels": {"good": " good", "bad": " bad"},
    }
    return Task.from_dict(spec, directory)


def every(calibration: slice, other: slice) -> dict[str, slice]:
    return {"calibration": calibration, "selection": other, "test": other}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Make a model that knows the words of all splits."""
    task = write_task(tmp_path_factory.mktemp("learned"), every(slice(None), slice(None)), 200)
    model = make_tiny_model("llama", vocab_size=SIZE, initializer_range=0.05, max_position_embeddings=128)
    return learn(task, model, tokenizer=byte_level(), steps=120)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Make a task whose new texts judge with words that calibration lacks."""
    return write_task(tmp_path, every(slice(2), slice(2, None)))


def score(model: PreTrainedModel, tokenizer: Any, task: Task, split: str = "selection") -> Evaluation:
    return evaluate(model, task.examples(split, tokenizer), tokenizer, metric="accuracy", batch_size=32, **QUIET)


def prune(dense: PreTrainedModel, *tasks: Task, work_dir: Path | None = None, **settings: Any) -> SievePruner:
    pruner = SievePruner(copy.deepcopy(dense), byte_level(), tasks, base_model="toy/base")
    pruner.prune(unhealed(**{"tolerance": 0.2, **SETTINGS, **settings}), work_dir=work_dir, **QUIET)
    return pruner


def cut_loss(dense: PreTrainedModel, task: Task, size: int | None = None) -> Comparison:
    """Compare the model without the other tokens, and without any pruning, with the dense one."""
    model, tokenizer = copy.deepcopy(dense), byte_level()
    vocabulary = task_vocabulary(model, tokenizer, task.examples("calibration", tokenizer), size=size)
    vocabulary.apply()
    return compare(score(dense, tokenizer, task), score(model, vocabulary.tokenizer, task))


def test_the_vocabulary_grows_until_its_own_loss_is_half_of_the_tolerance(dense: PreTrainedModel, task: Task) -> None:
    pruner = prune(dense, task)
    report = pruner.result.report
    first, *_, last = report["vocabulary"]["trials"]
    # The tokens of calibration alone lose many points on new words, although nothing is pruned yet.
    # A batch may hold another number of rows, whose products round otherwise.
    cut = cut_loss(dense, task).to_dict()
    assert first == pytest.approx({"tokens": first["tokens"], "lower_bound": first["mean"], **cut}, rel=1e-6)
    assert first["mean"] < -0.3
    assert last["tokens"] == report["vocabulary"]["after"] == len(pruner.tokenizer) > first["tokens"]
    assert last["mean"] == cut_loss(dense, task, last["tokens"]).mean >= -0.1
    assert pruner.model.config.sieve["vocabulary"] == {"before": SIZE, "after": last["tokens"]}
    # The search for the size starts from the model with these tokens.
    assert max(trial["lower_bound"] for trial in pruner.result.trials) >= -0.2


def test_texts_of_known_words_keep_the_first_vocabulary(dense: PreTrainedModel, tmp_path: Path) -> None:
    task = write_task(tmp_path, every(slice(None), slice(None)))
    (trial,) = prune(dense, task).result.report["vocabulary"]["trials"]
    assert trial["mean"] == cut_loss(dense, task).mean >= -0.1


def test_a_given_size_is_where_growth_starts(dense: PreTrainedModel, task: Task) -> None:
    trials = prune(dense, task, vocabulary_size=500).result.report["vocabulary"]["trials"]
    assert trials[0]["tokens"] == 500
    assert trials[0]["mean"] == cut_loss(dense, task, 500).mean


def test_the_error_names_the_vocabulary(dense: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_LARGEST_PART", 0.5)
    loss = cut_loss(dense, task)
    message = (
        rf"`vocabulary='task'` must lose at most half of tolerance=0\.2 before any pruning, got "
        rf"{-loss.mean:.4f} \+- {loss.standard_error:.4f} with \d+ of {SIZE} tokens\. Add calibration texts"
    )
    with pytest.raises(ToleranceError, match=message):
        prune(dense, task)


def test_after_that_error_the_model_has_all_its_tokens(
    dense: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_LARGEST_PART", 0.5)
    pruner = SievePruner(copy.deepcopy(dense), byte_level(), task)
    with pytest.raises(ToleranceError, match="`vocabulary='task'`"):
        pruner.prune(unhealed(tolerance=0.2, **SETTINGS), **QUIET)
    before = dense.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruner.model.state_dict().items())


def test_the_task_that_loses_most_decides_and_is_named(dense: PreTrainedModel, task: Task, tmp_path: Path) -> None:
    easy = write_task(tmp_path, every(slice(2), slice(2)), name="easy")
    both = prune(dense, easy, task).result.report["vocabulary"]
    assert both["trials"][0]["task"] == task.name
    assert both["trials"][0]["mean"] < -0.3
    assert both["trials"][-1]["lower_bound"] >= -0.1


def test_the_search_for_ranks_names_the_part_of_the_vocabulary(
    dense: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "TOLERANCE_SHARE", 50)
    loss = cut_loss(dense, task)
    part = rf"vocabulary='task' alone loses {-loss.mean:.4f} \+- {loss.standard_error:.4f} with \d+ tokens"
    with pytest.raises(ToleranceError, match=rf"No size meets tolerance=0\.02: .* {part}"):
        prune(dense, task, tolerance=0.02)


def test_a_genetic_search_starts_from_the_grown_vocabulary(dense: PreTrainedModel, task: Task) -> None:
    search = {"allocation": "genetic", "population_size": 2, "generations": 1, "search_fraction": 0.5}
    report = prune(dense, task, **search, tolerance=0.9).result.report["vocabulary"]
    assert [trial["mean"] for trial in report["trials"]] == [cut_loss(dense, task).mean, 0.0]


def test_nothing_is_scored_without_a_tolerance(dense: PreTrainedModel, task: Task) -> None:
    report = prune(dense, task, tolerance=None, pruning_ratio=0.3).result.report
    assert set(report["vocabulary"]) == {"before", "after"}


def test_card_and_table_show_the_loss_by_itself(dense: PreTrainedModel, task: Task, tmp_path: Path) -> None:
    pruner = prune(dense, task)
    trial = pruner.result.report["vocabulary"]["trials"][-1]
    loss = f"{trial['mean']:+.4f} ± {trial['standard_error']:.4f}"
    card = (pruner.save_pretrained(tmp_path / "out") / "README.md").read_text()
    assert f"the removed tokens alone change the score by {loss} on the selection split." in card
    row = next(line for line in format_table(pruner.result.report).splitlines() if "removed tokens alone" in line)
    assert row.endswith(f"{trial['mean']:+.3f} ± {trial['standard_error']:.3f}")


def test_tokens_of_the_same_characters_come_first() -> None:
    """Growth adds what further texts of the task are likely to have, not the first tokens of another script."""
    tokens = ["[UNK]", "漢", "字", "t", "o", "n", "漢字", "to", "no", "ton"]
    content = {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [[token, -float(n)] for n, token in enumerate(tokens)]},
        "added_tokens": [],
    }
    least = needed_tokens(content, ["to", "n"])
    assert needed_tokens(content, ["to", "n"], len(least) + 1) - least == {"no"}
    assert needed_tokens(content, ["to", "n", "漢", "字"], len(least) + 1) - least == {"漢字"}
