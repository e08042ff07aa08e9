"""The model type `sieve`: any transformers architecture, some of whose linears are `FactorizedLinear`.

This file and those it imports travel beside the weights of every pruned model, for `trust_remote_code=True`,
so they need torch and transformers alone.

Classes are made on demand as subclasses of the base architecture's (`SieveLlamaConfig`, `SieveLlamaForCausalLM`). They
replace the linears named in the configuration when the model is built, before any weight is read: sharding, dtypes,
device maps, tied weights and generation are transformers' own.
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
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from .experts import separate_experts
from .layers import FactorizedLinear
from .layout import copy_parameters
from .tensor_parallel import factor_plan
from .vllm_rules import keep_apart


if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    _ConfigBase = PreTrainedConfig
else:
    # Not `PreTrainedConfig`: its dataclass fields would override the defaults of the base architecture.
    _ConfigBase = object

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"`transformers` must be of version 5, got {transformers.__version__}. `pip install --upgrade transformers`."
    )

MODEL_TYPE = "sieve"
FORMAT_VERSION = 1
_FACTOR_TENSOR = re.compile(r"\.((right|left|pivot|rest)\.(weight|bias)|row_order)$")


class SieveModelConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Entry point of the model type: `from_pretrained` returns the configuration class of the base architecture.

    That class (`SieveLlamaConfig`, `SieveQwen3Config`, ...) is the base configuration with one more attribute, `sieve`.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make the configuration described by `config_dict`, the content of a `config.json`.

        Raises:
            ValueError: If the `sieve` block is missing, newer than this code or names an unknown architecture.
        """
        return config_class(_read_base(config_dict)).from_dict(config_dict, **kwargs)


class SieveConfigMixin(_ConfigBase):  # type: ignore[no-untyped-call]
    """What every `Sieve...Config` adds to its base architecture's configuration."""

    sieve: Any = None

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` and, beside it, the code that `trust_remote_code=True` runs."""
        self.auto_map = auto_map(type(self))
        super().save_pretrained(save_directory)
        for source in (__file__, *get_relative_import_files(__file__)):
            shutil.copyfile(source, Path(save_directory) / Path(source).name)
        if push_to_hub:
            # The base method uploads only what it wrote itself: the code would stay behind.
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)


class SievePreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What every `Sieve...` model adds to its base architecture's class.

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
        """Load as transformers loads its own models: for others it leaves some non-persistent buffers unset."""
        return False

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save with the ranks that the modules have now: merging an adapter may have widened them."""
        self.config.sieve = {**self.config.sieve, "rank_pattern": read_rank_pattern(self)}
        super().save_pretrained(save_directory, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Refuse a checkpoint that does not fit, where transformers would go on with random weights."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if problems := _loading_problems(self, loading_info):
            # On the way out transformers reports these, and would raise in our place.
            loading_info.mismatched_keys.clear()
            raise ValueError(
                "The checkpoint must hold exactly the tensors that `rank_pattern` in config.json describes, got "
                f"{'; '.join(problems)}. Download or save the model again."
            )
        # The last step of `from_pretrained`.
        copy_parameters(self)

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        """Keep rules for dense layers off the factorized layers that share their wildcard name."""
        factorized = dict(_factorized_layers(self))
        return {name: style for name, style in super()._expand_parallel_plan(plan).items() if name not in factorized}


def read_rank_pattern(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Read rank, storage and bias of every `FactorizedLinear` from the modules as they are.

    Args:
        model ([`~transformers.PreTrainedModel`]): With or without a head.

    Returns:
        `dict[str, dict]`: By module name relative to the base model, such as `"layers.0.self_attn.q_proj"`:
        `{"rank": 64, "storage": "pivoted", "bias": True}`.
    """
    pattern = {}
    for name, layer in _factorized_layers(model.base_model):
        pattern[name] = {"rank": layer.rank, "storage": layer.storage, "bias": layer.has_bias}
    return pattern


@functools.cache
def config_class(base: Any) -> Any:
    """Make the sieve class of the configuration class `base`, and the models of every Auto class that serves it."""
    namespace = {
        "__module__": __name__,
        "__doc__": f"`{base.__name__}` of a pruned model.",
        "model_type": MODEL_TYPE,
        # Left out, it is generated from the fields, of which `sieve` is none: other ranks would be equal.
        "__eq__": PreTrainedConfig.__eq__,
    }
    made = type(base)(f"Sieve{base.__name__}", (SieveConfigMixin, base), namespace)
    for auto_class, models in _auto_classes(base):
        classes = tuple(model_class(model, made) for model in models)
        # Keyed by the class just made: code that came with one checkpoint changes nothing for other checkpoints.
        auto_class.register(made, classes[0] if len(classes) == 1 else classes, exist_ok=True)
    return made


@functools.cache
def model_class(base: Any, config: Any) -> Any:
    """Make the sieve class of the model class `base`, for the sieve configuration class `config`."""
    from transformers import conversion_mapping

    base_config = config.__mro__[2]
    # Some architectures have a configuration of their own and borrow another one's model class.
    borrower = "" if base.config_class is base_config else f"__{base_config.__name__}"
    name = f"Sieve{base.__name__}{borrower}"
    namespace = {"__module__": __name__, "__doc__": f"Pruned `{base.__name__}`.", "config_class": config}
    # transformers looks them up by the name of the class or the model type, both of which are new.
    for known in (base_config.model_type, base.__name__):
        if (conversions := conversion_mapping.get_checkpoint_conversion_mapping(known)) is not None:  # type: ignore[no-untyped-call]
            conversion_mapping.register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return type(base)(name, (SievePreTrainedModel, base), namespace)


def _auto_classes(config: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield every Auto class that serves a configuration class, with its model classes."""
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None)
        if mapping is not None and isinstance(auto_class, type) and config in mapping:
            found = mapping[config] if isinstance(mapping[config], tuple) else (mapping[config],)
            # Without the text models that are served from a part of a multimodal configuration.
            parts = config.sub_configs.values()
            if models := tuple(m for m in found if issubclass(m, PreTrainedModel) and m.config_class not in parts):
                yield auto_class, models


def auto_map(config: Any) -> dict[str, str]:
    """Name the class that each Auto class finds in the code beside the weights."""
    names = {auto_class.__name__: models[0].__name__ for auto_class, models in _auto_classes(config)}
    return {key: f"{Path(__file__).stem}.{name}" for key, name in {"AutoConfig": "SieveModelConfig", **names}.items()}


def __getattr__(name: str) -> Any:
    """Make a class on demand, for `auto_map` and for pickle."""
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
    """Put an empty `FactorizedLinear` wherever the rank pattern names a layer."""
    separate_experts(model.base_model, model.config.sieve.get("separate_experts", ()))
    modules = dict(model.base_model.named_modules())
    for name, entry in model.config.sieve["rank_pattern"].items():
        if name not in modules:
            closest = difflib.get_close_matches(name, modules, n=1)
            hint = f"Did you mean {closest[0]!r}?" if closest else "Compare it with `model.named_modules()`."
            raise ValueError(f"`rank_pattern` must name layers of {type(model).__name__}, got {name!r}. {hint}")
        # A head that builds its trunk by `AutoModel.from_config` meets layers that are replaced already.
        if not isinstance(modules[name], FactorizedLinear):
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, _empty_layer(name, modules[name], entry))


def _empty_layer(name: str, linear: nn.Module, entry: dict[str, Any]) -> FactorizedLinear:
    """Make the layer that `entry` describes in place of `linear`, on its device and in its dtype."""
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
            # vLLM moves parameters to meta and buffers nowhere; one made there would never be filled.
            device=None if linear.weight.is_meta else linear.weight.device,
            dtype=linear.weight.dtype,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`rank_pattern` must give {name!r} a `rank`, `storage` and `bias` that fit it, got {entry!r}. {error}"
        ) from error


def _loading_problems(model: PreTrainedModel, loading_info: Any) -> list[str]:
    """Say what a checkpoint lacks, and which factors it has too many or in another shape.

    Another class than the one that wrote the checkpoint may bring a head or a pooler of its own, never a block.
    """
    inside = tuple(f"{name}." for name, _ in _factorized_layers(model))
    block = re.compile(("" if model.base_model is model else rf"{model.base_model_prefix}\.") + r".*\.\d+\.")
    same = model.config.architectures == [type(model).__name__]
    problems: dict[str, Iterable[str]] = {
        "missing": (k for k in loading_info.missing_keys if same or k.startswith(inside) or block.match(k)),
        "unexpected": (k for k in loading_info.unexpected_keys if _FACTOR_TENSOR.search(k)),
        "of another shape": (
            f"{key} {tuple(found)} instead of {tuple(wanted)}"
            for key, found, wanted in loading_info.mismatched_keys
            if key.startswith(inside)
        ),
    }
    return [f"{kind}: {listed}" for kind, names in problems.items() if (listed := _shorten(sorted(names)))]


def _shorten(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# Code that came with one trusted checkpoint must not spare the next one the question of trust.
if not __name__.startswith("transformers_modules."):
    AutoConfig.register(MODEL_TYPE, SieveModelConfig, exist_ok=True)
