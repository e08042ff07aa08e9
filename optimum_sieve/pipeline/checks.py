"""Checks of the model, the targets and the examples before any long work."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from optimum_sieve._messages import listed, shown
from optimum_sieve.backbone.kinds import input_format, model_kind
from optimum_sieve.backbone.targets import is_linear, linear_weight
from optimum_sieve.config.rules import search_count
from optimum_sieve.evaluation.batches import check_examples
from optimum_sieve.evaluation.generation import check_generation
from optimum_sieve.evaluation.stage import examples_fingerprint
from optimum_sieve.metrics.examples import check_code
from optimum_sieve.modeling.conversion import check_convertible, is_gguf, require_model
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.run import distributed
from optimum_sieve.tasks.data import SPLITS
from optimum_sieve.tasks.several import naming, task_shares


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Task


def check_model(model: PreTrainedModel) -> None:
    """Check that the model is a dense language model or sequence classifier.

    Raises:
        TypeError: If it is another object, such as one around a model.
        ValueError: If the model is already pruned, neither generates nor classifies, needs more than a text, or has
            adapters.
    """
    require_model(model)
    if getattr(model.config, "model_type", None) == "sieve":
        raise ValueError("`model` must be a dense model, got one that is pruned already. Use its base model.")
    config = model.config
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    writes = model.can_generate() and (not is_encoder or config.is_encoder_decoder)
    if not writes and model_kind(model) != "classification":
        raise ValueError(
            f"`model` must be a language model that writes, or a sequence classifier, got {type(model).__name__}. Load "
            "it with `AutoModelForCausalLM`, `AutoModelForSeq2SeqLM` or `AutoModelForSequenceClassification`."
        )
    input_format(model)
    needed = [
        name
        for name, parameter in inspect.signature(type(model).forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in ("self", "input_ids")
    ]
    if needed:
        raise ValueError(
            f"`model` must be able to read texts alone, got {type(model).__name__}, which needs {listed(needed)} too. "
            "Prune its language model."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("`model` must be a plain model, got one with adapters. Merge them and save it first.")


def check_task(task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the task has all splits and that its examples can be scored, by its metric too.

    Raises:
        ValueError: If not; the message names the split or the example.
    """
    task.require_splits(*SPLITS)
    inputs = input_format(model)
    for split in task.splits:
        examples = task.examples(split, tokenizer)
        if task.kind == "generate":
            check_generation(examples, tokenizer, inputs)
        check_examples(examples, tokenizer, candidates=task.kind != "generate", inputs=inputs)
        if split == "selection":
            check_code(task.metric, examples)


def check_tasks_of_run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], config: SieveConfig
) -> None:
    """Check the tasks of a run, their weights and their examples; the model needs no weights.

    Raises:
        ValueError: If something does not fit; the message names it and, with several tasks, the task.
    """
    task_shares(config.task_weights, len(tasks))
    for task in tasks:
        with naming(task, tasks):
            _check_one(model, tokenizer, task, config)


def _check_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: SieveConfig) -> None:
    if not task.labelled and config.tune not in (None, "auto"):
        raise ValueError(
            "`tune` must go with gold answers, got a task file without `answer`. Add it to the task file, or omit "
            "`tune`: healing alone needs no answers."
        )
    if not task.labelled and config.label_source == "data":
        raise ValueError(
            "`answer` must be given in the task file where label_source='data', got none. To hold the pruned model to "
            "the dense one's own answers instead, set label_source='model'."
        )
    check_task(task, model, tokenizer)
    if config.allocation == "genetic":
        if distributed.num_processes() > 1:
            raise ValueError(
                f"`allocation='genetic'` must be run in one process, got {distributed.num_processes()}. Share the "
                "search with workers: `optimum-cli sieve search --worker`."
            )
        search_count(config.search_fraction, task.splits["selection"])


def check_search(config: SieveConfig) -> None:
    """Check that the settings are those of a search that other processes can join.

    Raises:
        ValueError: If not.
    """
    if config.allocation != "genetic":
        raise ValueError(f"`allocation` must be 'genetic' for a search, got {config.allocation!r}.")
    if config.tune not in (None, "auto"):
        raise ValueError(
            f"`tune` must be None for a search that workers can join, got {shown(config.tune)}. `prune` tunes and "
            "searches in one process."
        )


def check_weights(model: PreTrainedModel, targets: Sequence[Target]) -> None:
    """Check that the targets can be factorized and saved.

    Raises:
        ValueError: If a weight is quantized, offloaded, shared or not finite, or its layer could not be saved.
    """
    check_convertible(model, [target.name for target in targets])
    if getattr(model.config, "quantization_config", None) is not None and not is_gguf(model):
        raise ValueError("`model` must not be quantized, got one that is. Load it without, prune, then quantize.")
    for target in targets:
        weight = linear_weight(model.get_submodule(target.name))
        if not weight.is_floating_point() or weight.is_meta:
            raise ValueError(
                f"`model` must have floating-point weights in memory, got {weight.dtype} on {weight.device} in "
                f"`{target.name}`. Load it without quantization or offloading, prune, then quantize."
            )
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"`model` must have finite weights, got NaN or infinity in `{target.name}`. "
                "The checkpoint is damaged, or overflowed when it was cast to float16."
            )


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shape (out, in) of the weight of every linear layer by name."""
    return {name: tuple(linear_weight(module).shape) for name, module in model.named_modules() if is_linear(module)}


def calibration_fingerprints(run: Run) -> list[str]:
    """Hash the calibration examples of each task: their texts and the token ids that the run's model receives."""
    if run.vocabulary is None:
        return [task.fingerprints["calibration"] for task in run.tasks]
    # The stored hashes are of the token ids before the vocabulary was reduced.
    return [examples_fingerprint(run.model, run.tokenizer, task.calibration) for task in run.tasks]


def check_base(run: Run, shapes: Mapping[str, tuple[int, ...]], fingerprints: Sequence[str]) -> None:
    """Check that the pruned model of a run was pruned from a dense model.

    Args:
        run (`Run`): The run.
        shapes (`Mapping[str, tuple[int, ...]]`): The dense model's [`linear_shapes`].
        fingerprints (`Sequence[str]`): The dense model's [`calibration_fingerprints`].

    Raises:
        ValueError: If a layer has another shape or the examples have other tokens.
    """
    layers = {name: layer for name, layer in run.model.named_modules() if isinstance(layer, FactorizedLinear)}
    wrong = [name for name, layer in layers.items() if shapes.get(name) != (layer.out_features, layer.in_features)]
    if wrong:
        raise ValueError(
            f"`dense` must be the model that `model` was pruned from, got one without {len(wrong)} of its "
            f"{len(layers)} factorized layers, such as {wrong[0]!r}. Name the base model."
        )
    if calibration_fingerprints(run) != list(fingerprints):
        raise ValueError(
            "`dense` must have the tokenizer of the model that was pruned from it, got other tokens for the same "
            "examples. Name the base model, in the revision that was pruned."
        )
