r"""Try whether a model honours what the arrangement of candidates needs of it, on random token ids.

Architectures differ in the masks and positions that they take, and in what their caches keep; many ignore what they do
not know. So the model itself is asked: it reads two texts as plain rows and again in the other arrangement, in its own
dtype, and both must give the same predictions.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.backbone.offloading import holds_offloaded
from optimum_sieve.evaluation.prefix import prefill, repeated

from .masks import text_config, tree_inputs
from .tree import tree_of


if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import nn


logger = logging.getLogger(__name__)

# Tokens of the shortest prompt that is tried, and of every continuation. In a short text, each token counts.
_SHORT, _CONTINUATION = 9, 3
# Number of continuations of the smallest tree, and of the token ids that are drawn from.
_BRANCHES, _IDS = 4, 4096
# Largest error relative to the effect of the prompt: float32 rounds by 1e-6, half precision by some percent.
_EXACT, _HALF = 1e-3, 0.1

_found: WeakKeyDictionary[nn.Module, dict[Hashable, dict[tuple[int, int], bool]]] = WeakKeyDictionary()


def takes_trees(model: nn.Module, *, longest: int, largest: int) -> bool:
    """Return whether `model` reads trees of tokens like plain rows; it runs at most twice for each size.

    Args:
        model (`torch.nn.Module`): A model, on any devices.
        longest (`int`): Length of the longest text, in tokens.
        largest (`int`): Number of tokens of the largest tree.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    return all(_holds(model, "tree", size, _tree_logits) for size in _sizes(model, longest, largest))


def takes_cache(model: nn.Module, *, longest: int, largest: int = 0) -> bool:
    """Return whether `model` goes on from cached keys and values of a prompt as if it had read it.

    Args:
        model (`torch.nn.Module`): A model, on any devices.
        longest (`int`): Length of the longest text, in tokens.
        largest (`int`): Number of tokens of the largest tree. Default: rows go on, not trees.
    """
    name, read = ("cached tree", _cached_tree_logits) if largest else ("cache", _cached_logits)
    return all(_holds(model, name, size, read) for size in _sizes(model, longest, largest))


@dataclass(frozen=True)
class _Texts:
    """A prompt, and sorted rows of one length that continue it, as token ids."""

    prompt: list[int]
    rows: list[list[int]]


def _sizes(model: nn.Module, longest: int, largest: int) -> list[tuple[int, int]]:
    """Return what to try: lengths of the prompt and of the tree, small ones and, rounded up, those of the data.

    A small text shows best whether every token is seen and has its position; windows show only in long ones.
    """
    small = _SHORT + _BRANCHES * _CONTINUATION
    if longest <= _SHORT + _CONTINUATION and largest <= small:
        return [(_SHORT, small)]
    limit = input_format(model).max_length or longest
    prompt = max(_SHORT, min(_round_up(longest), max(limit, longest)) - _CONTINUATION)
    return [(_SHORT, small), (prompt, max(prompt + _BRANCHES * _CONTINUATION, _round_up(largest)))]


def _round_up(length: int) -> int:
    """Return a length with few nonzero bits, so that few sizes are tried."""
    step = 1 << max(length.bit_length() - 3, 0)
    return -(-length // step) * step


def _holds(
    model: nn.Module, name: str, size: tuple[int, int], read: Callable[[nn.Module, _Texts], torch.Tensor]
) -> bool:
    """Return whether an arrangement gives the predictions of plain rows; remembered for each model."""
    if {parameter.is_meta for parameter in model.parameters()} == {True} and not holds_offloaded(model):
        # A plan from a configuration alone, for which nothing can be tried.
        return True
    kind = (name, getattr(text_config(model), "_attn_implementation", None), _dtype(model))
    known = _found.setdefault(model, {}).setdefault(kind, {})
    for tried, held in known.items():
        # What holds for a size holds for smaller ones.
        smaller, larger = (size, tried) if held else (tried, size)
        if all(one <= other for one, other in zip(smaller, larger, strict=True)):
            return held
    known[size] = _try(model, name, size, read)
    return known[size]


def _try(model: nn.Module, name: str, size: tuple[int, int], read: Callable[[nn.Module, _Texts], torch.Tensor]) -> bool:
    texts = _random_texts(model, *size)
    if texts is None:
        return False
    with evaluating(model):
        ends = [texts.rows[0], texts.rows[-1]]
        expected = _last_log_probs(model, ends)
        without = _last_log_probs(model, [row[len(texts.prompt) :] for row in ends])
        try:
            found = read(model, texts).float().log_softmax(dim=-1)
        # Whatever a model raises on inputs that it was not made for, it takes plain rows.
        except Exception as error:
            logger.debug("%s does not take a %s: %r", type(model).__name__, name, error)
            return False
    scale = float((expected - without).square().mean().sqrt())
    difference = float((found - expected).square().mean(dim=-1).sqrt().max())
    holds = difference <= (_HALF if _dtype(model).itemsize < 4 else _EXACT) * scale
    logger.debug("%s, %s of %s tokens: %.2g of %.2g", type(model).__name__, name, size, difference, scale)
    return holds


def _dtype(model: nn.Module) -> torch.dtype:
    floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(floating, torch.float32)


def _random_texts(model: nn.Module, prompt: int, tree: int) -> _Texts | None:
    """Return random texts of ordinary tokens; `None` if the model does not say how many, or is not causal."""
    config = text_config(model)
    count = input_format(model).num_tokens
    if config is None or count is None or input_format(model).kind != "causal":
        return None
    special = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    ids = torch.tensor([i for i in range(min(count, _IDS)) if i not in special])
    branches = max(_BRANCHES, (tree - prompt) // _CONTINUATION)
    chosen = torch.randint(len(ids), (prompt + branches * _CONTINUATION,), generator=torch.Generator().manual_seed(0))
    drawn = ids[chosen].tolist()
    start, rest = drawn[:prompt], drawn[prompt:]
    ends = [rest[place : place + _CONTINUATION] for place in range(0, len(rest), _CONTINUATION)]
    # Two of them begin alike.
    ends[1][0] = ends[0][0]
    return _Texts(start, sorted((start + end for end in ends), reverse=True))


def _last_log_probs(model: nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """Return the log-probabilities after each of some rows of one length."""
    ids = _tensor(model, rows)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    log_probs: torch.Tensor = logits[:, -1].float().log_softmax(dim=-1)
    return log_probs


def _tree_logits(model: nn.Module, texts: _Texts) -> torch.Tensor:
    ids, depths, ends, leaves = _tree_tensors(model, texts)
    inputs = tree_inputs(model, depths, ends, ids.shape[1])
    logits: torch.Tensor = model(input_ids=ids, **inputs, use_cache=False).logits
    return logits[0, leaves]


def _cached_tree_logits(model: nn.Module, texts: _Texts) -> torch.Tensor:
    ids, depths, ends, leaves = _tree_tensors(model, texts)
    length = len(texts.prompt)
    past = repeated(_prefilled(model, texts), len(ids))
    inputs = tree_inputs(model, depths, ends, ids.shape[1] - length, past)
    logits: torch.Tensor = model(input_ids=ids[:, length:], **inputs, past_key_values=past, use_cache=True).logits
    return logits[0, [leaf - length for leaf in leaves]]


def _cached_logits(model: nn.Module, texts: _Texts) -> torch.Tensor:
    length = len(texts.prompt)
    # Between the rows that are read, one has padding.
    ids = _tensor(model, [row[length:] for row in (texts.rows[0], texts.rows[1], texts.rows[-1])])
    mask = torch.ones(len(ids), length + _CONTINUATION, dtype=torch.long, device=ids.device)
    mask[1, -1] = 0
    past = repeated(_prefilled(model, texts), len(ids))
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True).logits
    return logits[[0, 2], -1]


def _prefilled(model: nn.Module, texts: _Texts) -> Any:
    cache = prefill(model, _tensor(model, [texts.prompt]))
    if cache is None:
        raise NotImplementedError("another kind of cache")
    return cache


def _tree_tensors(model: nn.Module, texts: _Texts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Return ids, depths and ends of a padded tree, each (1, length), and the places of its first and last leaf."""
    tree = tree_of(texts.rows)
    padding = (tree.tokens[0], 0, len(tree.tokens) + 1)
    ids, depths, ends = (_tensor(model, [[*each, pad]]) for each, pad in zip(tree[:3], padding, strict=True))
    return ids, depths, ends, [tree.places[0][-1], tree.places[-1][-1]]


def _tensor(model: nn.Module, rows: list[list[int]]) -> torch.Tensor:
    # Parameters on the meta device are loaded where they are needed.
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return torch.tensor(rows, device=next(devices, torch.device("cpu")))
