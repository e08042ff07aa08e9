"""The model type `sieve`: any transformers architecture, some of whose linears are `FactorizedLinear`.

This file and those it imports are saved with every pruned model, for `trust_remote_code=True`. They need torch and
transformers alone.

Subclasses of the classes of the base architecture are made on demand (`SieveLlamaConfig`, `SieveLlamaForCausalLM`).
When a model is built, before any weight is read, they replace the linears that the configuration names. transformers
does everything else: sharding, dtypes, device maps, tied weights and generation.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto

from .empty_layers import replace_linears
from .fingerprint import current_results
from .layers import factor_layers, factorized_layers
from .layout import copy_parameters
from .loading_checks import check_files, check_loaded, removing_stale
from .pipeline_sieve import pipeline_entry, register_pipeline
from .tensor_parallel import factor_plan
from .vllm_rules import keep_apart


if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

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
# Whether this is a copy that came with a checkpoint.
_IS_REMOTE = __name__.startswith("transformers_modules.")


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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make the configuration; the installed package has a pipeline of its own, which needs no trust."""
        if not _IS_REMOTE:
            config_dict = {key: value for key, value in config_dict.items() if key != "custom_pipelines"}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`, which names the pipeline that is saved with it."""
        # PEFT calls this and then looks up the model type's default targets. A configuration of defaults has no ranks.
        if (peft := sys.modules.get("peft.utils.constants")) is not None and self.sieve is not None:
            targets = factor_layers(self.sieve["rank_pattern"])
            peft.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[MODEL_TYPE] = targets
        return {**super().to_dict(), "custom_pipelines": {MODEL_TYPE: pipeline_entry(self)}}

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
        replace_linears(self)
        self._tp_plan = factor_plan(self, self._tp_plan or {})
        if config.get_text_config()._attn_implementation == "vllm":
            keep_apart(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Load like transformers' own models; for others, some non-persistent buffers stay unset."""
        return False

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save with the current ranks, which merging an adapter may have raised, and no scores of other weights."""
        block = {**self.config.sieve, "rank_pattern": read_rank_pattern(self)}
        if isinstance(block.get("results"), dict):
            state_dict = kwargs.get("state_dict", args[1] if len(args) > 1 else None)
            block["results"] = current_results(self, block["results"], state_dict)
        self.config.sieve = block
        with removing_stale(Path(save_directory)):
            super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load like the class of the base architecture, and name the checkpoint if a file of it is damaged."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise SafetensorError(
                f"The checkpoint {pretrained_model_name_or_path} must hold complete files, got a damaged one: {error}. "
                "Download or save the model again."
            ) from error

    @staticmethod
    def _load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        """Refuse a checkpoint whose tensors transformers would cast, or read from the wrong one of two saves."""
        # This code is saved with models and meets later versions, where a private method may have other parameters.
        load: Any = PreTrainedModel._load_pretrained_model
        values = inspect.signature(load).bind_partial(*args, **kwargs).arguments
        if "model" in values:
            check_files(values["model"], values.get("state_dict"), values.get("checkpoint_files"))
        return load(*args, **kwargs)

    def _get_dtype_plan(self, dtype: Any) -> dict[str, Any]:
        """Keep row orders integers in modules that stay in float32 whatever the dtype, such as `wo` of T5."""
        plan = super()._get_dtype_plan(dtype)
        return {r"^*\.row_order$": torch.int32, **plan} if plan else plan

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Refuse a checkpoint that does not fit, as transformers would continue with random weights."""
        beyond = set(loading_info.unexpected_keys)
        super()._adjust_missing_and_unexpected_keys(loading_info)
        check_loaded(self, loading_info, beyond, _declared_class(self))
        # This is the last step of `from_pretrained`.
        copy_parameters(self)

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        """Exclude factorized layers from the rules of dense layers with the same wildcard name."""
        factorized = dict(factorized_layers(self))
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
        for name, layer in factorized_layers(model.base_model)
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


def _declared_class(model: PreTrainedModel) -> Any:
    """Return the class of the model that was saved, as its configuration says."""
    names: Any = model.config.architectures
    if names is None or names == [type(model).__name__]:
        return type(model)
    try:
        (name,) = names
        # A trunk that is saved by itself has the class of the base architecture.
        declared = __getattr__(f"Sieve{name.removeprefix('Sieve')}")
    except (AttributeError, TypeError, ValueError):
        declared = None
    if declared is None or getattr(declared, "config_class", None) is not type(model.config):
        raise ValueError(
            f"`architectures` in config.json must name the class of the saved model, such as "
            f"[{type(model).__name__!r}], got {str(names)[:200]}. Download or save the model again."
        )
    return declared


# If code from one trusted checkpoint registered the type, transformers would not ask about trust for the next one.
if not _IS_REMOTE:
    AutoConfig.register(MODEL_TYPE, SieveModelConfig, exist_ok=True)
    register_pipeline(MODEL_TYPE)
