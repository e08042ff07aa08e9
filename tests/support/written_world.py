"""Settings of tasks whose answers are generated, and a model for them."""

from __future__ import annotations

from typing import Any

from tiny_models import make_tiny_model


WRITTEN: dict[str, Any] = {"kind": "generate", "labels": None, "max_new_tokens": 4, "metric": "f1"}
# Several tokens: a mean over tokens is no sum.
ANSWER: dict[str, Any] = {"answer": "very {{ label }}"}


def byte_model() -> Any:
    """Make a model of the byte-level tokenizer that generates different answers to different prompts."""
    return make_tiny_model("llama", vocab_size=960, initializer_range=0.3, max_position_embeddings=128)
