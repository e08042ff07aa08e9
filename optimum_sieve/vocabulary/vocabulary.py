"""`TaskVocabulary`: a tokenizer and model rows reduced to the tokens of some examples, and checked."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_sieve.backbone.fingerprint import tokenizer_fingerprint
from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.evaluation.batches import input_device, make_batches, site_logits
from optimum_sieve.evaluation.encoding import encode_texts
from optimum_sieve.run.workdir import content_key

from .rows import RowSelection
from .tokenizer import reduce_tokenizer, serialized


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example


@dataclass(frozen=True, eq=False)
class TaskVocabulary:
    """A tokenizer and the rows of a model for the tokens a task needs.

    Created by [`task_vocabulary`], which does not change the model; `apply` removes the other rows.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The reduced tokenizer.
        whole_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The original tokenizer.
        rows (`RowSelection`): The selected rows of the model.
    """

    tokenizer: PreTrainedTokenizerBase
    whole_tokenizer: PreTrainedTokenizerBase
    rows: RowSelection

    @property
    def sizes(self) -> dict[str, int]:
        """Number of embedding rows `"before"` and `"after"`."""
        return {"before": self.rows.size_before, "after": self.rows.size}

    @property
    def fingerprint(self) -> str:
        """Hash of the kept rows and of the reduced tokenizer, which splits texts that the rows were not chosen for."""
        return content_key(rows=self.rows.rows, tokenizer=tokenizer_fingerprint(self.tokenizer))

    def apply(self) -> None:
        """Reduce the model to the kept rows."""
        self.rows.apply()

    def undo(self) -> None:
        """Restore all rows of the model."""
        self.rows.undo()

    @contextmanager
    def undone(self) -> Iterator[PreTrainedTokenizerBase]:
        """Restore all rows inside the context and yield the original tokenizer."""
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
    """Return the vocabulary for the prompts, candidates and answers of `examples`, sufficient to split any text.

    One example runs through the model with all rows and with the kept rows; up to rounding, the logits must be equal.

    Args:
        model (`PreTrainedModel`): The model, not modified.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        examples (`Sequence[Example]`): At least one.
        size (`int`, *optional*): Minimum number of tokens, filled up with likely ones of further texts.

    Raises:
        ValueError: If the tokenizer or the model cannot be reduced, or gives different results afterwards.
    """
    serialized(tokenizer)
    texts = _texts(examples)
    before = encode_texts(texts, tokenizer)
    reduced, tokens = reduce_tokenizer(tokenizer, {token for ids in before for token in ids}, size)
    for text, ids, reduced_ids in zip(texts, before, encode_texts(texts, reduced), strict=True):
        if [tokens[token] for token in reduced_ids] != ids:
            raise ValueError(
                f"`vocabulary='task'` must keep the tokens of the task's texts, got different ones for {text[:60]!r} "
                f"with {type(tokenizer).__name__}. Set vocabulary='whole'."
            )
    vocabulary = TaskVocabulary(reduced, tokenizer, RowSelection(model, tokens))
    _check_logits(model, vocabulary, examples[0])
    return vocabulary


def matching_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reduced: PreTrainedTokenizerBase
) -> TaskVocabulary:
    """Return the vocabulary of the `reduced` tokenizer for the original model and tokenizer.

    Raises:
        ValueError: If `tokenizer` lacks a token of `reduced`.
    """
    ids = tokenizer.get_vocab()
    tokens = sorted(reduced.get_vocab().items(), key=lambda entry: entry[1])
    if missing := [token for token, _ in tokens if token not in ids]:
        raise ValueError(
            f"`dense` must have all tokens of the pruned model, got a tokenizer that lacks {len(missing):,} (e.g. "
            f"{missing[0]!r}). Pass the base model."
        )
    return TaskVocabulary(reduced, tokenizer, RowSelection(model, [ids[token] for token, _ in tokens]))


def _texts(examples: Sequence[Example]) -> list[str]:
    """List the texts whose tokens are kept: prompts, continuations, and both as one text."""
    texts: dict[str, None] = {}
    for example in examples:
        after = [*example.candidates, example.answer]
        if example.generation is not None:
            # The model may generate any accepted answer and any stop string.
            after += [example.generation.continuation(example.prompt, text, None) for text in example.accepted]
            after += example.generation.stop
        for text in (example.prompt, *(example.prompt + text for text in after), *after, *map(str.strip, after)):
            texts[text] = None
    return list(texts)


def _check_logits(model: PreTrainedModel, vocabulary: TaskVocabulary, example: Example) -> None:
    """Reject a model that uses token ids other than through its rows, such as with embeddings in every layer."""
    rows, device = vocabulary.rows, input_device(model)

    def logits(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        (batch,) = make_batches([example], tokenizer, batch_size=1, candidates=bool(example.candidates), model=model)
        with evaluating(model):
            return site_logits(model, batch.to(device))

    whole = logits(vocabulary.whole_tokenizer)
    try:
        vocabulary.apply()
        reduced = logits(vocabulary.tokenizer)
    finally:
        vocabulary.undo()
    # The logits of a classifier are over its labels, not over tokens.
    expected = whole[:, rows.rows] if whole.shape[1] == rows.size_before != reduced.shape[1] else whole
    scale = max(float(expected.abs().max()), 1e-6)
    difference = float((reduced - expected).abs().max()) if reduced.shape == expected.shape else float("inf")
    # Above rounding in low precision, far below the effect of a wrong row.
    if not difference <= 0.05 * scale:
        raise ValueError(
            f"`vocabulary='task'` must go with a model whose logits stay the same with the kept rows, got "
            f"{type(model).__name__}, whose logits of up to {scale:.3g} change by {difference:.3g}. Set "
            "vocabulary='whole'."
        )
