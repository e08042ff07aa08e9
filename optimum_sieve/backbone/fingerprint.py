"""Identify a model by everything that its outputs depend on. Every cached result is stored under this identity."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from optimum_sieve._messages import cut
from optimum_sieve.modeling.fingerprint import (
    DIGEST_KEY,
    combine_digests,
    stored_tensors,
    tensor_digest,
    weights_digest,
)
from optimum_sieve.run.workdir import content_key

from .offloading import loaded


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Their versions stand for their code.
_LIBRARIES = {library.__name__: library.__version__.partition("+")[0] for library in (torch, transformers)}
# transformers loads a checkpoint's own code as modules of this package.
_REMOTE_CODE = "transformers_modules"


def model_key(model: nn.Module) -> str:
    """Hash a model: tensors, configuration, special tokens of generation, code, and versions of the libraries.

    The device, offloading and the directory of the checkpoint do not change it. A large model takes seconds, because
    every byte is read: call it once per run.
    """
    return content_key(
        tensors=model_fingerprint(model),
        architecture=architecture(model),
        generation=_generation_tokens(model),
        code=_code(model),
        libraries=_LIBRARIES,
    )


def model_fingerprint(model: nn.Module) -> str:
    """Hash every byte of every parameter and buffer with its name, shape and dtype; one module is loaded at a time."""
    digests = {"weights": weights_digest(model, load=loaded)}
    for prefix, module in model.named_modules():
        # Not saved with the model, but used by it.
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            if buffer is not None:
                digests[f"{prefix}.{name}"] = tensor_digest(buffer, name)
    return combine_digests(digests)


def check_digest(model: PreTrainedModel, name: str) -> None:
    """Check that the weights of a pruned model are those that its results were measured on, if it has a digest of them.

    Args:
        model ([`~transformers.PreTrainedModel`]): In memory, in the dtype that was saved.
        name (`str`): Where it was loaded from, for the message.

    Raises:
        ValueError: If any byte differs, apart from the float32 in which transformers keeps some modules.
    """
    digest = (model.config.sieve.get("results") or {}).get(DIGEST_KEY)
    if digest is not None and digest not in _digests(model):
        raise ValueError(
            "`model` must have the weights that its results were measured on, got weights with another digest than "
            f"config.json in {cut(name)}: they are damaged or were changed. Download or copy it again; if they were "
            "changed on purpose, load and save it with `save_pretrained`, which removes the results."
        )


def _digests(model: PreTrainedModel) -> Iterator[str]:
    """Yield the digest of a model as it was loaded, then as it was saved."""
    yield weights_digest(model)
    if model.dtype in (torch.float16, torch.bfloat16):
        # transformers loads some modules in float32, such as `wo` of T5, also if they were saved in the model's dtype.
        tensors = ((name, _narrowed(tensor, model.dtype)) for name, tensor in stored_tensors(model))
        yield combine_digests({name: tensor_digest(tensor, name) for name, tensor in tensors})


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a float32 tensor in a smaller dtype if that holds the same values, else the tensor itself."""
    if tensor.dtype != torch.float32:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.float(), tensor) else tensor


def architecture(model: Any) -> dict[str, Any]:
    """Return a transformers model's configuration as JSON types, without its path and the library version."""
    values = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name not in ("_name_or_path", "transformers_version")
    }
    # Infinity and NaN, such as in the `time_step_limit` of Mamba2, are no JSON.
    result: dict[str, Any] = json.loads(json.dumps(values, default=str), parse_constant=str)
    return result


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer: how it splits texts, which also the token ids of all texts show, and how it decodes tokens."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    try:
        content = backend.to_str()
    except Exception:  # Slow tokenizers have no backend, and parts in Python cannot be serialized.
        content = json.dumps(sorted(tokenizer.get_vocab().items()))
    return content_key(kind=type(tokenizer).__qualname__, special=str(tokenizer.special_tokens_map), content=content)


def _generation_tokens(model: Any) -> dict[str, Any]:
    """Return the special tokens of the generation settings; evaluation replaces all other settings."""
    settings = getattr(model, "generation_config", None)
    return {name: value for name, value in vars(settings).items() if name.endswith("token_id")} if settings else {}


def _code(model: nn.Module) -> dict[str, str]:
    """Return the name of the model's class, and a hash of the source of each class that is in no library."""
    kinds = {type(module) for module in model.modules()}
    libraries = (*_LIBRARIES, __package__.partition(".")[0])
    own = {kind for kind in kinds if kind.__module__.partition(".")[0] not in libraries}
    return {kind.__qualname__: _source_digest(kind) for kind in own} | {"model": type(model).__qualname__}


def _source_digest(kind: type) -> str:
    """Hash the source of a class, for a checkpoint's own code with all files of its directory; `""` without source."""
    try:
        texts = [inspect.getsource(kind)]
        if kind.__module__.partition(".")[0] == _REMOTE_CODE:
            texts = [
                path.read_text(encoding="utf-8") for path in sorted(Path(inspect.getfile(kind)).parent.glob("*.py"))
            ]
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
