"""The model type `sieve`: any transformers architecture, some of whose linears are `FactorizedLinear`.

This file and those it imports are saved with every pruned model, for `trust_remote_code=True`. They need torch and
transformers alone.

Subclasses of the classes of the base architecture are made on demand (`SieveLlamaConfig`, `SieveLlamaForCausalLM`).
When a model is built, before any weight is read, they replace the linears that the configuration names. transformers
does everything else: sharding, dtypes, device maps, tied weights and generation.
"""

from __future__ import annotations

import difflib
import functools
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from .experts import separate_experts
from .layers import FACTOR_TENSOR, FactorizedLinear
from .layout import copy_parameters
from .tensor_parallel import factor_plan
from .vllm_rules import keep_apart


if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    _ConfigBase = PreTrainedConfig
else:
    # The dataclass fields of `PreTrainedConfig` would override the defaults of the base architecture.
    _ConfigBase = object

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"`transformers` must be of version 5, got {transformers.__version__}. `pip install --upgrade transformers`."
    )

MODEL_TYPE = "sieve"
FORMAT_VERSION = 1


class SieveModelConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Entry point of the model type: `from_pretrained` returns a class such as `SieveLlamaConfig`."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make the configuration from `config_dict`, the content of a `config.json`.

        Raises:
            ValueError: If the `sieve` block is missing, newer than this code or names an unknown architecture.
        """
        return config_class(_read_base(config_dict)).from_dict(config_dict, **kwargs)


class SieveConfigMixin(_ConfigBase):  # type: ignore[no-untyped-call]
    """Addition of every `Sieve...Config` to the configuration class of its base architecture: the `sieve` block."""

    sieve: Any = None

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` and the code that `trust_remote_code=True` runs."""
        self.auto_map = auto_map(type(self))
        super().save_pretrained(save_directory)
        for source in (__file__, *get_relative_import_files(__file__)):
            shutil.copyfile(source, Path(save_directory) / Path(source).name)
        if push_to_hub:
            # The base method would upload only the files that it wrote itself, without the code.
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)


class SievePreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Additions of every `Sieve...` model to the class of its base architecture.

    Raises:
        ValueError: If the rank pattern does not fit the architecture, or a checkpoint does not fit the rank pattern.
    """

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        _read_base(vars(config))
        super().__init__(config, *args, **kwargs)
        _replace_linears(self)
        self._tp_plan = factor_plan(self, self._tp_plan or {})
        if config.get_text_config()._attn_implementation == "vllm":
            keep_apart(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Load like transformers' own models; for others, some non-persistent buffers stay unset."""
        return False

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save with the current ranks, which merging an adapter may have raised."""
        self.config.sieve = {**self.config.sieve, "rank_pattern": read_rank_pattern(self)}
        super().save_pretrained(save_directory, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Refuse a checkpoint that does not fit, as transformers would continue with random weights."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if problems := _loading_problems(self, loading_info):
            # transformers would raise an error about these first.
            loading_info.mismatched_keys.clear()
            raise ValueError(
                "The checkpoint must hold exactly the tensors that `rank_pattern` in config.json describes, got "
                f"{'; '.join(problems)}. Download or save the model again."
            )
        # This is the last step of `from_pretrained`.
        copy_parameters(self)

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        """Exclude factorized layers from the rules of dense layers with the same wildcard name."""
        factorized = dict(_factorized_layers(self))
        return {name: style for name, style in super()._expand_parallel_plan(plan).items() if name not in factorized}


def read_rank_pattern(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Read the rank, storage and bias of every `FactorizedLinear` in a model.

    Args:
        model ([`~transformers.PreTrainedModel`]): With or without a head.

    Returns:
        `dict[str, dict]`: Module name relative to the base model, such as `"layers.0.self_attn.q_proj"` ->
        `{"rank": 64, "storage": "pivoted", "bias": True}`.
    """
    return {
        name: {"rank": layer.rank, "storage": layer.storage, "bias": layer.has_bias}
        for name, layer in _factorized_layers(model.base_model)
    }


@functools.cache
def config_class(base: Any) -> Any:
    """Make the sieve class of the configuration class `base`, and register its models with every Auto class."""
    namespace = {
        "__module__": __name__,
        "__doc__": f"`{base.__name__}` of a pruned model.",
        "model_type": MODEL_TYPE,
        # The generated method ignores `sieve`, which is not a field: configurations of other ranks would be equal.
        "__eq__": PreTrainedConfig.__eq__,
    }
    sieve_config = type(base)(f"Sieve{base.__name__}", (SieveConfigMixin, base), namespace)
    for auto_class, models in _auto_classes(base):
        classes = tuple(model_class(model, sieve_config) for model in models)
        # The new class is the key, so code that came with one checkpoint does not affect others.
        auto_class.register(sieve_config, classes[0] if len(classes) == 1 else classes, exist_ok=True)
    return sieve_config


@functools.cache
def model_class(base: Any, config: Any) -> Any:
    """Make the sieve class of the model class `base`, for the sieve configuration class `config`."""
    from transformers import conversion_mapping

    base_config = config.__mro__[2]
    # Some architectures combine their own configuration with the model class of another one.
    borrower = "" if base.config_class is base_config else f"__{base_config.__name__}"
    name = f"Sieve{base.__name__}{borrower}"
    namespace = {"__module__": __name__, "__doc__": f"Pruned `{base.__name__}`.", "config_class": config}
    # transformers looks them up by class name or model type, both of which are new here.
    for known in (base_config.model_type, base.__name__):
        if (conversions := conversion_mapping.get_checkpoint_conversion_mapping(known)) is not None:  # type: ignore[no-untyped-call]
            conversion_mapping.register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return type(base)(name, (SievePreTrainedModel, base), namespace)


def _auto_classes(config: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield every Auto class that supports a configuration class, with its model classes."""
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None)
        if mapping is not None and isinstance(auto_class, type) and config in mapping:
            served = mapping[config] if isinstance(mapping[config], tuple) else (mapping[config],)
            # Without text models, which use a part of a multimodal configuration.
            parts = config.sub_configs.values()
            if models := tuple(m for m in served if issubclass(m, PreTrainedModel) and m.config_class not in parts):
                yield auto_class, models


def auto_map(config: Any) -> dict[str, str]:
    """Return the class in the code saved with the weights, for each Auto class."""
    names = {auto_class.__name__: models[0].__name__ for auto_class, models in _auto_classes(config)}
    return {key: f"{Path(__file__).stem}.{name}" for key, name in {"AutoConfig": "SieveModelConfig", **names}.items()}


def __getattr__(name: str) -> Any:
    """Make a class on demand, for `auto_map` and pickle."""
    stem, _, borrower = name.removeprefix("Sieve").partition("__")
    base: Any = getattr(transformers, stem, None) if name.startswith("Sieve") else None
    ancestors = getattr(base, "__mro__", ())
    if PreTrainedConfig in ancestors:
        return config_class(base)
    if PreTrainedModel in ancestors:
        return model_class(base, config_class(getattr(transformers, borrower) if borrower else base.config_class))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _factorized_layers(module: nn.Module) -> Iterator[tuple[str, FactorizedLinear]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, FactorizedLinear))


def _read_base(config_dict: dict[str, Any]) -> Any:
    """Check the `sieve` block and return the configuration class of the base architecture."""
    block = config_dict.get("sieve")
    if not isinstance(block, dict) or not isinstance(block.get("rank_pattern"), dict):
        raise ValueError(
            "`config.json` must hold a `sieve` block with a `rank_pattern`, got none. Save the model again with its "
            "`save_pretrained`."
        )
    version, base = block.get("format_version"), block.get("base_model_type")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"`format_version` must be between 1 and {FORMAT_VERSION}, got {version!r}. Newer ones come with "
            "`pip install --upgrade optimum-sieve`."
        )
    if not isinstance(base, str) or base == MODEL_TYPE or base not in CONFIG_MAPPING:
        raise ValueError(
            f"`base_model_type` must be a model type that transformers {transformers.__version__} knows, got {base!r}. "
            "Newer ones come with `pip install --upgrade transformers`."
        )
    return CONFIG_MAPPING[base]


def _replace_linears(model: PreTrainedModel) -> None:
    """Replace the layers in the rank pattern with empty `FactorizedLinear` layers."""
    separate_experts(model.base_model, model.config.sieve.get("separate_experts", ()))
    modules = dict(model.base_model.named_modules())
    for name, entry in model.config.sieve["rank_pattern"].items():
        if name not in modules:
            closest = difflib.get_close_matches(name, modules, n=1)
            hint = f"Did you mean {closest[0]!r}?" if closest else "Compare it with `model.named_modules()`."
            raise ValueError(f"`rank_pattern` must name layers of {type(model).__name__}, got {name!r}. {hint}")
        # A head that builds its trunk with `AutoModel.from_config` has replaced them.
        if not isinstance(modules[name], FactorizedLinear):
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, _empty_layer(name, modules[name], entry))


def _empty_layer(name: str, linear: nn.Module, entry: dict[str, Any]) -> FactorizedLinear:
    """Make the layer that replaces `linear` according to `entry`, with the same device and dtype."""
    if not isinstance(linear, nn.Linear | Conv1D):
        raise ValueError(f"`rank_pattern` must name linear layers, got {name!r}, a {type(linear).__name__}.")
    # Conv1D holds its weight as (in, out).
    rows, columns = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.T.shape
    try:
        return FactorizedLinear(
            columns,
            rows,
            entry["rank"],
            storage=entry["storage"],
            bias=entry["bias"],
            # vLLM puts parameters on meta itself, and would never fill a buffer on meta.
            device=None if linear.weight.is_meta else linear.weight.device,
            dtype=linear.weight.dtype,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`rank_pattern` must give {name!r} a `rank`, `storage` and `bias` that fit it, got {entry!r}. {error}"
        ) from error


def _loading_problems(model: PreTrainedModel, loading_info: Any) -> list[str]:
    """List missing tensors, and factors that are unexpected or have another shape.

    A class other than that of the checkpoint may add a head or a pooler, but not a block.
    """
    inside = tuple(f"{name}." for name, _ in _factorized_layers(model))
    block = re.compile(("" if model.base_model is model else rf"{model.base_model_prefix}\.") + r".*\.\d+\.")
    same = model.config.architectures == [type(model).__name__]
    problems: dict[str, Iterable[str]] = {
        "missing": (k for k in loading_info.missing_keys if same or k.startswith(inside) or block.match(k)),
        "unexpected": (k for k in loading_info.unexpected_keys if FACTOR_TENSOR.search(k)),
        "of another shape": (
            f"{key} {tuple(saved)} instead of {tuple(expected)}"
            for key, saved, expected in loading_info.mismatched_keys
            if key.startswith(inside)
        ),
    }
    return [f"{kind}: {listed}" for kind, names in problems.items() if (listed := _shorten(sorted(names)))]


def _shorten(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# If code from one trusted checkpoint registered the type, transformers would not ask about trust for the next one.
if not __name__.startswith("transformers_modules."):
    AutoConfig.register(MODEL_TYPE, SieveModelConfig, exist_ok=True)
