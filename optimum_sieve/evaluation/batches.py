r"""Turn examples into batches of token ids and read log-likelihoods from a model's logits.

Evaluation (without gradients) and calibration (with gradients) share this module, so both use exactly the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum_sieve.backbone.kinds import InputFormat, Kind, input_format

from .encoding import EncodedExample, encode_examples
from .head import head_at, token_log_probs
from .token_ids import check_token_ids, padding_id
from .trees.arrangement import arranged
from .trees.groups import grouped
from .trees.masks import tree_inputs
from .trees.tensors import padded, padded_trees, padded_weights, present


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Cache, PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example


@dataclass(frozen=True)
class Batch:
    """Token ids for one forward pass, and the positions of the logits to score.

    A *site* is a (row, position) whose logits are needed. A *read* adds the log-probability of one token at one site to
    one candidate of one example. Single-token candidates share their example's row and site. For classifiers, each row
    is a site and labels take the place of tokens.

    Args:
        input_ids (`torch.Tensor` of shape `(rows, length)`):
            Token ids, padded on the right.
        attention_mask (`torch.Tensor` of shape `(rows, length)`):
            1 for tokens, 0 for padding.
        sites (`torch.Tensor` of shape `(sites, 2)`):
            Row and position of each next-token distribution to read.
        reads (`torch.Tensor` of shape `(reads, 3)`):
            Site, token id and slot; the slot is `example * max_candidates + candidate`.
        present (`torch.Tensor` of shape `(num_examples, max_candidates)`):
            Which candidates exist.
        indices (`tuple[int, ...]`):
            Indices of the batch's examples in the original list.
        kind (`str`):
            Kind of model, see [`InputFormat`][optimum_sieve.backbone.kinds.InputFormat].
        decoder_input_ids (`torch.Tensor` of shape `(rows, decoder_length)`, *optional*):
            Token ids of the decoder; the sites then refer to it. Never of the same length as `input_ids`.
        decoder_attention_mask (`torch.Tensor` of shape `(rows, decoder_length)`, *optional*):
            1 for tokens, 0 for padding.
        weights (`torch.Tensor` of shape `(num_examples, max_candidates)`, *optional*):
            Factor on each candidate's log-likelihood.
        depths, ends (`torch.Tensor` of shape `(rows, length)`, *optional*):
            Of rows that are trees of tokens, see [`Tree`][optimum_sieve.evaluation.trees.tree.Tree]; of all
            tokens, also those that a cache holds.
        alone (`bool`):
            Whether all rows are of one example, whose prompt should be computed once.
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
    depths: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    alone: bool = False

    @property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """The attention masks. A layer's token count identifies the one that applies to it."""
        return tuple(mask for mask in (self.attention_mask, self.decoder_attention_mask) if mask is not None)

    @property
    def num_examples(self) -> int:
        """Number of examples in the batch."""
        return len(self.indices)

    def with_sites(self, positions: Sequence[Sequence[int]]) -> Batch:
        """Return the batch with further sites after its own: the `positions` of each of its rows."""
        added = [(row, position) for row, chosen in enumerate(positions) for position in chosen]
        sites = torch.tensor(added, dtype=torch.long).reshape(-1, 2).to(self.sites)
        return replace(self, sites=torch.cat([self.sites, sites]))

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
    inputs: InputFormat | None = None,
    model: nn.Module | None = None,
    divide: bool = False,
) -> list[Batch]:
    """Tokenize `examples` into batches of similar length, longest first.

    The prompt alone and the prompt with each continuation are tokenized as whole texts. Their common prefix is the
    context; all tokens after it are scored. A token that spans the end of the prompt is therefore scored as the model
    sees it. Special tokens before the text (BOS) are kept, those after it (EOS) are dropped.

    Args:
        examples (`Sequence[Example]`):
            Examples to score.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer, not modified. It needs no padding token.
        batch_size (`int`):
            Maximum rows per forward pass, or tokens in that many texts if the candidates of an example form a tree. An
            example's candidates stay together, so one with more forms a larger batch, unless `divide` is set.
        candidates (`bool`):
            Score every candidate of each example; `False`: only the gold answer.
        inputs ([`InputFormat`][optimum_sieve.backbone.kinds.InputFormat], *optional*):
            The model's kind and context length. Default: those of `model`.
        model (`torch.nn.Module`, *optional*):
            The model. If a trial shows that it takes them, an example's candidates form one row, in which the prompt
            occurs once. Default: a row for each candidate.
        divide (`bool`):
            Whether an example with many candidates may be divided among batches: for
            [`candidate_scores`][optimum_sieve.evaluation.likelihoods.candidate_scores], not for a loss.

    Returns:
        `list[Batch]`: Batches on the CPU; each example is in exactly one, unless it is divided.

    Raises:
        ValueError: If `batch_size` is not positive, an example has nothing to score, no context or two identically
            tokenized candidates, or it exceeds the model's context length.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    inputs = inputs or (InputFormat() if model is None else input_format(model))
    rows = encode(examples, tokenizer, candidates=candidates, inputs=inputs)
    rows = arranged(rows, model, batch_size if divide else None)
    return pack(rows, batch_size=batch_size, pad_id=padding_id(tokenizer, inputs), kind=inputs.kind)


def pack(rows: Sequence[EncodedExample], *, batch_size: int, pad_id: int, kind: Kind) -> list[Batch]:
    """Group encoded examples into batches as [`make_batches`] does, padded with `pad_id`."""
    return [_collate(group, pad_id, kind) for group in grouped(rows, batch_size)]


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, candidates: bool, inputs: InputFormat
) -> list[EncodedExample]:
    """Tokenize `examples`; see [`make_batches`], which raises the same errors."""
    if not examples:
        raise ValueError("`examples` must hold at least one example, got none.")
    rows = encode_examples(examples, tokenizer, candidates, inputs)
    scored = [] if inputs.kind == "classification" else [(row.index, [read[2] for read in row.reads]) for row in rows]
    read = [(row.index, ids) for row in rows for ids in [*row.rows, row.source or []]]
    check_token_ids([*read, *scored], tokenizer, inputs)
    max_length = inputs.max_length
    too_long = [row for row in rows if max_length is not None and row.length > max_length]
    if too_long:
        worst = max(too_long, key=lambda row: row.length)
        raise ValueError(
            f"`examples` must fit in the {max_length} tokens the model takes, got {len(too_long)} longer ones; the "
            f"longest is `examples[{worst.index}]` with {worst.length} tokens "
            f"({examples[worst.index].prompt[:60]!r}...). Shorten the prompt in the task file (jinja2: "
            "`{{ text | truncate(2000) }}`) or drop these rows."
        )
    return rows


def check_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    candidates: bool = True,
    inputs: InputFormat = InputFormat(),  # noqa: B008 - immutable
) -> None:
    """Raise the errors of [`make_batches`] early, before hours of computation."""
    encode(examples, tokenizer, candidates=candidates, inputs=inputs)


def tokens_fingerprint(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat) -> str:
    """Return the SHA-256 of the examples' token ids, which depend on the tokenizer and its chat template."""
    encoded = encode(examples, tokenizer, candidates=bool(examples[0].candidates), inputs=inputs)
    # Results on several rows differ from those of versions that computed the prompt for each.
    rows = [
        [row.rows, row.reads, *([row.source] if row.source else []), *(["tree"] if len(row.rows) > 1 else [])]
        for row in encoded
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def log_likelihoods(model: nn.Module, batch: Batch, past: Cache | None = None) -> torch.Tensor:
    r"""Sum each candidate's token log-probabilities, \(\log p(\text{continuation} \mid \text{prompt})\).

    For normalized examples, the sum is divided by the candidate's number of characters. If the model allows it, only
    the logits at the batch's sites are computed. Differentiable; the log-softmax runs in `float32`.

    Args:
        model (`torch.nn.Module`):
            A model of transformers of the batch's kind.
        batch ([`Batch`]):
            From [`make_batches`], on the model's device.
        past (`Cache`, *optional*):
            Keys and values of the tokens before those of `batch`; modified.

    Returns:
        `torch.Tensor` of shape `(num_examples, max_candidates)`: `float32`, `-inf` for missing candidates.
    """
    at_sites = _logits(model, batch, past)
    site, token, slot = batch.reads.to(at_sites.device).unbind(dim=1)
    log_probs = token_log_probs(at_sites, site, token)
    present = batch.present.to(at_sites.device)
    sums = log_probs.new_zeros(present.numel()).index_add(0, slot, log_probs)
    sums = sums.view(present.shape)
    if batch.weights is not None:
        sums = sums * batch.weights.to(at_sites.device)
    return sums.masked_fill(~present, float("-inf"))


def site_logits(model: nn.Module, batch: Batch, past: Cache | None = None) -> torch.Tensor:
    """Return the logits (sites, vocabulary) at the batch's sites in `float32`; (sites, labels) for classifiers."""
    return _logits(model, batch, past).float()


def _logits(model: nn.Module, batch: Batch, past: Cache | None) -> torch.Tensor:
    """Return what [`site_logits`] does in the model's dtype."""
    rows, positions = batch.sites.unbind(dim=1)
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.kind != "classification":
        arguments |= {"use_cache": past is not None}
    if past is not None:
        arguments["past_key_values"] = past
    if batch.depths is not None and batch.ends is not None:
        arguments |= tree_inputs(model, batch.depths, batch.ends, batch.input_ids.shape[1], past)
    scored = batch.input_ids
    if batch.decoder_input_ids is not None:
        scored = batch.decoder_input_ids
        arguments |= {"decoder_input_ids": scored, "decoder_attention_mask": batch.decoder_attention_mask}
    with head_at(model, batch.sites, scored.shape) as selected:
        logits = model(**arguments).logits
    if selected:
        # Its gradient is a view; that of an index would be a copy.
        return logits.squeeze(0)  # type: ignore[no-any-return]
    if logits.dim() == 2:
        # A classifier returns one row of label logits per text.
        logits, positions = logits[:, None], torch.zeros_like(rows)
    return logits[rows.to(logits.device), positions.to(logits.device)]  # type: ignore[no-any-return]


def input_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter that is not offloaded to the meta device."""
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
    inputs = padded(sources or rows, pad_id)
    # A layer's token count identifies encoder or decoder tokens (see `Batch.masks`), so the lengths must differ.
    decoder = padded(rows, pad_id, other_than=inputs[0].shape[1]) if sources else (None, None)
    return Batch(
        input_ids=inputs[0],
        attention_mask=inputs[1],
        sites=torch.tensor(list(sites)),
        reads=torch.tensor(reads),
        present=present(batch, width),
        indices=tuple(example.index for example in batch),
        kind=kind,
        decoder_input_ids=decoder[0],
        decoder_attention_mask=decoder[1],
        weights=padded_weights(batch, width),
        alone=batch[0].alone,
        **padded_trees(batch, inputs[0].shape[1]),
    )
