"""Make the run of what a user passed, with everything checked before any long work."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.experts import separated_view
from optimum_sieve.backbone.fingerprint import model_key
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.offloading import holds_offloaded
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.calibration.sampled import draws_candidates
from optimum_sieve.calibration.writing import with_written_prompts
from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.evaluation.labelling import with_answers
from optimum_sieve.evaluation.stage import examples_fingerprint
from optimum_sieve.metrics.identity import require_metric_sources
from optimum_sieve.modeling.experts import separate_experts
from optimum_sieve.plan.certainty import warn_of_few_examples
from optimum_sieve.plan.healing import settle_training
from optimum_sieve.run import distributed
from optimum_sieve.run.context import Run, TaskRun
from optimum_sieve.run.workdir import WorkDir
from optimum_sieve.tasks.data import INPUTS
from optimum_sieve.tasks.several import naming, task_shares

from .checks import check_task, check_tasks_of_run, check_weights
from .planning import plan_run
from .usable import called_targets, tell_left_out


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.plan.plan import PrunePlan
    from optimum_sieve.tasks import Task
    from optimum_sieve.vocabulary import TaskVocabulary


def check_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], config: SieveConfig
) -> list[Target]:
    """Check the tasks, their examples and the layers; return the targets.

    Raises:
        ValueError: If something does not fit; the message names it and, with several tasks, the task.
    """
    if not isinstance(config, SieveConfig):
        raise TypeError(
            f"`config` must be a `SieveConfig`, got {type(config).__name__}. Pass for example "
            "`SieveConfig(tolerance=0.02)`."
        )
    targets = find_targets(model, config.target_modules, config.exclude_modules)
    if config.target_modules is None:
        tell_left_out(model)
    check_weights(model, targets)
    check_tasks_of_run(model, tokenizer, tasks, config)
    return targets


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], config: SieveConfig
) -> TaskVocabulary | None:
    """Return the vocabulary of the calibration splits, without the model's own answers; `None` for the whole one.

    Raises:
        ValueError: If the tokenizer or the model cannot be reduced to it, or an example tokenized with it cannot be
            scored.
    """
    if config.vocabulary == "whole":
        return None

    from optimum_sieve.vocabulary import task_vocabulary

    examples = [
        example
        for task in tasks
        for split in INPUTS
        if split in task.splits
        for example in task.examples(split, tokenizer)
    ]
    vocabulary = task_vocabulary(model, tokenizer, examples, size=config.vocabulary_size)
    for task in tasks:
        with naming(task, tasks):
            check_task(task, model, vocabulary.tokenizer)
    return vocabulary


def check_and_plan(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], config: SieveConfig
) -> PrunePlan:
    """Check everything as [`prepare`] does, and plan the run. The model does not change.

    Raises:
        ValueError: If the settings, the model or the data break a rule.
    """
    targets = check_inputs(separated_view(model), tokenizer, tasks, config)
    targets = called_targets(model, tokenizer, tasks, targets)
    return plan_run(model, tokenizer, tasks, targets, check_vocabulary(model, tokenizer, tasks, config), config)


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    config: SieveConfig,
    *,
    work_dir: str | Path | None,
    study_storage: str | None,
    progress: bool,
) -> Run:
    """Check everything, separate fused experts and return the run. After an error the model is unchanged.

    Raises:
        ValueError: If the settings, the model or the data break a rule.
        OSError: If the work directory cannot be used.
    """
    if study_storage is not None:
        require_metric_sources(task.metric for task in tasks)
    view = separated_view(model)
    targets = called_targets(model, tokenizer, tasks, check_inputs(view, tokenizer, tasks, config))
    vocabulary = check_vocabulary(model, tokenizer, tasks, config)
    # A plan tokenizes all examples, so it is made only if needed.
    limited = config.memory_limit is not None or holds_offloaded(model)
    plan_of = partial(plan_run, model, tokenizer, tasks, targets, vocabulary)
    labelled = all(task.labelled for task in tasks)
    config = settle_training(config, plan_of, labelled=labelled, limited=limited)
    by_block = limited and plan_of(config).blocks is not None
    warn_of_few_examples({task.name: task.splits for task in tasks}, config)
    work = WorkDir.temporary() if work_dir is None and by_block else WorkDir(work_dir)
    runs = task_runs(model, tokenizer, tasks, config)
    separate_experts(model)
    is_stored = work.path is not None or study_storage is not None
    return Run(
        model=model,
        tokenizer=tokenizer,
        config=config,
        targets=targets,
        tasks=runs,
        work=work,
        by_block=by_block,
        progress=progress and distributed.is_first(),
        # It names stored results alone, and takes as long as reading all weights.
        model_key=model_key(model) if is_stored else "",
        study_storage=study_storage,
    )


def with_texts(run: Run, *splits: str) -> Run:
    """Return the run with the answers and prompts that its dense model writes where the data has none, or few."""
    return with_written_prompts(with_answers(run, *splits))


def task_runs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], config: SieveConfig
) -> tuple[TaskRun, ...]:
    """Render the examples of every task with the tokenizer and hash those of each split."""
    shares = task_shares(config.task_weights, len(tasks))
    return tuple(_task_run(model, tokenizer, config, *each) for each in zip(tasks, shares, strict=True))


def _task_run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SieveConfig, task: Task, share: float
) -> TaskRun:
    examples: dict[str, Any] = {split: task.examples(split, tokenizer) for split in task.splits}
    taken = [example for split in INPUTS for example in examples.get(split, ())]
    return TaskRun(
        name=task.name,
        metric=task.metric,
        fingerprints={split: examples_fingerprint(model, tokenizer, rendered) for split, rendered in examples.items()},
        weight=share,
        labelled=task.labelled,
        kind=task.kind,
        draws=draws_candidates(config, taken, tokenizer, input_format(model)),
        **examples,
    )
