"""Fit a quantization with bitsandbytes, torchao, quanto or llm-compressor to the shapes of a pruned model.

Quantizers treat the factors like any `torch.nn.Linear`. But none of them supports a weight without
elements, and the group size must divide the row length, which for a last factor is the rank.
"""

from __future__ import annotations

import copy
import math
import re
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import get_keys_to_not_convert

from optimum_sieve.backbone.loading import default_device, empty_model
from optimum_sieve.backbone.targets import find_targets


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig

# Field of each method with the names of the modules that are not quantized.
_SKIPPED = {
    "bitsandbytes": "llm_int8_skip_modules",
    "torchao": "modules_to_not_convert",
    "quanto": "modules_to_not_convert",
    "llm-compressor": "ignore",
}
_MODIFIERS = ("QuantizationModifier", "GPTQModifier")
# The 4-bit CPU kernels of bitsandbytes need multiples of these numbers of rows and columns. Some return wrong results
# if a block of 64 extends past the end of a row.
_CPU_4BIT = (32, 64)


def compatible(
    config: PreTrainedConfig,
    quantization_config: Any,
    *,
    exclude_modules: Sequence[str] = (),
    device: str | torch.device | None = None,
) -> Any:
    """Return a copy of `quantization_config` that skips the linears whose shapes the method does not support.

    These are weights without elements (rank 0, or the `rest` of a pivoted layer of full rank), with one column (rank
    1), or with a row length that is not a multiple of the group size. No weights are loaded.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the pruned or dense model, from `AutoConfig.from_pretrained`. The model is assumed to be
            loaded with its head.
        quantization_config (`BitsAndBytesConfig`, `TorchAoConfig`, `QuantoConfig` or a modifier of llm-compressor):
            For `from_pretrained`, or for `llmcompressor.oneshot`, such as its `GPTQModifier`; not changed. Modules that
            it skips stay skipped; if it names none, the output embeddings are skipped, as in transformers.
        exclude_modules (`Sequence[str]`):
            `fnmatch` patterns of more linears to skip, such as `("left", "rest")`; a pattern also matches the end of a
            name after a dot.
        device (`torch.device`, *optional*):
            Device that the model will run on. Default: the accelerator if there is one, else the CPU.

    Returns:
        A copy of `quantization_config`.

    Raises:
        ValueError: If the model is quantized, the method is another one, or a pattern matches no linear.

    Example:

    ```python
    >>> from transformers import BitsAndBytesConfig, LlamaConfig
    >>> sizes = {"vocab_size": 8, "hidden_size": 1, "intermediate_size": 4, "num_attention_heads": 1}
    >>> config = LlamaConfig(**sizes, num_hidden_layers=1, head_dim=2)
    >>> fitted = compatible(config, BitsAndBytesConfig(load_in_8bit=True), exclude_modules=["down_proj"])
    >>> [name.rpartition(".")[2] for name in fitted.llm_int8_skip_modules]
    ['lm_head', 'q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj', 'down_proj']

    ```
    """
    method = _method(quantization_config)
    if method not in _SKIPPED:
        raise ValueError(
            "`quantization_config` must be a BitsAndBytesConfig, TorchAoConfig, QuantoConfig or a modifier of "
            f"llm-compressor, got {type(quantization_config).__name__}. For other methods, name the modules to skip "
            "yourself."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("`config` must be of a model that is not quantized, got one that is. Load it as it is.")
    empty = empty_model(config)
    linears = find_targets(empty, ["*"])
    chosen = {target.name for target in find_targets(empty, ["*"], exclude_modules)} if exclude_modules else None
    device = torch.device(device) if device is not None else default_device()
    left_out = [
        target.name
        for target in linears
        if (chosen is not None and target.name not in chosen)
        or not _fits(target.out_features, target.in_features, _multiples(quantization_config, target.name, device))
    ]
    named = getattr(quantization_config, _SKIPPED[method])
    # A list replaces the default of transformers, which skips the head and tied weights.
    if named is None or (method == "llm-compressor" and not named):
        named = sorted(get_keys_to_not_convert(empty))
    skipped = list(dict.fromkeys([*named, *left_out]))
    if method == "llm-compressor":
        # A modifier reads its fields once, when it is made.
        return type(quantization_config)(**quantization_config.model_dump(exclude_unset=True) | {"ignore": skipped})
    fitted = copy.copy(quantization_config)
    setattr(fitted, _SKIPPED[method], skipped)
    return fitted


def _method(quantization_config: Any) -> str:
    """Return the name of the library that a configuration is for, or of a method without a rule here."""
    # llm-compressor's modifiers name no method. AWQ's and the like also change pairs of layers, by names of dense ones.
    if type(quantization_config).__name__ in _MODIFIERS:
        return "llm-compressor"
    method = getattr(quantization_config, "quant_method", None)
    return str(getattr(method, "value", method))


def _fits(rows: int, columns: int, multiples: tuple[int, int]) -> bool:
    # One column saves nothing, and torchao and the CPU kernel of bitsandbytes fail on it.
    return rows > 0 and columns > 1 and rows % multiples[0] == 0 and columns % multiples[1] == 0


def _multiples(quantization_config: Any, name: str, device: torch.device) -> tuple[int, int]:
    """Return the numbers that the rows and columns of the weight called `name` must be multiples of."""
    if getattr(quantization_config, "load_in_4bit", False) and device.type == "cpu":
        return _CPU_4BIT
    if _method(quantization_config) == "llm-compressor":
        schemes = quantization_config.resolve_quantization_config().config_groups.values()
        # Rows and columns of a block; of a group, columns alone. -1 means one scale for a row.
        blocks = [getattr(scheme.weights, "block_structure", None) or (1, 1) for scheme in schemes]
        groups = [getattr(scheme.weights, "group_size", None) for scheme in schemes]
        columns = [size for size in groups if isinstance(size, int) and size > 0]
        return math.lcm(*(rows for rows, _ in blocks)), math.lcm(*columns, *(size for _, size in blocks))
    settings = _torchao_settings(getattr(quantization_config, "quant_type", None), name)
    granularities = (getattr(settings, kind, None) for kind in ("granularity", "weight_granularity"))
    sizes = (getattr(owner, "group_size", None) for owner in (settings, *granularities))
    return 1, next((size for size in sizes if isinstance(size, int) and size > 0), 1)


def _torchao_settings(quant_type: Any, name: str) -> Any:
    """Return the settings of the weight called `name`; torchao's `FqnToConfig` has one for each."""
    settings_of = getattr(quant_type, "fqn_to_config", None)
    if settings_of is None:
        return quant_type
    keys = (f"{name}.weight", name)
    for key in keys:
        if key in settings_of:
            return settings_of[key]
    for pattern, settings in settings_of.items():
        if pattern.startswith("re:") and any(re.fullmatch(pattern[3:], key) for key in keys):
            return settings
    return settings_of.get("_default")
