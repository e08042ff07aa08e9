"""The result of a pruning run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.adapters.merging import merged_adapter
from optimum_sieve.backbone.latency import total_seconds
from optimum_sieve.backbone.offloading import bring_in
from optimum_sieve.backbone.sizes import matrix_sizes, measure_sizes
from optimum_sieve.publish.card import public_name
from optimum_sieve.publish.result import TaskScores, make_result
from optimum_sieve.publish.sections import rank_section, spectra_section
from optimum_sieve.publish.trials import stop_reasons, trial_rows

from .progress import save_in_work_dir
from .reference import warn_of_the_majority


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.calibration.rounds import Bases
    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.healing.stage import Healer
    from optimum_sieve.publish.result import SieveResult
    from optimum_sieve.run.context import Run


logger = logging.getLogger(__name__)


def measured_dense(run: Run, bases: Bases) -> dict[str, Any]:
    """Return the sizes of the dense model, see `measure_sizes`, and the spectra of its matrices."""
    energies = {target.name: bases[target.name].energy.detach().cpu().numpy() for target in run.targets}
    return {**measure_sizes(run.model, run.targets, run.vocabulary), "spectra": spectra_section(energies)}


def pruned_result(
    run: Run,
    dense: Sequence[Evaluation],
    pruned: Sequence[Evaluation],
    offsets: list[dict[str, Any]],
    *,
    sizes: dict[str, Any],
    ranks: Ranks,
    trials: list[dict[str, Any]],
    healer: Healer | None,
    base_model: str | None,
    base_revision: str | None,
    loading: dict[str, str] | None,
) -> SieveResult:
    """Turn the pruned model of a run into one of type `sieve`, in place, and report on it.

    Args:
        run (`Run`): The run, whose model is pruned.
        dense (`Sequence[Evaluation]`): Evaluation of the dense model, tuned or not, on each task's test split.
        pruned (`Sequence[Evaluation]`): Evaluation of the pruned model.
        offsets (`list[dict]`): Label offsets that its scores contain, for the configuration.
        sizes (`dict[str, Any]`): Of the dense model, see [`measured_dense`].
        ranks (`Mapping[str, int | None]`): Ranks of the pruned model.
        trials (`list[dict[str, Any]]`): Trials of the search for the ranks.
        healer (`Healer`, *optional*): Healed the model.
        base_model (`str`, *optional*): Name of the dense model.
        base_revision (`str`, *optional*): Its commit on the Hub.
        loading (`dict[str, str]`, *optional*): Options it was loaded with.
    """
    bring_in(run.model)
    _warn_of_loss_to_tuned(run, dense, pruned)
    if not run.config.compares:
        # Otherwise the selection split has told.
        for task, evaluation in zip(run.tasks, dense, strict=True):
            warn_of_the_majority(task.name, evaluation, "test")
    untuned = [None] * len(run.tasks) if run.tuning is None else run.tuning.dense
    result = make_result(
        run.model,
        scores=[TaskScores.of(*each) for each in zip(run.tasks, dense, pruned, untuned, strict=True)],
        sizes=(sizes, measure_sizes(run.model, run.targets)),
        trials=trials,
        settings=run.config.to_dict(),
        seconds=run.seconds,
        loading=loading,
        base_model=public_name(base_model),
        base_revision=base_revision,
        tuning=None if run.tuning is None else run.tuning.report,
        healing=None if healer is None else healer.report(),
        vocabulary=None if run.vocabulary is None else run.vocabulary.sizes,
        latency=None if run.latencies is None else total_seconds(run, ranks),
        label_offsets=offsets,
        adapter=_adapter(run.model),
        sections={
            "spectra": sizes["spectra"],
            "ranks": rank_section(matrix_sizes(run.model, run.targets)),
            "written_prompts": sum(task.written for task in run.tasks) or None,
            "stopped": _stopped(run, trials, healer) or None,
        },
    )
    if run.vocabulary is not None and run.vocabulary_trials:
        # The configuration has the sizes alone.
        result.report["vocabulary"] = {
            **run.vocabulary.sizes,
            "trials": [dict(trial) for trial in run.vocabulary_trials],
        }
    save_in_work_dir(run, result.report)
    return result


def _adapter(model: PreTrainedModel) -> dict[str, str] | None:
    """Return what may be published of the adapter that was merged into the dense model."""
    adapter = merged_adapter(model)
    return adapter and {key: public_name(value) or "" if key == "name" else value for key, value in adapter.items()}


def _stopped(run: Run, trials: list[dict[str, Any]], healer: Healer | None) -> dict[str, str]:
    rows = trial_rows(trials, run.config.tolerance)
    return stop_reasons(rows, run.config.to_dict(), None if healer is None else healer.stopped)


def _warn_of_loss_to_tuned(run: Run, tuned: Sequence[Evaluation], pruned: Sequence[Evaluation]) -> None:
    """Warn if a tolerance from the model as it came lets the pruned one fall further behind the tuned one."""
    tolerance = run.config.tolerance
    if run.tuning is None or tolerance is None or run.config.reference == "tuned":
        return
    for task, before, after in zip(run.tasks, tuned, pruned, strict=True):
        if after.score < before.score - tolerance:
            logger.warning(
                "The pruned model scores %.4f on the test split of %r, the tuned model %.4f: `tolerance` is measured "
                'from the model as it came. `reference="tuned"` measures it from the tuned model, '
                "and removes less.",
                after.score, task.name, before.score,
            )  # fmt: skip
