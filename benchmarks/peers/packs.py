"""Pack a task's prompts and gold answers into long sequences, as other projects' calibration code expects.

The attention mask keeps the texts of a sequence apart, so that every hidden state is that of the text alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from bench import input_format, make_batches


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example

# Labels that a cross-entropy leaves out.
IGNORED = -100


@dataclass(frozen=True)
class Text:
    """Token ids of a prompt and its gold answer; `answer` is the number of tokens at the end that are the answer's."""

    ids: list[int]
    answer: int


def encode_texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> list[Text]:
    """Tokenize examples as the package scores them, in their order."""
    texts: dict[int, Text] = {}
    batches = make_batches(examples, tokenizer, batch_size=1, candidates=False, inputs=input_format(model))
    for batch in batches:
        ids = batch.input_ids[0][batch.attention_mask[0].bool()].tolist()
        answer = batch.reads[:, 1].tolist()
        # The last token is predicted, but no input.
        texts[batch.indices[0]] = Text([*ids, answer[-1]], len(answer))
    return [texts[index] for index in range(len(examples))]


def pack_texts(texts: Sequence[Text], length: int, loss: str) -> list[dict[str, torch.Tensor]]:
    """Pack whole texts into sequences of at most `length` tokens; a longer text is a sequence of its own.

    `input_ids` are the labels of the loss: every token but a text's first (`"text"`) or the answers' tokens
    (`"answer"`), elsewhere -100. The model's inputs are in `text_ids`; see [`reading_text_ids`].
    """
    groups: list[list[Text]] = []
    for text in texts:
        if not groups or sum(len(each.ids) for each in groups[-1]) + len(text.ids) > length:
            groups.append([])
        groups[-1].append(text)
    return [{**_sequence(group), "input_ids": _labels(group, loss)} for group in groups]


def _labels(group: Sequence[Text], loss: str) -> torch.Tensor:
    labels: list[int] = []
    for text in group:
        scored = len(text.ids) - 1 if loss == "text" else text.answer
        labels += [IGNORED] * (len(text.ids) - scored) + text.ids[len(text.ids) - scored :]
    return torch.tensor([labels])


def _sequence(group: Sequence[Text]) -> dict[str, torch.Tensor]:
    ids = [token for text in group for token in text.ids]
    places = torch.tensor([place for place, text in enumerate(group) for _ in text.ids])
    same = places[:, None] == places[None, :]
    return {"text_ids": torch.tensor([ids]), "attention_mask": same.tril()[None, None]}


def cut_texts(texts: Sequence[Text], count: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Pack texts into `count` sequences of exactly `length` tokens.

    The last text of a sequence is cut, and the texts are repeated if they are too few.
    """
    source = cycle(texts)
    packs = []
    for _ in range(count):
        group: list[Text] = []
        room = length
        while room:
            ids = next(source).ids[:room]
            group.append(Text(ids, 0))
            room -= len(ids)
        pack = _sequence(group)
        packs.append({"input_ids": pack["text_ids"], "attention_mask": pack["attention_mask"]})
    return packs


@contextmanager
def reading_text_ids(model: nn.Module) -> Iterator[None]:
    """Let the model read `text_ids`, where a batch has them, in place of `input_ids`, which are labels then."""

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "text_ids" in kwargs:
            kwargs = {**kwargs, "input_ids": kwargs["text_ids"]}
            del kwargs["text_ids"]
        return args, kwargs

    handle = model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
