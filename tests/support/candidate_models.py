"""Tiny models that differ in the masks, positions and caches that they take, and examples with many candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from architectures import _COMMON, _GATED, _HEADS, ARCHITECTURES
from toy import VOCABULARY

from optimum_sieve.tasks import Example


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZE = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WINDOW = {**_HEADS, "sliding_window": 8}
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
}  # fmt: skip
_MAMBA = {**_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}

# Windows and chunks of eight tokens are shorter than the prompts.
TREES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: ARCHITECTURES[name] for name in ("llama", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox", "cohere2")},
    **{name: ARCHITECTURES[name] for name in ("mixtral", "qwen3_moe", "falcon")},
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_WINDOW,
               "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _WINDOW),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_HEADS, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
}  # fmt: skip
# Positions by the place in the row, layers without attention, local attention of its own, a decoder with an encoder.
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4,
              "initializer_range": 0.3}),
    "mpt": ("MptForCausalLM", "MptConfig", {**_SIZE, "d_model": 32, "n_layers": 2, "n_heads": 4,
            "initializer_range": 0.3}),
    "falcon_alibi": ("FalconForCausalLM", "FalconConfig", {**_COMMON, "ffn_hidden_size": 48, "alibi": True}),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", {**_SIZE, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                "attention_types": [[["global", "local"], 1]], "window_size": 8, "max_position_embeddings": 64,
                "initializer_range": 0.3}),
    "mamba": ("MambaForCausalLM", "MambaConfig", _MAMBA),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**_GATED, "layer_types": ["conv", "full_attention"]}),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {**_HEADS, **_LINEAR, "num_hidden_layers": 4}),
    "t5": ARCHITECTURES["t5"],
}  # fmt: skip

PROMPTS = (
    "Number: 7 Parity:",
    "Number: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 Parity:",
    "Number: 9 8 7 6 5 4 3 2 1 0 Parity:",
    "Number: 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 Parity:",
)
# Some begin alike, and one has one token.
NAMES = (" odd", " even very odd", " even very even", " even 1", " very 2 3 4", " very 2 5", " very odd")


def make_any(name: str, **settings: Any) -> PreTrainedModel:
    """Make a random model of `TREES` or `ROWS`, in evaluation mode."""
    model_name, config_name, defaults = {**TREES, **ROWS}[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**_SIZE, **defaults, **settings})
    model: PreTrainedModel = getattr(transformers, model_name)(config)
    return model.eval()


def named(names: tuple[str, ...] = NAMES, prompts: tuple[str, ...] = PROMPTS) -> list[Example]:
    """Return an example of every prompt with these candidates."""
    return [
        Example(prompt=prompt, answer=names[i % len(names)], candidates=names, target=i % len(names))
        for i, prompt in enumerate(prompts)
    ]
