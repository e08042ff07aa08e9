from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from optimum_sieve import Comparison, Evaluation
from optimum_sieve.metrics.class_metrics import score_classes
from optimum_sieve.modeling import fingerprint
from optimum_sieve.publish import report
from optimum_sieve.publish.report import (
    build_report,
    remove_scores,
    task_block,
    write_report,
)
from optimum_sieve.publish.table import format_table, size_changes


def make_evaluation(correct: int, count: int = 10, metric: str = "accuracy") -> Evaluation:
    targets = np.arange(count) % 2
    predictions = np.where(np.arange(count) < correct, targets, 1 - targets)
    scored = score_classes(metric, predictions, targets)
    return Evaluation(
        metric=metric,
        score=scored.score,
        standard_error=scored.standard_error,
        majority_score=0.5,
        predictions=predictions,
        targets=targets,
        values=scored.values,
        log_probs=np.log(np.full((count, 2), 0.5)),
        fingerprint="same",
    )


COMPARISON = Comparison(mean=-0.1, standard_error=0.05, agreement=0.9, kl=0.0123, count=10)
PARAMETERS = {"targets_before": 2000, "targets_after": 500, "model_before": 3000, "model_after": 1500}


def test_report_and_configuration_name_the_digest_alike():
    assert report.DIGEST_KEY == fingerprint.DIGEST_KEY


@pytest.fixture
def full_report():
    return build_report(
        [task_block("toy", make_evaluation(8), make_evaluation(7), COMPARISON)],
        PARAMETERS,
        {"before": 6000, "after": 3000},
        {"moments": 1.25, "test": 2.0},
        {"tolerance": 0.02},
    )


def test_report_has_the_documented_schema(full_report):
    assert set(full_report) == {
        *("task", "split", "metric", "count", "dense", "pruned", "majority_score", "paired_difference", "agreement"),
        *("kl", "parameters", "bytes", "seconds", "settings", "versions", "answers", "examples_sha256", "error_method"),
    }
    assert full_report["task"] == "toy"
    assert full_report["split"] == "test"
    assert full_report["count"] == 10
    assert full_report["majority_score"] == 0.5
    assert full_report["dense"] == {"score": 0.8, "standard_error": make_evaluation(8).standard_error}
    assert full_report["pruned"]["score"] == 0.7
    assert full_report["paired_difference"] == {"mean": -0.1, "standard_error": 0.05}
    assert {"optimum-sieve", "torch", "transformers", "python"} <= set(full_report["versions"])


def test_report_survives_json(full_report, tmp_path):
    write_report(full_report, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == full_report
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(full_report)


def test_what_is_not_known_is_left_out():
    report = build_report([task_block("toy", pruned=make_evaluation(7), split="selection")])
    assert set(report) == {
        *(
            "task",
            "split",
            "metric",
            "count",
            "majority_score",
            "examples_sha256",
            "error_method",
            "pruned",
            "versions",
        ),
    }
    assert report["split"] == "selection"
    assert size_changes(report) == []


def test_a_report_needs_an_evaluation():
    with pytest.raises(ValueError, match="`dense` or `pruned` must be an evaluation, got None for both"):
        task_block("toy")


@pytest.mark.parametrize("other", [make_evaluation(5, count=8), make_evaluation(5, metric="macro_f1")])
def test_a_report_refuses_evaluations_that_do_not_match(other):
    with pytest.raises(ValueError, match="`dense` and `pruned` must be evaluations of the same metric on the same"):
        task_block("toy", make_evaluation(8), other)


def test_table_shows_every_figure(full_report):
    table = format_table(full_report)
    for figure in ("0.800", "0.700", "-0.100 ± 0.050", "0.900", "0.0123", "2,000", "500", "-75.0%", "-50.0%"):
        assert figure in table
    assert table.splitlines()[0] == "toy: 10 examples of the test split, most frequent answer 0.500"
    assert table.splitlines()[-1] == "seconds: moments 1.2, test 2.0"
    assert all(line == line.rstrip() for line in table.splitlines())


def test_a_metric_that_is_no_mean_or_undefined_for_constant_answers_says_so():
    evaluation = replace(make_evaluation(8), error_method="jackknife", majority_score=float("nan"))
    report = build_report([task_block("toy", evaluation)])
    assert "majority_score" not in report
    assert evaluation.to_dict()["majority_score"] is None
    assert format_table(report).splitlines()[0] == "toy: 10 examples of the test split, errors by jackknife"


def test_table_columns_line_up(full_report):
    header, *rows = [line for line in format_table(full_report).splitlines() if "  " in line][:3]
    assert {line.index(word) + len(word) for line, word in [(header, "dense"), (rows[0], "± 0.133")]} == {
        header.index("dense") + len("dense")
    }


def test_table_of_one_model_has_one_column():
    table = format_table(build_report([task_block("toy", make_evaluation(8))]))
    assert "dense" in table
    assert "pruned" not in table
    assert "difference" not in table


def test_a_tuned_model_has_a_column_and_a_difference_of_its_own():
    comparisons = (COMPARISON, Comparison(mean=-0.2, standard_error=0.04, agreement=0.7, kl=0.0456, count=10))
    block = task_block(
        "toy", make_evaluation(8), make_evaluation(7), comparisons[0], tuned=make_evaluation(9), to_tuned=comparisons[1]
    )
    assert block["tuned"]["score"] == 0.9
    assert block["paired_difference"] == {"mean": -0.1, "standard_error": 0.05}
    assert block["difference_to_tuned"] == {"mean": -0.2, "standard_error": 0.04}
    assert (block["agreement"], block["kl"]) == (0.7, 0.0456)
    report = build_report([block], PARAMETERS)
    header, accuracy, agreement, divergence, targets = format_table(report).splitlines()[2:7]
    assert header.split() == ["dense", "tuned", "pruned", "to", "dense", "to", "tuned"]
    assert re.split("  +", accuracy) == [
        *("accuracy", "0.800 ± 0.133", "0.900 ± 0.100", "0.700 ± 0.153", "-0.100 ± 0.050", "-0.200 ± 0.040"),
    ]
    assert agreement.split() == ["agreement", "with", "tuned", "0.700"]
    assert divergence.split() == ["KL", "to", "tuned", "0.0456"]
    assert targets.split()[-3:] == ["2,000", "500", "-75.0%"]
    assert targets.index("-75.0%") < header.index("to tuned")


def test_removed_scores_take_the_difference_to_the_tuned_model_along():
    evaluations = (make_evaluation(8), make_evaluation(7))
    report = build_report([task_block("toy", *evaluations, COMPARISON, tuned=make_evaluation(9), to_tuned=COMPARISON)])
    remove_scores(report)
    assert {"dense", "tuned"} <= report.keys()
    assert not {"pruned", "paired_difference", "difference_to_tuned", "agreement", "kl"} & report.keys()
