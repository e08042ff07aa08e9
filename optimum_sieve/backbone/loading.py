"""Load a dense model with its tokenizer, ready to be worked on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optimum_sieve.modeling.layout import copy_parameters
from optimum_sieve.modeling.modeling_sieve import SievePreTrainedModel
from optimum_sieve.run import distributed

from .blockwise import find_blocks
from .kinds import auto_class_name


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig


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
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """Return model, tokenizer and the model's name; a model that is loaded already is taken as it is.

    Args:
        model (`str | Path | PreTrainedModel`): Hub id, directory or a loaded model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Required beside a loaded model.
        dtype (`str | torch.dtype`, *optional*): `None`: as the checkpoint was saved.
        device (`str | torch.device`, *optional*): `None`: the accelerator if there is one, else the CPU.
        trust_remote_code (`bool`): Whether code that lies with the model may run.
        gguf_file (`str`, *optional*): Name of a GGUF file beside the model.
        revision (`str`, *optional*): Revision on the Hub.
        offload_dir (`str | Path`, *optional*): Leave the weights of the blocks on disk until a block is called: where
            they lie, or in this directory if they have to be converted.

    Raises:
        ValueError: If `dtype` is no floating-point type, a loaded model comes without a tokenizer, or the model cannot
            be offloaded.
        OSError: If the model is not found or damaged.
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("`tokenizer` must be given beside a loaded model, got None. Pass the model's tokenizer.")
        return model, tokenizer, getattr(model.config, "_name_or_path", None) or None
    name = str(model)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options |= {key: value for key, value in (("gguf_file", gguf_file), ("revision", revision)) if value is not None}
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    # GGUF files hold causal language models.
    config = None if gguf_file else AutoConfig.from_pretrained(name, **options)
    auto_class = getattr(transformers, auto_class_name(config))
    place = torch.device(device) if device is not None else default_device()
    if offload_dir is not None:
        if config is None:
            raise ValueError(
                f"`memory_limit` must go with a model in safetensors files, got the GGUF file {gguf_file!r}, which is "
                "unpacked in memory as a whole. Save the unpacked model with `save_pretrained` and prune that."
            )
        options |= {"device_map": offload_map(auto_class, config, place), "offload_folder": str(offload_dir)}
    loaded: PreTrainedModel = auto_class.from_pretrained(name, dtype=_dtype(dtype), **options)
    if not isinstance(loaded, SievePreTrainedModel):
        # A pruned model has done so.
        copy_parameters(loaded)
    if offload_dir is None:
        loaded.to(place)  # type: ignore[arg-type]
    return loaded, tokenizer, name


def offload_map(auto_class: Any, config: PretrainedConfig, device: torch.device) -> dict[str, Any]:
    """Return a `device_map` that leaves the blocks on disk and puts everything else on `device`.

    Raises:
        ValueError: If the model has not one sequence of blocks.
    """
    model = empty_model(auto_class, config)
    blocks = find_blocks(model)
    place: dict[str, Any] = dict.fromkeys(blocks, "disk")

    def add(prefix: str, module: torch.nn.Module) -> None:
        for name, child in module.named_children():
            own = f"{prefix}{name}"
            if any(block.startswith(f"{own}.") for block in blocks):
                add(f"{own}.", child)
            elif own not in place:
                place[own] = str(device)
        for name, _ in module.named_parameters(recurse=False):
            place[f"{prefix}{name}"] = str(device)

    add("", model)
    return place


def empty_model(auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """Make a model without weights, from its configuration alone."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config)
    return model


def default_device() -> torch.device:
    """Return the current accelerator, of several processes this one's, or the CPU; never `mps`: it has no float64."""
    if distributed.size() > 1:
        return distributed.device()
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "mps":
            return accelerator
    return torch.device("cpu")


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None:
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f"`dtype` must be a floating-point type such as 'bfloat16' or 'float32', got {dtype!r}.")
