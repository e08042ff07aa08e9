"""The figures at the top of a page. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bars import bytes_text, seconds_text
from .marks import clean
from .plot import percent


if TYPE_CHECKING:
    from collections.abc import Sequence


def tiles_of(report: dict[str, Any], tasks: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return label, value, its standard error and a note for each of the figures that matter most."""
    parameters, num_bytes = report.get("parameters", {}), report.get("bytes", {})
    tiles = []
    before, after = parameters.get("targets_before"), parameters.get("targets_after")
    if before:
        tiles.append(_tile("parameters of the matrices kept", percent(after / before), f"{after:,} of {before:,}"))
    if len(tasks) == 1:
        tiles += _score_tiles(tasks[0])
    if num_bytes.get("before") and num_bytes.get("after"):
        left = f"{100 * (num_bytes['after'] / num_bytes['before'] - 1):+.1f} %, from {bytes_text(num_bytes['before'])}"
        tiles.append(_tile("bytes of the weights", bytes_text(num_bytes["after"]), left))
    if report.get("seconds"):
        total = sum(report["seconds"].values())
        tiles.append(_tile("time of the run", seconds_text(total), "on the machine it ran on"))
    return tiles


def _score_tiles(task: dict[str, Any]) -> list[dict[str, str]]:
    tiles = []
    if "pruned" in task:
        side = "tuned" if "tuned" in task else "dense"
        of = f"{side} {task[side]['score']:.3f} ± {task[side]['standard_error']:.3f}" if side in task else ""
        shown, error = (f"{task['pruned'][key]:.3f}" for key in ("score", "standard_error"))
        tiles.append(_tile(f"{clean(task['metric'], 30)}, {task['split']} split", shown, of, error))
    if "paired_difference" in task:
        difference = task["paired_difference"]
        shown, error = f"{difference['mean']:+.3f}", f"{difference['standard_error']:.3f}"
        tiles.append(_tile("difference to dense, paired", shown, f"on {task['count']:,} examples", error))
    if "agreement" in task:
        kl = f"KL {task['kl']:.4f} nats" if "kl" in task else ""
        tiles.append(_tile("same answers", percent(task["agreement"]), kl))
    return tiles


def _tile(label: str, value: str, note: str, error: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "error": error}


def verdict_kind(sentence: str) -> str:
    """Return the class of a [`verdict`][optimum_sieve.publish.trials.verdict]: `"good"`, `"bad"` or `"unsure"`."""
    if "within the tolerance" in sentence:
        return "good"
    return "unsure" if "within its standard error" in sentence else "bad"
