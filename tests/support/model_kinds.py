"""Tiny encoder-decoders and sequence classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from toy import VOCABULARY


if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
           "max_position_embeddings": 64, "initializer_range": 0.3, "id2label": {0: "even", 1: "odd"},
           "label2id": {"even": 0, "odd": 1}}  # fmt: skip
T5 = {**SIZES, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {**T5, "initializer_factor": 2.0}),
    "bart": (
        "BartForConditionalGeneration",
        {**SIZES, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
         "decoder_start_token_id": 2, "init_std": 0.3},
    ),
    "bert": ("BertForSequenceClassification", ENCODER),
    "roberta": ("RobertaForSequenceClassification", {**ENCODER, "max_position_embeddings": 66}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {**ENCODER, "cls_token_id": 1, "sep_token_id": 2, "attn_implementation": "sdpa"},
    ),
    "llama-classifier": ("LlamaForSequenceClassification", {**ENCODER, "num_key_value_heads": 2}),
}  # fmt: skip


def make_model(name: str, **settings: Any) -> PreTrainedModel:
    class_name, defaults = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(model_class.config_class(**{**defaults, **settings}))
    return model.eval()
