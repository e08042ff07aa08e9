"""Checks of a checkpoint while it is loaded. Saved with the weights of a pruned model.

transformers gives random values to tensors that a checkpoint lacks, casts those of another kind and reads whatever a
buffer holds. For a pruned model each of these is an error.
"""

from __future__ import annotations

import copy
import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from .layers import FACTOR_TENSOR, factorized_layers


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import nn

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Two numbers in a byte, none of them NaN or infinite; unknown to older versions of torch.
_PACKED = {getattr(torch, "float4_e2m1fn_x2", None)}
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check_files(model: Any, state_dict: Mapping[str, torch.Tensor] | None, files: Sequence[str] | None) -> None:
    """Check the names and dtypes of the tensors of a checkpoint before they are read.

    Args:
        model (`PreTrainedModel`): The model they will be loaded into.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*): The tensors, if they are not read from files.
        files (`Sequence[str]`, *optional*): The files. Only those in safetensors are checked.

    Raises:
        ValueError: If two files hold the same tensor, there are weights of two saves, or weights are not
            floating-point numbers.
    """
    kinds: dict[str, str] = {}
    twice: list[str] = []
    for name, kind in _kinds(state_dict, files or ()):
        twice += [name] if name in kinds else []
        kinds[name] = kind
    # Quantizers store weights as integers.
    other = [] if getattr(model, "is_quantized", False) else _of_another_kind(model, kinds)
    raise_problems({"in two files": twice, "of another kind": other})
    for file in files or ():
        _check_is_only_save(Path(file))


def _kinds(state_dict: Mapping[str, torch.Tensor] | None, files: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each tensor and its dtype, as safetensors names it."""
    if state_dict is not None:
        yield from ((name, _DTYPES.get(tensor.dtype, str(tensor.dtype))) for name, tensor in state_dict.items())
        return
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as tensors:
                yield from ((name, tensors.get_slice(name).get_dtype()) for name in tensors.keys())  # noqa: SIM118


def _of_another_kind(model: Any, kinds: Mapping[str, str]) -> list[str]:
    """List the tensors that are floating-point numbers in the model and not in the checkpoint, or the reverse."""
    floats = {_relative(model, name): tensor.is_floating_point() for name, tensor in model.state_dict().items()}
    problems = []
    for name, kind in kinds.items():
        # Names of weights that transformers fuses on loading are not in the model.
        expected = floats.get(_relative(model, name), True if name.endswith(".weight") else None)
        if expected is not None and expected != (kind in _FLOATS):
            problems.append(f"{name} {kind}")
    return problems


def _check_is_only_save(file: Path) -> None:
    """Check that a file with all weights has no complete set of shards next to it, which transformers would ignore."""
    index = file.with_name(_INDEX)
    if file.name != _SINGLE or not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        is_complete = all((file.parent / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # An index that cannot be read loads nothing.
        is_complete = False
    if is_complete:
        raise ValueError(
            f"The checkpoint must hold its weights once, got {_SINGLE} and {len(shards)} shards in {file.parent}. "
            "Remove those of an earlier save."
        )


@contextmanager
def removing_stale(directory: Path) -> Iterator[None]:
    """Remove the weights of an earlier save that a save inside the context leaves next to its own.

    Nothing is removed unless exactly one of the two was written: some processes of a distributed save write nothing.
    """
    paths = [directory / name for name in (_SINGLE, _INDEX)]
    before = list(map(_state, paths))
    yield
    after = list(map(_state, paths))
    written = [old != new for old, new in zip(before, after, strict=True)]
    if None not in after and sum(written) == 1:
        # Another process of the same save may have removed it.
        paths[written.index(False)].unlink(missing_ok=True)


def _state(path: Path) -> tuple[int, ...] | None:
    """Return numbers that change when a file is written; `None` without a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def check_loaded(model: Any, loading_info: Any, found_beyond: Iterable[str], declared: Any) -> None:
    """Check that a checkpoint held what its configuration says, after it was loaded.

    A class other than that of the checkpoint may add a head or a pooler, but no tensor that the class of the
    checkpoint has, and no block.

    Args:
        model (`PreTrainedModel`): The loaded model.
        loading_info (`LoadStateDictInfo`): Report of transformers.
        found_beyond (`Iterable[str]`): Tensors of the checkpoint that `model` does not have.
        declared (`type`): Class of the model that was saved, as the configuration says.

    Raises:
        ValueError: If tensors are missing, unexpected, of another shape or not finite, or a row order repeats a row.
    """
    inside = tuple(f"{name}." for name, _ in factorized_layers(model))
    problems: dict[str, Iterable[str]] = {
        "missing": _missing(model, loading_info, found_beyond, declared, inside),
        "unexpected": (key for key in loading_info.unexpected_keys if FACTOR_TENSOR.search(key)),
        "of another shape": (
            f"{key} {tuple(saved)} instead of {tuple(expected)}"
            for key, saved, expected in loading_info.mismatched_keys
            if key.startswith(inside)
        ),
    }
    try:
        raise_problems(problems)
        raise_problems({"without every row once": _broken_orders(model), "not finite": _not_finite(model)})
    except ValueError:
        # transformers would raise an error about these first.
        loading_info.mismatched_keys.clear()
        raise


def _missing(
    model: Any, loading_info: Any, found_beyond: Iterable[str], declared: Any, inside: tuple[str, ...]
) -> set[str]:
    """Return the tensors that the checkpoint lacks although it must hold them."""
    missing = set(loading_info.missing_keys)
    if declared is type(model):
        return missing
    with torch.device("meta"):
        saved = declared(copy.deepcopy(model.config))
    ignored = [*map(re.escape, saved.all_tied_weights_keys), *(saved._keys_to_ignore_on_load_missing or ())]
    needed = {
        _relative(saved, key) for key in saved.state_dict() if not any(re.search(pattern, key) for pattern in ignored)
    }
    own = {_relative(model, key) for key in model.state_dict()}
    block = re.compile(r".*\.\d+\.")
    lacking = {
        key
        for key in missing
        if _relative(model, key) in needed or key.startswith(inside) or block.match(_relative(model, key))
    }
    beyond = {_relative(saved, key) for key in found_beyond}
    # Some classes have other names in the file, which only their own conversions know.
    return lacking | (needed - own - beyond if len(beyond) < len(needed - own) else set())


def _broken_orders(model: nn.Module) -> Iterator[str]:
    for name, layer in factorized_layers(model):
        order = getattr(layer, "row_order", None)
        if order is not None and not order.is_meta:
            rows = torch.arange(len(order), device=order.device)
            if not torch.equal(order.long().sort().values, rows):
                yield f"{name}.row_order"


def _not_finite(model: nn.Module) -> Iterator[str]:
    for name, layer in factorized_layers(model):
        for child, tensor in layer.named_parameters():
            is_plain = type(tensor.data) is torch.Tensor and tensor.is_floating_point() and not tensor.is_meta
            if is_plain and tensor.dtype not in _PACKED and tensor.numel() and not _is_finite(tensor.detach()):
                yield f"{name}.{child}"


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes show NaN and infinity, without a second tensor. float8 has no kernel for them.
    values = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.bfloat16)
    return all(bool(end.isfinite()) for end in torch.aminmax(values))


def raise_problems(problems: Mapping[str, Iterable[str]]) -> None:
    """Raise an error that lists the problems of each kind, if there are any."""
    found = [f"{kind}: {listed}" for kind, names in problems.items() if (listed := _shorten(sorted(names)))]
    if found:
        raise ValueError(
            "The checkpoint must hold exactly the tensors that `rank_pattern` in config.json describes, got "
            f"{'; '.join(found)}. Download or save the model again."
        )


def _relative(model: Any, name: str) -> str:
    """Return the name of a tensor relative to the base model; those of a head stay as they are."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _shorten(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
