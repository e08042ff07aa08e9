"""`TaskVocabulary`: a tokenizer and rows of a model for the tokens of some examples, checked against the whole ones."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.evaluation.batches import input_device, make_batches, site_logits
from optimum_sieve.evaluation.encoding import encode_texts

from .rows import RowSelection
from .tokenizer import reduce_tokenizer, serialized


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example


@dataclass(frozen=True, eq=False)
class TaskVocabulary:
    """The tokens a task needs: a tokenizer that has no others, and the rows of a model that are theirs.

    Made by [`task_vocabulary`], which leaves the model as it is; `apply` leaves the other rows out.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the kept tokens.
        whole_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer it was made of.
        rows (`RowSelection`): The model's rows.
    """

    tokenizer: PreTrainedTokenizerBase
    whole_tokenizer: PreTrainedTokenizerBase
    rows: RowSelection

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of the embeddings `"before"` and `"after"`."""
        return {"before": self.rows.size_before, "after": self.rows.size}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows that are kept."""
        return hashlib.sha256(json.dumps(self.rows.rows).encode()).hexdigest()

    def apply(self) -> None:
        """Leave the other rows out of the model."""
        self.rows.apply()

    def undo(self) -> None:
        """Give the model all rows back."""
        self.rows.undo()

    @contextmanager
    def undone(self) -> Iterator[PreTrainedTokenizerBase]:
        """Give the model all rows back inside the context, which receives the tokenizer of all tokens."""
        self.undo()
        try:
            yield self.whole_tokenizer
        finally:
            self.apply()


def task_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    size: int | None = None,
) -> TaskVocabulary:
    """Return the vocabulary of `examples`: of their prompts, candidates and answers, and all that any text needs.

    One example is run through the model with all rows and with those that are kept: its logits must be the same, but
    for rounding.

    Args:
        model (`PreTrainedModel`): The model, which is left as it is.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        examples (`Sequence[Example]`): At least one.
        size (`int`, *optional*): Number of tokens to fill up to with the tokenizer's first ones, where there are fewer.

    Raises:
        ValueError: If the tokenizer or the model cannot be reduced, or does not give the same afterwards.
    """
    serialized(tokenizer)
    texts = _texts(examples)
    before = encode_texts(texts, tokenizer)
    reduced, tokens = reduce_tokenizer(tokenizer, {token for ids in before for token in ids}, size)
    for text, ids, own in zip(texts, before, encode_texts(texts, reduced), strict=True):
        if [tokens[token] for token in own] != ids:
            raise ValueError(
                f"`vocabulary='task'` must leave the tokens of the task as they are, got others of {text[:60]!r} with "
                f"{type(tokenizer).__name__}. Set vocabulary='whole'."
            )
    vocabulary = TaskVocabulary(reduced, tokenizer, RowSelection(model, tokens))
    _check_logits(model, vocabulary, examples[0])
    return vocabulary


def matching_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reduced: PreTrainedTokenizerBase
) -> TaskVocabulary:
    """Return the vocabulary that a reduced tokenizer has of the model and tokenizer it was made from.

    Raises:
        ValueError: If a token of `reduced` is none of `tokenizer`.
    """
    ids = tokenizer.get_vocab()
    tokens = sorted(reduced.get_vocab().items(), key=lambda entry: entry[1])
    if missing := [token for token, _ in tokens if token not in ids]:
        raise ValueError(
            f"`dense` must have all tokens of the model that was pruned from it, got a tokenizer without "
            f"{len(missing):,} of them, such as {missing[0]!r}. Name the base model."
        )
    return TaskVocabulary(reduced, tokenizer, RowSelection(model, [ids[token] for token, _ in tokens]))


def _texts(examples: Sequence[Example]) -> list[str]:
    """List the texts whose tokens are kept: prompts, what follows them, and both as one text."""
    texts: dict[str, None] = {}
    for example in examples:
        after = [*example.candidates, example.answer]
        if example.generation is not None:
            # Any accepted answer may be written, and every stop.
            after += [example.generation.continuation(example.prompt, text, None) for text in example.accepted]
            after += example.generation.stop
        for text in (example.prompt, *(example.prompt + text for text in after), *after, *map(str.strip, after)):
            texts[text] = None
    return list(texts)


def _check_logits(model: PreTrainedModel, vocabulary: TaskVocabulary, example: Example) -> None:
    """Refuse a model in which tokens play a part beside their rows, such as one with embeddings in every layer."""
    rows, device = vocabulary.rows, input_device(model)

    def logits(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        (batch,) = make_batches(
            [example], tokenizer, batch_size=1, candidates=bool(example.candidates), inputs=input_format(model)
        )
        with evaluating(model):
            return site_logits(model, batch.to(device))

    whole = logits(vocabulary.whole_tokenizer)
    try:
        vocabulary.apply()
        found = logits(vocabulary.tokenizer)
    finally:
        vocabulary.undo()
    # A classifier's logits are of its labels.
    expected = whole[:, rows.rows] if whole.shape[1] == rows.size_before != found.shape[1] else whole
    scale = max(float(expected.abs().max()), 1e-6)
    difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    # Rounding of a low precision, far below what a wrong row brings.
    if not difference <= 0.05 * scale:
        raise ValueError(
            f"`vocabulary='task'` must go with a model whose logits are those of the kept rows, got "
            f"{type(model).__name__}, whose logits of up to {scale:.3g} change by {difference:.3g}. Set "
            "vocabulary='whole'."
        )
