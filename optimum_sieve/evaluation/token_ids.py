"""Token ids that the model has embeddings for. Never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.backbone.kinds import InputFormat


def check_token_ids(
    rows: Iterable[tuple[int, Iterable[int]]], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat
) -> None:
    """Check that the model has an embedding for every token.

    Args:
        rows (`Iterable[tuple[int, Iterable[int]]]`): Index of an example, and token ids of it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        inputs ([`InputFormat`][optimum_sieve.backbone.kinds.InputFormat]): The model's number of embeddings.

    Raises:
        ValueError: If not; the message names the token.
    """
    limit = inputs.num_tokens
    if limit is None:
        return
    for index, ids in rows:
        token = max(ids, default=0)
        if token >= limit:
            raise _beyond(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token}) in `examples[{index}]`", limit)


def padding_id(tokenizer: PreTrainedTokenizerBase, inputs: InputFormat) -> int:
    """Return the token id used for padding: any that the model has, as padding is masked.

    Raises:
        ValueError: If a classifier, which finds the last token by its padding token, has no embedding for that one.
    """
    limit = inputs.num_tokens
    pads = (inputs.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    known = [i for i in pads if isinstance(i, int) and i >= 0 and (limit is None or i < limit)]
    if inputs.kind == "classification" and inputs.pad_token_id not in (None, *known):
        raise _beyond(f"the padding token {inputs.pad_token_id} of its configuration", limit or 0)
    return known[0] if known else 0


def _beyond(token: str, limit: int) -> ValueError:
    return ValueError(
        f"`tokenizer` must have no tokens beyond the model's {limit:,} embeddings, got {token}. Use the model's own "
        "tokenizer, or call `model.resize_token_embeddings(len(tokenizer))` and train the new ones."
    )
