"""Export a pruned model as a dense model of its base architecture."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_sieve.backbone.kinds import loaded_kind
from optimum_sieve.backbone.loading import empty_model
from optimum_sieve.backbone.sizes import tensor_bytes
from optimum_sieve.backbone.sources import processor_files
from optimum_sieve.modeling.conversion import plain_layers
from optimum_sieve.modeling.experts import fuse_dense_experts
from optimum_sieve.modeling.label_offsets import KEY
from optimum_sieve.modeling.modeling_sieve import SieveConfigMixin, SievePreTrainedModel
from optimum_sieve.publish.card import build_export_card
from optimum_sieve.publish.directory import save_directory
from optimum_sieve.publish.saved import save_model
from optimum_sieve.publish.task_file import inherited_files
from optimum_sieve.run.bars import progress_bar


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.modeling.layers import FactorizedLinear


def export_dense(model: PreTrainedModel, *, progress: bool = False) -> PreTrainedModel:
    r"""Replace the factors of a pruned model with their products, in place: it becomes one of its base architecture.

    Each weight \(W' = \) `left @ right` is computed in float32 and stored in the dtype of its factors. If pruning added
    a bias that the base architecture does not have, the option of the configuration that adds it is set, such as
    `attention_bias`, and layers that need none get zeros. A bias that is zero is dropped.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model of type `sieve`, in memory and not quantized.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`~transformers.PreTrainedModel`]: The same object, with the class and configuration of the base architecture.
        It does not refer to optimum-sieve.

    Raises:
        ValueError: If the model is not pruned, or is quantized, offloaded or has adapters, or if the base architecture
            cannot have a bias that is needed. The model is then unchanged.
    """
    layers = plain_layers(model)
    base_class, config = _base_class(model), base_config(model)
    empty = _fit_biases(base_class, config, layers)
    dense_modules = dict(empty.named_modules())
    for name, layer in progress_bar(layers.items(), desc="dense", unit="matrix", progress=progress):
        # Separate experts have no modules in the base architecture.
        dense = dense_modules.get(name) or nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        model.set_submodule(name, _filled(dense, layer))
    _add_zero_biases(model, dense_modules)
    fuse_dense_experts(model)
    _replace_configs(model, config)
    model.__class__ = base_class
    model._tp_plan = empty._tp_plan
    return model


def save_dense(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    license_id: str | None = None,
    progress: bool = False,
    **options: Any,
) -> Path:
    """Write the dense model of [`export_dense`], with its tokenizer and a model card; all of it or nothing.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model of type `sieve`. Becomes dense in place.
        tokenizer (`PreTrainedTokenizerBase`): Saved with the model.
        output_dir (`str | Path`): A new or empty directory.
        overwrite (`bool`): Whether to replace a directory that holds a model, once the new one is complete.
        license_id (`str`, *optional*): Licence of the base model, as the Hub names it.
        progress (`bool`): Whether to show a progress bar.
        options: Passed to `save_pretrained`, such as `max_shard_size`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: As of [`export_dense`].
        FileExistsError: If `output_dir` holds files and `overwrite` is false, or files that are not of a model.
        OSError: If the disk is full or the directory cannot be written.
    """
    layers, block, kind = plain_layers(model), model.config.sieve, loaded_kind(model.config)
    processor = processor_files(model)
    source, revision = model.name_or_path, getattr(model.config, "_commit_hash", None)

    def write_model(directory: Path) -> None:
        save_model(export_dense(model, progress=progress), directory, **options)

    return save_directory(
        output_dir,
        write_model,
        tokenizer,
        lambda: build_export_card(
            block,
            kind=kind,
            form="dense",
            text=f"multiplied out: an ordinary `{type(model).__name__}`, which needs neither optimum-sieve nor "
            "`trust_remote_code`. Its outputs equal the pruned model's up to rounding; its size and speed are "
            "the dense model's.",
            library_name="transformers",
            license_id=license_id,
        ),
        files=lambda: {
            **processor,
            **inherited_files(source, revision, with_results=True, label_offsets=block.get(KEY) or ()),
        },
        overwrite=overwrite,
        inputs=[("model", model.name_or_path)],
        needed_bytes=tensor_bytes(model) + sum(map(_added_bytes, layers.values())),
    )


def base_config(model: PreTrainedModel) -> Any:
    """Return a shallow copy of a pruned model's configuration, of the class of the base architecture."""
    config = _as_base(model.config)
    config.architectures = [_base_class(model).__name__]
    return config


def _base_class(model: PreTrainedModel) -> Any:
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, SievePreTrainedModel))


def _as_base(config: Any) -> Any:
    base = copy.copy(config)
    base.__class__ = next(cls for cls in type(config).__mro__ if not issubclass(cls, SieveConfigMixin))
    for name in ("sieve", "auto_map"):
        base.__dict__.pop(name, None)
    return base


def _replace_configs(model: PreTrainedModel, config: Any) -> None:
    """Give the model `config`, and modules with another configuration, such as a decoder, its base version."""
    # Keeps the old ones, so that no new object gets their ids.
    replaced = {id(model.config): (model.config, config)}
    for module in model.modules():
        old: Any = getattr(module, "config", None)
        if isinstance(old, SieveConfigMixin):
            replaced.setdefault(id(old), (old, _as_base(old)))
            module.config = replaced[id(old)][1]


def _fit_biases(base_class: Any, config: Any, layers: Mapping[str, FactorizedLinear]) -> Any:
    """Set the options of `config` that add the biases that the layers need; return the empty dense model.

    Raises:
        ValueError: If no option adds one of them.
    """
    empty: Any = empty_model(config, model_class=base_class)
    missing = {name for name, layer in layers.items() if _needs_bias(layer)} - _biased(empty)
    # Work on a copy until all biases fit: the model uses the parts of `config`.
    trial, chosen = copy.deepcopy(config), []
    for option in [key for key, value in vars(config.get_text_config()).items() if value is False and "bias" in key]:
        setattr(trial.get_text_config(), option, True)
        larger: Any = empty_model(trial, model_class=base_class)
        added = _biased(larger) - _biased(empty)
        # Some options add other tensors, such as biases of norms.
        is_fit = larger.state_dict().keys() - empty.state_dict().keys() == {f"{name}.bias" for name in added}
        if is_fit and added & missing:
            empty, missing = larger, missing - added
            chosen.append(option)
        else:
            setattr(trial.get_text_config(), option, False)
    if missing:
        raise ValueError(
            f"`model` must have biases only where {base_class.__name__} can have them, got one that is not zero "
            f"in {len(missing)} of {len(layers)} factorized layers, such as {min(missing)!r}. Export to ONNX, or prune "
            "without the option that adds them."
        )
    for option in chosen:
        setattr(config.get_text_config(), option, True)
    return empty


def _biased(model: nn.Module) -> set[str]:
    """Return the names of the linears that have a bias."""
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m.bias is not None}


def _needs_bias(layer: FactorizedLinear) -> bool:
    return any(child.bias is not None and bool(child.bias.any()) for child in layer.children())  # type: ignore[operator]


@torch.no_grad()
def _filled(dense: Any, layer: FactorizedLinear) -> nn.Module:
    """Put the product of the factors into `dense`, an empty `Linear` or `Conv1D`."""
    factor = layer.last.weight
    exact = copy.deepcopy(layer).to(torch.promote_types(factor.dtype, torch.float32))
    weight, bias = exact.weight.to(factor.dtype), exact.bias
    # Conv1D holds its weight as (in, out).
    weight = weight.T.contiguous() if isinstance(dense, Conv1D) else weight
    dense.weight = nn.Parameter(weight, requires_grad=factor.requires_grad)
    if dense.bias is not None:
        bias = weight.new_zeros(layer.out_features) if bias is None else bias.to(factor.dtype)
        dense.bias = nn.Parameter(bias, requires_grad=factor.requires_grad)
    return dense.train(layer.training)  # type: ignore[no-any-return]


def _add_zero_biases(model: nn.Module, dense_modules: Mapping[str, Any]) -> None:
    """Add zero biases to the linears that have one in the empty dense model."""
    linears: list[tuple[str, Any]] = [item for item in model.named_modules() if isinstance(item[1], nn.Linear)]
    for name, module in linears:
        if module.bias is None and getattr(dense_modules.get(name), "bias", None) is not None:
            weight = module.weight
            module.bias = nn.Parameter(weight.new_zeros(module.out_features), requires_grad=weight.requires_grad)


def _added_bytes(layer: FactorizedLinear) -> int:
    """Return how many bytes more the dense layer takes."""
    parameters = list(layer.parameters())
    size = layer.out_features * layer.in_features - sum(parameter.numel() for parameter in parameters)
    return size * parameters[0].element_size()
