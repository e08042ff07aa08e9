"""Heal a model that was pruned and saved before, against the dense model it came from."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.sizes import measure_sizes
from optimum_sieve.backbone.targets import find_targets, is_linear, linear_weight
from optimum_sieve.config.validate import check_task_weights
from optimum_sieve.evaluation.batches import tokens_fingerprint
from optimum_sieve.evaluation.scores import Evaluation, evaluate
from optimum_sieve.evaluation.teacher import Lesson, teach
from optimum_sieve.healing.loop import heal
from optimum_sieve.healing.monitor import Monitored, SelectionMonitor
from optimum_sieve.modeling.conversion import check_pruned
from optimum_sieve.modeling.experts import separate_experts
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.publish.result import TaskScores, make_result
from optimum_sieve.run.workdir import WorkDir
from optimum_sieve.tasks.several import check_tasks, naming, task_shares
from optimum_sieve.vocabulary.vocabulary import matching_vocabulary

from .checks import check_model, check_task


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.config.heal import HealConfig
    from optimum_sieve.publish.result import SieveResult
    from optimum_sieve.tasks import Task


def heal_pruned(
    model: str | Path,
    dense: str | Path,
    tasks: Sequence[Task],
    config: HealConfig,
    *,
    task_weights: Sequence[float] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    seed: int = 0,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> tuple[SieveResult, PreTrainedTokenizerBase]:
    """Load a pruned model, heal it on the calibration split, and score it beside the dense one on the test split.

    The two models are in memory one after the other.

    Args:
        model (`str | Path`): Directory or Hub id of the pruned model.
        dense (`str | Path`): Directory or Hub id of the model it was pruned from.
        tasks (`Sequence[Task]`): The tasks, mostly one.
        config ([`HealConfig`][optimum_sieve.config.heal.HealConfig]): The settings; there is one round.
        task_weights (`Sequence[float]`, *optional*): How often each task's examples are drawn, relative to the others'.
            `None`: all the same.
        dtype (`str | torch.dtype`, *optional*): Such as `"bfloat16"`; `None`: as the checkpoints were saved.
        device (`str | torch.device`, *optional*): Where to work; `None`: the GPU if there is one.
        trust_remote_code (`bool`): Whether code that lies with the models may run.
        gguf_file (`str`, *optional*): Name of a GGUF file in the dense model's repository or directory.
        seed (`int`): Seed of the examples' order.
        work_dir (`str | Path`, *optional*): Keeps the state, so that a stopped run goes on.
        progress (`bool`): Whether progress bars are shown.

    Returns:
        `tuple[SieveResult, PreTrainedTokenizerBase]`: The healed model with its report, and its tokenizer.

    Raises:
        ValueError: If `model` is not pruned, `dense` is not what it was pruned from, or a task does not fit or has no
            answers.
        OSError: If a model cannot be loaded.
    """
    pruned_config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    check_pruned(pruned_config)
    check_tasks(tasks)
    shares = task_shares(check_task_weights(task_weights), len(tasks))
    _check_answers(tasks)
    block: dict[str, Any] = copy.deepcopy(pruned_config.sieve)
    work = WorkDir(work_dir)
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}

    reduced = None
    if "vocabulary" in block:
        reduced = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    options = {**loading, "gguf_file": gguf_file}
    reference = _Reference(dense, tasks, shares, config, block["settings"], work, options, progress, reduced)
    pruned, tokenizer, _ = load_model(model, **loading)
    reference.check_fits(pruned, tokenizer)
    start = time.perf_counter()
    healing = heal(
        pruned,
        reference.lessons,
        tokenizer,
        config,
        monitor=reference.monitor,
        seed=seed,
        work=work,
        progress=progress,
    )
    seconds = {"healing": round(time.perf_counter() - start, 3)}
    settings = {**config.to_dict(), "seed": seed}
    if task_weights is not None:
        settings["task_weights"] = list(task_weights)
    after = [_score(pruned, tokenizer, task, config) for task in tasks]
    described = {**healing.to_dict(), "monitored": reference.monitor.count, "settings": settings}
    return reference.make_result(pruned, after, block, described, seconds), tokenizer


def _check_answers(tasks: Sequence[Task]) -> None:
    """Refuse tasks without gold answers, which the monitor and the test compare with."""
    for task in tasks:
        if not task.labelled:
            raise ValueError(
                f"`task` must have an `answer` to heal a pruned directory, got none in {task.name!r}. Add it to the "
                "task file, or heal while you prune."
            )


class _Reference:
    """All that is needed of the dense model, which is let go.

    `reduced` is the pruned model's tokenizer, where it has fewer tokens.
    """

    def __init__(
        self,
        dense: str | Path,
        tasks: Sequence[Task],
        shares: Sequence[float],
        config: HealConfig,
        settings: dict[str, Any],
        work: WorkDir,
        loading: dict[str, Any],
        progress: bool,
        reduced: PreTrainedTokenizerBase | None,
    ) -> None:
        self.tasks = tasks
        model, tokenizer, _ = load_model(dense, **loading)
        check_model(model)
        for task in tasks:
            with naming(task, tasks):
                check_task(task, model, tokenizer)
                if reduced is not None:
                    check_task(task, model, reduced)
                config.monitor_count(task.splits["selection"])
        separate_experts(model)
        self.linears = {name: tuple(linear_weight(m).shape) for name, m in model.named_modules() if is_linear(m)}
        self.targets = find_targets(model, settings.get("target_modules"), settings.get("exclude_modules") or ())
        self.sizes = measure_sizes(model, self.targets)
        vocabulary = None if reduced is None else matching_vocabulary(model, tokenizer, reduced)
        monitored = [_monitored(model, tokenizer, task, config, progress) for task in tasks]
        self.test = [_score(model, tokenizer, task, config) for task in tasks]
        if vocabulary is not None:
            # What is taught is about the tokens that the pruned model has.
            vocabulary.apply()
            tokenizer = vocabulary.tokenizer
        self.tokens = _tokens(model, tokenizer, tasks)
        self.lessons = [
            _lesson(model, tokenizer, task, share, config, work, progress)
            for task, share in zip(tasks, shares, strict=True)
        ]
        self.monitor = SelectionMonitor(parts=monitored, tokenizer=tokenizer, batch_size=config.rows_per_pass)

    def check_fits(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a pruned model that did not come from this one."""
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)}
        wrong = [
            name for name, layer in layers.items() if self.linears.get(name) != (layer.out_features, layer.in_features)
        ]
        if wrong:
            raise ValueError(
                f"`dense` must be the model that `model` was pruned from, got one without {len(wrong)} of its "
                f"{len(layers)} factorized layers, such as {wrong[0]!r}. Name the base model."
            )
        if _tokens(model, tokenizer, self.tasks) != self.tokens:
            raise ValueError(
                "`dense` must have the tokenizer of the model that was pruned from it, got other tokens for the same "
                "examples. Name the base model, in the revision that was pruned."
            )

    def make_result(
        self,
        pruned: PreTrainedModel,
        after: Sequence[Evaluation],
        block: dict[str, Any],
        healing: dict[str, Any],
        seconds: dict[str, float],
    ) -> SieveResult:
        """Make the result of the healed model, whose scores are `after`; `block` is what its pruning wrote."""
        return make_result(
            pruned,
            scores=[
                TaskScores(task=task.name, dense=dense, pruned=found)
                for task, dense, found in zip(self.tasks, self.test, after, strict=True)
            ],
            sizes=(self.sizes, measure_sizes(pruned, self.targets)),
            trials=[],
            settings=block["settings"],
            seconds=seconds,
            loading=None,
            base_model=block.get("base_model"),
            base_revision=block.get("base_revision"),
            vocabulary=block.get("vocabulary"),
            healing=healing,
        )


def _tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]) -> list[str]:
    inputs = input_format(model)
    return [tokens_fingerprint(task.examples("calibration", tokenizer), tokenizer, inputs) for task in tasks]


def _lesson(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    weight: float,
    config: HealConfig,
    work: WorkDir,
    progress: bool,
) -> Lesson:
    examples, size = task.examples("calibration", tokenizer), config.rows_per_pass
    teacher = teach(model, examples, tokenizer, loss=config.loss, batch_size=size, work=work, progress=progress)
    return Lesson(teacher=teacher, examples=examples, weight=weight)


def _monitored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: HealConfig, progress: bool
) -> Monitored:
    selection = task.examples("selection", tokenizer)
    examples = selection[: config.monitor_count(len(selection))]
    dense = evaluate(
        model,
        examples,
        tokenizer,
        metric=task.metric,
        batch_size=config.rows_per_pass,
        progress=progress,
        description="dense model on selection",
    )
    return Monitored(task=task.name, examples=examples, dense=dense)


def _score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: HealConfig) -> Evaluation:
    examples = task.examples("test", tokenizer)
    return evaluate(model, examples, tokenizer, metric=task.metric, batch_size=config.rows_per_pass, progress=False)
