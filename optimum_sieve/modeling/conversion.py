"""Turn a model with factorized linears into one of model type `sieve`, which can be saved."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .block import check_block
from .experts import fuse_dense_experts, separate_names
from .fingerprint import DIGEST_KEY, weights_digest
from .label_offsets import KEY
from .layers import FactorizedLinear
from .modeling_sieve import (
    FORMAT_VERSION,
    SieveConfigMixin,
    SievePreTrainedModel,
    config_class,
    model_class,
    read_rank_pattern,
)


if TYPE_CHECKING:
    from collections.abc import Sequence


def sieve_model(
    model: PreTrainedModel,
    *,
    base_model: str | None,
    settings: dict[str, Any],
    results: dict[str, Any],
    base_revision: str | None = None,
    vocabulary: dict[str, int] | None = None,
    label_offsets: list[dict[str, Any]] | None = None,
    adapter: dict[str, str] | None = None,
) -> PreTrainedModel:
    """Turn a factorized transformers model into a model of type `sieve`, in place.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model of an architecture of transformers, with [`FactorizedLinear`] layers. It may be a pruned model with
            more layers replaced.
        base_model (`str`, *optional*): Hub id or path of the model that was pruned.
        settings (`dict`): Settings of the pruning run, as JSON values.
        results (`dict`): Scores of the pruning run, as JSON values. The digest of the weights is added to them.
        base_revision (`str`, *optional*): Commit of `base_model`.
        vocabulary (`dict[str, int]`, *optional*): Rows of the embeddings before and after, if the vocabulary was cut.
        label_offsets (`list[dict]`, *optional*): `candidates` and their `offsets` of each task that has some.
        adapter (`dict[str, str]`, *optional*): `type`, and where known `name` and `revision`, of the adapter that was
            merged into `base_model` before it was pruned.

    Returns:
        [`~transformers.PreTrainedModel`]: The same object with the same weights, and with the class and configuration
        that it will have after saving and loading.

    Raises:
        ValueError: If the architecture is not one of transformers, a factorized layer is outside the base model or
            inside another one, or weights are packed in GGUF blocks.
    """
    base_config, base_class = _base_classes(model)
    _check_layers(model)
    forget_quantization(model)
    fuse_dense_experts(model)
    block: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "base_model_type": base_config.model_type,
        "base_model": base_model,
        "rank_pattern": read_rank_pattern(model),
        "settings": settings,
        "results": results,
    }
    if base_revision is not None:
        block["base_revision"] = base_revision
    if vocabulary is not None:
        block["vocabulary"] = vocabulary
    if adapter is not None:
        block["adapter"] = adapter
    if label_offsets:
        block[KEY] = label_offsets
    if experts := separate_names(model.base_model):
        block["separate_experts"] = experts
    sieve_config = config_class(base_config)
    sieve_class = model_class(base_class, sieve_config)
    _replace_configs(model, base_config, sieve_config, block)
    model.__class__ = sieve_class
    if results:
        model.config.sieve["results"][DIGEST_KEY] = weights_digest(model)
    return model


def check_convertible(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Check that [`sieve_model`] will accept a dense model after the linears called `names` are factorized.

    Raises:
        ValueError: If the architecture is not one of transformers, a linear is outside the base model, or two of the
            linears share a weight.
    """
    _base_classes(model)
    inside = set(map(id, model.base_model.modules()))
    for name in names:
        if id(model.get_submodule(name)) not in inside:
            raise _outside_error(name)
    owners: dict[int, str] = {}
    for name in names:
        weight = id(model.get_submodule(name).weight)
        if weight in owners:
            raise ValueError(
                f"`model` must not share weights between the layers to prune, got {owners[weight]!r} and {name!r} with "
                "the same one. Name both in `exclude_modules`."
            )
        owners[weight] = name


def _replace_configs(model: PreTrainedModel, base_config: Any, sieve_config: Any, block: dict[str, Any]) -> None:
    """Give the model, and all modules with the same configuration, a configuration that holds `block`."""
    replaced: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if type(config) not in (base_config, sieve_config) or id(config) in map(id, replaced.values()):
            continue
        if id(config) not in replaced:
            # A copy, as other models may use the same object; a shallow one, as modules use its parts.
            new = copy.copy(config)
            new.__class__ = sieve_config
            # As the file will have it: lists instead of tuples, strings as keys.
            new.sieve = json.loads(json.dumps(block))
            replaced[id(config)] = new
        module.config = replaced[id(config)]


def _base_classes(model: PreTrainedModel) -> tuple[Any, Any]:
    """Return the configuration and model classes of transformers that `model` is based on."""
    base_class: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, SievePreTrainedModel))
    base_config: Any = next(cls for cls in type(model.config).__mro__ if not issubclass(cls, SieveConfigMixin))
    model_type = base_config.model_type
    if (
        getattr(transformers, base_class.__name__, None) is not base_class
        or model_type not in CONFIG_MAPPING
        or CONFIG_MAPPING[model_type] is not base_config
    ):
        raise ValueError(
            f"`model` must be of an architecture of transformers itself, got {base_class.__name__} with "
            f"{base_config.__name__}. Models that bring their own code cannot be saved as pruned models."
        )
    return base_config, base_class


def _check_layers(model: PreTrainedModel) -> None:
    """Check that a rank pattern can describe all factorized layers."""
    inside = set(map(id, model.base_model.modules()))
    for name, layer in model.named_modules():
        if not isinstance(layer, FactorizedLinear):
            continue
        if id(layer) not in inside:
            raise _outside_error(name)
        if any(isinstance(child, FactorizedLinear) for child in layer.children()):
            raise ValueError(
                f"`model` must be factorized once, got {name!r} with a factor that is factorized again. Prune the "
                "dense model instead."
            )


def _outside_error(name: str) -> ValueError:
    return ValueError(
        f"`model` must be factorized inside its base model alone, got {name!r} outside it. Name it in "
        "`exclude_modules`."
    )


def is_gguf(model: PreTrainedModel) -> bool:
    """Tell whether the weights were read from a GGUF file."""
    quantizer = getattr(model, "hf_quantizer", None)
    settings = getattr(quantizer, "quantization_config", None) or getattr(model.config, "quantization_config", None)
    return bool(getattr(settings, "quant_method", None) == "gguf")


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove the traces of a quantized checkpoint from a model whose weights were dequantized when it was loaded.

    With them, transformers would refuse to save the model, or quantize the new weights.

    Raises:
        ValueError: If the weights are still packed in blocks.
    """
    if is_gguf(model):
        if getattr(getattr(model, "hf_quantizer", None), "packed_modules", None):
            raise ValueError(
                "`model` must hold plain weights, got weights packed in GGUF blocks. Load it with "
                "`quantization_config=GgufConfig(dequantize=True)`."
            )
        owners: tuple[Any, ...] = (model, model.config)
        for owner in owners:
            for name in ("hf_quantizer", "quantization_method", "is_quantized", "quantization_config"):
                owner.__dict__.pop(name, None)
    if getattr(model, "hf_quantizer", None) is None:
        # transformers removes it from the whole configuration alone.
        model.config.get_text_config().__dict__.pop("quantization_config", None)
    operations = [op for entry in model.__dict__.get("_weight_conversions") or () for op in _operations(entry)]
    if any(getattr(operation, "hf_quantizer", None) is not None for operation in operations):
        # transformers then takes the conversions of the architecture.
        del model._weight_conversions


def _operations(conversion: Any) -> list[Any]:
    return list(getattr(conversion, "operations", None) or ())


def require_model(model: Any, argument: str = "model") -> None:
    """Check that an object is a transformers model, not another one around it.

    Raises:
        TypeError: If not; the message says how to get the model inside.
    """
    if isinstance(model, PreTrainedModel):
        return
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "OptimizedModule" in kinds:
        remedy = "Pass the model that `torch.compile` was called with."
    elif any(kind.startswith("Peft") for kind in kinds):
        remedy = "Merge its adapters with `merge_and_unload()`, save the result and load that."
    elif isinstance(getattr(model, "module", None), nn.Module):
        remedy = "Pass its `module`."
    else:
        remedy = "Load one with `AutoModelForCausalLM`."
    raise TypeError(f"`{argument}` must be a transformers model, got {type(model).__name__}. {remedy}")


def check_pruned(config: Any) -> None:
    """Check that a configuration is that of a pruned model, with a whole `sieve` block.

    Raises:
        ValueError: If its model type is not `sieve`, or a part of the block has another form.
    """
    if not isinstance(config, SieveConfigMixin):
        kind = getattr(config, "model_type", None)
        raise ValueError(
            f"`model` must be a pruned model (model_type 'sieve'), got {kind!r}. Prune it first, with "
            "`optimum-cli sieve prune`."
        )
    check_block(config.sieve)


def plain_layers(model: PreTrainedModel) -> dict[str, FactorizedLinear]:
    """Return the factorized layers of a pruned model by name, after checking that their factors are plain linears.

    Raises:
        TypeError: If it is another object around a model.
        ValueError: If the model is not pruned, or is quantized, offloaded or has adapters.
    """
    require_model(model)
    check_pruned(getattr(model, "config", None))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)}
    for name, layer in layers.items():
        if any(type(child) is not nn.Linear for child in layer.children()):
            kinds = ", ".join(sorted({type(child).__name__ for child in layer.children()}))
            raise ValueError(
                f"`model` must have plain factors, got {kinds} in {name!r}. Load it without quantization, and merge "
                "adapters with `merge_and_unload`."
            )
    # torchao does not change the class of the layers.
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("`model` must not be quantized, got one that is. Load it without, then export.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must be in memory, got weights that are offloaded. Load it without `device_map`.")
    return layers
