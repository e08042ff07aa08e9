"""Tensor parallel plans are rewritten for the factors, or refused; a parallel run never computes something else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import factors_layer, logits, make_input_ids, make_pruned_model, make_tiny_model, pivoted_layer, save
from torch import nn
from toy import make_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from two_processes import run_in_two_processes

from optimum_sieve.export.factors import save_factors
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern
from optimum_sieve.modeling.tensor_parallel import factor_plan


if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

config = DistributedConfig(tp_plan="auto", tp_size=2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=config)
split = ((name, value) for name, value in model.named_parameters() if hasattr(value, "to_local"))
shapes = {name: value.to_local().shape for name, value in split}
with torch.no_grad():
    logits = model(load_file("input.safetensors")["ids"]).logits
if torch.distributed.get_rank() == 0:
    Path("shapes.json").write_text(json.dumps(shapes))
    save_file({"logits": logits}, "output.safetensors")
"""


exact_names = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "_expand_parallel_plan"),
    reason="before 5.23 transformers splits layers by wildcard names alone",
)


class Blocks(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": layer, "norm": nn.LayerNorm(4)}) for layer in layers)


def layer(storage: Any) -> FactorizedLinear:
    return FactorizedLinear(4, 4, 2, storage=storage)


COLUMN = {"layers.*.proj.right": "replicate", "layers.*.proj.left": "colwise"}
ROW = {"layers.*.proj.right": "rowwise", "layers.*.proj.left": "replicate"}
PIVOTED_ROW = {"layers.*.proj.pivot": "rowwise", "layers.*.proj.rest": "replicate"}
NORM = {"layers.*.norm": "sequence_parallel"}


@pytest.mark.parametrize(
    ("layers", "style", "expected"),
    [
        ([layer("factors"), layer("factors")], "colwise", COLUMN | NORM),
        ([layer("factors"), layer("factors")], "rowwise", ROW | NORM),
        ([layer("factors"), nn.Linear(4, 4)], "colwise", COLUMN | {"layers.*.proj": "colwise"} | NORM),
        ([layer("pivoted"), layer("factors")], "rowwise", PIVOTED_ROW | ROW | NORM),
        ([layer("pivoted"), nn.Linear(4, 4)], "rowwise", PIVOTED_ROW | {"layers.*.proj": "rowwise"} | NORM),
        ([nn.Linear(4, 4)], "colwise", {"layers.*.proj": "colwise"} | NORM),
        ([layer("factors"), layer("pivoted")], "colwise", {}),
        ([layer("factors")], "mla_kv_a_proj", {}),
    ],
)
def test_rules(layers: list[nn.Module], style: str, expected: dict[str, str]) -> None:
    plan = {"layers.*.proj": style, **NORM}
    found = factor_plan(Blocks(*layers), plan)
    assert found == expected
    # vLLM takes the first rule that is a prefix of a name, so the factors' must come before the layer's.
    assert list(found) == list(expected)
    assert plan == {"layers.*.proj": style, **NORM}


@pytest.mark.parametrize("style", ["colwise_gather_output", "packed_colwise", "rowwise_split_input", "packed_rowwise"])
def test_variants_of_a_style_are_kept(style: str) -> None:
    found = factor_plan(Blocks(layer("factors")), {"layers.*.proj": style})
    assert found["layers.*.proj.left" if "colwise" in style else "layers.*.proj.right"] == style


def test_layers_without_a_rule_need_none() -> None:
    assert factor_plan(Blocks(layer("pivoted")), NORM) == NORM


def make_mixed_llama() -> PreTrainedModel:
    """Factor the first block: row-parallel layers pivoted, the others as factors but one; leave the second dense."""
    model = make_tiny_model("llama")
    for name, linear in tiny_models.block_linears(model).items():
        if "layers.0" in name and "k_proj" not in name:
            make_layer = pivoted_layer if name.endswith(("o_proj", "down_proj")) else factors_layer
            bias = torch.linspace(-1, 1, linear.weight.shape[0])
            model.base_model.set_submodule(name, make_layer(linear.weight.detach(), 8, bias))
    return sieve_model(model, base_model=None, settings={}, results={})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    make_mixed_llama().save_pretrained(directory)
    return directory


@exact_names
def test_factorized_layers_get_no_rule_of_their_own(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=2, tp_plan="auto"))
    assert plan["model.layers.0.self_attn.q_proj.left"] == "colwise"
    assert plan["model.layers.0.mlp.down_proj.pivot"] == "rowwise"
    assert plan["model.layers.1.self_attn.q_proj"] == "colwise"
    assert plan["model.layers.0.self_attn.k_proj"] == "colwise"
    assert not {name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)} & set(plan)


def logits_of_two_processes(directory: Path, scratch: Path) -> tuple[torch.Tensor, dict[str, list[int]]]:
    """Return the logits that two processes compute, and the shapes of what each of them holds a part of."""
    save_file({"ids": make_input_ids()}, scratch / "input.safetensors")
    run_in_two_processes(SCRIPT, scratch, directory)
    return load_file(scratch / "output.safetensors")["logits"], json.loads((scratch / "shapes.json").read_text())


@exact_names
def test_two_processes_compute_the_same_logits(directory: Path, tmp_path: Path) -> None:
    found, shapes = logits_of_two_processes(directory, tmp_path)
    expected = logits(AutoModelForCausalLM.from_pretrained(directory))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert shapes["model.layers.0.self_attn.q_proj.left.weight"] == [16, 8]
    assert shapes["model.layers.0.mlp.down_proj.pivot.weight"] == [8, 24]
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == [16, 32]


def test_two_processes_share_factors_of_any_rank(tmp_path: Path) -> None:
    pruned = make_pruned_model("llama", storage="factors")
    ranks = {entry["rank"] for entry in read_rank_pattern(pruned).values()}
    assert {0, 4, 9} < ranks
    found, shapes = logits_of_two_processes(save(pruned, tmp_path / "model"), tmp_path)
    torch.testing.assert_close(found, logits(pruned), rtol=0, atol=1e-5)
    names = {name.partition(".layers.0.")[2] for name in shapes}
    assert {"self_attn.q_proj.left.weight", "mlp.up_proj.left.weight", "mlp.down_proj.right.weight"} < names


def test_two_processes_share_what_was_pivoted(tmp_path: Path) -> None:
    pruned = make_pruned_model("llama", storage="pivoted")
    expected = logits(pruned)
    found, shapes = logits_of_two_processes(save_factors(pruned, make_tokenizer(), tmp_path / "factors"), tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert shapes["model.layers.0.self_attn.q_proj.left.weight"][0] == 16


@exact_names
def test_pivoted_columns_are_refused(tmp_path: Path) -> None:
    make_pruned_model("llama", storage="pivoted").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`tp_size=2` was requested, but `SieveLlamaForCausalLM` has no `tp_plan`"):
        model._resolve_parallel_plans(DistributedConfig(tp_size=2, tp_plan="auto"))
