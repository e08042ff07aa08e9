"""Evaluation as a stage of a run: scores and answers of the run's model, scores cached in the work directory."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve.allocation.certainty import LEAST_LOOK, LOOKS, is_settled
from optimum_sieve.backbone.fingerprint import tokenizer_fingerprint
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.metrics.identity import metric_source
from optimum_sieve.metrics.scored import EXAMPLES
from optimum_sieve.modeling.label_offsets import shared_candidates
from optimum_sieve.run import distributed
from optimum_sieve.run.context import WHOLE
from optimum_sieve.run.workdir import WorkDir, content_key

from .batches import tokens_fingerprint
from .blockwise import evaluate_by_block
from .comparison import Comparison, compare
from .likelihoods import fit_offsets
from .scores import Evaluation, evaluate, evaluation_of, evaluation_of_texts


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.metrics.identity import Metric
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.tasks import Example

# Raise it when the same model and examples give another evaluation: those of earlier versions are then computed again.
_FORMAT = 1


def examples_fingerprint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> str:
    """Hash examples: their texts, the token ids that the model receives and, for written answers, the tokenizer."""
    tokens = tokens_fingerprint(examples, tokenizer, input_format(model))
    # It decodes what the model writes.
    decoder = None if examples[0].generation is None else tokenizer_fingerprint(tokenizer)
    return content_key(texts=[astuple(example) for example in examples], tokens=tokens, decoder=decoder)


def score_cache(run: Run, tasks: Sequence[TaskRun]) -> WorkDir:
    """Return the work directory for results that depend on the metrics of tasks.

    It has no path if a metric cannot be identified, since another one would have the same cache key.
    """
    return WorkDir(None) if any(metric_source(task.metric) is None for task in tasks) else run.work


def score(
    run: Run,
    task: TaskRun,
    split: str,
    part: slice = WHOLE,
    *,
    label: str,
    pruned: str | None = None,
    held: tuple[Mapping[str, FactorBasis], Mapping[str, int | None]] | None = None,
    known: Evaluation | None = None,
) -> Evaluation:
    """Evaluate the model as it is now on a split, or take the evaluation from the work directory.

    Args:
        run (`Run`): The run.
        task (`TaskRun`): The task.
        split (`str`): The split.
        part (`slice`): Part of its examples.
        label (`str`): Name of the model for the progress bar.
        pruned (`str`, *optional*): Hash of what makes the model differ from the dense one. `None`: it is dense.
        held (`tuple`, *optional*): Bases and ranks to hold during the evaluation, block by block.
        known (`Evaluation`, *optional*): Evaluation of the first of these examples, which are not evaluated again.
    """
    if (found := _stored(run, task, split, part, pruned)) is not None:
        return found
    work, key = _place(run, task, split, part, pruned)
    examples = task.examples(split, part)[0 if known is None else known.count :]
    options: dict[str, Any] = {"metric": task.metric, "batch_size": run.config.batch_size}
    options |= {"progress": run.progress, "description": f"{label} on {split}"}
    if run.by_block and examples[0].generation is None:
        bases, ranks = held or ({}, {})
        options |= {"bases": bases, "ranks": ranks, "directory": run.work.path}
        evaluation = evaluate_by_block(run.model, examples, run.tokenizer, **options)
    else:
        evaluation = evaluate(run.model, examples, run.tokenizer, **options)
    if known is not None:
        evaluation = _joined(known, evaluation, task.examples(split, part), task.metric)
    path = work.file("evaluation", key)
    if path is not None and distributed.is_first():
        evaluation.save(path)
    distributed.wait()
    work.keep("evaluation", key, evaluation)
    return evaluation


def _stored(run: Run, task: TaskRun, split: str, part: slice, pruned: str | None) -> Evaluation | None:
    """Return an evaluation from the work directory; `None` if it is not there."""
    work, key = _place(run, task, split, part, pruned)
    kept: Evaluation | None = work.kept("evaluation", key)
    if kept is not None:
        return kept
    path = work.find("evaluation", key)
    return None if path is None else Evaluation.load(path, verify=False)


def _place(run: Run, task: TaskRun, split: str, part: slice, pruned: str | None) -> tuple[WorkDir, str]:
    """Return where an evaluation is stored, and under which key."""
    inputs = {"examples": task.fingerprint(split, part), "metric": metric_source(task.metric), "pruned": pruned}
    # A pruned model may be healed, and then depends on the metrics of all tasks.
    return score_cache(run, [task] if pruned is None else run.tasks), run.key(**inputs, format=_FORMAT)


def _joined(first: Evaluation, rest: Evaluation, examples: Sequence[Example], metric: Metric) -> Evaluation:
    """Return the evaluation of all examples from that of the first ones and that of the rest."""
    if first.texts:
        return evaluation_of_texts([*first.texts, *rest.texts], examples, metric)
    scores = np.full((len(examples), max(first.log_probs.shape[1], rest.log_probs.shape[1])), -np.inf)
    for each, rows in ((first, slice(first.count)), (rest, slice(first.count, None))):
        scores[rows, : each.log_probs.shape[1]] = each.log_probs
    return evaluation_of(scores, examples, metric)


def _first_ones(evaluation: Evaluation, examples: Sequence[Example], metric: Metric) -> Evaluation:
    """Return the evaluation of the first examples alone."""
    count = len(examples)
    if evaluation.texts:
        return evaluation_of_texts(evaluation.texts[:count], examples, metric)
    # Others may have more candidates.
    width = max(len(example.candidates) for example in examples)
    return evaluation_of(evaluation.log_probs[:count, :width], examples, metric)


def compare_pruned(run: Run, task: TaskRun, reference: Evaluation, **options: Any) -> Comparison:
    """Compare a pruned model, with label offsets, with `reference` on the selection split.

    Of many examples, a quarter is scored first. It decides alone if the rest would hardly change whether the size is
    within the tolerance, see [`is_settled`][optimum_sieve.allocation.certainty.is_settled]. The examples of a split are
    in random order. The options are of [`score`].

    All processes get the comparison of the first one, since theirs may differ by rounding.
    """

    def scored(part: slice, known: Evaluation | None) -> Evaluation:
        return score(run, task, "selection", part, known=known, **options)

    def adjusted(evaluation: Evaluation, part: slice) -> Evaluation:
        return _with_own_offsets(run, task, evaluation, part)

    limits = {"tolerance": run.config.tolerance or 0.0, "confidence": run.config.confidence}
    return distributed.agree(compare(*_as_far_as_needed(task, reference, scored, adjusted, **limits)))


def compare_tuned(run: Run, task: TaskRun, before: Evaluation) -> tuple[Evaluation, Evaluation]:
    """Evaluate the tuned model, which the run must hold now, on as many selection examples as show if it is better.

    Returns:
        `tuple[Evaluation, Evaluation]`: The model before tuning, evaluated in `before`, and after it, on the same
        examples.
    """

    def scored(part: slice, known: Evaluation | None) -> Evaluation:
        return score_dense(run, task, "selection", part, known=known)

    return _as_far_as_needed(task, before, scored, lambda evaluation, part: evaluation, tolerance=0.0, confidence=0.5)


def _as_far_as_needed(
    task: TaskRun,
    reference: Evaluation,
    scored: Callable[[slice, Evaluation | None], Evaluation],
    adjusted: Callable[[Evaluation, slice], Evaluation],
    *,
    tolerance: float,
    confidence: float,
) -> tuple[Evaluation, Evaluation]:
    """Return the evaluations to compare: of a quarter of the selection examples, if it decides, or of all."""
    part = _first_look(task)
    first = None
    # A part of the examples is a fair sample of a mean. Other metrics may weigh a class that it lacks like any other.
    if part.stop >= LEAST_LOOK and reference.error_method == EXAMPLES:
        first = scored(part, None)
    if first is not None and first.error_method == EXAMPLES:
        examples = task.examples("selection", part)
        before = _first_ones(reference, examples, task.metric)
        after = adjusted(first, part)
        found = distributed.agree(compare(before, after))
        if is_settled(
            found.mean, found.standard_error, found.count, len(task.selection), tolerance=tolerance,
            confidence=confidence,
        ):  # fmt: skip
            return before, after
    return reference, adjusted(scored(WHOLE, first), WHOLE)


def _first_look(task: TaskRun) -> slice:
    """Return the part of the selection examples that is scored first."""
    return slice(len(task.selection) // LOOKS)


def compare_selection(run: Run, reference: Sequence[Evaluation], **options: Any) -> dict[str, Comparison]:
    """Compare a pruned model with the reference of every task, see [`compare_pruned`]; return comparisons by task."""
    pairs = zip(run.tasks, reference, strict=True)
    return {task.name: compare_pruned(run, task, before, **options) for task, before in pairs}


def _with_own_offsets(run: Run, task: TaskRun, selection: Evaluation, part: slice = WHOLE) -> Evaluation:
    """Return an evaluation on the selection split with the label offsets that it gives."""
    offsets = label_offsets(run, task, selection) if offset_candidates(run, task) else None
    return with_offsets(task, "selection", selection, offsets, part)


def offset_candidates(run: Run, task: TaskRun) -> tuple[str, ...]:
    """Return the labels of a task that get offsets; none if the settings, or answers that differ, exclude them."""
    if run.config.label_offsets == "none" or not task.labelled:
        return ()
    return shared_candidates([*task.calibration, *task.selection, *task.test])


def label_offsets(run: Run, task: TaskRun, selection: Evaluation) -> NDArray[np.float64]:
    """Return the offsets (candidates,) that restore the shares of a task's labels.

    With them, the mean probability of each label on the selection prompts explains how often it is the gold answer in
    the calibration split, see [`fit_offsets`][optimum_sieve.evaluation.likelihoods.fit_offsets]. No gold answer of the
    selection split is used, so the comparison on it stays fair.

    Args:
        run (`Run`): The run.
        task (`TaskRun`): The task, see [`offset_candidates`].
        selection (`Evaluation`): Evaluation of the pruned model on the selection split, without offsets.
    """
    labels = selection.log_probs.shape[1]
    counts = np.bincount([example.target or 0 for example in task.calibration], minlength=labels)
    return fit_offsets(selection.log_probs, counts.astype(np.float64))


def with_offsets(
    task: TaskRun, split: str, evaluation: Evaluation, offsets: NDArray[np.float64] | None, part: slice = WHOLE
) -> Evaluation:
    """Return an evaluation with offsets added to the log-likelihoods of the labels."""
    if offsets is None:
        return evaluation
    return evaluation_of(evaluation.log_probs + offsets, task.examples(split, part), task.metric)


def score_dense(run: Run, task: TaskRun, split: str, part: slice = WHOLE, **options: Any) -> Evaluation:
    """Evaluate the dense model, tuned or not, which the run must hold now, with its original vocabulary."""
    options |= {"label": "dense model" if run.tuning is None else "tuned model"}
    if run.vocabulary is None or run.before_reduction is None:
        return score(run, task, split, part, **options)
    with run.vocabulary.undone():
        return score(run.before_reduction, task, split, part, **options)


def score_reference(run: Run) -> tuple[Evaluation, ...]:
    """Return the run's `reference`, or evaluate the model that the run holds now in its place."""
    return run.reference or tuple(score_dense(run, task, "selection") for task in run.tasks)


def score_test_dense(run: Run) -> list[Evaluation]:
    """Evaluate the dense model on the test split of every task."""
    with run.timed("test"):
        return [score_dense(run, task, "test") for task in run.tasks]


def score_test_pruned(run: Run, pruned: str | None = None) -> tuple[list[Evaluation], list[dict[str, Any]]]:
    """Evaluate the pruned model, which the run must hold now, on the test split of every task, with label offsets.

    The work directory is used only for the predictions on the selection split that the offsets are fitted to, if
    `pruned`, a hash as for [`score`], names what was accepted. If a part of the split was enough to accept it, the rest
    is scored now.

    Returns:
        `tuple[list[Evaluation], list[dict]]`: The evaluations, and the offsets for the model's configuration.
    """
    fresh = replace(run, work=WorkDir(None))
    evaluations, stored = [], []
    with run.timed("test"):
        for task in run.tasks:
            offsets = None
            if candidates := offset_candidates(run, task):
                scored = fresh if pruned is None else run
                known = _stored(scored, task, "selection", _first_look(task), pruned)
                selection = score(scored, task, "selection", label="pruned model", pruned=pruned, known=known)
                offsets = label_offsets(run, task, selection)
                stored.append({"candidates": list(candidates), "offsets": offsets.tolist()})
            test = score(fresh, task, "test", label="pruned model")
            evaluations.append(with_offsets(task, "test", test, offsets))
    return evaluations, stored
