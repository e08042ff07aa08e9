"""The attention mask and the positions of rows that are trees of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import Cache


def tree_inputs(
    model: nn.Module, depths: torch.Tensor, ends: torch.Tensor, count: int, past: Cache | None = None
) -> dict[str, Any]:
    """Return the arguments `attention_mask` and `position_ids` with which `model` reads trees of tokens.

    A token sees itself and the tokens that it continues, within the window or chunk of its layer. The mask has four
    dimensions. A model with layers of several kinds gets one mask for each, by the names in its configuration.

    Args:
        model (`torch.nn.Module`): A causal model of transformers.
        depths (`torch.Tensor` of shape `(rows, length)`): Position of each token in its text.
        ends (`torch.Tensor` of shape `(rows, length)`): Place after the last token that continues each token.
        count (`int`): Number of tokens that the model reads now: the last ones.
        past (`Cache`, *optional*): Keys and values of the tokens before them.

    Raises:
        NotImplementedError: If the model has layers without attention, or of a kind that is not known.
    """
    config = text_config(model)
    places = torch.arange(depths.shape[1], device=depths.device)
    first = len(places) - count
    asking = places[first:, None]
    seen = (places <= asking) & (asking < ends[:, None, :])
    steps = depths[:, first:, None] - depths[:, None, :]
    masks = {}
    for kind, layer in _kinds(config).items():
        mask = seen
        if kind == "sliding_attention":
            mask = seen & (steps < config.sliding_window)
        elif kind == "chunked_attention":
            chunks = depths // config.attention_chunk_size
            mask = seen & (chunks[:, first:, None] == chunks[:, None, :])
        elif kind != "full_attention":
            raise NotImplementedError(f"layers of kind {kind!r}")
        # Layers with a window forget old keys.
        offset = 0 if past is None else past.get_mask_sizes(count, layer)[1]
        masks[kind] = _in_form(mask[:, None, :, offset:], model, config)
    mask_or_masks = masks if len(masks) > 1 else next(iter(masks.values()))
    return {"attention_mask": mask_or_masks, "position_ids": depths[:, first:]}


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's text part, or `None`."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _kinds(config: Any) -> dict[str, int]:
    """Return the kinds of the model's layers, each with the index of its first layer."""
    layers: Sequence[str] | None = getattr(config, "layer_types", None)
    if layers is None:
        # Without a list, a window holds for all layers.
        layers = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    return {kind: list(layers).index(kind) for kind in dict.fromkeys(layers)}


def _in_form(mask: torch.Tensor, model: nn.Module, config: Any) -> torch.Tensor:
    """Return a mask in the form that the model's attention takes: true where it sees, or a term of the scores."""
    if getattr(config, "_attn_implementation", None) == "sdpa":
        return mask
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return hidden.masked_fill(~mask, torch.finfo(dtype).min)
