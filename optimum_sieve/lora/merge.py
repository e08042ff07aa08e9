"""Merge a LoRA adapter into a pruned model and save it. Merging needs PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from optimum_sieve.backbone.kinds import loaded_kind
from optimum_sieve.backbone.loading import empty_model
from optimum_sieve.backbone.sizes import tensor_bytes
from optimum_sieve.backbone.sources import processor_files
from optimum_sieve.modeling.conversion import check_pruned, plain_layers
from optimum_sieve.modeling.fingerprint import task_names
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern
from optimum_sieve.publish.card import build_export_card
from optimum_sieve.publish.directory import save_directory
from optimum_sieve.publish.saved import save_model
from optimum_sieve.publish.task_file import inherited_files
from optimum_sieve.surgery.factors import recompress

from .layer import require_peft, whole_matrix


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANKS = ("widen", "keep")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _FIRST, _LAST = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def check_adapter(adapter: str | Path, config: Any) -> None:
    """Check that an adapter fits a pruned model. Reads names and shapes, no weights.

    Args:
        adapter (`str | Path`): Directory that PEFT's `save_pretrained` wrote.
        config (`PreTrainedConfig`): Configuration of the pruned model.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If the model is not pruned, the directory holds no LoRA adapter in safetensors, the model lacks a
            layer of the adapter or has it in another shape, or the adapter lacks a tensor or has one too many.
    """
    check_pruned(config)
    directory = Path(adapter)
    settings = _read_settings(directory)
    shapes = _read_shapes(directory)
    empty = empty_model(config)
    matrices = {name: shape for name, shape in shapes.items() if name.endswith((_FIRST, _LAST))}
    modules = dict(empty.named_modules())
    problems = [problem for key, shape in matrices.items() if (problem := _problem(modules, key, shape))]
    if problems:
        base = settings.get("base_model_name_or_path")
        raise ValueError(
            f"`adapter` must fit the model, got {len(problems)} of {len(matrices)} matrices that do not, such as "
            f"{problems[0]}. It was trained on {base!r}: name that model, or one pruned from it."
        )
    _check_complete(directory, shapes, empty)


def _check_complete(adapter: Path, shapes: dict[str, list[int]], empty: PreTrainedModel) -> None:
    """Check that an adapter holds exactly the tensors that its configuration makes of the model.

    PEFT would leave out what is missing or too many, and merge the rest.
    """
    # A tensor of the model itself, such as resized embeddings, replaces that one.
    known = {f"{_PREFIX}{name}": list(tensor.shape) for name, tensor in empty.state_dict().items()}
    try:
        expected = _expected_shapes(adapter, empty)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"`adapter` must have an {_CONFIG} that PEFT can apply to the model, got {str(adapter)!r}: "
            f"{str(error)[:200]}. Save it again with `save_pretrained`."
        ) from error
    problems = [f"{name!r}, which is missing" for name in expected if name not in shapes]
    for name, shape in shapes.items():
        fitting = expected.get(name, known.get(name))
        if fitting is None:
            problems.append(f"{name!r}, which its {_CONFIG} does not name")
        elif fitting != shape:
            problems.append(f"{name!r} of shape {tuple(shape)} instead of {tuple(fitting)}")
    if problems:
        raise ValueError(
            f"`adapter` must hold the tensors that its {_CONFIG} names, got {len(problems)} that differ in "
            f"{str(adapter)!r}, such as {problems[0]}. Save it again with `save_pretrained`."
        )


def _expected_shapes(adapter: Path, empty: PreTrainedModel) -> dict[str, list[int]]:
    """Return the shapes of the tensors of an adapter by name, by adding an empty one to the empty model."""
    peft = require_peft()
    config = whole_matrix(peft.LoraConfig.from_pretrained(adapter))
    # Some initializations compute with the weights.
    config.init_lora_weights = True
    adapted = peft.get_peft_model(empty, config, low_cpu_mem_usage=True)
    tensors = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _read_settings(directory: Path) -> dict[str, Any]:
    try:
        settings = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`adapter` must be a directory that PEFT wrote, got {str(directory)!r} without a readable {_CONFIG}."
        ) from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise ValueError(f"`adapter` must be a LoRA adapter, got {kind!r} in {str(directory)!r}. Train one with LoRA.")
    return settings  # type: ignore[no-any-return]


def _read_shapes(directory: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in the adapter by name."""
    path = directory / _WEIGHTS
    try:
        with safe_open(path, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: part.get_shape() for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"`adapter` must hold its weights in {_WEIGHTS}, got {str(directory)!r}: {error}. Save it again with "
            "`save_pretrained`."
        ) from error
    other = [f"{name!r} of {kind}" for name, kind in kinds.items() if not kind.startswith(("F", "BF"))]
    if other:
        raise ValueError(f"`adapter` must hold floating-point numbers, got {other[0]} in {str(directory)!r}.")
    return shapes


def _problem(modules: dict[str, Any], key: str, shape: list[int]) -> str | None:
    """Return why a matrix of an adapter does not fit, or `None` if it does."""
    end = _FIRST if key.endswith(_FIRST) else _LAST
    name = key.removeprefix(_PREFIX).removesuffix(end)
    module = modules.get(name)
    if module is None:
        return f"that of {name!r}, which the model does not have"
    side, features = ("in_features", shape[1]) if end == _FIRST else ("out_features", shape[0])
    expected = _features(module)[side]
    if expected is not None and expected != features:
        return f"that of {name!r} with {side} {features} where the model has {expected}"
    return None


def _features(module: Any) -> dict[str, int | None]:
    """Return both sides of a linear layer or a `Conv1D`, whose weight is (in, out)."""
    if hasattr(module, "nf"):
        return {"in_features": module.weight.shape[0], "out_features": module.nf}
    return {side: getattr(module, side, None) for side in ("in_features", "out_features")}


def merge_adapter(model: PreTrainedModel, adapter: str | Path, *, rank: str = "widen") -> PreTrainedModel:
    """Merge a LoRA adapter for factors, whole matrices or the dense model into a pruned model, in place.

    An adapter of factors does not change ranks. An adapter of whole matrices adds its rank to that of the layers;
    `rank="keep"` then reduces each layer to its old rank with the best approximation.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model of type `sieve`, in memory and not quantized.
        adapter (`str | Path`): Directory that PEFT's `save_pretrained` wrote.
        rank (`str`): `"widen"` or `"keep"`.

    Returns:
        [`~transformers.PreTrainedModel`]: The same model. The scores in its configuration, measured without the
        adapter, are removed.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If the model is quantized or offloaded, or the adapter does not fit it or is not finite.
    """
    if rank not in RANKS:
        raise ValueError(f"`rank` must be 'widen' or 'keep', got {rank!r}.")
    peft = require_peft()
    plain_layers(model)
    check_adapter(adapter, model.config)
    before = {name: entry["rank"] for name, entry in read_rank_pattern(model).items()}
    config = whole_matrix(peft.LoraConfig.from_pretrained(adapter))
    adapted = peft.PeftModel.from_pretrained(model, adapter, config=config)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    if rank == "keep":
        recompress(merged, before)
    block = merged.config.sieve
    results = task_names(block.get("results") or {})
    merged.config.sieve = {**block, "rank_pattern": read_rank_pattern(merged), "results": results}
    return merged


def save_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    license_id: str | None = None,
) -> Path:
    """Write the result of [`merge_adapter`], with its tokenizer and a model card; all of it or nothing.

    Args:
        model ([`~transformers.PreTrainedModel`]): The merged model.
        tokenizer (`PreTrainedTokenizerBase`): Saved with the model.
        output_dir (`str | Path`): A new or empty directory.
        overwrite (`bool`): Whether to replace a directory that holds a model, once the new one is complete.
        license_id (`str`, *optional*): Licence of the base model, as the Hub names it.

    Returns:
        `Path`: `output_dir`.

    Raises:
        FileExistsError: If `output_dir` holds files and `overwrite` is false, or files that are not of a model.
        OSError: If the disk is full or the directory cannot be written.
    """
    return save_directory(
        output_dir,
        lambda directory: save_model(model, directory),
        tokenizer,
        lambda: build_export_card(
            model.config.sieve,
            kind=loaded_kind(model.config),
            form="adapted",
            text="into which a LoRA adapter was merged. Nothing was measured after the merge: "
            "`optimum-cli sieve evaluate` does.",
            library_name="transformers",
            license_id=license_id,
        ),
        files=lambda: {
            **processor_files(model),
            **inherited_files(model.name_or_path, getattr(model.config, "_commit_hash", None)),
        },
        overwrite=overwrite,
        inputs=[("model", model.name_or_path)],
        needed_bytes=tensor_bytes(model),
    )
