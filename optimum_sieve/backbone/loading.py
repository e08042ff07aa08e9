"""Load a model with its tokenizer, or make an empty one from its configuration."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_sieve._messages import cut, listed, shown
from optimum_sieve.modeling.block import check_block
from optimum_sieve.modeling.conversion import require_model
from optimum_sieve.modeling.experts import separate_experts
from optimum_sieve.modeling.layout import copy_parameters
from optimum_sieve.modeling.modeling_sieve import SievePreTrainedModel
from optimum_sieve.run import distributed
from optimum_sieve.run.scratch import Scratch

from .adapters.merging import check_adapter, is_adapted, merge_files, plain
from .blockwise import find_blocks
from .fingerprint import check_digest
from .kinds import auto_class_name
from .quantized import check_quantized, quantization_options
from .sources import (
    adapter_of,
    base_options,
    naming_base,
    naming_model,
    read_config,
    read_tokenizer,
    source_options,
)


if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedConfig


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    revision: str | None = None,
    offload_dir: str | Path | None = None,
    quantized: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """Return the model, its tokenizer and its name; a loaded model is returned unchanged.

    An adapter of PEFT is merged into its base model, whose name is then returned: in a new model if it is in files, in
    place if it is a `PeftModel`.

    Args:
        model (`str | Path | PreTrainedModel`): Hub id or directory of a model or adapter, or a loaded one.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Required with a loaded model.
        dtype (`str | torch.dtype`, *optional*): Default: as the checkpoint was saved.
        device (`str | torch.device`, *optional*): Default: the accelerator if there is one, else the CPU.
        trust_remote_code (`bool`): Whether code from the model's repository may run.
        gguf_file (`str`, *optional*): Name of a GGUF file in the repository or directory.
        revision (`str`, *optional*): Revision on the Hub; for an adapter in a directory, that of its base model.
        offload_dir (`str | Path`, *optional*): Leave the weights of the blocks on disk until a block is called: in the
            checkpoint or, if they have to be converted, in a new directory inside this one, which is removed together
            with the model.
        quantized (`bool`): Whether a checkpoint that cannot be dequantized on loading may stay quantized.

    Raises:
        TypeError: If `model` is neither a name nor a transformers model.
        ValueError: If `dtype` is not a floating-point type, this machine lacks the `device`, a loaded model comes
            without a tokenizer, the model cannot be offloaded or dequantized, an adapter cannot be merged, or a pruned
            model, loaded as it was saved, has other weights than its digest says.
        ImportError: If `model` is an adapter and PEFT is not installed.
        OSError: If the model is not found or damaged.
    """
    if not isinstance(model, str | Path):
        return _given(model, tokenizer)
    name = str(model)
    placed: dict[str, Any] = {"kind": read_dtype(dtype), "device": read_device(device), "offload_dir": offload_dir}
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **source_options(name, revision)}
    options |= {key: value for key, value in (("gguf_file", gguf_file), ("revision", revision)) if value is not None}
    adapter = None if gguf_file else adapter_of(name, options)
    # GGUF files hold causal language models.
    config = None if gguf_file else read_config(name, **options)
    if adapter is not None:
        check_adapter(adapter, config, offload_dir)
    if tokenizer is None:
        tokenizer = read_tokenizer(name, **options)
    if adapter is None:
        return _load(name, config, options, quantized=quantized, **placed), tokenizer, name
    base, options = adapter.base_model, base_options(adapter, options)
    with naming_base(adapter):
        options |= {"config": config, **source_options(base, adapter.base_revision)}
        loaded = _load(base, config, options, lent=adapter.shapes(), **placed)
    return merge_files(loaded, adapter, len(tokenizer)), tokenizer, base


def _load(
    name: str,
    config: PreTrainedConfig | None,
    options: dict[str, Any],
    *,
    kind: str | torch.dtype,
    device: torch.device,
    offload_dir: str | Path | None,
    quantized: bool = False,
    lent: Collection[str] = (),
) -> PreTrainedModel:
    """Load the weights of a model; `lent` names tensors that it may lack, as they come later."""
    if config is not None:
        options |= quantization_options(config, name, accepted=quantized)
        if config.model_type == "sieve":
            check_block(config.sieve)
    auto_class = getattr(transformers, auto_class_name(config))
    scratch: Scratch | None = None
    loaded: PreTrainedModel
    if offload_dir is not None:
        if config is None:
            raise ValueError(
                f"`memory_limit` must go with a model in safetensors files, got the GGUF file "
                f"{options['gguf_file']!r}, which is unpacked in memory as a whole. Save the unpacked model with "
                "`save_pretrained` and prune that."
            )
        scratch = Scratch(Path(offload_dir), "offloaded")
        with naming_model(name):
            device_map = offload_map(config, device)
        options |= {"device_map": device_map, "offload_folder": str(scratch.path)}
    with naming_model(name):
        loaded, info = auto_class.from_pretrained(name, dtype=kind, output_loading_info=True, **options)
    _check_missing(set(info["missing_keys"]) - set(lent), name)
    check_quantized(loaded, name)
    if not isinstance(loaded, SievePreTrainedModel):
        # Pruned models do it themselves.
        copy_parameters(loaded)
    elif scratch is None and kind in ("auto", getattr(config, "dtype", None)):
        check_digest(loaded, name)
    if scratch is not None:
        weakref.finalize(loaded, scratch.remove)
    else:
        loaded.to(device)  # type: ignore[arg-type]
    return loaded


def _check_missing(missing: Collection[str], name: str) -> None:
    """Refuse a checkpoint that lacks tensors, which transformers fills with random values."""
    if missing:
        raise ValueError(
            f"`model` must have all weights that its config.json describes, got {cut(name)} without "
            f"{listed(sorted(missing))}. Download or save it again."
        )


def _given(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    if not is_adapted(model):
        require_model(model)
    if tokenizer is None:
        raise ValueError("`tokenizer` must be given with a loaded model, got None. Pass the model's tokenizer.")
    model = plain(model)
    return model, tokenizer, getattr(model.config, "_name_or_path", None) or None


def offload_map(config: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
    """Return a `device_map` that leaves the blocks on disk and puts everything else on `device`.

    Raises:
        ValueError: If the model does not have exactly one sequence of blocks.
    """
    model = empty_model(config)
    blocks = find_blocks(model)
    device_map: dict[str, Any] = dict.fromkeys(blocks, "disk")

    def add(prefix: str, module: torch.nn.Module) -> None:
        for name, child in module.named_children():
            full_name = f"{prefix}{name}"
            if any(block.startswith(f"{full_name}.") for block in blocks):
                add(f"{full_name}.", child)
            elif full_name not in device_map:
                device_map[full_name] = str(device)
        for name, _ in module.named_parameters(recurse=False):
            device_map[f"{prefix}{name}"] = str(device)

    add("", model)
    return device_map


def empty_model(config: PreTrainedConfig, *, model_class: Any = None, separate: bool = False) -> PreTrainedModel:
    """Make a model without weights, on the meta device. The configuration is not changed.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of a dense or pruned model.
        model_class (`type`, *optional*): Class of the model. Default: the one with the head that `load_model` loads.
        separate (`bool`): Whether fused experts become separate linears, as in a model that is being pruned.

    Returns:
        [`~transformers.PreTrainedModel`]: Its tensors have shapes and dtypes only.
    """
    # Making a model may change its configuration.
    copied = copy.deepcopy(config)
    make: Any = model_class or getattr(transformers, auto_class_name(copied)).from_config
    with torch.device("meta"):
        model: PreTrainedModel = make(copied)
    if separate:
        separate_experts(model)
    return model


def default_device() -> torch.device:
    """Return the accelerator of this process, or the CPU; never `mps`, which has no float64."""
    if distributed.num_processes() > 1:
        return distributed.device()
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "mps":
            return accelerator
    return torch.device("cpu")


def read_device(device: str | torch.device | None) -> torch.device:
    """Return the device that a user named, which must work; `None` gives the default one.

    Raises:
        ValueError: If there is no such device on this machine.
    """
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
        # Only an allocation shows whether a device works. The meta device has no values.
        usable = not torch.empty(1, device=found).is_meta
    except Exception:  # Each kind of device has errors of its own.
        usable = False
    if usable:
        return found
    raise ValueError(f"`device` must be one that torch finds on this machine, {_devices()}, got {shown(str(device))}.")


def _devices() -> str:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    accelerators = [f"'{kind.type}:{index}'" for index in range(torch.accelerator.device_count())] if kind else []
    return listed(["'cpu'", *accelerators])


def read_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    """Return the floating-point type that a user named; `None` and `"auto"` give `"auto"`.

    Raises:
        ValueError: If it is not a floating-point type that models compute in.
    """
    if dtype is None:
        return "auto"
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    # Types of one byte are for storage.
    if kind == "auto" or (isinstance(kind, torch.dtype) and kind.is_floating_point and kind.itemsize > 1):
        return kind
    raise ValueError(f"`dtype` must be a floating-point type such as 'bfloat16' or 'float32', got {shown(dtype)}.")


def dtype_of(config: PreTrainedConfig, dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the type that a model with this configuration is loaded in."""
    kind = read_dtype(dtype)
    if isinstance(kind, torch.dtype):
        return kind
    saved = getattr(config, "dtype", None) or torch.float32
    if not isinstance(saved, torch.dtype):
        raise ValueError(f"`dtype` in config.json must be the name of a floating-point type, got {shown(saved)}.")
    return saved
