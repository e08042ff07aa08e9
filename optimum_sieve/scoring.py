r"""The one place where examples become tensors: rows of token ids, and log-likelihoods read from a model's logits.

Used by evaluation (no gradient) and by calibration (with gradients), so that both see exactly the same tokens.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve.encoding import EncodedExample, encode_examples


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import Cache, PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example


@dataclass(frozen=True)
class Batch:
    """Rows of token ids for one forward pass, and where the log-likelihoods are read from the logits.

    A *site* is a (row, position) whose logits are needed; a *read* takes the log-probability of one token at one site
    and adds it to one candidate of one example. Candidates of one token share their example's row and site.

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
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    sites: torch.Tensor
    reads: torch.Tensor
    present: torch.Tensor
    indices: tuple[int, ...]

    @property
    def num_examples(self) -> int:
        """Number of examples in the batch."""
        return len(self.indices)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            sites=self.sites.to(device),
            reads=self.reads.to(device),
            present=self.present.to(device),
            indices=self.indices,
        )


def make_batches(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    candidates: bool = True,
    max_length: int | None = None,
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
        max_length (`int`, *optional*):
            Most tokens the model takes. `None`: not checked.

    Returns:
        `list[Batch]`: Batches on the CPU; each example is in exactly one.

    Raises:
        ValueError: If `batch_size` is not positive, an example has nothing to score, no token comes before its
            continuation, two candidates are the same tokens, or an example is longer than `max_length`.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    rows = _encode(examples, tokenizer, candidates, max_length)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
    batches: list[list[EncodedExample]] = []
    filled = batch_size
    for row in sorted(rows, key=lambda row: -row.length):
        if filled + len(row.rows) > batch_size:
            batches.append([])
            filled = 0
        batches[-1].append(row)
        filled += len(row.rows)
    return [_collate(batch, pad_id) for batch in batches]


def check_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    candidates: bool = True,
    max_length: int | None = None,
) -> None:
    """Raise what [`make_batches`] would raise, so that nothing about a split goes wrong after hours of work."""
    _encode(examples, tokenizer, candidates, max_length)


def tokens_fingerprint(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the token ids that stand for `examples`: it changes with the tokenizer and its chat template."""
    rows = [[row.rows, row.reads] for row in _encode(examples, tokenizer, bool(examples[0].candidates), None)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def log_likelihoods(model: nn.Module, batch: Batch, past: Cache | None = None) -> torch.Tensor:
    r"""Sum each candidate's token log-probabilities, \(\log p(\text{continuation} \mid \text{prompt})\).

    Only the logits at the batch's sites are computed where the model can leave out the others. Differentiable; the
    log-softmax runs in `float32`.

    Args:
        model (`torch.nn.Module`):
            A causal language model of transformers.
        batch ([`Batch`]):
            From [`make_batches`], on the model's device.
        past (`Cache`, *optional*):
            Keys and values of the tokens before those of `batch`; written to.

    Returns:
        `torch.Tensor` of shape `(num_examples, max_candidates)`: `float32`, `-inf` where an example has fewer
        candidates.
    """
    rows, positions = batch.sites.unbind(dim=1)
    arguments: dict[str, Any] = {"use_cache": False}
    if past is not None:
        arguments = {"use_cache": True, "past_key_values": past}
    columns = positions
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"], columns = torch.unique(positions.cpu(), return_inverse=True)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **arguments).logits
    if logits.shape[1] == batch.input_ids.shape[1]:
        columns = positions
    device = logits.device
    at_sites: torch.Tensor = logits[rows.to(device), columns.to(device)].float()
    site, token, slot = batch.reads.to(device).unbind(dim=1)
    token_log_probs = at_sites[site, token] - at_sites.logsumexp(dim=-1)[site]
    present = batch.present.to(device)
    sums = token_log_probs.new_zeros(present.numel()).index_add(0, slot, token_log_probs)
    return sums.view(present.shape).masked_fill(~present, float("-inf"))


def max_positions(model: nn.Module) -> int | None:
    """Return how many tokens `model` takes by its configuration, or `None` where that names no limit."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def input_device(model: nn.Module) -> torch.device:
    """Return the device of `model`'s first parameter that has one (offloaded parameters have none)."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _collate(batch: list[EncodedExample], pad_id: int) -> Batch:
    rows: list[list[int]] = []
    sites: dict[tuple[int, int], int] = {}
    reads: list[tuple[int, int, int]] = []
    width = max(example.num_candidates for example in batch)
    for number, example in enumerate(batch):
        for row, position, token, candidate in example.reads:
            site = sites.setdefault((len(rows) + row, position), len(sites))
            reads.append((site, token, number * width + candidate))
        rows += example.rows
    length = max(len(row) for row in rows)
    return Batch(
        input_ids=torch.tensor([row + [pad_id] * (length - len(row)) for row in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        sites=torch.tensor(list(sites)),
        reads=torch.tensor(reads),
        present=torch.tensor([[c < example.num_candidates for c in range(width)] for example in batch]),
        indices=tuple(example.index for example in batch),
    )


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, candidates: bool, max_length: int | None
) -> list[EncodedExample]:
    if not examples:
        raise ValueError("`examples` must hold at least one example, got none.")
    rows = encode_examples(examples, tokenizer, candidates)
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
