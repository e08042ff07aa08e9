"""From what a user gives to the setting of a run: everything is checked before any long work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import __version__
from .checks import check_task, check_vocabulary, check_weights
from .experts import separate_experts
from .inputs import input_format
from .scoring import tokens_fingerprint
from .setting import Setting
from .targets import find_targets
from .tasks.data import SPLITS
from .workdir import WorkDir, architecture, content_key, model_fingerprint


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import SieveConfig
    from .targets import Target
    from .tasks import Task


def check_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: SieveConfig
) -> list[Target]:
    """Return the targets; refuse examples or layers that do not fit.

    Raises:
        ValueError: The message names what does not fit.
    """
    separate_experts(model)
    targets = find_targets(model, config.target_modules, config.exclude_modules)
    check_weights(model, targets)
    if not task.labelled and config.label_source == "data":
        raise ValueError(
            "`answer` must be given in the task file where label_source='data', got none. To hold the pruned model to "
            "the dense one's own answers instead, set label_source='model'."
        )
    check_task(task, model, tokenizer)
    if config.vocabulary == "task":
        check_vocabulary(task, model, tokenizer, config.vocabulary_size)
    if config.allocation == "genetic":
        if task.kind == "generate":
            raise ValueError(
                "`allocation='genetic'` must go with a task of the kind labels or choices, got the kind 'generate': "
                "patterns are judged by the distribution over an example's candidates. Use 'energy' or 'uniform'."
            )
        config.search_count(task.splits["selection"])
    if config.heal is not None:
        config.heal.monitor_count(task.splits["selection"])
    return targets


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: SieveConfig,
    *,
    work_dir: str | Path | None,
    study_storage: str | None,
    progress: bool,
) -> Setting:
    """Check everything and return the setting of a run.

    Raises:
        ValueError: If the settings, the model or the data break a rule.
        OSError: If the work directory cannot be used.
    """
    # Healed sizes are too dear to be forgotten during a search, which takes up the best one again.
    searches_healed = config.heal is not None and config.tolerance is not None
    return Setting(
        model=model,
        tokenizer=tokenizer,
        config=config,
        metric=task.metric,
        targets=check_inputs(model, tokenizer, task, config),
        work=WorkDir.temporary() if work_dir is None and searches_healed else WorkDir(work_dir),
        fingerprint=_fingerprint(model, tokenizer, task),
        progress=progress,
        study_storage=study_storage,
    )


def _fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    """Hash everything but the settings that results depend on: weights, architecture, tokens, this package."""
    inputs = input_format(model)
    return content_key(
        model=model_fingerprint(model),
        architecture=architecture(model),
        task=task.fingerprint(),
        tokens=[tokens_fingerprint(task.examples(split, tokenizer), tokenizer, inputs) for split in SPLITS],
        version=__version__,
    )
