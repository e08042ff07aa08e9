"""Fit a quantization of bitsandbytes, torchao or quanto to the shapes of a pruned model.

The quantizers of transformers reach the factors as they reach any `torch.nn.Linear`. But none of them takes a weight
without elements, a group of weights must divide a row, and a factor's rows are as long as the rank.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import get_keys_to_not_convert

from optimum_sieve.backbone.loading import default_device, empty_model
from optimum_sieve.backbone.targets import find_targets


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig

# Where each method keeps the names of the modules that stay as they are.
_SKIPPED = {
    "bitsandbytes": "llm_int8_skip_modules",
    "torchao": "modules_to_not_convert",
    "quanto": "modules_to_not_convert",
}
# bitsandbytes' 4-bit kernels for the CPU take no other number of rows, and of columns some of them return numbers that
# have nothing to do with the weights where a block of 64 goes over the end of a row.
_CPU_4BIT = (32, 64)


def compatible(
    config: PreTrainedConfig,
    quantization_config: Any,
    *,
    exclude_modules: Sequence[str] = (),
    device: str | torch.device | None = None,
) -> Any:
    """Return `quantization_config` with the linears left out whose shapes the method cannot take.

    Those are weights without elements (rank 0, or what a pivoted layer of full rank has left), of a single column (rank
    1), and those whose rows the method's groups do not divide. Nothing is loaded: a model without data is made.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Of the model that will be quantized, as `AutoConfig.from_pretrained` returns it; pruned or dense. It is
            loaded with its head.
        quantization_config (`BitsAndBytesConfig`, `TorchAoConfig` or `QuantoConfig`):
            For `from_pretrained`. It is not changed. Modules that it leaves out stay left out; where it names none,
            the output embeddings do, as transformers has it.
        exclude_modules (`Sequence[str]`):
            `fnmatch` patterns of more linears that stay as they are, such as `("left", "rest")`; a pattern also matches
            the end of a name from a dot on.
        device (`torch.device`, *optional*):
            Where the model will run. `None`: the accelerator if there is one, else the CPU.

    Returns:
        A copy of `quantization_config`.

    Raises:
        ValueError: If the model is quantized already, the method is another one, or a pattern matches no linear.

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
    method = getattr(quantization_config, "quant_method", None)
    method = str(getattr(method, "value", method))
    if method not in _SKIPPED:
        raise ValueError(
            "`quantization_config` must be a BitsAndBytesConfig, TorchAoConfig or QuantoConfig, got "
            f"{type(quantization_config).__name__}. Name the modules that other methods leave out yourself."
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
    # A list replaces transformers' own, which keeps the head and tied weights.
    named = sorted(get_keys_to_not_convert(empty)) if named is None else named
    fitted = copy.copy(quantization_config)
    setattr(fitted, _SKIPPED[method], list(dict.fromkeys([*named, *left_out])))
    return fitted


def _fits(rows: int, columns: int, multiples: tuple[int, int]) -> bool:
    # One column saves nothing, and both torchao and bitsandbytes' kernel for the CPU fail on it.
    return rows > 0 and columns > 1 and rows % multiples[0] == 0 and columns % multiples[1] == 0


def _multiples(quantization_config: Any, name: str, device: torch.device) -> tuple[int, int]:
    """Return what the rows and the columns of the weight called `name` must be multiples of."""
    if getattr(quantization_config, "load_in_4bit", False) and device.type == "cpu":
        return _CPU_4BIT
    settings = _torchao_settings(getattr(quantization_config, "quant_type", None), name)
    granularities = (getattr(settings, kind, None) for kind in ("granularity", "weight_granularity"))
    sizes = (getattr(owner, "group_size", None) for owner in (settings, *granularities))
    return 1, next((size for size in sizes if isinstance(size, int) and size > 0), 1)


def _torchao_settings(quant_type: Any, name: str) -> Any:
    """Return the settings of the weight called `name`, where torchao's `FqnToConfig` has several."""
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
