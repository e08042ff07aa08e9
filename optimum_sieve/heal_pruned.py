"""Heal a model that was pruned and saved before, against the dense model it came from."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer

from .checks import check_model, check_task
from .evaluation import evaluate
from .experts import separate_experts
from .export import check_pruned
from .healer import SelectionMonitor
from .healing import heal
from .inputs import input_format
from .layers import FactorizedLinear
from .loading import load_model
from .plan import measure_sizes
from .result import make_result
from .scoring import tokens_fingerprint
from .targets import find_targets, is_linear, linear_weight
from .teacher import teach
from .vocabulary.vocabulary import matching_vocabulary
from .workdir import WorkDir


if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .heal_config import HealConfig
    from .result import SieveResult
    from .tasks import Task


def heal_pruned(
    model: str | Path,
    dense: str | Path,
    task: Task,
    config: HealConfig,
    *,
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
        task (`Task`): The task.
        config ([`HealConfig`][optimum_sieve.heal_config.HealConfig]): The settings; there is one round.
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
        ValueError: If `model` is not pruned, `dense` is not what it was pruned from, or the task does not fit or has no
            answers.
        OSError: If a model cannot be loaded.
    """
    pruned_config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    check_pruned(pruned_config)
    if not task.labelled:
        raise ValueError(
            f"`task` must have an `answer` to heal a pruned directory, got none in {task.name!r}. Add it to the task "
            "file, or heal while you prune."
        )
    block: dict[str, Any] = copy.deepcopy(pruned_config.sieve)
    work = WorkDir(work_dir)
    seconds: dict[str, float] = {}
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}

    given = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    reduced = given if "vocabulary" in block else None
    options = {**loading, "gguf_file": gguf_file}
    reference = _Reference(dense, task, config, block["settings"], work, options, progress, reduced)
    pruned, tokenizer, _ = load_model(model, **loading)
    reference.check_fits(pruned, tokenizer, task)
    start = time.perf_counter()
    healing = heal(
        pruned,
        reference.teacher,
        tokenizer,
        task.examples("calibration", tokenizer),
        config,
        monitor=reference.monitor,
        seed=seed,
        work=work,
        progress=progress,
    )
    seconds["healing"] = round(time.perf_counter() - start, 3)
    result = make_result(
        pruned,
        scores=(reference.test, _score(pruned, tokenizer, task, "test", config)),
        sizes=(reference.sizes, measure_sizes(pruned, reference.targets)),
        trials=[],
        task=task.name,
        settings=block["settings"],
        seconds=seconds,
        loading=None,
        references=None,
        base_model=block.get("base_model"),
        base_revision=block.get("base_revision"),
        vocabulary=block.get("vocabulary"),
        healing={
            **healing.to_dict(),
            "monitored": reference.monitor.dense.count,
            "settings": {**config.to_dict(), "seed": seed},
        },
    )
    return result, tokenizer


class _Reference:
    """All that is needed of the dense model, which is let go.

    `reduced` is the pruned model's tokenizer, where it has fewer tokens.
    """

    def __init__(
        self,
        dense: str | Path,
        task: Task,
        config: HealConfig,
        settings: dict[str, Any],
        work: WorkDir,
        loading: dict[str, Any],
        progress: bool,
        reduced: PreTrainedTokenizerBase | None,
    ) -> None:
        model, tokenizer, _ = load_model(dense, **loading)
        check_model(model)
        check_task(task, model, tokenizer)
        separate_experts(model)
        self.linears = {name: tuple(linear_weight(m).shape) for name, m in model.named_modules() if is_linear(m)}
        self.targets = find_targets(model, settings.get("target_modules"), settings.get("exclude_modules") or ())
        self.sizes = measure_sizes(model, self.targets)
        selection = task.examples("selection", tokenizer)
        monitored = selection[: config.monitor_count(len(selection))]
        dense_score = evaluate(
            model,
            monitored,
            tokenizer,
            metric=task.metric,
            batch_size=config.rows_per_pass,
            progress=progress,
            description="dense model on selection",
        )
        self.test = _score(model, tokenizer, task, "test", config)
        if reduced is not None:
            # What is taught is about the tokens that the pruned model has.
            matching_vocabulary(model, tokenizer, reduced).apply()
            tokenizer = reduced
        self.monitor = SelectionMonitor(
            examples=monitored, dense=dense_score, tokenizer=tokenizer, batch_size=config.rows_per_pass
        )
        calibration = task.examples("calibration", tokenizer)
        self.tokens = tokens_fingerprint(calibration, tokenizer, input_format(model))
        self.teacher = teach(
            model,
            calibration,
            tokenizer,
            loss=config.loss,
            batch_size=config.rows_per_pass,
            work=work,
            progress=progress,
        )

    def check_fits(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
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
        found = tokens_fingerprint(task.examples("calibration", tokenizer), tokenizer, input_format(model))
        if found != self.tokens:
            raise ValueError(
                "`dense` must have the tokenizer of the model that was pruned from it, got other tokens for the same "
                "examples. Name the base model, in the revision that was pruned."
            )


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, split: str, config: HealConfig
) -> Any:
    examples = task.examples(split, tokenizer)
    return evaluate(model, examples, tokenizer, metric=task.metric, batch_size=config.rows_per_pass, progress=False)
