"""This package's metrics as modules of the evaluate library, alone and combined."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest

import optimum_sieve.metrics
from optimum_sieve.metrics import Accuracy, TokenF1, load
from optimum_sieve.metrics.class_metrics import CLASS_METRICS, score_classes
from optimum_sieve.metrics.text_metrics import LIST_METRICS, TEXT_METRICS, score_texts


TEXTS = ["3 cats\n2 dogs", "the Eiffel tower", "none", "7"]
ANSWERS = [["2 dogs, 3 cats", "3"], ["Eiffel Tower 1"], ["2"], ["seven 7"]]
# Names of scores of the evaluate library.
KEYS = {"accuracy": "accuracy", "macro_f1": "f1", "exact_match": "exact_match", "f1": "f1", "rougeL": "rougeL"}
KEYS |= {"numeric": "numeric", "set_f1": "f1", "entity_f1": "f1"}


def inputs(name: str) -> tuple[Any, Any, Any]:
    """Return predictions, references and what this package computes from them."""
    if name in CLASS_METRICS:
        rng = np.random.default_rng(0)
        predictions, targets = rng.integers(0, 3, 30), rng.integers(0, 3, 30)
        return predictions.tolist(), targets.tolist(), score_classes(name, predictions, targets)
    answers = [accepted[:1] for accepted in ANSWERS] if name in LIST_METRICS else ANSWERS
    return TEXTS, answers, score_texts(name, TEXTS, answers)


def test_every_metric_is_there() -> None:
    assert set(KEYS) == {*CLASS_METRICS, *TEXT_METRICS}
    assert set(dir(optimum_sieve.metrics)) >= set(optimum_sieve.metrics.__all__)


@pytest.mark.parametrize("name", KEYS)
def test_a_metric_computes_what_tasks_are_scored_by(name: str) -> None:
    predictions, references, expected = inputs(name)
    metric = load(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.description == type(metric).__doc__
    assert metric.compute(predictions=predictions, references=references) == {KEYS[name]: expected.score}
    found = metric.compute(predictions=predictions, references=references, standard_error=True)
    assert found == {KEYS[name]: expected.score, "standard_error": expected.standard_error}
    # In parts, as evaluate collects them.
    for half in (slice(2), slice(2, None)):
        metric.add_batch(predictions=predictions[half], references=references[half])
    assert metric.compute() == {KEYS[name]: expected.score}


def test_references_may_be_single_texts() -> None:
    firsts = [accepted[0] for accepted in ANSWERS]
    expected = score_texts("f1", TEXTS, [[first] for first in firsts]).score
    assert TokenF1().compute(predictions=TEXTS, references=firsts) == {"f1": expected}
    assert load("token_f1").name == "token_f1"


def test_metrics_can_be_combined() -> None:
    names = ["exact_match", "f1", "rougeL"]
    combined = evaluate.combine([load(name) for name in names])
    expected = {name: score_texts(name, TEXTS, ANSWERS).score for name in names}
    assert combined.compute(predictions=TEXTS, references=ANSWERS) == expected
    # The names of two equal scores begin with those of their metrics.
    both = evaluate.combine([load("token_f1"), load("set_f1")])
    firsts = [accepted[0] for accepted in ANSWERS]
    assert set(both.compute(predictions=TEXTS, references=firsts)) == {"token_f1_f1", "set_f1_f1"}


def test_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="`references` must hold the whole list as one text for each example"):
        load("set_f1").compute(predictions=["a"], references=[["a", "b"]])
    with pytest.raises(ValueError, match="`references` must hold at least one text for each example"):
        load("f1").compute(predictions=["a"], references=[[]])
    with pytest.raises(ValueError, match="`references` must contain numbers, got 'none'"):
        load("numeric").compute(predictions=["a"], references=["none"])
    with pytest.raises(ValueError, match="invalid literal for int"):
        Accuracy().compute(predictions=["a"], references=["a"])
    with pytest.raises(ValueError, match=r"`name` must be one of accuracy, .* got 'rouge_l'. Did you mean 'rougeL'\?"):
        load("rouge_l")


def test_metrics_are_imported_without_evaluate() -> None:
    code = (
        "import sys, optimum_sieve.metrics; from optimum_sieve.metrics import ModuleMetric, examples; "
        "from optimum_sieve.tasks import Task; import optimum_sieve.commands.evaluate; "
        "print([name for name in ('evaluate', 'datasets', 'torch', 'transformers') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for metric in (load("f1"), load("f1", cache_dir=str(tmp_path / "cache"))):
        metric.compute(predictions=["a"], references=["a"])
    for folder in (tmp_path, Path(evaluate.config.HF_METRICS_CACHE)):
        assert [path for path in folder.rglob("*") if path.is_file()] == []
