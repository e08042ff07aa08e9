"""Store every layer of a pruned model as plain factors of rank 1 or more, for tools that cannot serve the others."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_sieve.backbone.kinds import loaded_kind
from optimum_sieve.backbone.loading import empty_model
from optimum_sieve.backbone.sizes import bytes_by_part, tensor_bytes
from optimum_sieve.backbone.sources import processor_files
from optimum_sieve.modeling.conversion import plain_layers
from optimum_sieve.modeling.fingerprint import DIGEST_KEY, current_results, weights_digest
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern
from optimum_sieve.publish.card import build_card, build_export_card
from optimum_sieve.publish.directory import save_directory
from optimum_sieve.publish.origin.terms import NO_TERMS
from optimum_sieve.publish.recipe import RECIPE_NAME, recipe_specs
from optimum_sieve.publish.report import EXPORT_KEY, REPORT_NAME, remove_scores, task_blocks
from optimum_sieve.publish.saved import save_model
from optimum_sieve.publish.sections import matrix_place, rank_section
from optimum_sieve.publish.task_file import TASK_NAME, inherited_files, inherited_text
from optimum_sieve.run.bars import progress_bar


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.publish.origin.terms import Terms

# Measured on the layers as they were stored.
_OF_THE_STORAGE = ("largest_coefficient", "latency")


def export_factors(model: PreTrainedModel, *, progress: bool = False) -> PreTrainedModel:
    """Store the pivoted layers of a pruned model as factors, and those of rank 0 as zeros of rank 1, in place.

    The outputs change by rounding alone: the left factor of a pivoted layer holds its coefficients and an identity.
    Tensor parallelism can split such layers, and there is no weight without elements.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model of type `sieve`, in memory and not quantized.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`~transformers.PreTrainedModel`]: The same object. The scores in its configuration stay, with the digest of the
        new weights, if they were measured on the old ones.

    Raises:
        ValueError: If the model is not pruned, or is quantized, offloaded or has adapters.
    """
    layers = plain_layers(model)
    block = model.config.sieve
    results = current_results(model, block.get("results") or {})
    for name, layer in progress_bar(layers.items(), desc="factors", unit="matrix", progress=progress):
        if layer.storage != "factors" or not layer.rank:
            model.set_submodule(name, _as_factors(layer))
    if DIGEST_KEY in results:
        results = {**results, DIGEST_KEY: weights_digest(model)}
    model.config.sieve = {**block, "rank_pattern": read_rank_pattern(model), "results": results}
    model._tp_plan = empty_model(model.config, model_class=type(model))._tp_plan
    return model


def save_factors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    terms: Terms = NO_TERMS,
    progress: bool = False,
    **options: Any,
) -> Path:
    """Write the model of [`export_factors`] as a whole pruned directory, with task, report and card, or nothing.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model of type `sieve`. Its layers become factors in place.
        tokenizer (`PreTrainedTokenizerBase`): Saved with the model.
        output_dir (`str | Path`): A new or empty directory.
        overwrite (`bool`): Whether to replace a directory that holds a model, once the new one is complete.
        terms (`Terms`): Licence and languages of the base model.
        progress (`bool`): Whether to show a progress bar.
        options: Passed to `save_pretrained`, such as `max_shard_size`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: As of [`export_factors`].
        FileExistsError: If `output_dir` holds files and `overwrite` is false, or files that are not of a model.
        OSError: If the disk is full or the directory cannot be written.
    """
    added_bytes = sum(map(_added_bytes, plain_layers(model).values()))
    source = (model.name_or_path, getattr(model.config, "_commit_hash", None))
    recipe, report = inherited_text(*source, RECIPE_NAME), _read_report(inherited_text(*source, REPORT_NAME))

    def write_model(directory: Path) -> None:
        save_model(export_factors(model, progress=progress), directory, **options)
        if report is not None:
            _update(report, model)

    def files() -> dict[str, str]:
        kept = {} if recipe is None else {RECIPE_NAME: recipe}
        return {**processor_files(model), **kept, **inherited_files(*source, with_results=_is_scored(model))}

    def card() -> object:
        if report is None:
            return _short_card(model, terms)
        return _card(model, report, files(), terms)

    return save_directory(
        output_dir,
        write_model,
        tokenizer,
        card,
        report=report,
        files=files,
        terms=terms,
        overwrite=overwrite,
        inputs=[("model", model.name_or_path)],
        needed_bytes=tensor_bytes(model) + added_bytes,
    )


def _is_scored(model: PreTrainedModel) -> bool:
    """Whether the recorded scores hold for the weights, up to rounding; otherwise [`current_results`] removed them."""
    return any("pruned" in task for task in task_blocks(model.config.sieve["results"]))


@torch.no_grad()
def _as_factors(layer: FactorizedLinear) -> FactorizedLinear:
    factor = layer.last.weight
    exact = copy.deepcopy(layer).to(torch.promote_types(factor.dtype, torch.float32))
    left, right = exact.factors()
    if not layer.rank:
        left, right = left.new_zeros(layer.out_features, 1), right.new_zeros(1, layer.in_features)
    made = FactorizedLinear.from_factors(left, right, exact.bias, dtype=factor.dtype)
    return made.requires_grad_(factor.requires_grad).train(layer.training)


def _added_bytes(layer: FactorizedLinear) -> int:
    """Return how many bytes more a layer takes as factors."""
    rank, weights = layer.rank or 1, layer.first.weight.numel() + layer.last.weight.numel()
    return (rank * (layer.out_features + layer.in_features) - weights) * layer.last.weight.element_size()


def _read_report(text: str | None) -> dict[str, Any] | None:
    """Return a report; `None` if there is none, or it is damaged."""
    try:
        report = json.loads(text or "")
        is_whole = {"bytes", "parameters", "versions"} <= report.keys()
        return report if is_whole and {"targets_after", "model_after"} <= report["parameters"].keys() else None
    except (ValueError, AttributeError):
        return None


def _update(report: dict[str, Any], model: PreTrainedModel) -> None:
    """Bring the report of a pruned model up to date after its layers became factors, in place."""
    report[EXPORT_KEY] = "factors"
    parameters, count = report["parameters"], sum(parameter.numel() for parameter in model.parameters())
    # Nothing else has changed.
    parameters["targets_after"] += count - parameters["model_after"]
    parameters["model_after"] = count
    if "parts" in report:
        report["parts"]["after"] = bytes_by_part(model)
    if "ranks" in report:
        report["ranks"] = _rank_section(model, report["ranks"])
    for key in _OF_THE_STORAGE:
        report.pop(key, None)
    results = model.config.sieve["results"]
    if not _is_scored(model):
        remove_scores(report)
    elif DIGEST_KEY in results:
        report[DIGEST_KEY] = results[DIGEST_KEY]


def _rank_section(model: nn.Module, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of the ranks for the same matrices as they are now."""
    places = {
        (layer, kind)
        for kind, row in zip(section["kinds"], section["kept"], strict=True)
        for layer, kept in zip(section["layers"], row, strict=True)
        if kept is not None
    }
    matrices: list[tuple[str, int | None, float]] = []
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLinear | nn.Linear | Conv1D) and matrix_place(name) in places:
            matrices.append((name, getattr(module, "rank", None), _fraction(module)))
    return rank_section(matrices)


def _fraction(module: nn.Module) -> float:
    if not isinstance(module, FactorizedLinear):
        return 1.0
    weights = module.first.weight.numel() + module.last.weight.numel()
    return weights / (module.out_features * module.in_features)


def _card(model: PreTrainedModel, report: dict[str, Any], files: Mapping[str, str], terms: Terms) -> object:
    block = model.config.sieve
    base = block.get("base_model")
    specs = recipe_specs(files.get(RECIPE_NAME))
    if not specs:
        tasks = json.loads(files[TASK_NAME])["tasks"] if TASK_NAME in files else []
        specs = [{key: value for key, value in task.items() if key != "results"} for task in tasks]
    return build_card(
        report,
        block["rank_pattern"],
        # A name without a user may be the last part of a path, and is then no Hub id.
        base_model=base if base is None or "/" in base else f"./{base}",
        base_revision=block.get("base_revision"),
        task_specs=specs,
        kind=loaded_kind(model.config),
        terms=terms,
    )


def _short_card(model: PreTrainedModel, terms: Terms) -> str:
    return build_export_card(
        model.config.sieve,
        kind=loaded_kind(model.config),
        form="as factors",
        text="all of them plain products of two matrices. Its outputs equal those of the pruned model that it was made "
        "from, up to rounding.",
        library_name="transformers",
        terms=terms,
    )
