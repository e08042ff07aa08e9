r"""Heal a pruned model: train its factors for a fixed number of steps to match the dense model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from optimum_sieve.backbone.fingerprint import model_key
from optimum_sieve.backbone.training import training_only
from optimum_sieve.evaluation.teacher import lessons_fingerprint
from optimum_sieve.run.workdir import WorkDir, content_key
from optimum_sieve.training.adapters import Adapters
from optimum_sieve.training.loop import HEALING, Part, Trainer

from .factors import HeldAsFactors, factor_names, norm_parameters, trained_parameters


if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.config.heal import HealConfig
    from optimum_sieve.evaluation.batches import Batch
    from optimum_sieve.evaluation.teacher import Lesson
    from optimum_sieve.training.steps import Training


# Raise it when the same settings give other weights: results of earlier versions are then computed again.
FORMAT = 6


def heal(
    model: PreTrainedModel,
    lessons: Sequence[Lesson],
    tokenizer: PreTrainedTokenizerBase,
    config: HealConfig,
    *,
    seed: int = 0,
    steps_before: int = 0,
    work: WorkDir | None = None,
    pruned_key: str | None = None,
    progress: bool = True,
) -> Training:
    r"""Train the factors of a pruned model, in place, to match the dense model.

    The loss of an example is \((1 - w)\, \mathrm{KL}(\text{dense} \Vert \text{model}) - w \log p(\text{gold})\) with
    the gold weight \(w\). Examples of several lessons are drawn in proportion to the lessons' weights. Trained are LoRA
    adapters of both factors, which are merged into them, or all entries. Ranks and storage do not change. There is no
    dropout. Under `accelerate launch` the processes divide the passes of each step.

    Args:
        model (`PreTrainedModel`): A model with factorized layers, converted to type `sieve` or not.
        lessons (`Sequence[Lesson]`): The calibration examples of each task with the dense model's predictions, see
            [`teach`][optimum_sieve.evaluation.teacher.teach].
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        config ([`HealConfig`][optimum_sieve.config.heal.HealConfig]): The settings.
        seed (`int`): Seed of the adapters and of the examples' order.
        steps_before (`int`): Steps taken before, at larger sizes; their examples are not drawn again in this epoch.
        work (`WorkDir`, *optional*): Stores the state every `SAVE_STEPS` steps, and the result.
        pruned_key (`str`, *optional*): Hash of the pruned model. Default: computed from all of its weights.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`Training`][optimum_sieve.training.steps.Training]: Its figures. After an error the model is as it was.

    Raises:
        ValueError: If the model has no factorized layer, or the loss or its gradient is not finite.
    """
    work = work or WorkDir(None)
    key = content_key(
        # Slow: every byte is read. The key only names files.
        model=model_key(model) if pruned_key is None and work.path is not None else pruned_key,
        teacher=lessons_fingerprint(lessons),
        settings=config.to_dict(),
        seed=seed,
        steps_before=steps_before,
        format=FORMAT,
    )
    held = HeldAsFactors(model)
    try:
        adapters = Adapters(model, factor_names(model), config.adapter_rank, seed) if config.adapter_rank else None
        if adapters is None:
            parameters = trained_parameters(model, norms=config.train_norms)
        else:
            parameters = adapters.parameters | (norm_parameters(model) if config.train_norms else {})
        trainer = Trainer(
            HEALING, model, tokenizer, [_part(lesson, config) for lesson in lessons], parameters, config,
            # Adapters have the scale that the rate is made for; factors differ in scale.
            relative=adapters is None, rows_per_pass=config.rows_per_pass, seed=seed, steps_before=steps_before,
            work=work, key=key,
        )  # fmt: skip
        if not trainer.load_result():
            attached = nullcontext() if adapters is None else adapters.attached()
            with training_only(model, parameters, checkpointing=config.gradient_checkpointing), attached:
                trainer.train(progress=progress)
    except BaseException:
        held.undo()
        raise
    # Without a step the layers stay bit-identical.
    if not trainer.training.steps:
        held.undo()
        return trainer.training
    if adapters is not None:
        adapters.merge()
    held.pivot()
    return trainer.training


def _part(lesson: Lesson, config: HealConfig) -> Part:
    def loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        return lesson.losses(model, batch, config.gold_weight)

    return Part(
        examples=lesson.examples,
        loss=loss,
        by_candidate=lesson.teacher.by_candidate,
        weight=lesson.weight,
        copies=lesson.copies,
    )
