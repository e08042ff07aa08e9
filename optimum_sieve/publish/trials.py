"""The sizes that a run tried, why it stopped, and whether the test bears its tolerance out. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimum_sieve.allocation.tolerance import FINE, SMALLEST_KEPT


if TYPE_CHECKING:
    from collections.abc import Sequence

_FIGURES = ("mean", "standard_error", "lower_bound", "agreement", "kl", "count")
# Parts of a genetic search that are shown: candidates, and the ladder of sizes on fresh examples.
_CANDIDATE, _CONFIRMED = "search", "confirm"
# The part of a run whose size was searched, and why that ended.
_STOPS = {
    "unhealed": {
        "search_steps": "the bisection of the size without training took all {search_steps} steps",
        "time_limit": "the bisection of the size without training stopped at the time limit",
        "smallest_size": "the bisection of the size without training stopped at the smallest size, {smallest} % of the "
        "parameters",
        "small_size": "the bisection of the size without training ended at a small size, where the descent starts",
        "genetic_search": "the genetic search ended",
        "confirmed": "the genetic search ended with its confirmation on fresh examples",
    },
    "healed": {
        "refused": "the descent of healed sizes stopped after two sizes in a row were beyond the tolerance",
        "time_limit": "the descent of healed sizes stopped before a size that would have ended after the time limit",
        "smallest_size": "the descent of healed sizes stopped at the smallest size, {smallest} % of the parameters",
    },
}
# The model that a test difference is measured from.
REFERENCES = {"paired_difference": "dense", "difference_to_tuned": "tuned"}


def trial_rows(trials: Sequence[dict[str, Any]], tolerance: float | None) -> list[dict[str, Any]]:
    """Return the records of the sizes tried as a report holds them.

    Args:
        trials (`Sequence[dict]`): Records of `SieveResult.trials`; of a genetic search, those of dropped candidates and
            of bottlenecks are left out.
        tolerance (`float`, *optional*): Largest acceptable drop.

    Returns:
        `list[dict]`: The fraction `kept`, the one `asked` for, whether the size was `healed`, the figures on the
            selection split, those of each of several `tasks`, and whether the size was `accepted`. A candidate of a
            genetic search is neither accepted nor refused by its score on the examples that it was bred on: it has the
            key `part` alone.
    """
    rows = []
    for trial in trials:
        part = trial.get("part")
        if part not in (None, _CANDIDATE, _CONFIRMED) or not trial.get("complete", True):
            continue
        row: dict[str, Any] = {"kept": trial["kept"], "healed": bool(trial.get("healed", False))}
        row |= {name: trial[name] for name in ("asked", *_FIGURES) if name in trial}
        if "tasks" in trial:
            row["tasks"] = {
                task: {name: figures[name] for name in _FIGURES if name in figures}
                for task, figures in trial["tasks"].items()
            }
        if part is not None:
            row["part"] = part
        if part != _CANDIDATE and tolerance is not None:
            row["accepted"] = bool(trial.get("accepted", trial["lower_bound"] >= -tolerance))
        rows.append(row)
    return rows


def stop_reasons(
    trials: Sequence[dict[str, Any]], settings: dict[str, Any], healed: str | None = None
) -> dict[str, str]:
    """Return why the search for a size ended, without training and healed; nothing where no size was searched.

    Args:
        trials (`Sequence[dict]`): Rows of [`trial_rows`].
        settings (`dict[str, Any]`): `SieveConfig.to_dict()` of the run.
        healed (`str`, *optional*): Reason of the descent, see `Healer.stopped`.
    """
    reasons = {}
    if parts := {trial["part"] for trial in trials if "part" in trial}:
        reasons["unhealed"] = "confirmed" if _CONFIRMED in parts else "genetic_search"
    elif settings.get("tolerance") is not None and trials:
        tried = [trial for trial in trials if not trial["healed"]]
        if len(tried) >= settings["search_steps"]:
            reasons["unhealed"] = "search_steps"
        elif tried and _holds(tried[-1], SMALLEST_KEPT):
            reasons["unhealed"] = "smallest_size"
        elif tried and _holds(tried[-1], FINE) and settings.get("heal") is not None:
            reasons["unhealed"] = "small_size"
        else:
            reasons["unhealed"] = "time_limit"
    if healed is not None:
        reasons["healed"] = healed
    return reasons


def _holds(trial: dict[str, Any], largest: float) -> bool:
    return bool(trial["accepted"] and trial.get("asked", trial["kept"]) <= largest)


def stop_sentences(report: dict[str, Any]) -> list[str]:
    """Return a sentence, without a full stop, for each reason in a report."""
    stopped, settings = report.get("stopped", {}), report.get("settings", {})
    texts = [texts[stopped[kind]] for kind, texts in _STOPS.items() if stopped.get(kind) in texts]
    values = {"search_steps": settings.get("search_steps", ""), "smallest": f"{100 * SMALLEST_KEPT:.0f}"}
    return [text.format(**values) for text in texts]


def reference_key(report: dict[str, Any], task: dict[str, Any]) -> str:
    """Return the key of the test difference that the tolerance is about: to the dense model or to the tuned one."""
    to_tuned = report.get("settings", {}).get("reference") == "tuned" and "difference_to_tuned" in task
    return "difference_to_tuned" if to_tuned else "paired_difference"


def verdict(report: dict[str, Any], task: dict[str, Any]) -> str | None:
    """Return the sentence on whether the test difference of a task bears the tolerance out; `None` without one.

    Example:

    ```python
    >>> task = {"split": "test", "paired_difference": {"mean": -0.025, "standard_error": 0.01}}
    >>> sentence = verdict({"settings": {"tolerance": 0.02}}, task)
    >>> sentence.partition(", though ")[2]
    'within its standard error: these examples cannot tell'

    ```
    """
    tolerance, difference = report.get("settings", {}).get("tolerance"), task.get(reference_key(report, task))
    if tolerance is None or difference is None or task.get("split") != "test":
        return None
    mean, error = difference["mean"], difference["standard_error"]
    found = f"the test difference, {mean:+.3f} ± {error:.3f}, is"
    missing = -tolerance - mean
    if missing <= 0:
        return f"{found} within the tolerance of {tolerance:.3f}"
    found = f"{found} beyond the tolerance of {tolerance:.3f}"
    if missing <= error:
        return f"{found}, though within its standard error: these examples cannot tell"
    return f"{found} by {missing / error:.1f} standard errors" if error > 0 else f"{found}, and has no standard error"


def size_name(trial: dict[str, Any]) -> str:
    """Return what a row of [`trial_rows`] is, in a word."""
    return str(trial.get("part", "healed" if trial["healed"] else "pruned"))


def answer(trial: dict[str, Any]) -> str:
    """Return whether a size was accepted, in words; empty for what is neither accepted nor refused."""
    return {True: "accepted", False: "beyond the tolerance", None: ""}[trial.get("accepted")]


def by_task(trial: dict[str, Any], task: str) -> dict[str, Any]:
    """Return the figures of one task in a row of [`trial_rows`]."""
    figures: dict[str, Any] = trial.get("tasks", {}).get(task, trial)
    return figures


def worst(trial: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the task with the lowest bound in a row of [`trial_rows`]."""
    figures: dict[str, Any] = min(trial.get("tasks", {"": trial}).values(), key=lambda each: each["lower_bound"])
    return figures


def decisive(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that decided about a size: all but the candidates of a genetic search."""
    return [trial for trial in trials if trial.get("part") != _CANDIDATE]


def trial_lines(report: dict[str, Any]) -> list[str]:
    """Return the sizes tried, why the search stopped and the verdicts as lines for a terminal."""
    trials, settings = decisive(report.get("trials", [])), report.get("settings", {})
    lines = []
    if trials:
        several = " on the worst task" if "tasks" in trials[0] else ""
        lines += [
            "",
            f"sizes tried on the selection split, difference{several}; accepted if at least "
            f"{0 - (settings.get('tolerance') or 0):+.3f} with confidence {settings.get('confidence')}:",
        ]
        for trial in trials:
            figures = worst(trial)
            lines.append(
                f"  {size_name(trial):7}  kept {trial['kept']:6.1%}  {figures['mean']:+.3f} ± "
                f"{figures['standard_error']:.3f}  at least {trial['lower_bound']:+.3f}  {answer(trial)}".rstrip()
            )
    return [*lines, *stop_sentences(report)]


def verdict_lines(report: dict[str, Any], tasks: Sequence[dict[str, Any]]) -> list[str]:
    """Return whether the test bears the tolerance out on each task, as lines for a terminal."""
    found = [(f"{task['task']}: " if len(tasks) > 1 else "", verdict(report, task)) for task in tasks]
    lines = [f"{prefix}{sentence}" for prefix, sentence in found if sentence]
    return ["", *lines] if lines else []
