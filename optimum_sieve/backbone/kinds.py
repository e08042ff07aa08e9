"""How a kind of model is given an example, and where its answer is read. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


Kind = Literal["causal", "seq2seq", "classification"]
_CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """What must be known of a model to make its inputs.

    Args:
        kind (`str`):
            `"causal"`: prompt and answer are one text, whose last tokens are scored. `"seq2seq"`: the encoder reads the
            prompt, the decoder the answer. `"classification"`: the model reads the prompt and scores its labels.
        max_length (`int`, *optional*): Most tokens the model takes.
        pad_token_id (`int`, *optional*): Padding by the model's configuration, by which some models find a text's end.
        start_token_id (`int`, *optional*): Token that a decoder starts with.
        label_ids (`Mapping[str, int]`): Class of each label by its name, of a classifier.
    """

    kind: Kind = "causal"
    max_length: int | None = None
    pad_token_id: int | None = None
    start_token_id: int | None = None
    label_ids: Mapping[str, int] = field(default_factory=dict)

    def classes(self, candidates: Sequence[str]) -> list[int]:
        """Return the class of each candidate: the label of its name or, where labels have no names, of its place.

        Raises:
            ValueError: If the candidates are not labels of the model.
        """
        names = [candidate.strip() for candidate in candidates]
        if all(name in self.label_ids for name in names):
            return [self.label_ids[name] for name in names]
        if len(names) == len(self.label_ids) and all(name.startswith("LABEL_") for name in self.label_ids):
            return list(range(len(names)))
        raise ValueError(
            f"`labels` must be the model's own, {', '.join(map(repr, self.label_ids))}, got "
            f"{', '.join(map(repr, names))}. Write those texts in the task file, or set `id2label` in the model's "
            "configuration."
        )


def input_format(model: Any) -> InputFormat:
    """Return the format of a transformers model; of anything else that of a causal language model without limits.

    Raises:
        ValueError: If the model classifies without at least two labels, or decodes without a start token.
    """
    config = getattr(model, "config", None)
    if config is None:
        return InputFormat()
    kind = model_kind(model)
    pad = _token_id(config, "pad_token_id")
    if kind == "classification":
        labels = {str(name): int(place) for name, place in config.label2id.items()}
        if len(labels) < 2:
            raise ValueError(
                f"`model` must have at least two labels, got {len(labels)}: one is a regression. Load a classifier."
            )
        # Some architectures count positions from the padding token on.
        limit = max_positions(model)
        offset = pad + 1 if pad is not None and config.model_type in _OFFSET_POSITIONS else 0
        return InputFormat(kind=kind, max_length=limit and limit - offset, pad_token_id=pad, label_ids=labels)
    if kind == "seq2seq":
        start = _token_id(config, "decoder_start_token_id")
        if start is None:
            raise ValueError(
                "`model` must have a `decoder_start_token_id` in its configuration, got None. Set it before pruning."
            )
        return InputFormat(kind=kind, max_length=max_positions(model), pad_token_id=pad, start_token_id=start)
    return InputFormat(max_length=max_positions(model))


_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "ibert", "longformer", "mpnet")


def model_kind(model: Any) -> Kind:
    """Tell how a transformers model, dense or pruned, is given its inputs."""
    # A pruned model's class may have a borrower's name behind its own.
    if type(model).__name__.partition("__")[0].endswith(_CLASSIFIER):
        return "classification"
    return "seq2seq" if getattr(model.config, "is_encoder_decoder", False) else "causal"


def auto_class_name(config: Any) -> str:
    """Return the name of the Auto class that loads a checkpoint with this configuration, with its head."""
    names = [name.partition("__")[0] for name in getattr(config, "architectures", None) or ()]
    if any(name.endswith(_CLASSIFIER) for name in names):
        return "AutoModelForSequenceClassification"
    return "AutoModelForSeq2SeqLM" if getattr(config, "is_encoder_decoder", False) else "AutoModelForCausalLM"


def max_positions(model: Any) -> int | None:
    """Return how many tokens `model` takes by its configuration, or `None` where that names no limit."""
    config: Any = getattr(model, "config", None)
    text_config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _token_id(config: Any, name: str) -> int | None:
    found = getattr(config, name, None)
    return found if isinstance(found, int) else None
