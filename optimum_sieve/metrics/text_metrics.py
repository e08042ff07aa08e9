r"""Metrics of generated answers with the contribution of each example. Plain numpy, unless a module of evaluate scores.

Texts are normalized as in the SQuAD evaluation (Rajpurkar et al., 2016): lower case, single spaces, no punctuation or
articles.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve._messages import shown

from .module_metric import ModuleMetric
from .module_scores import module_score, score_by_module
from .scored import Scored, jackknifed


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from .identity import Metric


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# A minus sign after a word, a number or a bracket is a subtraction.
_NUMBER = re.compile(r"((?<![\w)])-)?\$?(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")


def normalize_text(text: str) -> str:
    """Return `text` in lower case without punctuation, articles and extra spaces, and in Unicode form C.

    Example:

    ```python
    >>> normalize_text(" The  Eiffel Tower. ")
    'eiffel tower'

    ```
    """
    return " ".join(_ARTICLES.sub(" ", _normal(text).lower().translate(_PUNCTUATION)).split())


def last_number(text: str) -> Decimal | None:
    """Return the last number of `text`, or `None`.

    Example:

    ```python
    >>> last_number("3 boxes at $1,200.50 each, so 3 * 1200.50 = $3,601.50.")
    Decimal('3601.50')

    ```
    """
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1][0] + numbers[-1][1].replace(",", "")) if numbers else None


def items(text: str, separators: str = "\n") -> Counter[str]:
    r"""Parse a generated list: JSON, or items split at any of `separators`; `none` is the empty list.

    Items are lower-cased and stripped of bullets and trailing punctuation. A JSON object becomes one item with its keys
    sorted.

    Example:

    ```python
    >>> items("- Gout.\n- PWS") == items('["gout", "PWS"] and that is all.')
    True

    ```
    """
    parsed: list[Any] | None = None
    if text.lstrip().startswith("["):
        try:
            parsed = json.JSONDecoder().raw_decode(text.lstrip())[0]
        # A model may write brackets or digits without end.
        except (ValueError, RecursionError):
            parsed = None
    if not isinstance(parsed, list):
        parsed = [_BULLET.sub("", part) for part in re.split(f"[{re.escape(separators)}]", text)]
    texts = [
        json.dumps(item, sort_keys=True, ensure_ascii=False) if isinstance(item, dict) else item for item in parsed
    ]
    cleaned = [" ".join(_normal(str(item)).lower().split()).rstrip(".,; ") for item in texts]
    kept = [item for item in cleaned if item]
    return Counter() if kept == ["none"] else Counter(kept)


def score_texts(metric: Metric, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> Scored:
    r"""Score generated texts against the accepted answers of each example.

    These metrics are means over the examples of the best value over the accepted answers:

    - `"exact_match"`: equality of the normalized texts.
    - `"f1"`: F1 of the normalized words.
    - `"rougeL"`: F1 of the longest common subsequence of words (Lin, 2004).
    - `"numeric"`: equality of the last numbers.
    - `"set_f1"`: F1 of the sets of items, separated by line breaks, commas or semicolons.

    `"entity_f1"` is the micro-averaged F1 of the multisets of items, one per line; its values are jackknife
    pseudo-values.

    Args:
        metric (`str`, `ModuleMetric` or `Callable`):
            One of the above; a module of evaluate; or a function of a text and its accepted answers that returns a
            number, whose mean is the score.
        texts (`Sequence[str]`):
            Generated texts.
        answers (`Sequence[Sequence[str]]`):
            Accepted answers of each example, at least one.

    Returns:
        [`Scored`][optimum_sieve.metrics.scored.Scored]: The score and each example's value.

    Raises:
        ValueError: If `metric` is unknown or does not return a finite number.

    Example:

    ```python
    >>> score_texts("f1", ["in the Middle Rhine"], [["Middle Rhine", "Rhine"]]).score
    0.8

    ```
    """
    if isinstance(metric, ModuleMetric):
        return score_by_module(metric, texts, answers)
    if metric == "entity_f1":
        return _score_entities(texts, answers)
    if isinstance(metric, str):
        if metric not in _BEST:
            raise ValueError(f"`metric` must be one of {', '.join(TEXT_METRICS)}, got {metric!r}.")
        single = _BEST[metric]
        pairs = zip(texts, answers, strict=True)
        values = np.array([max(single(text, answer) for answer in accepted) for text, accepted in pairs])
    else:
        values = np.array([_custom_value(metric, *pair) for pair in zip(texts, answers, strict=True)])
    return Scored(float(values.mean()), values)


def _custom_value(metric: Callable[[str, Sequence[str]], float], text: str, accepted: Sequence[str]) -> float:
    returned = metric(text, tuple(accepted))
    try:
        value = float(returned)
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise ValueError(
            f"`metric` must return a finite number for every example, got {shown(returned)} for {shown(text)}."
        )
    return value


def majority_text_score(metric: Metric, answers: Sequence[Sequence[str]]) -> float:
    """Score the constant answer that is most frequent among the examples' first accepted answers."""
    firsts = [accepted[0] for accepted in answers]
    most = Counter(map(normalize_text, firsts)).most_common(1)[0][0]
    constant = next(text for text in firsts if normalize_text(text) == most)
    if isinstance(metric, ModuleMetric):
        return module_score(metric, [constant] * len(answers), answers)
    return score_texts(metric, [constant] * len(answers), answers).score


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _exact_match(text: str, answer: str) -> float:
    return float(normalize_text(text) == normalize_text(answer))


def _word_f1(text: str, answer: str) -> float:
    return _counts_f1(Counter(normalize_text(text).split()), Counter(normalize_text(answer).split()))


def _rouge_l(text: str, answer: str) -> float:
    words, gold = (re.findall(r"[^\W_]+", _normal(raw).lower()) for raw in (text, answer))
    if not words and not gold:
        return 1.0
    lengths = np.zeros(len(gold) + 1, dtype=np.int64)
    for word in words:
        matches = lengths[:-1] + np.array([word == other for other in gold], dtype=np.int64)
        # Each cell of the next row is the maximum of the match, the cell above and the cell to the left.
        lengths[1:] = np.maximum.accumulate(np.maximum(matches, lengths[1:]))
    return 2 * int(lengths[-1]) / (len(words) + len(gold))


def _numeric(text: str, answer: str) -> float:
    return float(last_number(text) == last_number(answer))


def _set_f1(text: str, answer: str) -> float:
    return _counts_f1(*(Counter(set(items(listed, "\n,;"))) for listed in (text, answer)))


def _counts_f1(predicted: Counter[str], gold: Counter[str]) -> float:
    """F1 of two multisets; 1 if both are empty."""
    total = predicted.total() + gold.total()
    return 2 * (predicted & gold).total() / total if total else 1.0


_BEST: dict[str, Callable[[str, str], float]] = {
    "exact_match": _exact_match,
    "f1": _word_f1,
    "rougeL": _rouge_l,
    "numeric": _numeric,
    "set_f1": _set_f1,
}
# Metrics of lists: each example has exactly one accepted answer, the whole list.
LIST_METRICS = ("entity_f1", "set_f1")
TEXT_METRICS = (*_BEST, "entity_f1")


def _score_entities(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> Scored:
    pairs = [(items(text), items(accepted[0])) for text, accepted in zip(texts, answers, strict=True)]
    doubled = np.array([2 * (predicted & gold).total() for predicted, gold in pairs])
    total = np.array([predicted.total() + gold.total() for predicted, gold in pairs])
    score, left_out = _ratio(doubled.sum(), total.sum()), _ratio(doubled.sum() - doubled, total.sum() - total)
    return jackknifed(float(score), left_out)


def _ratio(numerator: Any, denominator: Any) -> NDArray[np.float64]:
    """Divide; 1 where both multisets are empty."""
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), 1.0)
