"""Tests of the digest of a model's weights."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import save_file
from torch import nn
from toy import make_model

from optimum_sieve.backbone.loading import offload_map
from optimum_sieve.backbone.offloading import loaded
from optimum_sieve.modeling import fingerprint
from optimum_sieve.modeling.fingerprint import combine_digests, stored_tensors, tensor_digest, weights_digest


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def test_any_single_changed_value_changes_the_digest() -> None:
    model = make_model(num_hidden_layers=1, hidden_size=8, intermediate_size=6, num_attention_heads=2)
    before, seen = weights_digest(model), set()
    for _, tensor in stored_tensors(model):
        flat = tensor.reshape(-1)
        for index in range(min(len(flat), 40)):
            value = flat[index].clone()
            # The smallest possible change.
            flat[index] = torch.nextafter(value, value + 1)
            seen.add(weights_digest(model))
            flat[index] = value
    assert before not in seen
    assert len(seen) > 200
    assert weights_digest(model) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_are_hashed_by_their_bytes(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).remainder(2).to(dtype)
    changed = tensor.clone()
    changed.view(torch.uint8)[-1, -1] ^= 1
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    assert tensor_digest(tensor) != tensor_digest(changed)
    assert tensor_digest(tensor) != tensor_digest(tensor.reshape(4, 3))
    assert tensor_digest(tensor[0, 0]) != tensor_digest(tensor[0, :1])
    assert tensor_digest(tensor[:0]) == tensor_digest(torch.empty(0, 4, dtype=dtype))


def test_the_sign_of_zero_and_the_dtype_count() -> None:
    zeros = torch.zeros(2)
    assert len({tensor_digest(zeros), tensor_digest(-zeros), tensor_digest(zeros.view(torch.int32))}) == 3


def test_the_memory_layout_does_not_count() -> None:
    tensor = torch.randn(5, 7)
    spread = torch.empty(5, 14)[:, ::2].copy_(tensor)
    assert tensor_digest(tensor) == tensor_digest(tensor.T.contiguous().T) == tensor_digest(spread)


def test_a_large_tensor_is_hashed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(5, 7).bfloat16()
    before = tensor_digest(tensor)
    monkeypatch.setattr(fingerprint, "_CHUNK", 4)
    assert tensor_digest(tensor) == before


class Buffers(nn.Module):
    """A module with a tied weight and every kind of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("order", torch.arange(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("absent", None)


def test_buffers_count_if_they_are_saved_and_a_tied_tensor_counts_once() -> None:
    model = Buffers()
    assert [name for name, _ in stored_tensors(model)] == ["order", "first.weight"]
    before = weights_digest(model)
    model.get_buffer("cache").add_(1)
    assert weights_digest(model) == before
    model.get_buffer("order").add_(1)
    assert weights_digest(model) != before


def test_names_count_and_their_order_does_not() -> None:
    assert combine_digests({"a": "1", "b": "2"}) == combine_digests({"b": "2", "a": "1"})
    assert combine_digests({"a": "1", "b": "2"}) != combine_digests({"a": "2", "b": "1"})


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_model_has_the_digest_of_the_model_in_memory(tied: bool, tmp_path: object) -> None:
    model = make_model(tie_word_embeddings=tied).bfloat16()
    before = weights_digest(model)
    dispatch_model(model, offload_map(model.config, torch.device("cpu")), offload_dir=tmp_path, force_hooks=True)
    assert weights_digest(model, load=loaded) == before
    with pytest.raises(ValueError, match=r"`model` must hold the values of its weights, got 'model\.layers\.0"):
        weights_digest(model)


def test_a_saved_file_gives_the_digest_of_the_model(tmp_path: object) -> None:
    from safetensors import safe_open

    model = make_model()
    save_file(dict(stored_tensors(model)), f"{tmp_path}/model.safetensors")
    with safe_open(f"{tmp_path}/model.safetensors", "pt") as file:
        digests = {name: tensor_digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    assert combine_digests(digests) == weights_digest(model)
