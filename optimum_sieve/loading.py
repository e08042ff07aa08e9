"""Load a dense model with its tokenizer, ready to be worked on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .inputs import auto_class_name


if TYPE_CHECKING:
    from pathlib import Path


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    revision: str | None = None,
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

    Raises:
        ValueError: If `dtype` is no floating-point type, or a loaded model comes without a tokenizer.
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
    loaded: PreTrainedModel = auto_class.from_pretrained(name, dtype=_dtype(dtype), **options)
    copy_parameters(loaded)
    loaded.to(torch.device(device) if device is not None else default_device())  # type: ignore[arg-type]
    return loaded, tokenizer, name


def default_device() -> torch.device:
    """Return the current accelerator, or the CPU; never `mps`, which has no float64."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "mps":
            return accelerator
    return torch.device("cpu")


def copy_parameters(model: torch.nn.Module) -> None:
    """Copy the parameters into memory of their own, in place.

    `from_pretrained` leaves them in the memory-mapped file, where they are not aligned; a matrix-vector product on the
    CPU is several times slower there, which would make every pruned model look faster than it is.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None:
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f"`dtype` must be a floating-point type such as 'bfloat16' or 'float32', got {dtype!r}.")
