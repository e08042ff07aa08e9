"""State-space and hybrid models are pruned; layers that nothing calls, or that share weights, stay dense."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from tiny_models import make_input_ids
from torch import nn
from toy import VOCABULARY, load_task, make_model, make_tokenizer, parity_rows, unhealed
from transformers import AutoModelForCausalLM

from optimum_sieve import SievePruner
from optimum_sieve.backbone.targets import find_targets, left_out
from optimum_sieve.pipeline.usable import called_targets


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_TOKENS = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SMALL = {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
_GATED = {**_SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "head_dim": 8, "num_hidden_layers": 4},
}
_UNCALLED, _SHARED = "are not called for the examples", "share their weights with others"
# Model type: name of the classes, settings, and what stays dense for what reason.
HYBRIDS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "mamba": ("Mamba", {**_SMALL, "state_size": 8}, {_UNCALLED: "backbone.layers.*.mixer.dt_proj"}),
    "mamba2": (
        "Mamba2",
        {**_SMALL, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
        {},
    ),
    "jamba": (
        "Jamba",
        {**_GATED, **_EXPERTS, "mamba_d_state": 8, "mamba_dt_rank": 4, "num_hidden_layers": 4,
         "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        {_UNCALLED: "model.layers.*.mamba.dt_proj"},
    ),
    "zamba2": (
        "Zamba2",
        {**_GATED, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1,
         "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 16,
         "attention_head_dim": 16, "adapter_rank": 4},
        {_SHARED: "model.layers.*.shared_transformer.self_attn.q_proj"},
    ),
    "qwen3_next": ("Qwen3Next", {**_GATED, **_EXPERTS, **_DELTA}, {}),
}  # fmt: skip


def make_hybrid(name: str) -> Any:
    class_name, settings, _ = HYBRIDS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{class_name}Config")(**settings)
    return getattr(transformers, f"{class_name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_model_is_pruned_and_loads_again(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pruner = SievePruner(make_hybrid(name), make_tokenizer(after="</s>"), load_task(tmp_path, parity_rows(60)))
    with caplog.at_level(logging.WARNING, logger="optimum_sieve.pipeline.usable"):
        result = pruner.prune(unhealed(pruning_ratio=0.4, rank_multiple=4, batch_size=32, rounds=1), progress=False)
    notices = {message.partition(", as they ")[2] for message in caplog.messages if "stay dense" in message}
    assert len(notices) == len(HYBRIDS[name][2])
    for reason, pattern in HYBRIDS[name][2].items():
        assert any(notice.startswith(f"{reason}: ") and pattern in notice for notice in notices)
        assert not any(layer.endswith(pattern.rpartition("*.")[2]) for layer in result.rank_pattern)
    assert result.report["parameters"]["targets_after"] <= 0.6 * result.report["parameters"]["targets_before"]
    again = AutoModelForCausalLM.from_pretrained(pruner.save_pretrained(tmp_path / "out")).eval()
    ids = make_input_ids()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, result.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_infinite_limit_in_the_configuration_survives(tmp_path: Path) -> None:
    """JSON has no infinity: transformers has a form of its own for it."""
    model = make_hybrid("mamba2")
    assert model.config.time_step_limit[1] == math.inf
    pruner = SievePruner(model, make_tokenizer(after="</s>"), load_task(tmp_path, parity_rows(60)))
    pruner.prune(unhealed(pruning_ratio=0.4, rounds=1), work_dir=tmp_path / "work", progress=False)
    again = AutoModelForCausalLM.from_pretrained(pruner.save_pretrained(tmp_path / "out"))
    assert list(again.config.time_step_limit) == [0.0, math.inf]
    for path in (tmp_path / "out").glob("sieve*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


class Lending(nn.Module):
    """Uses the weight of a linear layer without calling it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.linear.weight.T


def test_a_plan_leaves_out_what_a_run_leaves_out(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    make_hybrid("mamba").save_pretrained(tmp_path / "model")
    make_tokenizer(after="</s>").save_pretrained(tmp_path / "model")
    load_task(tmp_path, parity_rows(60))
    words = ["--model", tmp_path / "model", "--task", tmp_path / "task.json", "--pruning-ratio", "0.4"]
    status, out, error = cli("prune", *words, "--dry-run")
    assert status == 0, error
    assert "matrices to prune      6 (" in out
    assert sum("dt_proj" in message for message in caplog.messages) == 1


def test_no_target_is_called(tmp_path: Path) -> None:
    model = make_model()
    for block in model.model.layers:
        block.mlp.up_proj = Lending(block.mlp.up_proj)
    task = load_task(tmp_path)
    targets = find_targets(model)
    called = called_targets(model, make_tokenizer(), [task], targets)
    missing = {target.name for target in targets} - {target.name for target in called}
    assert missing == {f"model.layers.{index}.mlp.up_proj.linear" for index in range(2)}
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(
        ValueError, match=r"`target_modules` must be layers that .*, got 2 that were never called .*\.0\."
    ):
        called_targets(model, make_tokenizer(), [task], find_targets(model, ["up_proj.linear"]))


def test_layers_that_share_weights_are_no_targets_by_default() -> None:
    model = make_model()
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(2)]
    assert left_out(model) == {_SHARED: names}
    assert not {target.name for target in find_targets(model)} & set(names)


def test_experts_without_a_token_count_as_called(tmp_path: Path) -> None:
    settings = {"vocab_size": len(VOCABULARY), "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.SwitchTransformersConfig(
        **settings, num_experts=8, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    targets = find_targets(model)
    assert called_targets(model, make_tokenizer(), [load_task(tmp_path)], targets) == targets
