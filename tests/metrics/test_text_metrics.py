"""Metrics of written answers, against hand-made cases, a recursive subsequence and the textbook jackknife."""

from __future__ import annotations

import random

import numpy as np
import pytest

from optimum_sieve.metrics.identity import metric_name
from optimum_sieve.metrics.text_metrics import (
    TEXT_METRICS,
    items,
    last_number,
    majority_text_score,
    normalize_text,
    score_texts,
)


def one(metric: str, text: str, *accepted: str) -> float:
    return float(score_texts(metric, [text], [accepted]).values[0])


@pytest.mark.parametrize(
    ("metric", "text", "accepted", "value"),
    [
        ("exact_match", "The  Eiffel-Tower!", ["an Eiffel Tower", "eiffeltower"], 1.0),
        ("exact_match", "Eiffel", ["Eiffel Tower"], 0.0),
        ("exact_match", "", ["Eiffel Tower"], 0.0),
        ("f1", "the cat sat", ["cat sat down", "dog"], 0.8),
        # The best answer, not the first.
        ("f1", "dog", ["cat sat down", "A dog."], 1.0),
        # A word counts as often as it is in both.
        ("f1", "new new york", ["new york city"], 2 * 2 / 6),
        ("f1", "", ["dog"], 0.0),
        ("rougeL", "police killed the gunman", ["police kill the gunman"], 0.75),
        ("rougeL", "the gunman police killed", ["police killed the gunman"], 0.5),
        ("rougeL", "", ["x"], 0.0),
        ("numeric", "6 boxes of 7 make 42.", ["#### 42"], 1.0),
        ("numeric", "It costs $1,234.50", ["1234.5"], 1.0),
        ("numeric", "-3", ["3"], 0.0),
        ("numeric", "10-7=3", ["3"], 1.0),
        ("numeric", "none at all", ["3"], 0.0),
        ("set_f1", "Gout; asthma, gout", ["asthma\ngout"], 1.0),
        ("set_f1", '["gout", "flu"]', ["gout, asthma, plague"], 2 / 5),
        ("set_f1", "none", ["None."], 1.0),
        ("set_f1", "gout", ["none"], 0.0),
        ("entity_f1", "- gout\n- gout", ["Gout"], 2 / 3),
    ],
)
def test_scores_of_single_texts(metric: str, text: str, accepted: list[str], value: float) -> None:
    assert one(metric, text, *accepted) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,000,000 of 2", "2"), ("is .5", "0.5"), ("x5", "5"), ("(-5)", "-5"), ("3-5", "5"), ("1,2", "2"), ("7.", "7")],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert float(last_number(text)) == float(number)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Gout\n\n  small  pox.\n", ["gout", "small pox"]),
        ("1. Gout\n2) flu\n* plague", ["gout", "flu", "plague"]),
        ('["Gout", "PWS"] and more', ["gout", "pws"]),
        ('[{"type": "Drug", "text": "Aspirin"}]', ['{"text": "aspirin", "type": "drug"}']),
        ("[]", []),
        ("none", []),
        ("[broken", ["[broken"]),
        ("deafness, autosomal", ["deafness, autosomal"]),
    ],
)
def test_lists_are_read_as_json_or_by_lines(text: str, expected: list[str]) -> None:
    assert sorted(items(text).elements()) == sorted(expected)


def longest_common_subsequence(one: str, other: str) -> int:
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + longest_common_subsequence(one[:-1], other[:-1])
    return max(longest_common_subsequence(one[:-1], other), longest_common_subsequence(one, other[:-1]))


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    rng = random.Random(0)
    for _ in range(50):
        text, gold = ("".join(rng.choices("bcde", k=rng.randint(1, 8))) for _ in range(2))
        common = longest_common_subsequence(text, gold)
        precision, recall = common / len(text), common / len(gold)
        expected = 2 * precision * recall / (precision + recall) if common else 0.0
        assert one("rougeL", " ".join(text), " ".join(gold)) == pytest.approx(expected)


def test_entity_f1_is_the_micro_average_and_its_values_the_jackknife() -> None:
    rng = np.random.default_rng(0)
    names = ["gout", "flu", "pws", "none of these"]

    def written(count: int) -> list[str]:
        return ["\n".join(rng.choice(names, rng.integers(1, 4))) for _ in range(count)]

    texts, answers = written(40), [[text] for text in written(40)]
    found = score_texts("entity_f1", texts, answers)
    pairs = [(items(text), items(gold)) for text, (gold,) in zip(texts, answers, strict=True)]
    hits = sum((own & gold).total() for own, gold in pairs)
    precision = hits / sum(own.total() for own, _ in pairs)
    recall = hits / sum(gold.total() for _, gold in pairs)
    assert found.score == pytest.approx(2 * precision * recall / (precision + recall))
    left_out = [
        score_texts("entity_f1", texts[:i] + texts[i + 1 :], answers[:i] + answers[i + 1 :]).score for i in range(40)
    ]
    np.testing.assert_allclose(found.values, 40 * found.score - 39 * np.array(left_out))
    assert found.standard_error == pytest.approx(np.sqrt(39 / 40 * ((left_out - np.mean(left_out)) ** 2).sum()))


def test_means_have_the_standard_error_of_their_values() -> None:
    found = score_texts("f1", ["a b", "dog", "cat"], [["b"], ["cat dog"], ["dog"]])
    assert found.score == pytest.approx(found.values.mean())
    assert found.standard_error == pytest.approx(found.values.std(ddof=1) / np.sqrt(3))


def test_the_most_frequent_answer_is_the_majority() -> None:
    answers = [["Paris"], ["the paris", "Rome"], ["Rome"], ["Oslo"]]
    assert majority_text_score("exact_match", answers) == 0.5


def test_a_metric_of_ones_own_is_a_function_of_an_answer_and_the_accepted_ones() -> None:
    def shared_letters(text: str, accepted: tuple[str, ...]) -> float:
        return len(set(text) & set(accepted[0]))

    assert score_texts(shared_letters, ["abc", "x"], [["bcd", "?"], ["y"]]).values.tolist() == [2.0, 0.0]
    assert metric_name(shared_letters) == "shared_letters"
    for wrong in (float("nan"), None, "good"):
        with pytest.raises(ValueError, match=r"`metric` must return a finite number for every example, got .* for 'a'"):
            score_texts(lambda text, accepted, wrong=wrong: wrong, ["a"], [["b"]])


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match=f"`metric` must be one of {', '.join(TEXT_METRICS)}, got 'bleu'"):
        score_texts("bleu", ["a"], [["b"]])


def test_normalized_texts_have_no_articles_punctuation_or_case() -> None:
    assert normalize_text("A man, a plan;  AN 'area' of the\nTheatre") == "man plan area of theatre"
