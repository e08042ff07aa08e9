"""Kinds of models (causal, seq2seq, classification) and the format of their inputs. Does not import torch at first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


Kind = Literal["causal", "seq2seq", "classification"]
_CLASSIFIER = "ForSequenceClassification"
_IMAGES, _SEVERAL = "image-text", "multimodal"
MULTIMODAL = (_IMAGES, _SEVERAL)
# Auto class by kind; models that also take images or sounds are of one of the last two, and of a kind for their texts.
AUTO_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    _IMAGES: "AutoModelForImageTextToText",
    _SEVERAL: "AutoModelForMultimodalLM",
}


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """Properties of a model that determine its inputs.

    Args:
        kind (`str`):
            `"causal"`: prompt and answer form one text; the answer's tokens are scored. `"seq2seq"`: prompt for the
            encoder, answer for the decoder. `"classification"`: only the prompt; the model scores its labels.
        max_length (`int`, *optional*): Maximum number of tokens.
        pad_token_id (`int`, *optional*): The configuration's padding token, which some classifiers use to find the last
            token.
        start_token_id (`int`, *optional*): First token of a decoder.
        label_ids (`Mapping[str, int]`): Class index by label name, for classifiers.
        num_tokens (`int`, *optional*): Number of input embeddings.
    """

    kind: Kind = "causal"
    max_length: int | None = None
    pad_token_id: int | None = None
    start_token_id: int | None = None
    label_ids: Mapping[str, int] = field(default_factory=dict)
    num_tokens: int | None = None

    def classes(self, candidates: Sequence[str]) -> list[int]:
        """Return the class index of each candidate, by label name or, if labels have only default names, by order.

        Raises:
            ValueError: If a candidate is not a label of the model.
        """
        names = [candidate.strip() for candidate in candidates]
        if all(name in self.label_ids for name in names):
            return [self.label_ids[name] for name in names]
        if len(names) == len(self.label_ids) and all(name.startswith("LABEL_") for name in self.label_ids):
            return list(range(len(names)))
        raise ValueError(
            f"`labels` must be the model's own, {', '.join(map(repr, self.label_ids))}, got "
            f"{', '.join(map(repr, names))}. Use the model's labels in the task file, or set `id2label` in its "
            "configuration."
        )


def input_format(model: Any) -> InputFormat:
    """Return the input format of a transformers model; any other module counts as causal without a length limit.

    Raises:
        ValueError: If a classifier has fewer than two labels, or an encoder-decoder has no start token.
    """
    config = getattr(model, "config", None)
    if config is None:
        return InputFormat()
    kind = model_kind(model)
    pad = _token_id(config, "pad_token_id")
    common: dict[str, Any] = {"kind": kind, "num_tokens": _num_embeddings(model)}
    if kind == "classification":
        labels = {str(name): int(index) for name, index in config.label2id.items()}
        if len(labels) < 2:
            raise ValueError(
                f"`model` must have at least two labels, got {len(labels)} (a regression). Load a classifier."
            )
        # Some architectures start positions after the padding token's id.
        limit = max_positions(model)
        offset = pad + 1 if pad is not None and config.model_type in _OFFSET_POSITIONS else 0
        return InputFormat(**common, max_length=limit and limit - offset, pad_token_id=pad, label_ids=labels)
    if kind == "seq2seq":
        start = _token_id(config, "decoder_start_token_id")
        if start is None:
            raise ValueError(
                "`model` must have a `decoder_start_token_id` in its configuration, got None. Set it before pruning."
            )
        return InputFormat(**common, max_length=max_positions(model), pad_token_id=pad, start_token_id=start)
    return InputFormat(**common, max_length=max_positions(model))


_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "ibert", "longformer", "mpnet")


def model_kind(model: Any) -> Kind:
    """Return the kind of a transformers model, dense or pruned."""
    return _kind([type(model).__name__], model.config)


def config_kind(config: Any) -> Kind:
    """Return the kind of the model that a configuration describes, dense or pruned."""
    return _kind(getattr(config, "architectures", None) or (), config)


def _kind(names: Iterable[Any], config: Any) -> Kind:
    # The class name of a pruned model may have a suffix after two underscores.
    if any(str(name).partition("__")[0].endswith(_CLASSIFIER) for name in names):
        return "classification"
    return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"


def loaded_kind(config: Any) -> str:
    """Return the key of `AUTO_CLASSES` of a configuration: its kind, or that it takes images or sounds too."""
    kind = config_kind(config)
    if kind == "classification" or config is None:
        return kind
    # Imports torch.
    from transformers.models.auto import modeling_auto as known

    block = getattr(config, "sieve", None)
    base: Any = block.get("base_model_type") if isinstance(block, dict) else getattr(config, "model_type", None)
    names = [
        str(name).removeprefix("Sieve").partition("__")[0] for name in getattr(config, "architectures", None) or ()
    ]
    for loaded, classes in (
        (_IMAGES, known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        (_SEVERAL, known.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    ):
        is_text = not names and base in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if base in classes and not is_text and (not names or classes[base] in names):
            return loaded
    return kind


def auto_class_name(config: Any) -> str:
    """Return the name of the Auto class that loads a checkpoint with this configuration including its head."""
    return AUTO_CLASSES[loaded_kind(config)]


def max_positions(model: Any) -> int | None:
    """Return the context length in `model`'s configuration, or `None` if it has none."""
    config: Any = getattr(model, "config", None)
    text_config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _num_embeddings(model: Any) -> int | None:
    """Return the number of input embeddings, or `None` if the model does not tell."""
    try:
        count = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None
    return count if isinstance(count, int) else None


def _token_id(config: Any, name: str) -> int | None:
    token_id = getattr(config, name, None)
    return token_id if isinstance(token_id, int) else None
