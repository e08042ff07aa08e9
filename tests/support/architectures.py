"""Tiny configurations of every architecture of docs/architectures.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tiny_models
import torch
from toy import VOCABULARY


if TYPE_CHECKING:
    from transformers import PreTrainedModel


_BASE = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = {**tiny_models._COMMON, **_BASE}
_GATED = {**tiny_models._GATED, **_BASE}
_HEADS = {**_GATED, "head_dim": 8}
_LABELS = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}
_MOE = {**_HEADS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_KNOWN = {
    name: (model, config, {**settings, **_BASE})
    for name, (model, config, settings) in tiny_models.ARCHITECTURES.items()
    if name != "bert"
}
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **_KNOWN,
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GATED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_HEADS, "sliding_window": 8}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_COMMON, "intermediate_size": 48}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_COMMON, "ffn_hidden_size": 48, "alibi": False}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", _GATED),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {**_HEADS, "sliding_window": 8}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GATED),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _GATED),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_MOE, "num_experts": 4}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**_BASE, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**_BASE, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
         "decoder_start_token_id": 2, "init_std": 0.3},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_COMMON, "intermediate_size": 48, **_LABELS}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_COMMON, "intermediate_size": 48, **_LABELS}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**_COMMON, **_LABELS, "intermediate_size": 48, "cls_token_id": 1, "sep_token_id": 2},
    ),
}  # fmt: skip


def make_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = tiny_models.make_input_ids()
    more = {"decoder_input_ids": tiny_models.make_input_ids(seed=1, length=4)}
    return {"input_ids": ids, **(more if model.config.is_encoder_decoder else {})}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**make_inputs(model)).logits
    return output
