"""Multiple choice: candidates of each example's own, in an order of its own, scored as letters or as texts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from toy import load_task, make_model, make_tokenizer, unhealed, write_rows

from optimum_sieve import SievePruner, evaluate
from optimum_sieve.calibration import losses
from optimum_sieve.calibration.losses import fisher_root
from optimum_sieve.evaluation.batches import log_likelihoods, make_batches
from optimum_sieve.metrics.class_metrics import most_frequent


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.tasks import Example, Task

TEXTS = ["odd", "even", "very odd", "user", "assistant even"]
LETTERED = "{{ question }} {{ lettered_choices }} Answer:"


def choice_rows(count: int = 60) -> list[dict[str, Any]]:
    """Rows with two to five choices; the right one is `i % 2`."""
    return [
        {"question": str(i), "choices": TEXTS[: 2 + i % 4], "answer": "AB"[i % 2], "a": "odd", "b": "even"}
        for i in range(count)
    ]


def load(directory: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Task:
    spec = {
        "kind": "choices",
        "labels": None,
        "prompt": LETTERED,
        "choices": "{{ choices }}",
        "answer": "{{ answer }}",
        **changes,
    }
    return load_task(directory, choice_rows() if rows is None else rows, **spec)


def examples_of(task: Task) -> list[Example]:
    tokenizer = make_tokenizer()
    return [example for split in ("calibration", "selection", "test") for example in task.examples(split, tokenizer)]


def question(example: Example) -> int:
    return int(example.prompt.split()[0])


def test_letters_are_scored_and_listed_in_the_prompt(tmp_path: Path) -> None:
    by_question = {question(example): example for example in examples_of(load(tmp_path))}
    assert len(by_question) == 60
    example = by_question[6]
    assert example.prompt == "6 A. odd\nB. even\nC. very odd\nD. user Answer:"
    assert example.candidates == (" A", " B", " C", " D")
    assert (example.answer, example.target, example.normalized) == (" A", 0, False)
    assert len(by_question[4].candidates) == 2


def test_texts_are_scored_where_the_candidate_says_so(tmp_path: Path) -> None:
    task = load(tmp_path, prompt="{{ question }} Answer:", candidate=" {{ choice }}", normalize=True)
    example = next(example for example in examples_of(task) if question(example) == 7)
    assert example.candidates == (" odd", " even", " very odd", " user", " assistant even")
    assert (example.answer, example.target, example.normalized) == (" even", 1, True)


def test_shuffling_moves_the_right_choice_with_its_text(tmp_path: Path) -> None:
    plain = {question(e): e for e in examples_of(load(tmp_path, candidate="{{ letter }} {{ choice }}"))}
    task = load(tmp_path, candidate="{{ letter }} {{ choice }}", shuffle=True)
    shuffled = {question(e): e for e in examples_of(task)}
    assert shuffled.keys() == plain.keys()
    for number, example in shuffled.items():
        assert example.answer.split(" ", 1)[1] == plain[number].answer.split(" ", 1)[1]
        assert example.candidates[example.target] == example.answer
        # What the prompt lists is what the candidates are.
        listed = example.prompt.split(" ", 1)[1].removesuffix(" Answer:").splitlines()
        assert [line.replace(".", "", 1) for line in listed] == list(example.candidates)
    places = Counter(example.target for example in shuffled.values())
    assert max(Counter(example.target for example in plain.values())) == 1
    assert len(places) == 5
    # By seed and row: the same again, other for another seed.
    assert {question(e): e for e in examples_of(task)} == shuffled
    other = load(tmp_path, candidate="{{ letter }} {{ choice }}", shuffle=True, seed=1)
    assert {question(e): e.target for e in examples_of(other)} != {n: e.target for n, e in shuffled.items()}


@pytest.mark.parametrize(
    ("answer", "rows"),
    [
        ("{{ answer }}", {"answer": "B"}),
        ("{{ answer }}", {"answer": "b"}),
        ("{{ answer }}", {"answer": 1}),
        ("{{ answer }}", {"answer": "1"}),
        ("{{ answer }}", {"answer": "even"}),
        ("{{ number - 1 }}", {"number": 2}),
        ("{{ choices.index(answer) }}", {"answer": "even"}),
        # As a text this would be the place or the choice.
        ("{{ answer | int }}", {"answer": "1", "choices": ["1", "even"]}),
        ("{{ choices.text.index(answer) }}", {"answer": "even", "choices": {"text": ["odd", "even"]}}),
    ],
)
def test_an_answer_is_a_place_a_letter_or_a_text(tmp_path: Path, answer: str, rows: dict[str, Any]) -> None:
    data = [{"question": str(i), "choices": ["odd", "even"], **rows} for i in range(12)]
    choices = "{{ choices.text }}" if isinstance(data[0]["choices"], dict) else "{{ choices }}"
    for example in examples_of(load(tmp_path, data, answer=answer, choices=choices, shuffle=True)):
        assert example.prompt.splitlines()[example.target].removesuffix(" Answer:").endswith(". even")


def test_choices_may_be_several_fields(tmp_path: Path) -> None:
    for example in examples_of(load(tmp_path, choices=["{{ a }}", "{{ b }}", "neither"])):
        assert "A. odd\nB. even\nC. neither" in example.prompt


def test_equal_questions_stay_in_one_split_whatever_their_order(tmp_path: Path) -> None:
    rows = choice_rows(20)
    for split in ("calibration", "selection", "test"):
        # The same row at another number is shuffled in another way.
        write_rows(tmp_path / f"{split}.jsonl", rows[{"calibration": 0, "selection": 7, "test": 14}[split] :][:8])
    files = {split: f"{split}.jsonl" for split in ("calibration", "selection", "test")}
    with pytest.raises(
        ValueError, match="`data` must have disjoint splits, got 1 rows of selection whose prompt is in calib"
    ):
        load(tmp_path, data={"files": files}, shuffle=True)


def naive_sum(model: torch.nn.Module, prompt: str, text: str) -> float:
    tokenizer = make_tokenizer()
    start, ids = (tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, prompt + text))
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(log_probs[i - 1, ids[i]] for i in range(len(start), len(ids))))


@torch.no_grad()
@pytest.mark.parametrize("normalize", [False, True])
def test_normalized_scores_are_log_likelihoods_per_character(tmp_path: Path, normalize: bool) -> None:
    task = load(tmp_path, prompt="{{ question }} ?", candidate=" {{ choice }}", normalize=normalize)
    examples, model = task.examples("test", make_tokenizer()), make_model()
    found = evaluate(model, examples, make_tokenizer(), metric="accuracy", batch_size=7, progress=False)
    predictions = []
    for example in examples:
        sums = [naive_sum(model, example.prompt, text) for text in example.candidates]
        lengths = [len(text.strip()) if normalize else 1 for text in example.candidates]
        predictions.append(int(np.argmax(np.array(sums) / lengths)))
    np.testing.assert_array_equal(found.predictions, predictions)
    assert len(set(predictions)) > 1
    targets = [example.target for example in examples]
    assert found.score == np.mean([p == t for p, t in zip(predictions, targets, strict=True)])
    assert found.majority_score == max(Counter(targets).values()) / len(targets)


def test_the_answers_own_likelihood_is_never_normalized(tmp_path: Path) -> None:
    examples = load(tmp_path, candidate=" {{ choice }}", normalize=True).examples("test", make_tokenizer())
    for batch in make_batches(examples, make_tokenizer(), batch_size=8, candidates=False):
        assert batch.weights is None


def test_the_fisher_root_of_two_choices_does_not_depend_on_its_neighbours_choices(tmp_path: Path) -> None:
    task = load(tmp_path, prompt="{{ question }} ?", candidate=" {{ choice }}")
    examples, model, tokenizer = task.examples("test", make_tokenizer()), make_model(), make_tokenizer()
    pair = next(i for i, example in enumerate(examples) if len(example.candidates) == 2)
    batch = make_batches([examples[pair]], tokenizer, batch_size=8)[0]
    wide = [examples[pair], next(example for example in examples if len(example.candidates) == 5)]

    def gradient(examples: list[Example]) -> torch.Tensor:
        (batch,) = make_batches(examples, tokenizer, batch_size=16)
        rows = [list(batch.indices).index(0)]
        scores = log_likelihoods(model, batch).detach().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "log_likelihoods", lambda *_: scores)
            fisher_root(0)(model, batch).backward()
        return scores.grad[rows][0]

    alone, together = gradient([examples[pair]]), gradient(wide)
    assert batch.present.shape == (1, 2)
    assert together.shape == (5,)
    # Two candidates have one direction, whose sign is free.
    torch.testing.assert_close(together[:2].abs(), alone.abs())
    assert (together[2:] == 0).all()
    assert alone.abs().max() > 0.01


@pytest.mark.parametrize("allocation", ["energy", "uniform", "genetic"])
def test_pruned_within_a_tolerance_and_saved(tmp_path: Path, allocation: str) -> None:
    task = load(tmp_path, prompt="{{ question }} ?", candidate=" {{ choice }}", normalize=True, shuffle=True)
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    config = unhealed(
        tolerance=0.5, confidence=0.6, allocation=allocation, rank_multiple=2, generations=2, search_fraction=0.5
    )
    report = pruner.prune(config, progress=False).report
    assert report["parameters"]["targets_after"] < report["parameters"]["targets_before"]
    assert report["kl"] > 0
    targets = np.array([example.target for example in task.examples("test", make_tokenizer())])
    assert report["majority_score"] == (most_frequent(targets) == targets).mean()
    assert "{{ choice }}" in (pruner.save_pretrained(tmp_path / "out") / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"choices": None}, TypeError, r"`choices` must be a template of a list, .* got None"),
        ({"choices": ["{{ a }}"]}, TypeError, r"`choices` must be a template of a list"),
        ({"choices": "{{ question }}"}, ValueError, r"`choices` must be 2 to 26 texts in every row, got 1 in row \d+"),
        ({"choices": "{{ chioces }}"}, ValueError, r"got 'chioces' in row .* Did you mean 'choices'\?"),
        ({"choices": "{{ [1, none] }}"}, ValueError, r"`choices` must not hold a missing value, got \[1, None\]"),
        ({"choices": ["{{ a }}", "{{ a }}"], "candidate": "{{ choice }}"}, ValueError, r"must be distinct texts"),
        ({"answer": 3}, TypeError, r"`answer` must be a template of the right choice's index"),
        (
            {"answer": "{{ question and 'F' }}"},
            ValueError,
            r"exactly one of the choices 'odd', .*got 'F' in row .*, which matches none of them",
        ),
        (
            {"answer": "{{ 7 if question else 8 }}"},
            ValueError,
            r"got 7 in row \d+ of rows.jsonl, which matches none of them",
        ),
        (
            {"answer": "{{ question and '1' }}", "choices": ["1", "even"]},
            ValueError,
            r"got '1' in row \d+ of rows.jsonl, which matches 2 of them. An integer is always an index: `{{ answer",
        ),
        ({"candidate": "the same"}, ValueError, r"`candidate` must name `letter` or `choice`, and nothing else"),
        ({"candidate": "{{ question }}"}, ValueError, r"`candidate` must name `letter` or `choice`, and nothing else"),
        ({"candidate": 3}, TypeError, r"`candidate` must be a template, got 3"),
        ({"prompt": "{{ question }}"}, ValueError, r"`prompt` must show the choices when letters are scored"),
        ({"shuffle": "yes"}, TypeError, r"`shuffle` must be true or false, got 'yes'"),
        ({"metric": "macro_f1"}, ValueError, r"`metric` must be one of accuracy, got 'macro_f1'"),
        ({"labels": {"a": "b"}}, ValueError, r"`task` must have known keys only, got 'labels'"),
    ],
)
def test_bad_task_files(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(tmp_path, **changes)
