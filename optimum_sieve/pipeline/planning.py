"""Plan the run of a model on tasks: with the loaded model, or from its configuration and tokenizer alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.experts import separated_view
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.loading import dtype_of, empty_model, read_dtype
from optimum_sieve.backbone.sources import naming_model, read_config, read_tokenizer
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.calibration.losses import PROMPT_SITES
from optimum_sieve.calibration.sampled import draws_candidates, typical_draw
from optimum_sieve.calibration.writing import count_prompts
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.tune import TuneConfig
from optimum_sieve.evaluation.batches import encode, make_batches
from optimum_sieve.evaluation.encoding import encode_prompts
from optimum_sieve.evaluation.trees.arrangement import can_be_trees
from optimum_sieve.plan.candidates import describe_candidates
from optimum_sieve.plan.forecast import Forecast
from optimum_sieve.plan.hardware import device_of
from optimum_sieve.plan.healing import settle_training
from optimum_sieve.plan.memory import BatchSizes, SplitSizes
from optimum_sieve.plan.plan import make_plan
from optimum_sieve.tasks.data import INPUTS
from optimum_sieve.tasks.several import check_tasks, read_tasks
from optimum_sieve.training.negatives import drawn_copies, has_many_candidates

from .checks import check_model, check_tasks_of_run


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.backbone.kinds import InputFormat
    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.evaluation.batches import Batch
    from optimum_sieve.plan.plan import PrunePlan
    from optimum_sieve.tasks import Example, Task
    from optimum_sieve.vocabulary import TaskVocabulary


def forecast_tasks(
    model: str | Path,
    task: str | Path | dict[str, Any] | Task | Sequence[str | Path | dict[str, Any] | Task],
    config: SieveConfig,
    *,
    hardware: str = "this",
    dtype: str = "bfloat16",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Forecast:
    """Predict the cost of a run from a model's configuration and tokenizer; its weights are not read.

    A model is assumed to take the candidates of an example as one tree, which a run tries.

    Args:
        model (`str | Path`): Hub id or directory of the model.
        task (`str | Path | dict | Task`): Task file, its content, or a task; or a sequence of those.
        config (`SieveConfig`): The settings. The vocabulary counts as whole.
        hardware (`str`): One of `plan.hardware.HARDWARE`, a single device. `"this"` measures this machine.
        dtype (`str`): Type that the model is loaded in.
        revision (`str`, *optional*): Revision on the Hub.
        trust_remote_code (`bool`): Whether to run code that is saved with the model or named by an `lm_eval` task.

    Raises:
        OSError: If there is no configuration or no tokenizer.
        ValueError: If a task, an example or the model breaks a rule, or the `memory_limit` is too low.
    """
    read_dtype(dtype)
    tasks = read_tasks(task, trust_remote_code=trust_remote_code)
    check_tasks(tasks)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    described = read_config(model, **options)
    with naming_model(model):
        kind = dtype_of(described, dtype)
        tokenizer = read_tokenizer(model, **options)
        empty = empty_model(described)
    empty.to(dtype=kind)  # type: ignore[call-arg]
    check_model(empty)
    check_tasks_of_run(empty, tokenizer, tasks, config)
    targets = find_targets(separated_view(empty), config.target_modules, config.exclude_modules)
    plan = plan_run(empty, tokenizer, tasks, targets, None, config, device_of(hardware))
    return Forecast.of(plan, hardware, kind)


def plan_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    targets: list[Target],
    vocabulary: TaskVocabulary | None,
    config: SieveConfig,
    device: torch.device | None = None,
) -> PrunePlan:
    """Plan a run whose inputs were checked. It computes on the device of the weights, if no other one is given.

    Raises:
        ValueError: If the `memory_limit` is too low; the message gives the lowest one.
    """
    sizes = [_task_sizes(model, tokenizer, task, config) for task in tasks]
    splits = {
        task.name: task.splits | ({"written": size.written.examples} if size.written.examples else {})
        for task, size in zip(tasks, sizes, strict=True)
    }
    batch = _batch_sizes(sizes)
    view = separated_view(model)
    candidates = candidate_costs(model, tokenizer, tasks)
    labelled = all(task.labelled for task in tasks)
    has_offsets = any(task.labelled and task.kind == "labels" for task in tasks)

    def plan_of(settled: SieveConfig) -> PrunePlan:
        return make_plan(
            view, targets, settled, splits, batch, vocabulary, candidates,
            labelled=labelled, has_offsets=has_offsets, device=device,
        )  # fmt: skip

    plan = plan_of(settle_training(config, plan_of, labelled=labelled))
    if plan.blocks is None or not batch.written.examples:
        return plan
    # With one block in memory no prompts are written.
    without = replace(config, written_prompts=0)
    return plan_run(model, tokenizer, tasks, targets, vocabulary, without, device)


def _batch_sizes(sizes: Sequence[BatchSizes]) -> BatchSizes:
    """Return the sizes of all tasks from those of each."""
    splits: dict[str, SplitSizes] = {}
    for size in sizes:
        for split, total in size.splits.items():
            splits[split] = splits.get(split, SplitSizes()) + total
    drawn = {stage for size in sizes for stage in size.drawn}
    return BatchSizes(
        tokens=max(size.tokens for size in sizes),
        logits=max(size.logits for size in sizes),
        states=max(size.states for size in sizes),
        splits=splits,
        drawn={stage: sum((size.seen(stage) for size in sizes), SplitSizes()) for stage in drawn},
        written=sum((size.written for size in sizes), SplitSizes()),
    )


def _task_sizes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: SieveConfig
) -> BatchSizes:
    """Measure the batches of all splits of a task."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    batched = partial(make_batches, tokenizer=tokenizer, batch_size=config.batch_size, model=model)
    written = task.kind == "generate"
    examples = {split: task.examples(split, tokenizer) for split in task.splits}
    # A loss needs all candidates of an example, a score does not.
    batches = {
        split: batched(each, candidates=not written, divide=split not in INPUTS)
        for split, each in examples.items()
        if split in INPUTS or not written
    }
    splits = {split: _total(each, vocabulary) for split, each in batches.items()}
    splits |= {
        split: _written(model, tokenizer, each, vocabulary) for split, each in examples.items() if split not in splits
    }
    taken = [example for split in INPUTS for example in examples.get(split, ())]
    states = max(splits[split].tokens for split in INPUTS if split in splits)
    count = count_prompts(model, taken, tokenizer, config)
    if count:
        # Those that are written count like those there are.
        more = splits["calibration"].times(count / splits["calibration"].examples)
        splits["unlabelled"] = splits.get("unlabelled", SplitSizes()) + more
    # Calibration on written answers also needs logits of the prompts.
    prompts = config.batch_size * PROMPT_SITES if written else 0
    every = [batch for each in batches.values() for batch in each]
    return BatchSizes(
        tokens=max(batch.input_ids.numel() for batch in every),
        logits=(max(len(batch.sites) for batch in every) + prompts) * vocabulary,
        states=states,
        splits=splits,
        drawn={
            stage: _total(batched(fewer), vocabulary).times(1 + count / len(taken))
            for stage, fewer in _drawn(taken, tokenizer, input_format(model), config).items()
        },
        written=_more_prompts(count, taken, tokenizer, input_format(model), vocabulary),
    )


def _more_prompts(
    count: int, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat, vocabulary: int
) -> SplitSizes:
    """Return what writing prompts computes: as many tokens are read before as are written."""
    if not count:
        return SplitSizes()
    tokens = round(count * sum(map(len, encode_prompts(examples, tokenizer, inputs))) / len(examples))
    return SplitSizes(examples=count, tokens=2 * tokens, logits=tokens * vocabulary)


def _drawn(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat, config: SieveConfig
) -> dict[str, list[Example]]:
    """Return examples with as many candidates as each stage sees that draws some of many."""
    drawn = {}
    if draws_candidates(config, examples, tokenizer, inputs):
        drawn["moments"] = typical_draw(examples, config)
    trainings = {
        "tuning": TuneConfig() if config.tune == "auto" else config.tune,
        "healing": HealConfig() if config.heal == "auto" else config.heal,
    }
    for stage, training in trainings.items():
        most = training.max_candidates if isinstance(training, TuneConfig | HealConfig) else 0
        if has_many_candidates(examples, most, tokenizer, inputs):
            drawn[stage] = drawn_copies(examples, most, 1, seed=config.seed)[0]
    return drawn


def _total(batches: Sequence[Batch], vocabulary: int) -> SplitSizes:
    return SplitSizes(
        examples=len({index for batch in batches for index in batch.indices}),
        tokens=sum(batch.input_ids.numel() for batch in batches),
        logits=sum(len(batch.sites) for batch in batches) * vocabulary,
    )


def _written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], vocabulary: int
) -> SplitSizes:
    """Return what writing the answers computes, each as long as it may become."""
    prompts = sum(map(len, encode_prompts(examples, tokenizer, input_format(model))))
    written = sum(example.generation.max_new_tokens for example in examples if example.generation is not None)
    return SplitSizes(examples=len(examples), tokens=prompts + written, logits=written * vocabulary)


def candidate_costs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> dict[str, str]:
    """Say for each task what the candidates of its calibration examples cost; nothing where they have no tokens."""
    inputs = input_format(model)
    costs = {}
    for task in tasks:
        if task.kind == "generate" or inputs.kind == "classification":
            continue
        rows = encode(task.examples("calibration", tokenizer), tokenizer, candidates=True, inputs=inputs)
        branching = [row for row in rows if len(row.rows) > 1]
        costs[task.name] = describe_candidates(rows, trees=not branching or can_be_trees(branching, model))
    return costs
