"""The search as a stage of a run: set up from the run and its factor bases, and stored in its work directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from optimum_sieve.allocation.stage import loss_curves
from optimum_sieve.calibration.rounds import BASIS_SETTINGS
from optimum_sieve.calibration.rounds import FORMAT as CALIBRATION_FORMAT
from optimum_sieve.calibration.sampled import draws_key
from optimum_sieve.calibration.writing import are_stored, prompts_key
from optimum_sieve.config.rules import search_count
from optimum_sieve.evaluation.stage import score_cache
from optimum_sieve.metrics.identity import metric_name, metric_source, require_metric_sources
from optimum_sieve.run.checksum import sealed
from optimum_sieve.run.files import replacing
from optimum_sieve.surgery.live import LiveRanks

from .candidate import BOTTLENECK, CONFIRM, SEARCH
from .genome import SearchSpace
from .loop import Search, lead
from .presets import PRESETS
from .ranking import Goal
from .scoring.by_likelihood import CandidateScorer
from .scoring.by_text import WrittenScorer
from .scoring.scorer import JointScorer
from .study.leader import announce_texts, announced, wait_for_study, wait_for_texts
from .study.storage import naming_storage
from .study.study import SearchStudy
from .summary import SUMMARY, summarize
from .worker import work


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.tasks import Example

    from .scoring.scorer import Scorer


# Settings that candidates' scores depend on, besides the model and the task.
_SETTINGS = (
    *(*BASIS_SETTINGS, "rounds", "storage", "rank_multiple", "tolerance", "pruning_ratio"),
    *("confidence", "search_preset", "population_size", "generations", "search_fraction", "batch_size"),
)
# Raised when candidates are bred or judged in another way, so that older studies are left alone.
_STUDY_FORMAT = 4
# No candidate is dropped on fewer examples.
_LEAST_SLICE = 16


def run_search(run: Run, bases: Mapping[str, FactorBasis], *, num_bottlenecks: int = 0) -> dict[str, Any]:
    """Search a rank for every target; continue an earlier run with the same settings.

    Args:
        run (`Run`): The run.
        bases (`Mapping[str, FactorBasis]`): A basis of every target.
        num_bottlenecks (`int`): Matrices of the result to lower one by one.

    Returns:
        `dict[str, Any]`: `ranks` by name (`None` = dense), `candidates` and the other contents of the report; also
        stored in the work directory, as `search-<key>.json`.

    Raises:
        ValueError: If `num_bottlenecks` is negative.
        RuntimeError: If nothing within the tolerance was confirmed.
    """
    if num_bottlenecks < 0:
        raise ValueError(f"`num_bottlenecks` must be at least 0, got {num_bottlenecks}.")
    search = make_search(run, bases)
    search.num_bottlenecks = num_bottlenecks
    with open_study(run, search, bases) as study, LiveRanks(run.model, bases) as live:
        scored = lead(search, study, make_scorers(run, search, live), progress=run.progress)
    summary = summarize(search, scored, {task.name: metric_name(task.metric) for task in run.tasks})
    if run.work.path is not None:
        path = run.work.path / f"{SUMMARY}-{study.name.removeprefix('sieve-')}.json"
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(sealed(summary), indent=1) + "\n", encoding="utf-8")
    return summary


@contextmanager
def leading(run: Run) -> Iterator[None]:
    """Let workers know, inside the context, that this process leads the search of a run, before it has begun.

    Entered before the dense model writes answers and, with a reduced vocabulary, once more for the search itself.
    """
    url = _storage_url(run)
    if run.config.allocation != "genetic" or url is None:
        yield
        return
    with naming_storage(url), announced(url, _announced_name(run)):
        if any(task.written for task in run.tasks):
            announce_texts(url, _announced_name(run.before_reduction or run))
        yield


def wait_for_prompts(run: Run) -> None:
    """Return once the prompts that the dense model writes are in the work directory, if it writes any.

    Raises:
        ValueError: If a metric has no source, or the leader stored the prompts in another work directory.
        RuntimeError: If the process that leads the search, which writes them, gives no sign of life.
    """
    require_metric_sources(task.metric for task in run.tasks)
    url = _storage_url(run) or ""
    # The prompts of each task are read once, not with each look.
    is_stored = partial(are_stored, run, [prompts_key(run, task) for task in run.tasks])
    with naming_storage(url):
        wait_for_texts(url, _announced_name(run), is_stored)
    if not is_stored():
        raise ValueError(
            f"`work_dir` must hold the prompts that the leader's model wrote, got {run.work.path} without them. Give "
            "the worker the leader's work directory, or a copy of it."
        )


def wait_for_search(run: Run) -> None:
    """Return once the search of a run has begun and its bases are in the work directory, after [`wait_for_prompts`].

    Raises:
        RuntimeError: If the process that leads the search gives no sign of life.
    """
    url = _storage_url(run) or ""
    with naming_storage(url):
        wait_for_study(url, _study_name(run), _announced_name(run.before_reduction or run))


def join_search(run: Run, bases: Mapping[str, FactorBasis]) -> int:
    """Score candidates of a search that another process leads; return how many.

    Raises:
        ValueError: If the search was made with other bases.
        RuntimeError: If the process that leads the search died and was not started again.
    """
    search = make_search(run, bases)
    with open_study(run, search, bases) as study, LiveRanks(run.model, bases) as live:
        return work(search, study, make_scorers(run, search, live), progress=run.progress)


def make_search(run: Run, bases: Mapping[str, FactorBasis]) -> Search:
    """Make the search of a run."""
    config, preset = run.config, PRESETS[run.config.search_preset]
    sizes = {name: getattr(config, name) or getattr(preset, name) for name in ("population_size", "generations")}
    space = SearchSpace.from_curves(
        loss_curves(run, bases), storage=config.storage, multiple=config.rank_multiple, levels=preset.levels
    )
    counts = [len(task.selection) for task in run.tasks]
    goal = Goal(
        tolerance=config.tolerance or 0.0,
        confidence=config.confidence,
        confirm_counts=tuple(count - search_count(config.search_fraction, count) for count in counts),
        kept=None if config.pruning_ratio is None else 1 - config.pruning_ratio,
    )
    preset = dataclasses.replace(preset, **sizes)
    return Search(space=space, preset=preset, goal=goal, seed=config.seed)


def make_scorers(run: Run, search: Search, live: LiveRanks) -> dict[str, JointScorer]:
    """Make the scorers of the search part and of the confirmation part of every task's selection split."""

    def scorer(task: TaskRun, examples: Sequence[Example], ends: Sequence[int], **more: Sequence[Example]) -> Scorer:
        kind = CandidateScorer if examples[0].generation is None else WrittenScorer
        more_options: dict[str, Any] = {"batch_size": run.config.batch_size, "vocabulary": run.vocabulary, **more}
        more_options["model_key"] = run.model_key
        return kind(live, examples, ends, run.tokenizer, metric=task.metric, **more_options)

    searching, confirming = [], []
    for task in run.tasks:
        count = search_count(run.config.search_fraction, len(task.selection))
        ends = sorted({max(min(_LEAST_SLICE, count), math.ceil(part * count)) for part in search.preset.slices})
        searching.append(scorer(task, task.selection[:count], ends, calibration=task.calibration))
        confirming.append(scorer(task, task.selection[count:], [len(task.selection) - count]))
    weights = [task.weight for task in run.tasks]
    search_scorer = JointScorer(searching, weights)
    return {SEARCH: search_scorer, BOTTLENECK: search_scorer, CONFIRM: JointScorer(confirming, weights)}


@contextmanager
def open_study(run: Run, search: Search, bases: Mapping[str, FactorBasis]) -> Iterator[SearchStudy]:
    """Open the study of a run: in the storage asked for, else in the work directory, else in memory.

    Raises:
        ValueError: If the study was made with other bases.
        OSError: If its storage cannot be read or written, also inside the context.
    """
    url = _storage_url(run)
    with naming_storage(url), SearchStudy(url, _study_name(run), search.space) as study:
        study.record_digest("bases", bases_digest(bases))
        yield study


def _storage_url(run: Run) -> str | None:
    directory = score_cache(run, run.tasks).path
    if run.study_storage is not None or directory is None:
        return run.study_storage
    return f"sqlite:///{(directory / 'search.db').resolve()}"


def _study_name(run: Run) -> str:
    """Name a study by everything that its candidates' scores depend on."""
    key = run.key(
        *_SETTINGS,
        tasks=[_data(run, task) for task in run.tasks],
        names=[target.name for target in run.targets],
        format=[CALIBRATION_FORMAT, _STUDY_FORMAT],
        **draws_key(*run.tasks),
    )
    return f"sieve-{key}"


def _data(run: Run, task: TaskRun) -> list[Any]:
    """Return what names the data of a task: its own, and the prompts that the dense model writes before or after."""
    given = task.given or task
    names = [given.fingerprint("calibration"), given.fingerprint("selection"), metric_source(task.metric), task.weight]
    if given.unlabelled:
        names.append(given.fingerprint("unlabelled"))
    if (key := prompts_key(run, given)) is not None:
        names.append(key)
    return names


def _announced_name(run: Run) -> str:
    """Name the study in which a leader announces itself: that of its search, as soon as its vocabulary is known."""
    name = _study_name(run)
    return name if run.config.vocabulary == "whole" or run.vocabulary is not None else f"{name}-vocabulary"


def bases_digest(bases: Mapping[str, FactorBasis]) -> str:
    """Return the SHA-256 of all factors."""
    digest = hashlib.sha256()
    for name in sorted(bases):
        for field, tensor in sorted(bases[name].tensors().items()):
            digest.update(f"{name} {field} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()
