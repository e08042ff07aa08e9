"""Save a model, load it again and compare the two, so that the files hold the model that was scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve.backbone.kinds import model_kind
from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.modeling.fingerprint import same_bits, stored_tensors
from optimum_sieve.modeling.layout import leaving_parameters
from optimum_sieve.run.bars import hidden_bars


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

# Tokens of the input for the comparison of outputs.
_LENGTH = 8
# Largest difference of two outputs, relative to the largest output. Equal weights differ by rounding alone.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}


def save_model(model: PreTrainedModel, directory: Path, **options: Any) -> None:
    """Write a model with its `save_pretrained`, then check that the files hold the same model.

    Args:
        model ([`~transformers.PreTrainedModel`]): In memory.
        directory (`Path`): Temporary directory, renamed by the caller.
        options: Passed to `save_pretrained`, such as `max_shard_size`.

    Raises:
        RuntimeError: If the model loaded from `directory` has other tensors, or computes something else.
    """
    model.save_pretrained(directory, **options)
    check_saved(model, directory)


@torch.no_grad()
def check_saved(model: PreTrainedModel, directory: Path) -> None:
    """Load the model in a directory and compare all tensors, and the output for one input, with those of `model`.

    Compared tensors are shared with `model`, and the others are mapped from the files where possible, so the check
    needs little memory of its own.

    Raises:
        RuntimeError: If a name, shape, dtype or bit of a tensor differs, or the outputs do.
    """
    with hidden_bars(), leaving_parameters():
        reloaded: PreTrainedModel = type(model).from_pretrained(directory, dtype="auto", **_attention(model))
    differences = _differences(model, reloaded)
    if differences:
        raise _error(f"{len(differences)} tensors that differ, such as {differences[0]}")
    # Hooks that move tensors between devices exist in the first model alone.
    if len({parameter.device for parameter in model.parameters()}) == 1:
        _check_output(model, reloaded)


def _attention(model: PreTrainedModel) -> dict[str, Any]:
    """Return the option that computes attention as `model` does, which no file says."""
    implementation = getattr(model.config, "_attn_implementation", None)
    return {} if implementation is None else {"attn_implementation": implementation}


def _differences(model: PreTrainedModel, reloaded: PreTrainedModel) -> list[str]:
    """Describe the tensors that differ; those that are equal become the same object in both models."""
    expected, differences = dict(stored_tensors(model)), []
    for name, tensor in stored_tensors(reloaded):
        other = expected.pop(name, None)
        if other is None:
            differences.append(f"{name!r}, which the scored model does not have")
        elif _is_widened(tensor, other):
            continue
        elif (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            differences.append(
                f"{name!r}, {tensor.dtype} of shape {tuple(tensor.shape)} instead of {other.dtype} of shape "
                f"{tuple(other.shape)}"
            )
        elif not same_bits(tensor, other):
            differences.append(f"the values of {name!r}")
        else:
            _share(model, reloaded, name)
    return [*differences, *(f"{name!r}, which is not saved" for name in expected)]


def _is_widened(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether a tensor has the values of `other` in float32, where transformers keeps modules in it."""
    is_half = other.dtype in (torch.float16, torch.bfloat16)
    return is_half and tensor.dtype == torch.float32 and torch.equal(tensor, other.to(tensor))


def _share(model: PreTrainedModel, reloaded: PreTrainedModel, name: str) -> None:
    """Put a tensor of `model` into `reloaded`, which releases its own one."""
    path, _, child = name.rpartition(".")
    source, target = model.get_submodule(path), reloaded.get_submodule(path)
    for kind in ("_parameters", "_buffers"):
        if child in getattr(source, kind):
            getattr(target, kind)[child] = getattr(source, kind)[child]


def _check_output(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    device = next(model.parameters()).device
    for path, module in model.named_modules():
        # Also the other names of shared ones.
        own = reloaded.get_submodule(path)._parameters
        own.update({name: value for name, value in module._parameters.items() if _is_same_kind(own[name], value)})
    reloaded.to(device)  # type: ignore[arg-type]
    with evaluating(model):
        try:
            inputs = _inputs(model, device)
            before = model(**inputs).logits.float()
        except Exception:  # Some models need other inputs. All tensors are equal, so the output is not needed.
            return
        after = reloaded(**inputs).logits.float()
    largest = before[before.isfinite()].abs().max().item() if before.isfinite().any() else 0.0
    if not torch.allclose(after, before, rtol=0, atol=_TOLERANCES.get(model.dtype, 0.05) * largest, equal_nan=True):
        difference = (after - before).abs().max().item()
        raise _error(f"outputs that differ by {difference:.2g} where the largest is {largest:.2g}")


def _is_same_kind(own: torch.Tensor | None, value: torch.Tensor | None) -> bool:
    return own is not None and value is not None and own.dtype == value.dtype


def _inputs(model: PreTrainedModel, device: torch.device) -> dict[str, torch.Tensor]:
    rows: Any = model.get_input_embeddings()
    ids = (torch.arange(_LENGTH, device=device) % rows.weight.shape[0])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": ids} if model_kind(model) == "seq2seq" else inputs


def _error(difference: str) -> RuntimeError:
    return RuntimeError(
        f"The saved model must be the one that was scored, got {difference}. Nothing was written. Load the base model "
        "in another way, for example with `dtype='float32'`, or report this."
    )
