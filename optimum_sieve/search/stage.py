"""The search as a stage of a run: made of the run's setting and bases, kept in its work directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

from optimum_sieve.allocation.allocators import allocate
from optimum_sieve.allocation.stage import loss_curves
from optimum_sieve.calibration.rounds import BASIS_SETTINGS
from optimum_sieve.calibration.rounds import FORMAT as CALIBRATION_FORMAT
from optimum_sieve.run.files import replacing
from optimum_sieve.search.ranking.by_task import Goal
from optimum_sieve.search.scoring.by_likelihood import CandidateScorer
from optimum_sieve.search.scoring.by_text import WrittenScorer
from optimum_sieve.search.scoring.scorer import JointScorer
from optimum_sieve.search.study.storage import wait_for_study
from optimum_sieve.search.study.study import SearchStudy
from optimum_sieve.surgery.live import LiveRanks
from optimum_sieve.tasks.task import metric_source
from optimum_sieve.tasks.text_metrics import metric_name

from .candidate import BOTTLENECK, CONFIRM, SEARCH
from .genome import SearchSpace
from .loop import Search, lead, work
from .presets import PRESETS
from .summary import SUMMARY, summarize


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.search.scoring.scorer import Scorer
    from optimum_sieve.tasks import Example

    from .genome import Genome
    from .presets import SearchPreset


# What candidates' scores depend on, beside the model and the task.
_SETTINGS = (
    *(*BASIS_SETTINGS, "rounds", "storage", "rank_multiple", "tolerance", "pruning_ratio"),
    *("confidence", "search_preset", "population_size", "generations", "search_fraction", "batch_size"),
)
# Raised when candidates are judged in another way, so that studies made before are left alone.
_STUDY_FORMAT = 3
# Scores on fewer examples than this drop no candidate.
_LEAST_SLICE = 16


def run_search(
    run: Run,
    bases: Mapping[str, FactorBasis],
    *,
    num_bottlenecks: int = 0,
) -> dict[str, Any]:
    """Search a rank for every target; go on where an earlier run with the same settings stopped.

    Args:
        run (`Run`): The run.
        bases (`Mapping[str, FactorBasis]`): A basis of every target.
        num_bottlenecks (`int`): Matrices of the result to lower one by one.

    Returns:
        `dict[str, Any]`: `ranks` by name (`None` = dense), `candidates` and what else the report shows; also kept in
        the work directory, as `search-<key>.json`.

    Raises:
        ValueError: If `num_bottlenecks` is negative.
        RuntimeError: If nothing within the tolerance was confirmed.
    """
    if num_bottlenecks < 0:
        raise ValueError(f"`num_bottlenecks` must be at least 0, got {num_bottlenecks}.")
    search = make_search(run, bases)
    search.num_bottlenecks = num_bottlenecks
    with open_study(run, search, bases) as study, LiveRanks(run.model, bases) as live:
        scorers = make_scorers(run, search, live)
        scored = lead(search, study, scorers, progress=run.progress)
    found = summarize(search, scored, {task.name: metric_name(task.metric) for task in run.tasks})
    if run.work.path is not None:
        path = run.work.path / f"{SUMMARY}-{study.name.removeprefix('sieve-')}.json"
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def wait_for_search(run: Run) -> None:
    """Return when the search of a run has begun, so that its bases lie in the work directory."""
    wait_for_study(_storage_url(run) or "", _study_name(run))


def join_search(run: Run, bases: Mapping[str, FactorBasis]) -> int:
    """Score candidates of a search that another process leads; return how many.

    Raises:
        ValueError: If `bases` are not those the search was made with.
    """
    search = make_search(run, bases)
    with (
        SearchStudy(_storage_url(run), _study_name(run), search.space) as study,
        LiveRanks(run.model, bases) as live,
    ):
        study.check_digest("bases", bases_digest(bases))
        scorers = make_scorers(run, search, live)
        return work(search, study, scorers, progress=run.progress)


def preset_of(run: Run) -> SearchPreset:
    """Return the preset's settings with those the configuration sets."""
    config, preset = run.config, PRESETS[run.config.search_preset]
    return dataclasses.replace(
        preset,
        population_size=config.population_size or preset.population_size,
        generations=config.generations or preset.generations,
    )


def make_search(run: Run, bases: Mapping[str, FactorBasis]) -> Search:
    """Make the search of a run."""
    config, preset = run.config, preset_of(run)
    curves = loss_curves(run, bases)
    space = SearchSpace.from_curves(curves, storage=config.storage, multiple=config.rank_multiple, levels=preset.levels)

    def allocated(allocation: str, kept: float) -> Genome:
        budget = int(kept * space.num_parameters)
        ranks = allocate(curves, budget, allocation=allocation, storage=config.storage, multiple=config.rank_multiple)
        return space.repair(ranks)

    goal = Goal(
        tolerance=config.tolerance or 0.0,
        confidence=config.confidence,
        confirm_counts=tuple(len(task.selection) - config.search_count(len(task.selection)) for task in run.tasks),
        kept=None if config.pruning_ratio is None else 1 - config.pruning_ratio,
    )
    return Search(space=space, preset=preset, goal=goal, allocate=allocated, seed=config.seed)


def make_scorers(run: Run, search: Search, live: LiveRanks) -> dict[str, JointScorer]:
    """Make the scorers of the search part and of the confirmation part of every task's selection split."""
    weights = [task.weight for task in run.tasks]
    searching = JointScorer([_search_scorer(run, task, search, live) for task in run.tasks], weights)
    confirming = JointScorer([_confirm_scorer(run, task, live) for task in run.tasks], weights)
    return {SEARCH: searching, BOTTLENECK: searching, CONFIRM: confirming}


def _search_scorer(run: Run, task: TaskRun, search: Search, live: LiveRanks) -> Scorer:
    count = run.config.search_count(len(task.selection))
    ends = sorted({max(min(_LEAST_SLICE, count), math.ceil(part * count)) for part in search.preset.slices})
    return _scorer(run, task, live, task.selection[:count], ends, task.calibration)


def _confirm_scorer(run: Run, task: TaskRun, live: LiveRanks) -> Scorer:
    count = run.config.search_count(len(task.selection))
    return _scorer(run, task, live, task.selection[count:], [len(task.selection) - count])


def _scorer(
    run: Run,
    task: TaskRun,
    live: LiveRanks,
    examples: Sequence[Example],
    ends: Sequence[int],
    more: Sequence[Example] = (),
) -> Scorer:
    kind = CandidateScorer if examples[0].generation is None else WrittenScorer
    return kind(
        live,
        examples,
        ends,
        run.tokenizer,
        metric=task.metric,
        batch_size=run.config.batch_size,
        calibration=more,
        vocabulary=run.vocabulary,
    )


def open_study(run: Run, search: Search, bases: Mapping[str, FactorBasis]) -> SearchStudy:
    """Open the study of a run: in the storage asked for, else in the work directory, else in memory.

    Raises:
        ValueError: If other bases were used for the study before.
    """
    study = SearchStudy(_storage_url(run), _study_name(run), search.space)
    study.record_digest("bases", bases_digest(bases))
    return study


def _storage_url(run: Run) -> str | None:
    if run.study_storage is not None:
        return run.study_storage
    path = run.work.path
    return None if path is None else f"sqlite:///{(path / 'search.db').resolve()}"


def _study_name(run: Run) -> str:
    """Name a study by all that its candidates' scores depend on."""
    key = run.key(
        *_SETTINGS,
        tasks=[
            [task.fingerprint("calibration"), task.fingerprint("selection"), metric_source(task.metric), task.weight]
            for task in run.tasks
        ],
        names=[target.name for target in run.targets],
        format=[CALIBRATION_FORMAT, _STUDY_FORMAT],
    )
    return f"sieve-{key}"


def bases_digest(bases: Mapping[str, FactorBasis]) -> str:
    """Return the SHA-256 of all factors."""
    digest = hashlib.sha256()
    for name in sorted(bases):
        for field, tensor in sorted(bases[name].tensors().items()):
            digest.update(f"{name} {field} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()
