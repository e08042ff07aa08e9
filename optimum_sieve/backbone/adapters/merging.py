"""Merge an adapter into its base model. Needs PEFT, which is imported on first use."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from optimum_sieve._messages import cut, listed


if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from .files import Adapter

logger = logging.getLogger(__name__)

# Methods that compute something that no weight can hold.
_UNMERGEABLE = ("ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA")
_SEED = 0
# Of a model: the adapter that was merged into it.
_ATTRIBUTE = "_sieve_merged_adapter"
# What PEFT raises for adapters that do not fit the model, or cannot be merged.
_ERRORS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, OSError, RuntimeError, SafetensorError)


def require_peft() -> Any:
    """Import PEFT.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("`peft` must be installed for adapters, got none. `pip install peft`.") from error
    return peft


def is_adapted(model: Any) -> bool:
    """Return whether an object is PEFT's model around another one; does not import PEFT."""
    return any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)


def check_kind(kind: str, name: str) -> None:
    """Check that adapters of a method can be merged into weights.

    Args:
        kind (`str`): PEFT's name of the method.
        name (`str`): Name of the adapter, for the message.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If they cannot.
    """
    require_peft()

    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuners = {str(getattr(key, "value", key)): tuner for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    if kind in _UNMERGEABLE or not hasattr(tuners.get(kind), "merge_and_unload"):
        raise ValueError(
            f"`model` must have an adapter that can be merged into its weights, such as LoRA, got {kind} in "
            f"{cut(name)}. Train a LoRA adapter, or name the base model."
        )


def check_adapter(adapter: Adapter, config: Any, offload_dir: str | Path | None) -> None:
    """Check, before the base model is loaded, that an adapter can be merged into it.

    Args:
        adapter (`Adapter`): The adapter.
        config ([`~transformers.PreTrainedConfig`]): Configuration of its base model.
        offload_dir (`str | Path`, *optional*): Directory for blocks of the base model that do not fit the memory.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If it cannot.
    """
    check_kind(adapter.kind, adapter.name)
    if config.model_type == "sieve":
        raise ValueError(
            f"`model` must be an adapter of a dense model, got {cut(adapter.name)}, whose base "
            f"{cut(adapter.base_model)} is pruned. Merge it with `optimum-cli sieve merge`."
        )
    if offload_dir is not None:
        raise ValueError(
            f"`memory_limit` must leave room for the whole model where `model` is an adapter, got "
            f"{cut(adapter.name)}, which is merged in memory. Raise it, or merge the adapter, save the model with "
            "`save_pretrained` and prune that."
        )


def merged_adapter(model: Any) -> dict[str, str] | None:
    """Return `type`, and where known `name` and `revision`, of the adapter that was merged into a model; or `None`."""
    return getattr(model, _ATTRIBUTE, None)


def adapted_name(model: Any) -> str | None:
    """Return the name of the base model of a `PeftModel`, and `None` for other objects."""
    return model.get_base_model().name_or_path or None if is_adapted(model) else None


def plain(model: Any) -> Any:
    """Return the base model of a `PeftModel` with its adapter merged into it, in place; other objects as they are.

    Raises:
        ValueError: If the adapter cannot be merged, or there are several.
    """
    return merge_given(model) if is_adapted(model) else model


def merge_files(model: PreTrainedModel, adapter: Adapter, num_tokens: int) -> PreTrainedModel:
    """Merge an adapter in files into its base model, in place.

    The embeddings get the rows that the adapter was trained with, or those that its tokenizer needs.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model, in memory and not quantized.
        adapter (`Adapter`): The adapter.
        num_tokens (`int`): Number of tokens of the tokenizer.

    Returns:
        [`~transformers.PreTrainedModel`]: The same model.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If the adapter does not fit, cannot be merged, or makes weights that are not finite.
    """
    peft = require_peft()
    directory = adapter.weights().parent
    found = adapter.shapes()
    with _naming(adapter.name), _quiet():
        _resize(model, found, num_tokens)
        known = {name for name, _ in model.named_parameters()}
        adapted = peft.PeftModel.from_pretrained(model, str(directory), torch_device="cpu")
        # PEFT passes over both.
        expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        _check_names(expected, found, known, adapter.name)
    return _merge(adapted, adapter.name, name=adapter.name, revision=adapter.revision)


def merge_given(adapted: Any) -> PreTrainedModel:
    """Merge the adapter of a `PeftModel` into its base model, in place, and return that.

    Raises:
        ValueError: If it has several adapters or none, its base is quantized or in another object, or the adapter
            cannot be merged.
    """
    names = list(adapted.peft_config)
    if len(names) != 1:
        raise ValueError(
            f"`model` must have one adapter, got {len(names)}: {listed(names)}. Remove the others with "
            "`delete_adapter`, or combine them with `add_weighted_adapter`."
        )
    kind = adapter_kind(adapted)
    check_kind(kind, f"a {type(adapted).__name__}")
    base = adapted.get_base_model()
    if getattr(base, "hf_quantizer", None) is not None or getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            "`model` must have an adapter on plain weights, got one on quantized weights. Load the base model without "
            "quantization and put the adapter on it with `PeftModel.from_pretrained`."
        )
    return _merge(adapted, names[0])


def adapter_kind(adapted: Any) -> str:
    """Return PEFT's name of the method of a `PeftModel`'s first adapter, such as `"LORA"`."""
    kind = next(iter(adapted.peft_config.values())).peft_type
    return str(getattr(kind, "value", kind))


def _merge(adapted: Any, shown_name: str, **known: str | None) -> PreTrainedModel:
    kind = adapter_kind(adapted)
    base = adapted.get_base_model()
    dtypes = {weight: parameter.dtype for weight, parameter in base.named_parameters()}
    with _naming(shown_name), _quiet():
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    for weight, parameter in merged.named_parameters():
        # PEFT trains whole modules in float32.
        parameter.data = parameter.data.to(dtypes.get(weight, _dtype(merged, parameter)))
        parameter.requires_grad = True
    entry = {"type": kind, **{key: value for key, value in known.items() if value is not None}}
    setattr(merged, _ATTRIBUTE, entry)
    base = merged.name_or_path or "its base model"
    logger.warning("The adapter %s (%s) was merged into %s.", shown_name, kind, base)
    merged.eval()  # type: ignore[no-untyped-call]
    return merged


def _dtype(model: PreTrainedModel, parameter: torch.Tensor) -> torch.dtype:
    return model.dtype if parameter.is_floating_point() else parameter.dtype


def _resize(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], num_tokens: int) -> None:
    """Give the embeddings as many rows as the adapter has of them, else at least as many as there are tokens."""
    embeddings: Any = model.get_input_embeddings()
    rows = len(embeddings.weight)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    places = [_name(model, embeddings), _name(model, head)]
    saved = [shapes[f"{place}{end}"][0] for place in places for end in _ENDS if f"{place}{end}" in shapes]
    needed = saved[0] if saved else max(rows, num_tokens)
    if needed != rows:
        # Rows that the adapter does not hold are drawn.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model.resize_token_embeddings(needed)


_ENDS = (".weight", ".base_layer.weight")


def _name(model: nn.Module, module: Any) -> str | None:
    return next((name for name, other in model.named_modules() if other is module), None)


def _check_names(expected: Collection[str], found: Collection[str], known: Collection[str], name: str) -> None:
    wanted = {each.removeprefix("base_model.model.") for each in expected}
    missing = sorted(wanted - set(found))
    # Whole tensors of the base model may be there too, such as resized embeddings.
    unknown = sorted(each for each in set(found) - wanted if each.replace(".base_layer", "") not in known)
    if missing or unknown:
        problem = f"without {listed(missing, 3)}" if missing else f"with {listed(unknown, 3)} that are not among them"
        raise ValueError(
            f"`model` must be an adapter with the tensors that its adapter_config.json describes, got {cut(name)} "
            f"{problem}. Save it again with PEFT, with the same versions of PEFT and transformers as here."
        )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let errors of PEFT name the argument and the adapter.

    Raises:
        ValueError: In their place.
    """
    try:
        yield
    except (*_ERRORS, TypeError, ValueError) as error:
        if str(error).startswith("`model`") or isinstance(error, MemoryError):
            raise
        raise ValueError(
            f"`model` must be an adapter that PEFT can merge into its base model, got an error for {cut(name)}: "
            f"{cut(str(error) or type(error).__name__, 600)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of PEFT about models that are trained on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
