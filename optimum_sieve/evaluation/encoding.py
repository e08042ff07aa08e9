r"""Tokenize examples: the rows of token ids to run, the end of the context and the tokens to score.

Never imports torch.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .token_ids import check_token_ids
from .trees.tree import merge_prefixes


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.backbone.kinds import InputFormat
    from optimum_sieve.tasks import Example


logger = logging.getLogger(__name__)

# Examples that are tokenized at once.
_TOKENIZED = 32


@dataclass(frozen=True)
class EncodedExample:
    """One example as token ids, without padding.

    Args:
        index (`int`):
            Index of the example in its list.
        rows (`list[list[int]]`):
            Distinct model inputs. A candidate that is a prefix of another shares its row.
        reads (`list[tuple[int, int, int, int]]`):
            For each token to score: row, position that predicts it, token id, candidate.
        num_candidates (`int`):
            Number of candidates.
        shadowed (`bool`):
            Whether one candidate is a prefix of another.
        source (`list[int]`, *optional*):
            Input of the encoder; the rows are then inputs of the decoder.
        weights (`list[float]`, *optional*):
            Factor on each candidate's log-likelihood.
        depths, ends (`list[int]`, *optional*):
            Of a row that is a tree of tokens, see [`Tree`][optimum_sieve.evaluation.trees.tree.Tree].
        alone (`bool`):
            Whether its rows are not put into a batch with others, so that their prompt can be computed once.
    """

    index: int
    rows: list[list[int]]
    reads: list[tuple[int, int, int, int]]
    num_candidates: int
    shadowed: bool
    source: list[int] | None = None
    weights: list[float] | None = None
    depths: list[int] | None = None
    ends: list[int] | None = None
    alone: bool = False

    @property
    def length(self) -> int:
        """Length of the longest input in tokens."""
        return max(len(row) for row in [*self.rows, self.source or []])

    @property
    def text_length(self) -> int:
        """Length of the longest text in tokens; `length` may be that of a tree of several texts."""
        return self.length if self.depths is None else max(self.depths) + 1


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, candidates: bool, inputs: InputFormat
) -> list[EncodedExample]:
    """Tokenize every candidate of `examples`, or only the gold answer.

    Raises:
        ValueError: If an example has nothing to score, no context or two identically tokenized candidates, or its
            candidates are not the labels of the classifier.
    """
    for index, example in enumerate(examples):
        if not (example.candidates or (not candidates and inputs.kind != "classification")):
            raise ValueError(
                f"`examples[{index}]` must have candidates to score, got none. Pass `candidates=False` to score its "
                "answer."
            )
    with _restored(tokenizer):
        if inputs.kind == "classification":
            return _encode_for_classifier(examples, tokenizer, candidates, inputs)
        if inputs.kind == "seq2seq":
            rows = _encode_for_decoder(examples, tokenizer, candidates, inputs)
        else:
            rows = _encode_as_one_text(examples, tokenizer, candidates)
    if candidates:
        rows = [replace(row, weights=_weights(example)) for row, example in zip(rows, examples, strict=True)]
    shadowed = sum(row.shadowed for row in rows)
    if shadowed:
        logger.warning(
            "In %d of %d examples one candidate's tokens are a prefix of another's, so the longer one can never score "
            "higher. End all candidates with the same text, for example a line break.",
            shadowed,
            len(examples),
        )
    return rows


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat
) -> list[list[int]]:
    """Tokenize the prompts for generation.

    Raises:
        ValueError: If a prompt has no tokens.
    """
    with _restored(tokenizer):
        if inputs.kind == "seq2seq":
            return _whole_texts(examples, tokenizer)
        prefix = _special_prefix(tokenizer, examples)
        plain = _token_ids(tokenizer, [example.prompt for example in examples])
        rows = [
            (prefix if example.add_special_tokens else []) + ids for example, ids in zip(examples, plain, strict=True)
        ]
    _refuse_empty(rows, examples)
    check_token_ids(enumerate(rows), tokenizer, inputs)
    return rows


def answer_lengths(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the number of tokens of each gold answer, including its stop string or EOS."""
    with _restored(tokenizer):
        return [len(ids) for ids in _token_ids(tokenizer, [example.answer for example in examples])]


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize whole texts with all special tokens."""
    with _restored(tokenizer):
        return _token_ids(tokenizer, list(texts), special=True)


def _encode_as_one_text(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, candidates: bool
) -> list[EncodedExample]:
    """Encode prompt and continuation as one text, for causal language models."""
    prefix = _special_prefix(tokenizer, examples)
    rows: list[EncodedExample] = []
    # The tokenizer's results are far larger than the rows, and an example may have many candidates.
    for start in range(0, len(examples), _TOKENIZED):
        part = [(example, _continuations(example, candidates)) for example in examples[start : start + _TOKENIZED]]
        tokens = iter(_token_ids(tokenizer, [row.prompt + text for row, after in part for text in ("", *after)]))
        for example, after in part:
            before = prefix if example.add_special_tokens else []
            prompt = before + next(tokens)
            rows.append(_encode_row(len(rows), example, prompt, [before + next(tokens) for _ in after]))
    return rows


def _encode_for_decoder(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, candidates: bool, inputs: InputFormat
) -> list[EncodedExample]:
    """Encode the prompt for the encoder and each continuation, after the start token, for the decoder."""
    assert inputs.start_token_id is not None
    sources = _whole_texts(examples, tokenizer)
    # The decoder's text does not continue the prompt, so it needs no leading space.
    continuations = [
        tuple(text.lstrip() if example.generation else text for text in _continuations(example, candidates))
        for example in examples
    ]
    tokens = iter(_token_ids(tokenizer, [text for texts in continuations for text in texts]))
    rows = []
    for index, (example, source, texts) in enumerate(zip(examples, sources, continuations, strict=True)):
        start = [inputs.start_token_id]
        row = _encode_row(index, example, start, [start + next(tokens) for _ in texts])
        rows.append(replace(row, source=source))
    return rows


def _encode_for_classifier(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, candidates: bool, inputs: InputFormat
) -> list[EncodedExample]:
    """Encode only the prompt; labels take the place of tokens in the reads."""
    rows = []
    for index, (example, row) in enumerate(zip(examples, _whole_texts(examples, tokenizer), strict=True)):
        classes = inputs.classes(example.candidates)
        if not candidates:
            classes = [classes[example.candidates.index(example.answer)]]
        reads = [(0, 0, label, candidate) for candidate, label in enumerate(classes)]
        rows.append(EncodedExample(index, [row], reads, len(classes), shadowed=False))
    return rows


def _continuations(example: Example, candidates: bool) -> tuple[str, ...]:
    return example.candidates if candidates else (example.answer,)


def _weights(example: Example) -> list[float] | None:
    return [1 / divisor for divisor in example.divisors] or None


def _whole_texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize the prompts with all special tokens, unless the chat template added them."""
    prompts = [example.prompt for example in examples]
    special, plain = (_token_ids(tokenizer, prompts, special) for special in (True, False))
    rows = [
        with_special if example.add_special_tokens else without
        for example, with_special, without in zip(examples, special, plain, strict=True)
    ]
    _refuse_empty(rows, examples)
    return rows


def _refuse_empty(rows: list[list[int]], examples: Sequence[Example]) -> None:
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        if not row:
            raise ValueError(f"`examples[{index}]` must have a prompt of at least one token, got {example.prompt!r}.")


def _encode_row(index: int, example: Example, prompt: list[int], wholes: list[list[int]]) -> EncodedExample:
    """Encode one example from the token ids of the prompt and of the prompt with each continuation (`wholes`)."""
    context = _common_prefix([prompt, *wholes])
    shown = repr(example.prompt if len(example.prompt) <= 60 else example.prompt[:60] + "...")
    if context == 0:
        raise ValueError(
            f"`examples[{index}]` must have at least one token before its continuation, got prompt {shown}. This "
            "tokenizer adds no BOS: start the prompt with some text."
        )
    if any(len(whole) == context for whole in wholes):
        raise ValueError(
            f"`examples[{index}]` must have continuations of at least one token each, got an empty one after the "
            f"prompt {shown}. Check the texts of the labels or answers with this tokenizer."
        )
    if len(set(map(tuple, wholes))) < len(wholes):
        raise ValueError(
            f"`examples[{index}]` must have candidates of distinct tokens, got two with the same tokens among "
            f"{', '.join(map(repr, example.candidates))}. Choose other texts."
        )
    # The last token of a continuation is predicted but not an input, so the row ends before it.
    rows, owners = merge_prefixes([whole[:-1] for whole in wholes])
    reads = [
        (owner, position - 1, whole[position], candidate)
        for candidate, (owner, whole) in enumerate(zip(owners, wholes, strict=True))
        for position in range(context, len(whole))
    ]
    shadowed = len(merge_prefixes(wholes)[0]) < len(wholes)
    return EncodedExample(index, rows, reads, len(wholes), shadowed)


def _common_prefix(sequences: list[list[int]]) -> int:
    """Return the length of the common prefix of all `sequences`."""
    for length, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return length
    return min(len(sequence) for sequence in sequences)


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = False) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _special_prefix(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[int]:
    """Return the special tokens that `tokenizer` adds before a text."""
    text = next((example.prompt + example.answer for example in examples if example.add_special_tokens), None)
    if text is None:
        return []
    plain, full = (_token_ids(tokenizer, [text], special)[0] for special in (False, True))
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise ValueError(
        f"`tokenizer` must add its special tokens around a text without changing the others, got {full} for {plain}. "
        "Use `chat` in the task file, which adds none."
    )


@contextmanager
def _restored(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Restore the truncation and padding of a fast tokenizer, which a call without them disables."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    try:
        yield
    finally:
        if backend is not None and truncation is not None:
            backend.enable_truncation(**truncation)
        if backend is not None and padding is not None:
            backend.enable_padding(**padding)
