"""What a report says about the sizes tried, the end of the search and the test."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from optimum_sieve.allocation.tolerance import SMALLEST_KEPT
from optimum_sieve.publish.table import format_table
from optimum_sieve.publish.trials import stop_reasons, stop_sentences, trial_lines, trial_rows, verdict


SETTINGS: dict[str, Any] = {"tolerance": 0.02, "confidence": 0.9, "search_steps": 2}
FIGURES: dict[str, Any] = {"mean": -0.01, "standard_error": 0.005, "agreement": 0.9, "kl": 0.1, "count": 400}


def trial(kept: float, bound: float, **more: Any) -> dict[str, Any]:
    return {"kept": kept, "lower_bound": bound, **FIGURES, **more}


def block(mean: float, error: float, **more: Any) -> dict[str, Any]:
    return {"task": "toy", "split": "test", "paired_difference": {"mean": mean, "standard_error": error}, **more}


def test_rows_hold_the_figures_and_the_answer() -> None:
    rows = trial_rows([trial(0.5, -0.015), trial(0.25, -0.03, healed=True, asked=0.27)], 0.02)
    assert [(row["kept"], row["healed"], row["accepted"]) for row in rows] == [(0.5, False, True), (0.25, True, False)]
    assert {key: rows[0][key] for key in FIGURES} == FIGURES
    # Of earlier versions, `kept` is the fraction that was asked for.
    assert [row.get("asked") for row in rows] == [None, 0.27]
    assert "accepted" not in trial_rows([trial(0.5, -0.015)], None)[0]


def test_rows_of_several_tasks_hold_each_task() -> None:
    tasks = {"a": {**FIGURES, "lower_bound": -0.015}, "b": {**FIGURES, "lower_bound": -0.03, "mean": -0.02}}
    (row,) = trial_rows([{"kept": 0.5, "lower_bound": -0.03, "tasks": tasks}], 0.02)
    assert row["tasks"]["b"]["mean"] == -0.02
    assert row["accepted"] is False
    (line,) = (line for line in trial_lines({"trials": [row], "settings": SETTINGS}) if "kept" in line)
    # The worst one.
    assert "-0.020 ± 0.005" in line


def test_rows_of_a_genetic_search_leave_out_what_was_dropped() -> None:
    search = [
        trial(0.5, -0.3, part="search", complete=True),
        trial(0.4, -0.3, part="search", complete=False),
        trial(0.3, -0.3, part="bottleneck", complete=True),
        trial(0.6, -0.01, part="confirm", complete=True),
    ]
    rows = trial_rows(search, 0.02)
    assert [(row["part"], row.get("accepted")) for row in rows] == [("search", None), ("confirm", True)]
    assert stop_reasons(rows, SETTINGS) == {"unhealed": "confirmed"}
    assert stop_reasons(rows[:1], SETTINGS) == {"unhealed": "genetic_search"}
    lines = [line for line in trial_lines({"trials": rows, "settings": SETTINGS}) if "kept" in line]
    assert [line.split()[0] for line in lines] == ["confirm"]


@pytest.mark.parametrize(
    ("tried", "healed", "reasons", "sentence"),
    [
        (2, None, {"unhealed": "search_steps"}, "took all 2 steps"),
        (1, None, {"unhealed": "time_limit"}, "the bisection of the size without training stopped at the time limit"),
        (2, "refused", {"unhealed": "search_steps", "healed": "refused"}, "after two sizes in a row were beyond"),
        (2, "time_limit", {"unhealed": "search_steps", "healed": "time_limit"}, "have ended after the time limit"),
        (2, "smallest_size", {"unhealed": "search_steps", "healed": "smallest_size"}, "stopped at the smallest size"),
    ],
)
def test_the_reason_of_the_end(tried: int, healed: str | None, reasons: dict[str, str], sentence: str) -> None:
    rows = trial_rows([trial(0.5, 0.0)] * tried + [trial(0.3, 0.0, healed=True)] * 3, 0.02)
    assert stop_reasons(rows, SETTINGS, healed) == reasons
    assert sentence in "\n".join(stop_sentences({"stopped": reasons, "settings": SETTINGS}))


def test_the_smallest_size_ends_a_bisection() -> None:
    rows = trial_rows([trial(SMALLEST_KEPT, 0.0)], 0.02)
    reasons = stop_reasons(rows, SETTINGS)
    assert reasons == {"unhealed": "smallest_size"}
    (sentence,) = stop_sentences({"stopped": reasons, "settings": SETTINGS})
    assert sentence.endswith("without training stopped at the smallest size, 2 % of the parameters")


def test_a_small_size_ends_the_bisection_before_a_descent() -> None:
    rows, settings = trial_rows([trial(0.0625, 0.0)], 0.02), {**SETTINGS, "heal": {"steps": 32}}
    assert stop_reasons(rows, settings, "refused") == {"unhealed": "small_size", "healed": "refused"}
    assert "ended at a small size" in stop_sentences({"stopped": {"unhealed": "small_size"}, "settings": settings})[0]
    for other, size in ((SETTINGS, 0.0625), ({**settings, "heal": None}, 0.0625), (settings, 0.125)):
        assert stop_reasons(trial_rows([trial(size, 0.0)], 0.02), other) == {"unhealed": "time_limit"}


def test_nothing_is_said_where_no_size_was_searched() -> None:
    assert stop_reasons([], {**SETTINGS, "tolerance": None}) == {}
    assert trial_lines({"settings": SETTINGS}) == []


@pytest.mark.parametrize(
    ("mean", "error", "words"),
    [
        (0.001, 0.01, "the test difference, +0.001 ± 0.010, is within the tolerance of 0.020"),
        (-0.02, 0.01, "within the tolerance"),
        (-0.025, 0.01, "beyond the tolerance of 0.020, though within its standard error: these examples cannot tell"),
        (-0.045, 0.01, "beyond the tolerance of 0.020 by 2.5 standard errors"),
        (-0.045, 0.0, "beyond the tolerance of 0.020, and has no standard error"),
    ],
)
def test_the_verdict_of_the_test(mean: float, error: float, words: str) -> None:
    assert words in str(verdict({"settings": SETTINGS}, block(mean, error)))


def test_there_is_no_verdict_without_tolerance_or_test() -> None:
    assert verdict({"settings": {"tolerance": None}}, block(0.0, 0.01)) is None
    assert verdict({"settings": SETTINGS}, {"task": "toy", "split": "test"}) is None
    assert verdict({"settings": SETTINGS}, block(0.0, 0.01) | {"split": "selection"}) is None


def test_the_verdict_is_about_the_reference_of_the_tolerance() -> None:
    tuned = block(0.1, 0.01, difference_to_tuned={"mean": -0.1, "standard_error": 0.01})
    assert "within" in str(verdict({"settings": SETTINGS}, tuned))
    assert "by 8.0 standard errors" in str(verdict({"settings": {**SETTINGS, "reference": "tuned"}}, tuned))


def test_the_table_of_the_terminal_has_all_of_it() -> None:
    scores = {"score": 0.8, "standard_error": 0.01}
    report = {
        **block(-0.025, 0.01),
        **{"metric": "accuracy", "count": 400, "majority_score": 0.5, "dense": scores, "pruned": scores},
        **{"settings": SETTINGS, "stopped": {"unhealed": "search_steps", "healed": "refused"}},
        "trials": trial_rows([trial(0.5, -0.0164), trial(0.25, -0.03, healed=True)], 0.02),
    }
    before = copy.deepcopy(report)
    table = format_table(report)
    assert "accepted if at least -0.020 with confidence 0.9" in table
    assert "  pruned   kept  50.0%  -0.010 ± 0.005  at least -0.016  accepted\n" in table
    assert "  healed   kept  25.0%  -0.010 ± 0.005  at least -0.030  beyond the tolerance\n" in table
    assert "the descent of healed sizes stopped after two sizes in a row were beyond the tolerance\n" in table
    assert "is beyond the tolerance of 0.020, though within its standard error" in table
    assert report == before
