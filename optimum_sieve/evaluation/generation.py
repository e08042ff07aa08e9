"""Let a model write its answers: greedily, in batches, with what `generate` of transformers does for every model."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.modes import evaluating

from .batches import input_device, padding_id
from .encoding import answer_lengths, encode_prompts


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.backbone.kinds import InputFormat
    from optimum_sieve.tasks import Example
    from optimum_sieve.tasks.example import Generation


logger = logging.getLogger(__name__)

# Of a model's generation settings, those that are no choice of how to write but belong to the model.
_OWN_TOKENS = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id")


@dataclass(frozen=True)
class Written:
    """An answer that a model wrote: its `text`, without spaces around it, and whether the model `ended` it itself."""

    text: str
    ended: bool


def write_answers(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    seed: int | None = None,
    on_batch: Callable[[int], object] = lambda count: None,
) -> list[Written]:
    """Let the model write the answer of every example, in their order.

    Each token is the likeliest, whatever the model's own generation settings say of sampling and penalties. Prompts are
    tokenized as they are for scoring.

    Args:
        model (`torch.nn.Module`): A model of transformers that writes.
        examples (`Sequence[Example]`): At least one, all with the same `generation`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer. It needs no padding token.
        batch_size (`int`): Rows that are written at the same time.
        seed (`int`, *optional*): Draw each token by its probability instead, with this seed and the example's place.
        on_batch (`Callable`): Called after each batch with its number of examples.

    Raises:
        ValueError: If the model does not write, a prompt leaves no room for an answer, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    inputs = input_format(model)
    prompts = _checked_prompts(examples, tokenizer, inputs)
    generation = examples[0].generation
    assert generation is not None
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    written: dict[int, Written] = {}
    with evaluating(model), _plain_settings(model, tokenizer, generation, inputs) as ends:
        writer = _Writer(model, tokenizer, generation, inputs, ends, seed)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            rows = writer.write([prompts[place] for place in places], places)
            written |= dict(zip(places, rows, strict=True))
            on_batch(len(places))
    return [written[place] for place in range(len(prompts))]


def check_generation(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat) -> None:
    """Raise what [`write_answers`] would raise, and warn of gold answers that are longer than what may be written.

    Raises:
        ValueError: If the model does not write, or a prompt leaves no room for the answer.
    """
    _checked_prompts(examples, tokenizer, inputs)
    most = max(example.generation.max_new_tokens for example in examples if example.generation is not None)
    longer = [count for count in answer_lengths(examples, tokenizer) if count > most]
    if longer:
        logger.warning(
            "%d of %d gold answers are longer than the %d tokens of `max_new_tokens`, the longest has %d: no model can "
            "write them. Raise it.",
            len(longer), len(examples), most, max(longer),
        )  # fmt: skip


def _checked_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat
) -> list[list[int]]:
    if inputs.kind == "classification":
        raise ValueError(
            "`model` must be one that writes for a task of the kind 'generate', got a sequence classifier. Use the "
            "kind 'labels'."
        )
    prompts = encode_prompts(examples, tokenizer, inputs)
    if inputs.max_length is None:
        return prompts
    for index, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        assert example.generation is not None
        most = example.generation.max_new_tokens
        used = max(len(prompt), most) if inputs.kind == "seq2seq" else len(prompt) + most
        if used > inputs.max_length:
            raise ValueError(
                f"`examples[{index}]` must leave room for an answer in the {inputs.max_length} tokens the model takes, "
                f"got {len(prompt)} of the prompt ({example.prompt[:60]!r}...) and {most} of `max_new_tokens`. Shorten "
                "the prompt in the task file (jinja2: `{{ text | truncate(2000) }}`), or lower `max_new_tokens`."
            )
    return prompts


@dataclass(frozen=True)
class _Writer:
    """What stays the same from batch to batch."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    generation: Generation
    inputs: InputFormat
    ends: set[int]
    seed: int | None

    def write(self, prompts: list[list[int]], places: list[int]) -> list[Written]:
        """Write the answers of the prompts at these places."""
        width, pad = max(map(len, prompts)), padding_id(self.tokenizer, self.inputs)
        # What is written comes right after a causal model's prompt; an encoder may count positions from the left.
        left = self.inputs.kind == "causal"
        padding = [width - len(ids) for ids in prompts]
        rows = [[pad] * n + ids if left else ids + [pad] * n for n, ids in zip(padding, prompts, strict=True)]
        masks = [[0] * n + [1] * (width - n) if left else [1] * (width - n) + [0] * n for n in padding]
        begin, stops, device = (width if left else 1), self.generation.stop, input_device(self.model)
        noise = [] if self.seed is None else [_Noise(self.seed, places, begin)]
        found = self.model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(masks, device=device),
            logits_processor=LogitsProcessorList(noise),
            stopping_criteria=StoppingCriteriaList(
                [_StopTexts(self.tokenizer, stops, begin, len(rows))] if stops else []
            ),
        )
        return [_read(ids, self.tokenizer, stops, self.ends) for ids in found[:, begin:].tolist()]


def _read(ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], ends: set[int]) -> Written:
    """Cut what was written at the first token or text that ends it."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    text = _decode(tokenizer, ids[:end])
    cut = min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)
    return Written(text[:cut].strip(), ended=end is not None or cut is not None)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Noise(LogitsProcessor):
    """Add Gumbel noise to the logits, so that the likeliest token is one drawn by its probability.

    The noise depends on the seed, the example's place and the position alone, not on how examples are batched.
    """

    def __init__(self, seed: int, places: Sequence[int], begin: int) -> None:
        self._seed, self._places, self._begin = seed, places, begin

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the logits (rows, vocabulary) with noise, in float32."""
        step = input_ids.shape[1] - self._begin
        noise = np.stack(
            [np.random.default_rng((self._seed, place, step)).gumbel(size=scores.shape[1]) for place in self._places]
        )
        return scores.float() + torch.from_numpy(noise).float().to(scores.device)  # type: ignore[return-value]


class _StopTexts(StoppingCriteria):
    """End a row as soon as a stop text is in what was written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], begin: int, num_rows: int) -> None:
        self._tokenizer, self._stops, self._begin = tokenizer, stops, begin
        self._done = [False] * num_rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        """Tell which rows (rows,) have ended."""
        for row, ids in enumerate(input_ids[:, self._begin :].tolist()):
            if not self._done[row]:
                text = _decode(self._tokenizer, ids)
                self._done[row] = any(stop in text for stop in self._stops)
        return torch.tensor(self._done, device=input_ids.device)  # type: ignore[return-value]


@contextmanager
def _plain_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, generation: Generation, inputs: InputFormat
) -> Iterator[set[int]]:
    """Put settings in place of the model's own that write the likeliest token; give the tokens that end a text."""
    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in _OWN_TOKENS}
    ends = {tokenizer.eos_token_id, *(end if isinstance(end := tokens["eos_token_id"], list) else [end])} - {None}
    # A stop that is a special token is not in the text.
    special = {stop for stop in generation.stop if stop in tokenizer.all_special_tokens}
    ends |= {tokenizer.convert_tokens_to_ids(stop) for stop in special}
    tokens |= {"eos_token_id": sorted(ends) or None, "pad_token_id": padding_id(tokenizer, inputs)}
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=generation.max_new_tokens, do_sample=False, num_beams=1, use_cache=True, **tokens
    )
    try:
        yield ends
    finally:
        model.generation_config = own
