"""What a run shows while it chooses a size: a line on the terminal, and a report in the work directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from optimum_sieve.metrics.identity import metric_name
from optimum_sieve.metrics.module_metric import ModuleMetric
from optimum_sieve.publish.card import public_name
from optimum_sieve.publish.report import REPORT_NAME, versions, write_report
from optimum_sieve.publish.trials import trial_rows
from optimum_sieve.run import distributed
from optimum_sieve.run.bars import bars_are_shown
from optimum_sieve.run.events import emit


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.healing.stage import Healer
    from optimum_sieve.run.context import Run


def show_trial(run: Run, trials: Sequence[dict[str, Any]], healer: Healer | None = None) -> None:
    """Show the last of the sizes tried on the terminal, and all of them in the report of the work directory.

    Args:
        run (`Run`): The run.
        trials (`Sequence[dict]`): Records of the sizes, see
            [`size_trial`][optimum_sieve.allocation.tolerance.size_trial].
        healer (`Healer`, *optional*): Has healed the last one.
    """
    if run.progress and bars_are_shown():
        tqdm.write(trial_line(trials[-1], run.tasks[0].metric if len(run.tasks) == 1 else "lowest score"))
    worst = min(trials[-1].get("tasks", {"": trials[-1]}).values(), key=lambda each: each["lower_bound"])
    figures = {key: worst[key] for key in ("mean", "standard_error", "lower_bound", "agreement")}
    emit("sizes", len(trials), kept=trials[-1]["kept"], accepted=float(trials[-1]["accepted"]), **figures)
    blocks = [{"task": task.name, "metric": metric_name(task.metric), "split": "test"} for task in run.tasks]
    report: dict[str, Any] = {
        **(blocks[0] if len(blocks) == 1 else {"tasks": blocks}),
        "base_model": public_name(run.model.name_or_path or None),
        "complete": False,
        "seconds": {stage: round(value, 3) for stage, value in run.seconds.items()},
        "settings": run.config.to_dict(),
        "trials": trial_rows(trials, run.config.tolerance),
        "versions": versions(),
    }
    if healer is not None:
        report["healing"] = healer.report()
    save_in_work_dir(run, report)


def save_in_work_dir(run: Run, report: dict[str, Any]) -> None:
    """Replace the report in the work directory, from which `sieve report` makes a page; without one do nothing."""
    if run.work.path is not None and distributed.is_first():
        write_report(report, run.work.path / REPORT_NAME)


def trial_line(trial: dict[str, Any], metric: object) -> str:
    """Describe a size for the terminal."""
    worst = min(trial.get("tasks", {"": trial}).values(), key=lambda each: each["lower_bound"])
    name = metric_name(metric) if isinstance(metric, str | ModuleMetric) else "score"
    verdict = "accepted" if trial["accepted"] else "beyond the tolerance"
    kind = "healed" if trial.get("healed") else "pruned"
    return (
        f"kept {trial['kept']:6.1%} {kind}  {name} {worst['mean']:+.3f} ± {worst['standard_error']:.3f}, at least "
        f"{worst['lower_bound']:+.3f}, agreement {worst['agreement']:.3f}: {verdict}"
    )
