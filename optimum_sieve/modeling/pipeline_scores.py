"""What `pipeline_sieve.py` computes without optimum-sieve: templates, likelihoods of candidates, written answers.

Saved with every pruned model. The same rules as `optimum_sieve.evaluation`, in the shortest form.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cached_property
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True)
class RenderedRow:
    """A row as text.

    Args:
        prompt (`str`): With the chat template applied.
        candidates (`tuple[str, ...]`): Texts whose likelihoods are compared; none if the answer is written.
        names (`tuple[str, ...]`): What each candidate stands for: the name of a label, or the text of a choice.
        special (`bool`): Whether the tokenizer adds its special tokens.
    """

    prompt: str
    candidates: tuple[str, ...]
    names: tuple[str, ...]
    special: bool


@dataclass(frozen=True)
class Template:
    """A sandboxed jinja2 template over the fields of a row; a missing value is an error."""

    source: str

    @cached_property
    def _environment(self) -> Any:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        return ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_missing
        )

    @cached_property
    def _compiled(self) -> Any:
        return self._environment.from_string(self.source)

    @cached_property
    def _expression(self) -> Any:
        match = re.fullmatch(r"\s*\{\{[-+]?(.*?)[-+]?\}\}\s*", self.source, re.DOTALL)
        if match is None or "}}" in match[1]:
            return None
        return self._environment.compile_expression(match[1], undefined_to_none=False)

    @property
    def names(self) -> set[str]:
        """Names of the fields that it uses."""
        from jinja2 import meta

        used = meta.find_undeclared_variables(self._environment.parse(self.source))
        return set(used) - set(self._environment.globals)

    def render(self, fields: dict[str, Any]) -> str:
        """Render it to text."""
        return str(self._compiled.render(fields))

    def values(self, fields: dict[str, Any]) -> list[Any]:
        """Return the items of a template that is one expression with a list, or the one rendered text."""
        value = None if self._expression is None else self._expression(fields)
        return list(value) if isinstance(value, list | tuple) else [self.render(fields)]


def _not_missing(value: Any) -> Any:
    if value is None or value != value:
        raise ValueError("a value is missing")
    return value


def choice_texts(values: Iterable[Any]) -> list[str]:
    """Return the choices of a row as texts; raise `ValueError` unless they are 2 to 26 distinct ones, none missing."""
    given = list(values)
    texts = list(map(str, given))
    if None in given or not 2 <= len(texts) <= len(ascii_uppercase) or len(set(texts)) < len(texts):
        raise ValueError(f"choices must be 2 to {len(ascii_uppercase)} distinct texts, none missing, got {texts[:30]}")
    return texts


def label_offsets(model: Any, task: dict[str, Any], candidates: Sequence[str]) -> list[float]:
    """Return the offsets of these candidates, which a pruned model or the task of an exported one stores; else 0."""
    block = getattr(model.config, "sieve", None) or task
    for entry in block.get("label_offsets") or ():
        if entry["candidates"] == list(candidates):
            return [float(offset) for offset in entry["offsets"]]
    return [0.0] * len(candidates)


def softmax(scores: Sequence[float]) -> list[float]:
    """Return probabilities in proportion to the exponentials of log-likelihoods."""
    return [float(p) for p in torch.tensor(scores, dtype=torch.float64).softmax(0)]


def check_head(model: Any) -> None:
    """Refuse a classifier that was loaded as a language model, with a head of random weights."""
    names = str(getattr(model.config, "architectures", None))
    if "ForSequenceClassification" in names and not is_classifier(model):
        raise ValueError(
            f"`model` must have its own head, got the classifier {names} loaded as {type(model).__name__}. Load it "
            "with `AutoModelForSequenceClassification` and pass the model and its tokenizer."
        )


def is_classifier(model: Any) -> bool:
    """Whether the model scores labels instead of tokens."""
    return "ForSequenceClassification" in type(model).__name__


@torch.no_grad()
def text_scores(model: Any, tokenizer: Any, rows: Sequence[RenderedRow], batch_size: int) -> list[list[float]]:
    r"""Return \(\log p(\text{candidate} \mid \text{prompt})\) of every candidate of every row.

    Prompt and candidate are tokenized as one text; all tokens after what the candidates share are scored. Candidates
    that end in different last tokens share a forward pass.
    """
    inputs: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int, int, int]]] = {}
    for number, row in enumerate(rows):
        source, prompt, wholes = _tokens(model, tokenizer, row)
        start = _shared([prompt, *wholes])
        for candidate, whole in enumerate(wholes):
            reads = inputs.setdefault((tuple(source), tuple(whole[:-1])), [])
            reads += [(number, candidate, position - 1, whole[position]) for position in range(start, len(whole))]
    scores = [[0.0] * len(row.candidates) for row in rows]
    order = sorted(inputs, key=lambda key: -len(key[0]) - len(key[1]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        log_probs = _logits(model, tokenizer, batch, [[read[2] for read in inputs[key]] for key in batch])
        for place, key in enumerate(batch):
            for number, candidate, position, token in inputs[key]:
                scores[number][candidate] += float(log_probs(place, position)[token])
    return scores


def _tokens(model: Any, tokenizer: Any, row: RenderedRow) -> tuple[list[int], list[int], list[list[int]]]:
    """Return the encoder's tokens, if there is one, those before every candidate, and the same with each candidate."""
    if model.config.is_encoder_decoder:
        begin = [model.config.decoder_start_token_id]
        source = tokenizer(row.prompt, add_special_tokens=row.special)["input_ids"]
        return source, begin, [begin + _ids(tokenizer, text, special=False) for text in row.candidates]
    wholes = [_ids(tokenizer, row.prompt + text, row.special) for text in row.candidates]
    return [], _ids(tokenizer, row.prompt, row.special), wholes


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Tokenize a text with the special tokens before it, without those after it."""
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer(text, add_special_tokens=True)["input_ids"] if special else plain
    start = next(i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain)
    return full[: start + len(plain)]


def _shared(sequences: list[list[int]]) -> int:
    """Return the length of what all sequences begin with."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({each[i] for each in sequences}) > 1), shortest)


def _logits(model: Any, tokenizer: Any, batch: list[Any], positions: list[list[int]]) -> Any:
    """Run a batch of (encoder tokens, tokens); return a function from row and position to log-probabilities."""
    wanted = sorted({position for each in positions for position in each})
    ids, mask = _padded([list(tokens) for _, tokens in batch], model, tokenizer)
    if batch[0][0]:
        sources, source_mask = _padded([list(source) for source, _ in batch], model, tokenizer)
        named = {"input_ids": sources, "attention_mask": source_mask}
        named |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    else:
        named = {"input_ids": ids, "attention_mask": mask}
    # The vocabulary is wide: logits at other positions would be the largest tensor.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**named, use_cache=False, logits_to_keep=torch.tensor(wanted, device=model.device)).logits
    else:
        logits = model(**named, use_cache=False).logits[:, wanted]
    log_probs = logits.float().log_softmax(-1)
    place = {position: number for number, position in enumerate(wanted)}
    return lambda row, position: log_probs[row, place[position]]


@torch.no_grad()
def classifier_scores(model: Any, tokenizer: Any, rows: Sequence[RenderedRow], batch_size: int) -> list[list[float]]:
    """Return the logits of a classifier's labels, in the order of each row's candidates."""
    known = {str(name): int(index) for name, index in model.config.label2id.items()}
    scores: dict[int, list[float]] = {}
    for numbers, ids, mask in _batches(model, tokenizer, rows, batch_size, left=False):
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        for number, row in zip(numbers, logits, strict=True):
            names = [text.strip() for text in rows[number].candidates]
            classes = [known[name] for name in names] if known.keys() >= set(names) else range(len(names))
            scores[number] = [float(row[index]) for index in classes]
    return [scores[number] for number in range(len(rows))]


@torch.no_grad()
def written_texts(
    model: Any, tokenizer: Any, rows: Sequence[RenderedRow], batch_size: int, stops: Sequence[str], limit: int
) -> list[str]:
    """Return what the model writes greedily after each prompt, up to `limit` tokens, cut at the first stop string."""
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    # A stop string that is a special token does not appear in the decoded text.
    special = [tokenizer.convert_tokens_to_ids(stop) for stop in stops if stop in tokenizer.all_special_tokens]
    ends = sorted({*ends, *special, tokenizer.eos_token_id} - {None})
    kept = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=ends or None,
        pad_token_id=_pad(model, tokenizer), **{name: getattr(settings, name, None) for name in kept},
    )  # fmt: skip
    encoder = model.config.is_encoder_decoder
    texts: dict[int, str] = {}
    for numbers, ids, mask in _batches(model, tokenizer, rows, batch_size, left=not encoder):
        first = 1 if encoder else ids.shape[1]
        stopping = StoppingCriteriaList([_Stops(tokenizer, stops, first)])
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, stopping_criteria=stopping)
        for number, tokens in zip(numbers, made[:, first:].tolist(), strict=True):
            end = next((place for place, token in enumerate(tokens) if token in ends), None)
            text = _decoded(tokenizer, tokens[:end])
            cut = min((text.find(stop) for stop in stops if stop in text), default=None)
            texts[number] = text[:cut].strip()
    return [texts[number] for number in range(len(rows))]


class _Stops(StoppingCriteria):
    """End a row once its written text contains a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], first: int) -> None:
        self.tokenizer, self.stops, self.first = tokenizer, stops, first

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return which rows have ended, (rows,)."""
        texts = [_decoded(self.tokenizer, tokens) for tokens in input_ids[:, self.first :].tolist()]
        ended = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _decoded(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _batches(
    model: Any, tokenizer: Any, rows: Sequence[RenderedRow], batch_size: int, *, left: bool
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yield the numbers, token ids and attention mask of prompts of similar length."""
    prompts = [
        _ids(tokenizer, row.prompt, row.special)
        if left
        else tokenizer(row.prompt, add_special_tokens=row.special)["input_ids"]
        for row in rows
    ]
    order = sorted(range(len(rows)), key=lambda number: -len(prompts[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        yield numbers, *_padded([prompts[number] for number in numbers], model, tokenizer, left=left)


def _padded(rows: list[list[int]], model: Any, tokenizer: Any, *, left: bool = False) -> tuple[Any, Any]:
    """Return padded token ids and the attention mask, both (rows, length)."""
    width, pad = max(map(len, rows)), _pad(model, tokenizer)
    gaps = [width - len(row) for row in rows]
    ids = [[pad] * gap + row if left else row + [pad] * gap for gap, row in zip(gaps, rows, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) if left else [1] * (width - gap) + [0] * gap for gap in gaps]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def _pad(model: Any, tokenizer: Any) -> int:
    """Return a token for padding, which is masked; a classifier finds the last token by that of its configuration."""
    own = model.config.pad_token_id if is_classifier(model) else None
    return next((token for token in (own, tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
