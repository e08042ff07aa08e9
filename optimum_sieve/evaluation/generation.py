"""Generate answers in batches with `generate` of transformers, greedily or sampled."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.modes import evaluating

from .batches import input_device, make_batches
from .encoding import answer_lengths, encode_prompts
from .likelihoods import most_likely
from .token_ids import padding_id


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.backbone.kinds import InputFormat
    from optimum_sieve.tasks import Example
    from optimum_sieve.tasks.example import Generation


logger = logging.getLogger(__name__)

# Generation settings kept from the model: special tokens, as opposed to the decoding strategy.
_MODEL_TOKENS = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id")


@dataclass(frozen=True)
class Written:
    """A generated answer: its `text`, stripped unless it is scored as written, and whether it `ended` in time."""

    text: str
    ended: bool


def write_answers(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    seed: int | None = None,
    top_p: float = 1.0,
    on_batch: Callable[[int], object] = lambda count: None,
    to_score: bool = True,
) -> list[Written]:
    """Generate the answer to every example, in order.

    Decoding is greedy; the model's own sampling and penalty settings are ignored. Prompts are tokenized as for scoring.

    Args:
        model (`torch.nn.Module`): A generative model of transformers.
        examples (`Sequence[Example]`): At least one, all with the same `generation`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer. It needs no padding token.
        batch_size (`int`): Rows per batch.
        seed (`int`, *optional*): Sample from the model's distribution, seeded by this and the example's index. Default:
            greedy decoding.
        top_p (`float`): Sample from the most likely tokens alone, which together have this probability.
        on_batch (`Callable`): Called after each batch with its number of examples.
        to_score (`bool`): Where a task scores tokens, return the gold answer if each of its tokens is the most likely
            one, else an empty text; false to write freely.

    Raises:
        ValueError: If the model is a classifier, a prompt leaves no room for an answer, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    inputs = input_format(model)
    prompts = _checked_prompts(examples, tokenizer, inputs)
    generation = examples[0].generation
    assert generation is not None
    if generation.scored == "tokens" and to_score:
        batches = make_batches(examples, tokenizer, batch_size=batch_size, candidates=False, inputs=inputs)
        likely = most_likely(model, batches, len(examples), on_batch)
        return [
            Written(example.answer if right else "", ended=True)
            for example, right in zip(examples, likely, strict=True)
        ]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    written: dict[int, Written] = {}
    with evaluating(model), _plain_settings(model, tokenizer, generation, inputs) as ends:
        writer = _Writer(model, tokenizer, generation, inputs, ends, seed, top_p)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            answers = writer.write([prompts[index] for index in indices], indices)
            written |= dict(zip(indices, answers, strict=True))
            on_batch(len(indices))
    return [written[index] for index in range(len(prompts))]


def check_generation(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat) -> None:
    """Raise the errors of [`write_answers`] early, and warn if gold answers exceed `max_new_tokens`.

    Raises:
        ValueError: If the model is a classifier, or a prompt leaves no room for the answer.
    """
    _checked_prompts(examples, tokenizer, inputs)
    limit = max(example.generation.max_new_tokens for example in examples if example.generation is not None)
    longer = [count for count in answer_lengths(examples, tokenizer) if count > limit]
    if longer:
        logger.warning(
            "%d of %d gold answers are longer than the %d tokens of `max_new_tokens`, the longest has %d: no model can "
            "generate them. Increase it.",
            len(longer), len(examples), limit, max(longer),
        )  # fmt: skip


def _checked_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat
) -> list[list[int]]:
    if inputs.kind == "classification":
        raise ValueError(
            "`model` must be generative for a task of kind 'generate', got a sequence classifier. Use kind 'labels'."
        )
    prompts = encode_prompts(examples, tokenizer, inputs)
    if inputs.max_length is None:
        return prompts
    for index, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        assert example.generation is not None
        limit = example.generation.max_new_tokens
        used = max(len(prompt), limit) if inputs.kind == "seq2seq" else len(prompt) + limit
        if used > inputs.max_length:
            raise ValueError(
                f"`examples[{index}]` must leave room for an answer in the {inputs.max_length} tokens the model takes, "
                f"got {len(prompt)} prompt tokens ({example.prompt[:60]!r}...) and max_new_tokens={limit}. Shorten the "
                "prompt in the task file (jinja2: `{{ text | truncate(2000) }}`), or lower `max_new_tokens`."
            )
    return prompts


@dataclass(frozen=True)
class _Writer:
    """Generate batch by batch with constant settings."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    generation: Generation
    inputs: InputFormat
    ends: set[int]
    seed: int | None
    top_p: float

    def write(self, prompts: list[list[int]], indices: list[int]) -> list[Written]:
        """Generate answers to the `prompts` of the examples at `indices`."""
        width, pad = max(map(len, prompts)), padding_id(self.tokenizer, self.inputs)
        # A causal model continues the row, so it is padded on the left; an encoder may count positions from the left.
        left = self.inputs.kind == "causal"
        padding = [width - len(ids) for ids in prompts]
        rows = [[pad] * n + ids if left else ids + [pad] * n for n, ids in zip(padding, prompts, strict=True)]
        masks = [[0] * n + [1] * (width - n) if left else [1] * (width - n) + [0] * n for n in padding]
        begin, stops, device = (width if left else 1), self.generation.stop, input_device(self.model)
        sampled: list[LogitsProcessor] = [] if self.seed is None else [_Noise(self.seed, indices, begin)]
        if sampled and self.top_p < 1:
            sampled.insert(0, TopPLogitsWarper(self.top_p))
        sequences = self.model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(masks, device=device),
            logits_processor=LogitsProcessorList(sampled),
            stopping_criteria=StoppingCriteriaList(
                [_StopTexts(self.tokenizer, stops, begin, len(rows))] if stops else []
            ),
        )
        written = [_read(ids, self.tokenizer, stops, self.ends) for ids in sequences[:, begin:].tolist()]
        return (
            written if self.generation.scored != "text" else [replace(each, text=each.text.strip()) for each in written]
        )


def _read(ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], ends: set[int]) -> Written:
    """Decode generated ids up to the first end token or stop string."""
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    text = _decode(tokenizer, ids[:end])
    cut = min((position for stop in stops if (position := text.find(stop)) >= 0), default=None)
    return Written(text[:cut], ended=end is not None or cut is not None)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Noise(LogitsProcessor):
    """Add Gumbel noise to the logits, so that greedy decoding samples from the model's distribution.

    The noise depends only on the seed, the example's index and the position, not on the batches.
    """

    def __init__(self, seed: int, indices: Sequence[int], begin: int) -> None:
        self._seed, self._indices, self._begin = seed, indices, begin

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the logits (rows, vocabulary) with noise, in float32."""
        step = input_ids.shape[1] - self._begin
        noise = np.stack(
            [np.random.default_rng((self._seed, index, step)).gumbel(size=scores.shape[1]) for index in self._indices]
        )
        return scores.float() + torch.from_numpy(noise).float().to(scores.device)  # type: ignore[return-value]


class _StopTexts(StoppingCriteria):
    """End a row as soon as its generated text contains a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], begin: int, num_rows: int) -> None:
        self._tokenizer, self._stops, self._begin = tokenizer, stops, begin
        self._done = [False] * num_rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        """Return which rows have ended, (rows,)."""
        for row, ids in enumerate(input_ids[:, self._begin :].tolist()):
            if not self._done[row]:
                text = _decode(self._tokenizer, ids)
                self._done[row] = any(stop in text for stop in self._stops)
        return torch.tensor(self._done, device=input_ids.device)  # type: ignore[return-value]


@contextmanager
def _plain_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, generation: Generation, inputs: InputFormat
) -> Iterator[set[int]]:
    """Replace the model's generation settings by greedy decoding inside the context; yield the end token ids."""
    original = model.generation_config
    tokens = {name: getattr(original, name, None) for name in _MODEL_TOKENS}
    ends = {tokenizer.eos_token_id, *(end if isinstance(end := tokens["eos_token_id"], list) else [end])} - {None}
    # A stop string that is a special token does not appear in the decoded text.
    special = {stop for stop in generation.stop if stop in tokenizer.all_special_tokens}
    ends |= {tokenizer.convert_tokens_to_ids(stop) for stop in special}
    tokens |= {"eos_token_id": sorted(ends) or None, "pad_token_id": padding_id(tokenizer, inputs)}
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=generation.max_new_tokens, do_sample=False, num_beams=1, use_cache=True, **tokens
    )
    try:
        yield ends
    finally:
        model.generation_config = original
