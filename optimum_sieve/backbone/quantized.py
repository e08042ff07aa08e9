"""Read how a checkpoint is quantized, before its weights are loaded: dequantize it, or refuse it by name."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
from typing import TYPE_CHECKING, Any

from torch.nn import Parameter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from optimum_sieve._messages import shown


if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# Packages that transformers needs for a method; it names those of the other methods itself.
_PACKAGES = {
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptqmodel",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
}


def quantization_options(config: PreTrainedConfig, name: str, *, accepted: bool = False) -> dict[str, Any]:
    """Return the options of `from_pretrained` that dequantize a quantized checkpoint; none for a plain one.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Configuration of the checkpoint.
        name (`str`): Its name, for messages.
        accepted (`bool`): Whether the model may stay quantized if its format cannot be dequantized, or if it is a
            pruned one that was quantized after.

    Returns:
        `dict[str, Any]`: Empty, or with a `quantization_config`.

    Raises:
        ValueError: If the format is unknown, or cannot be dequantized on loading and is not `accepted`.
        ImportError: If the package of the format is not installed.
    """
    settings = _settings(config)
    if settings is None:
        return {}
    method = _method(settings)
    # transformers would load the packed values as if they were the weights.
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING and method != "bitsandbytes":
        raise ValueError(
            f"`model` must be quantized with a method that transformers supports, got {shown(method)} in {name}. "
            "Name the model that it was quantized from."
        )
    kind: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    is_pruned = config.model_type == "sieve"
    can_dequantize = kind is not None and "dequantize" in inspect.signature(kind.__init__).parameters
    if not accepted and (is_pruned or not can_dequantize):
        raise ValueError(
            f"`model` must have plain weights, got {name} quantized with {method!r}. Name the model that it was "
            "quantized from."
        )
    _check_package(method, name)
    if is_pruned or not can_dequantize:
        return {}
    logger.warning("%s is quantized with %s: its weights are dequantized and saved as plain ones.", name, method)
    return {"quantization_config": kind.from_dict({**settings, "dequantize": True})}


def check_quantized(model: PreTrainedModel, name: str) -> None:
    """Check that the layers that bitsandbytes made for a checkpoint received quantized weights.

    Raises:
        ValueError: If a weight is a plain one, which fails in the first forward pass.
    """
    for path, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes") and type(getattr(module, "weight", None)) is Parameter:
            raise ValueError(
                "`model` must have the quantized weights that `quantization_config` in config.json describes, got "
                f"plain ones in {path!r} of {name}. Remove `quantization_config`, or download the model again."
            )


def _settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return the quantization settings in a configuration, or in that of its text model."""
    for owner in (config, config.get_text_config()):
        settings: Any = getattr(owner, "quantization_config", None)
        if settings is not None:
            return dict(settings if isinstance(settings, dict) else settings.to_dict())
    return None


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def _check_package(method: str, name: str) -> None:
    package = _PACKAGES.get(method)
    if package is None:
        return
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"`{package}` must be installed to load {name}, which is quantized with {method!r}, got none. "
            f"`pip install {package}`."
        ) from error
