"""Tiny random models of nine architectures, and factors in place of their linears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.layers import FactorizedLinear


if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY_SIZE = 64
_COMMON = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    # Far above a real model's, so that different inputs get clearly different outputs.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}

# Name: model class, configuration class, settings.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GATED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GATED, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GATED, "head_dim": 8, "sliding_window": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GATED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GATED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _COMMON),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_COMMON, "intermediate_size": 48}),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_COMMON, "intermediate_size": 48, "num_labels": 3}),
}


def make_tiny_model(architecture: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Make a random model of two layers and hidden size 32, in evaluation mode."""
    model_name, config_name, defaults = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**{**defaults, **settings})
    model: PreTrainedModel = getattr(transformers, model_name)(config)
    return model.eval()


def make_input_ids(*, seed: int = 0, rows: int = 2, length: int = 7) -> torch.Tensor:
    """Make token ids (rows, length) without special ones."""
    return torch.randint(3, VOCABULARY_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of `input_ids`."""
    output: torch.Tensor = model(make_input_ids() if input_ids is None else input_ids).logits
    return output


def block_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Name every dense linear of the transformer blocks, relative to the base model."""
    modules = dict(model.base_model.named_modules())
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and any(part.isdigit() for part in name.split("."))
        and not isinstance(modules[name.rpartition(".")[0]], FactorizedLinear)
    }


def factorize_in_place(
    model: PreTrainedModel,
    *,
    seed: int = 0,
    storage: Literal["factors", "pivoted"] | None = None,
    exact: bool = False,
) -> list[str]:
    """Replace block linears by `FactorizedLinear`, and return the names of the replaced ones.

    Args:
        model: Changed in place.
        seed: Of the factors and added biases.
        storage: One for all layers. `None` mixes factors, pivoted and dense layers, of rank 0, small and full.
        exact: Make factors of full rank from the weight's singular value decomposition, and add no bias.
    """
    generator = torch.Generator().manual_seed(seed)
    replaced = []
    for index, (name, linear) in enumerate(block_linears(model).items()):
        kind = storage or ("factors", "pivoted", "dense")[index % 3]
        if kind == "dense" and not exact:
            continue
        weight = linear.weight.detach() if isinstance(linear, nn.Linear) else linear.weight.detach().T
        full = min(weight.shape)
        rank = full if exact else (4, full, 0, 9)[index % 4]
        bias = linear.bias.detach() if linear.bias is not None else None
        if bias is None and index % 2 == 0 and not exact:
            bias = torch.randn(weight.shape[0], generator=generator)
        layer = pivoted_layer(weight, rank, bias) if kind == "pivoted" and rank else factors_layer(weight, rank, bias)
        model.base_model.set_submodule(name, layer.to(weight.dtype).train(linear.training))
        replaced.append(name)
    return replaced


def factors_layer(weight: torch.Tensor, rank: int, bias: torch.Tensor | None) -> FactorizedLinear:
    """Hold the best approximation of `weight` of rank `rank` as factors."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    left, right = (left * values)[:, :rank].float(), right[:rank].float()
    return FactorizedLinear.from_factors(left, right, bias)


def pivoted_layer(weight: torch.Tensor, rank: int, bias: torch.Tensor | None) -> FactorizedLinear:
    """Hold the best approximation of `weight` of rank `rank` by the rows that greedy pivoting finds in it."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    low_rank = (left * values)[:, :rank] @ right[:rank]
    rows: list[int] = []
    rest = low_rank.clone()
    for _ in range(rank):
        pivot = int(rest.norm(dim=1).argmax())
        rows.append(pivot)
        direction = rest[pivot] / rest[pivot].norm()
        rest -= torch.outer(rest @ direction, direction)
        rest[pivot] = 0
    others = [row for row in range(len(weight)) if row not in rows]
    coefficients = torch.linalg.lstsq(low_rank[rows].T, low_rank[others].T).solution.T
    row_order = torch.empty(len(weight), dtype=torch.int32)
    row_order[torch.tensor([*rows, *others])] = torch.arange(len(weight), dtype=torch.int32)
    return FactorizedLinear.from_pivots(low_rank[rows].float(), coefficients.float(), row_order, bias)


def make_pruned_model(architecture: str, *, seed: int = 0, storage: Any = None, **settings: Any) -> PreTrainedModel:
    """Make a tiny model of type `sieve`, with the mixed layers of `factorize_in_place`."""
    model = make_tiny_model(architecture, seed=seed, **settings)
    factorize_in_place(model, seed=seed, storage=storage)
    return sieve_model(model, base_model="org/base", settings={"pruning_ratio": 0.5}, results={"score": 0.75})


def auto_class(architecture: str) -> Any:
    """Return the Auto class that loads `architecture` with its head."""
    is_classifier = "SequenceClassification" in ARCHITECTURES[architecture][0]
    return AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM


def assert_same_tensors(first: PreTrainedModel, second: PreTrainedModel) -> None:
    """Assert that two models hold the same tensors, bit for bit."""
    expected, found = first.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name


def tensor_names(directory: Path) -> set[str]:
    """Name the tensors of the checkpoint in `directory`."""
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return names


def save(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    """Save `model`, and return where."""
    model.save_pretrained(directory, **options)
    return directory
