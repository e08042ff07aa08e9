"""Models saved before the package was moved into folders load after it, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


# Made with commit 8e7e64a, by `save_pretrained` of tiny random models with factors, pivots and biases.
SAVED = Path(__file__).parent / "saved"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_model_saved_before_loads_bit_for_bit(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(SAVED / name)
    weights, expected = load_file(SAVED / name / "model.safetensors"), load_file(SAVED / name / "expected.safetensors")
    found = model.state_dict()
    assert weights.keys() <= found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in weights.items())
    with torch.no_grad():
        assert torch.equal(model(expected["input_ids"]).logits, expected["logits"])
