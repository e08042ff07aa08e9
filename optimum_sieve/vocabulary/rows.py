"""The rows of a model's embeddings and head that some tokens have, in place of all: there and back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .token_ids import copies, named_ids, renumber_config, with_parts


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Slot:
    """Where a value of a model is kept, its old and its new value."""

    place: dict[str, Any]
    name: str
    old: Any
    new: Any


class RowSelection:
    """Rows of everything in a model that has one for each token, and what goes with them.

    What that is, the architecture tells: two models without memory are built, from the configuration and from the same
    with another `vocab_size` and other token ids. Tensors whose shapes differ have a row (or a column) for each token,
    and plain numbers that differ, such as `num_embeddings` or `padding_idx`, follow. So biases of heads, shared
    embeddings of encoder-decoders and padded vocabularies need no cases of their own. Tied weights stay tied.

    Args:
        model (`PreTrainedModel`): The model, which is left as it is until `apply`.
        tokens (`Sequence[int]`): Old id of each token of the new vocabulary. Ids that the configuration names beside
            them follow at the end.

    Raises:
        ValueError: If the tokens are not the model's, or its vocabulary cannot be told.
    """

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int]) -> None:
        self.model = model
        self.size_before = vocabulary_size(model)
        _check_tokens(tokens, self.size_before)
        owned = [model.config, *(module.config for module in model.modules() if hasattr(module, "config"))]
        configs = {id(config): config for own in owned for config in with_parts(own)}
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
        """Elements of the tensors that are left out, shared ones counted once."""
        tensors = {id(slot.old): slot for slot in self._slots if isinstance(slot.old, torch.Tensor)}
        return sum(slot.old.numel() - slot.new.numel() for slot in tensors.values())

    def apply(self) -> None:
        """Leave the other rows out."""
        for slot in self._slots:
            slot.place[slot.name] = slot.new

    def undo(self) -> None:
        """Put all rows back."""
        for slot in self._slots:
            slot.place[slot.name] = slot.old

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
        """Compare what the two configurations build, and find the same places in the model."""
        before, after = _empty(self.model, self.model.config), _empty(self.model, config)
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
                f"`vocabulary='task'` must go with a model whose `vocab_size` gives its embeddings their size, got "
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
            place: Any = live._parameters if key in live._parameters else live._buffers
            found = place.get(key)
            if found is None or found.shape != tensor.shape or found.is_meta:
                raise ValueError(
                    f"`vocabulary='task'` must go with a model in memory whose `{name}.{key}` is of the shape "
                    f"{tuple(tensor.shape)} that its configuration gives it, got "
                    f"{None if found is None else (tuple(found.shape), str(found.device))}. Set vocabulary='whole'."
                )
            if id(found) not in selected:
                selected[id(found)] = self._select(found, tensor.shape, other.shape)
            yield _Slot(place, key, found, selected[id(found)])

    def _select(self, tensor: torch.Tensor, before: torch.Size, after: torch.Size) -> torch.Tensor:
        changed = [d for d, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        if len(changed) != 1 or (before[changed[0]], after[changed[0]]) != (self.size_before, self.size):
            raise ValueError(
                f"`vocabulary='task'` must go with a model that has one row for each token, got {tuple(before)} for "
                f"{self.size_before:,} tokens and {tuple(after)} for {self.size:,} in {type(self.model).__name__}. Set "
                "vocabulary='whole'."
            )
        rows = torch.tensor(self.rows, device=tensor.device)
        new = tensor.detach().index_select(changed[0], rows)
        return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of rows that a model's configuration gives to its tokens.

    Raises:
        ValueError: If it does not say.
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
            f"`tokenizer` must have no tokens beyond the model's {size:,} embeddings, got {len(beyond)}, such as "
            f"{beyond[0]}. Call `model.resize_token_embeddings(len(tokenizer))` first, or set vocabulary='whole'."
        )


def _empty(model: PreTrainedModel, config: Any) -> Any:
    """Build a model of the same class without memory; of a copy, as building may change the configuration."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    own = chain(module._parameters.items(), module._buffers.items())
    return ((name, tensor) for name, tensor in own if tensor is not None)


def _number_slots(live: nn.Module, before: nn.Module, after: nn.Module) -> Iterator[_Slot]:
    """Find whole numbers, such as the number of embeddings or the padding token, that follow the vocabulary."""
    for name, old in vars(before).items():
        new = vars(after).get(name)
        if isinstance(old, int) and isinstance(new, int) and old != new and vars(live).get(name) == old:
            yield _Slot(live.__dict__, name, old, new)
