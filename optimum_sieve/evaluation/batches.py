r"""The one place where examples become tensors: rows of token ids, and log-likelihoods read from a model's logits.

Used by evaluation (no gradient) and by calibration (with gradients), so that both see exactly the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum_sieve.backbone.kinds import InputFormat, Kind

from .encoding import EncodedExample, encode_examples


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import Cache, PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example


@dataclass(frozen=True)
class Batch:
    """Rows of token ids for one forward pass, and where the log-likelihoods are read from the logits.

    A *site* is a (row, position) whose logits are needed; a *read* takes the log-probability of one token at one site
    and adds it to one candidate of one example. Candidates of one token share their example's row and site. Of a
    classifier, rows have logits, and labels stand for tokens.

    Args:
        input_ids (`torch.Tensor` of shape `(rows, length)`):
            Token ids, padded on the right.
        attention_mask (`torch.Tensor` of shape `(rows, length)`):
            1 on tokens, 0 on padding.
        sites (`torch.Tensor` of shape `(sites, 2)`):
            Row and position of each needed next-token distribution.
        reads (`torch.Tensor` of shape `(reads, 3)`):
            Site, token id and slot; the slot is `example * max_candidates + candidate`.
        present (`torch.Tensor` of shape `(num_examples, max_candidates)`):
            Which candidates exist.
        indices (`tuple[int, ...]`):
            Positions of the batch's examples in the list they came from.
        kind (`str`):
            Kind of model the rows are for, see [`InputFormat`][optimum_sieve.backbone.kinds.InputFormat].
        decoder_input_ids (`torch.Tensor` of shape `(rows, decoder_length)`, *optional*):
            Token ids of the decoder, whose positions the sites name; never of the same length as `input_ids`.
        decoder_attention_mask (`torch.Tensor` of shape `(rows, decoder_length)`, *optional*):
            1 on tokens, 0 on padding.
        weights (`torch.Tensor` of shape `(num_examples, max_candidates)`, *optional*):
            What each candidate's log-likelihood is multiplied by.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    sites: torch.Tensor
    reads: torch.Tensor
    present: torch.Tensor
    indices: tuple[int, ...]
    kind: Kind = "causal"
    decoder_input_ids: torch.Tensor | None = None
    decoder_attention_mask: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """The attention masks; which one a layer's tokens follow is told by their number."""
        masks = (self.attention_mask, self.decoder_attention_mask)
        return tuple(mask for mask in masks if mask is not None)

    @property
    def num_examples(self) -> int:
        """Number of examples in the batch."""
        return len(self.indices)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in tensors.items() if isinstance(x, torch.Tensor)}
        return replace(self, **moved)


def make_batches(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    candidates: bool = True,
    inputs: InputFormat = InputFormat(),  # noqa: B008 - it cannot be changed
) -> list[Batch]:
    """Tokenize `examples` into batches of similar length, longest first.

    The prompt and the prompt followed by each continuation are tokenized as whole texts; the tokens they all begin
    with are the context, everything after it is scored. A token that spans the end of the prompt is therefore scored
    exactly as the model would see it. The tokens a tokenizer puts before a text (BOS) are kept, those it puts after
    it (EOS) are not.

    Args:
        examples (`Sequence[Example]`):
            What to score.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer. It needs no padding token and is left as it was.
        batch_size (`int`):
            Most rows of one forward pass. An example's candidates stay together, so an example of more rows than
            that is a batch of its own.
        candidates (`bool`):
            Score every candidate of each example; `False`: the gold answer alone.
        inputs ([`InputFormat`][optimum_sieve.backbone.kinds.InputFormat]):
            Kind of the model, and most tokens it takes.

    Returns:
        `list[Batch]`: Batches on the CPU; each example is in exactly one.

    Raises:
        ValueError: If `batch_size` is not positive, an example has nothing to score, no token comes before its
            continuation, two candidates are the same tokens, or an example is longer than the model takes.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    rows = encode(examples, tokenizer, candidates=candidates, inputs=inputs)
    return pack(rows, batch_size=batch_size, pad_id=padding_id(tokenizer, inputs), kind=inputs.kind)


def pack(rows: Sequence[EncodedExample], *, batch_size: int, pad_id: int, kind: Kind) -> list[Batch]:
    """Put encoded examples into batches as [`make_batches`] does; `pad_id` is what short rows are filled up with."""
    batches: list[list[EncodedExample]] = []
    filled = batch_size
    for row in sorted(rows, key=lambda row: -row.length):
        if filled + len(row.rows) > batch_size:
            batches.append([])
            filled = 0
        batches[-1].append(row)
        filled += len(row.rows)
    return [_collate(batch, pad_id, kind) for batch in batches]


def padding_id(tokenizer: PreTrainedTokenizerBase, inputs: InputFormat) -> int:
    """Return the token id that rows are filled up with."""
    pads = (inputs.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in pads if isinstance(i, int)), 0)


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, candidates: bool, inputs: InputFormat
) -> list[EncodedExample]:
    """Tokenize `examples`; see [`make_batches`], which raises what this does."""
    if not examples:
        raise ValueError("`examples` must hold at least one example, got none.")
    rows = encode_examples(examples, tokenizer, candidates, inputs)
    max_length = inputs.max_length
    too_long = [row for row in rows if max_length is not None and row.length > max_length]
    if too_long:
        worst = max(too_long, key=lambda row: row.length)
        raise ValueError(
            f"`examples` must fit in the {max_length} tokens the model takes, got {len(too_long)} longer ones; the "
            f"longest is `examples[{worst.index}]` with {worst.length} tokens "
            f"({examples[worst.index].prompt[:60]!r}...). Shorten the prompt in the task file (jinja2: "
            "`{{ text | truncate(2000) }}`) or leave such rows out."
        )
    return rows


def check_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    candidates: bool = True,
    inputs: InputFormat = InputFormat(),  # noqa: B008 - it cannot be changed
) -> None:
    """Raise what [`make_batches`] would raise, so that nothing about a split goes wrong after hours of work."""
    encode(examples, tokenizer, candidates=candidates, inputs=inputs)


def tokens_fingerprint(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat) -> str:
    """SHA-256 of the token ids that stand for `examples`: it changes with the tokenizer and its chat template."""
    encoded = encode(examples, tokenizer, candidates=bool(examples[0].candidates), inputs=inputs)
    rows = [[row.rows, row.reads, *([row.source] if row.source else [])] for row in encoded]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def log_likelihoods(model: nn.Module, batch: Batch, past: Cache | None = None) -> torch.Tensor:
    r"""Sum each candidate's token log-probabilities, \(\log p(\text{continuation} \mid \text{prompt})\).

    Of normalized examples, the sum is divided by the candidate's number of characters.

    Only the logits at the batch's sites are computed where the model can leave out the others. Differentiable; the
    log-softmax runs in `float32`.

    Args:
        model (`torch.nn.Module`):
            A model of transformers, of the kind the batch is for.
        batch ([`Batch`]):
            From [`make_batches`], on the model's device.
        past (`Cache`, *optional*):
            Keys and values of the tokens before those of `batch`; written to.

    Returns:
        `torch.Tensor` of shape `(num_examples, max_candidates)`: `float32`, `-inf` where an example has fewer
        candidates.
    """
    at_sites = site_logits(model, batch, past)
    device = at_sites.device
    site, token, slot = batch.reads.to(device).unbind(dim=1)
    token_log_probs = at_sites[site, token] - at_sites.logsumexp(dim=-1)[site]
    present = batch.present.to(device)
    sums = token_log_probs.new_zeros(present.numel()).index_add(0, slot, token_log_probs)
    sums = sums.view(present.shape)
    if batch.weights is not None:
        sums = sums * batch.weights.to(device)
    return sums.masked_fill(~present, float("-inf"))


def site_logits(model: nn.Module, batch: Batch, past: Cache | None = None) -> torch.Tensor:
    """Return the logits (sites, vocabulary) at the batch's sites in `float32`; a classifier's are of its labels."""
    rows, positions = batch.sites.unbind(dim=1)
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.kind != "classification":
        arguments |= {"use_cache": past is not None}
    if past is not None:
        arguments["past_key_values"] = past
    scored = batch.input_ids
    if batch.decoder_input_ids is not None:
        scored = batch.decoder_input_ids
        arguments |= {"decoder_input_ids": scored, "decoder_attention_mask": batch.decoder_attention_mask}
    with head_at(model, batch.sites, scored.shape) as chosen:
        logits = model(**arguments).logits
    if chosen:
        return logits[0].float()  # type: ignore[no-any-return]
    if logits.dim() == 2:
        # A classifier's: one row of labels for each text.
        logits, positions = logits[:, None], torch.zeros_like(rows)
    at_sites: torch.Tensor = logits[rows.to(logits.device), positions.to(logits.device)].float()
    return at_sites


def input_device(model: nn.Module) -> torch.device:
    """Return the device of `model`'s first parameter that has one (offloaded parameters have none)."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _collate(batch: list[EncodedExample], pad_id: int, kind: Kind) -> Batch:
    rows: list[list[int]] = []
    sites: dict[tuple[int, int], int] = {}
    reads: list[tuple[int, int, int]] = []
    width = max(example.num_candidates for example in batch)
    for number, example in enumerate(batch):
        for row, position, token, candidate in example.reads:
            site = sites.setdefault((len(rows) + row, position), len(sites))
            reads.append((site, token, number * width + candidate))
        rows += example.rows
    sources = [example.source for example in batch for _ in example.rows if example.source is not None]
    inputs = _padded(sources or rows, pad_id)
    # A layer's tokens are told to be the encoder's or the decoder's by their number, so the lengths must differ.
    decoder = _padded(rows, pad_id, other_than=inputs[0].shape[1]) if sources else (None, None)
    return Batch(
        input_ids=inputs[0],
        attention_mask=inputs[1],
        sites=torch.tensor(list(sites)),
        reads=torch.tensor(reads),
        present=torch.tensor([[c < example.num_candidates for c in range(width)] for example in batch]),
        indices=tuple(example.index for example in batch),
        kind=kind,
        decoder_input_ids=decoder[0],
        decoder_attention_mask=decoder[1],
        weights=_weights(batch, width),
    )


def _weights(batch: list[EncodedExample], width: int) -> torch.Tensor | None:
    if not any(example.weights for example in batch):
        return None
    own = [example.weights or [1.0] * example.num_candidates for example in batch]
    return torch.tensor([[*weights, *[1.0] * (width - len(weights))] for weights in own])


def _padded(rows: list[list[int]], pad_id: int, other_than: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, both (rows, length), of another length than `other_than`."""
    length = max(len(row) for row in rows)
    length += length == other_than
    ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


@contextmanager
def head_at(model: nn.Module, sites: torch.Tensor, shape: torch.Size) -> Iterator[list[bool]]:
    """Let a model's head see the hidden states at some sites alone, (1, sites, features), inside the context.

    A vocabulary is many times as wide as the states: logits at all positions would be the largest tensor of a run.

    Returns:
        `list[bool]`: Holds something afterwards where the head was called as expected.
    """
    owner: Any = model
    head = owner.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    chosen: list[bool] = []

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0] if args else None
        if not isinstance(states, torch.Tensor) or states.dim() != 3 or states.shape[:2] != shape:
            return None
        rows, positions = sites.to(states.device).unbind(dim=1)
        chosen.append(True)
        return (states[rows, positions][None], *args[1:])

    if not isinstance(head, nn.Module):
        yield chosen
        return
    handle = head.register_forward_pre_hook(choose)
    try:
        yield chosen
    finally:
        handle.remove()
