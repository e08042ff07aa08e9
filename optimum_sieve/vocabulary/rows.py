"""Reduce a model's embeddings and head to the rows of some tokens, and undo it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum_sieve.backbone.loading import empty_model

from .token_ids import copies, named_ids, renumber_config, with_parts


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Slot:
    """An attribute of a model with its old and new value; `container` is the dictionary that holds it."""

    container: dict[str, Any]
    name: str
    old: Any
    new: Any


class RowSelection:
    """Select the rows of all of a model's per-token tensors and adapt its configuration.

    To identify them, the model is built twice on the meta device: from its configuration and from a copy with the new
    `vocab_size` and token ids. Tensors whose shapes differ have one row (or column) per token. Integers that differ,
    such as `num_embeddings` or `padding_idx`, change with them. Head biases, shared embeddings of encoder-decoders and
    padded vocabularies thus need no special cases. Tied weights stay tied.

    Args:
        model (`PreTrainedModel`): The model, unchanged until `apply`.
        tokens (`Sequence[int]`): Old id of each token of the new vocabulary. Other ids in the configuration are
            appended.

    Raises:
        ValueError: If a token is outside the model's vocabulary, or the vocabulary cannot be determined.
    """

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int]) -> None:
        self.model = model
        self.size_before = vocabulary_size(model)
        _check_tokens(tokens, self.size_before)
        whole_configs = [model.config, *(module.config for module in model.modules() if hasattr(module, "config"))]
        configs = {id(config): config for whole in whole_configs for config in with_parts(whole)}
        generation = getattr(model, "generation_config", None)
        named = named_ids([*configs.values(), *([generation] if generation else [])], self.size_before)
        self.rows = [*tokens, *sorted(named - set(tokens))]
        self._numbers = {old: new for new, old in enumerate(self.rows)}
        new_configs = copies(configs.values())
        for config in new_configs.values():
            self._renumber(config)
        self._slots = [
            *self._config_slots(new_configs),
            *self._structure_slots(new_configs[id(model.config)]),
        ]
        if generation is not None:
            new_generation = copy.deepcopy(generation)
            renumber_config(new_generation, self._numbers, self.size_before)
            self._slots.append(_Slot(model.__dict__, "generation_config", generation, new_generation))

    @property
    def size(self) -> int:
        """Number of rows kept."""
        return len(self.rows)

    @property
    def removed_elements(self) -> int:
        """Number of removed tensor elements; shared tensors count once."""
        tensors = {id(slot.old): slot for slot in self._slots if isinstance(slot.old, torch.Tensor)}
        return sum(slot.old.numel() - slot.new.numel() for slot in tensors.values())

    def apply(self) -> None:
        """Reduce the model to the kept rows."""
        for slot in self._slots:
            slot.container[slot.name] = slot.new

    def undo(self) -> None:
        """Restore all rows."""
        for slot in self._slots:
            slot.container[slot.name] = slot.old

    def _renumber(self, config: Any) -> None:
        renumber_config(config, self._numbers, self.size_before)
        if getattr(config, "vocab_size", None) == self.size_before:
            config.vocab_size = self.size

    def _config_slots(self, new: dict[int, Any]) -> Iterator[_Slot]:
        for module in self.model.modules():
            config = module.__dict__.get("config")
            if id(config) in new:
                yield _Slot(module.__dict__, "config", config, new[id(config)])

    def _structure_slots(self, config: Any) -> list[_Slot]:
        """Compare the models built from both configurations, and locate their differences in the live model."""
        before, after = (empty_model(each, model_class=type(self.model)) for each in (self.model.config, config))
        live = dict(self.model.named_modules(remove_duplicate=False))
        selected: dict[int, Any] = {}
        slots: list[_Slot] = []
        built = dict(after.named_modules(remove_duplicate=False))
        for name, module in before.named_modules(remove_duplicate=False):
            if name in live and name in built:
                slots += self._tensor_slots(name, live[name], module, built[name], selected)
                slots += _number_slots(live[name], module, built[name])
        if not selected:
            raise ValueError(
                f"`vocabulary='task'` must go with a model whose `vocab_size` sets the size of its embeddings, got "
                f"{type(self.model).__name__}. Set vocabulary='whole'."
            )
        return slots

    def _tensor_slots(
        self, name: str, live: nn.Module, before: nn.Module, after: nn.Module, selected: dict[int, Any]
    ) -> Iterator[_Slot]:
        for key, tensor in _own_tensors(before):
            other = dict(_own_tensors(after))[key]
            if tensor.shape == other.shape:
                continue
            container: Any = live._parameters if key in live._parameters else live._buffers
            current = container.get(key)
            if current is None or current.shape != tensor.shape or current.is_meta:
                got = None if current is None else (tuple(current.shape), str(current.device))
                raise ValueError(
                    f"`vocabulary='task'` must go with a model in memory whose `{name}.{key}` has the shape "
                    f"{tuple(tensor.shape)} from its configuration, got {got}. Set vocabulary='whole'."
                )
            if id(current) not in selected:
                selected[id(current)] = self._select(current, tensor.shape, other.shape)
            yield _Slot(container, key, current, selected[id(current)])

    def _select(self, tensor: torch.Tensor, before: torch.Size, after: torch.Size) -> torch.Tensor:
        changed = [d for d, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        if len(changed) != 1 or (before[changed[0]], after[changed[0]]) != (self.size_before, self.size):
            raise ValueError(
                f"`vocabulary='task'` must go with a model that has one row per token, got {tuple(before)} for "
                f"{self.size_before:,} tokens and {tuple(after)} for {self.size:,} in {type(self.model).__name__}. Set "
                "vocabulary='whole'."
            )
        rows = torch.tensor(self.rows, device=tensor.device)
        new = tensor.detach().index_select(changed[0], rows)
        return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the vocabulary size in a model's configuration.

    Raises:
        ValueError: If the configuration has none.
    """
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int) or size < 1:
        raise ValueError(
            f"`vocabulary='task'` must go with a model that has a `vocab_size`, got {size} in "
            f"{type(model.config).__name__}. Set vocabulary='whole'."
        )
    return size


def _check_tokens(tokens: Sequence[int], size: int) -> None:
    beyond = [token for token in tokens if token >= size]
    if beyond:
        raise ValueError(
            f"`tokenizer` must have no tokens beyond the model's {size:,} embeddings, got {len(beyond)} (e.g. "
            f"{beyond[0]}). Call `model.resize_token_embeddings(len(tokenizer))` first, or set vocabulary='whole'."
        )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = chain(module._parameters.items(), module._buffers.items())
    return ((name, tensor) for name, tensor in tensors if tensor is not None)


def _number_slots(live: nn.Module, before: nn.Module, after: nn.Module) -> Iterator[_Slot]:
    """Find integer attributes, such as `num_embeddings` or `padding_idx`, that depend on the vocabulary."""
    for name, old in vars(before).items():
        new = vars(after).get(name)
        if isinstance(old, int) and isinstance(new, int) and old != new and vars(live).get(name) == old:
            yield _Slot(live.__dict__, name, old, new)
