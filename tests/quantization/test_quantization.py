"""Pruned models are quantized by bitsandbytes and torchao while they load, run, and come back from disk."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import torch
from clean_environment import make_clean_environment
from quantized_models import (
    LAYER_ERROR,
    MODEL_ERROR,
    MODELS,
    factors,
    fit,
    int4,
    int8_int4,
    is_quantized,
    load,
    relative_error,
    save_models,
)
from safetensors.torch import save_file
from tiny_models import logits, make_input_ids, make_pruned_model, save
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import (
    BitsAndBytesConfig,
    TorchAoConfig,
)


if TYPE_CHECKING:
    from pathlib import Path


def mixed() -> Any:
    # By parameter: transformers applies the settings of a module to its bias too.
    first, last = r"re:.*\.(right|pivot)\.weight", r"re:.*\.(left|rest)\.weight"
    return FqnToConfig({first: int4(PerGroup(8)), last: Int8WeightOnlyConfig()})


# Name: configuration, fewest bits of a weight, what the rows and columns of a quantized weight are multiples of.
METHODS: dict[str, tuple[Any, int, tuple[int, int]]] = {
    "torchao int8": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), 8, (1, 1)),
    "torchao int8 activations": (lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()), 8, (1, 1)),
    "torchao int4 rows": (lambda: TorchAoConfig(int4(PerAxis(0))), 4, (1, 1)),
    "torchao int4 groups of 8": (lambda: TorchAoConfig(int4(PerGroup(8))), 4, (1, 8)),
    "torchao int4 groups of 32": (lambda: TorchAoConfig(int4(PerGroup(32))), 4, (1, 32)),
    "torchao int8 activations int4": (lambda: TorchAoConfig(int8_int4(32)), 4, (1, 32)),
    "bitsandbytes int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), 8, (1, 1)),
    "bitsandbytes nf4": (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 4, (32, 64)),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("pruned"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_factors_are_quantized_while_loading_and_come_back_equal(
    name: str, method: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    make_config, bits, (rows, columns) = METHODS[method]
    pruned = load(directories[name])
    plain = dict(factors(pruned))
    fitting = {
        child
        for child, linear in plain.items()
        if linear.weight.numel() and linear.in_features % columns == 0 and linear.out_features % rows == 0
    }
    quantized = load(directories[name], fit(directories[name], make_config()))
    assert {child for child, linear in factors(quantized) if is_quantized(linear)} == fitting
    assert bool(fitting) is (name == "wide" or method != "bitsandbytes nf4")
    # Before it runs: bitsandbytes' kernel for the CPU repacks 4-bit weights, and does not save them right afterwards.
    save(quantized, tmp_path / "quantized")

    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for child in fitting:
            inputs = x[:, : plain[child].in_features]
            error = relative_error(quantized.get_submodule(child)(inputs), plain[child](inputs))
            assert error < LAYER_ERROR[bits], child
    found = logits(quantized)
    assert relative_error(found, logits(pruned)) < MODEL_ERROR[bits]
    assert "FactorizedLinear(" in repr(quantized)

    reloaded = load(tmp_path / "quantized")
    assert torch.equal(logits(reloaded), found)
    # The scores are of the weights before quantization.
    block = pruned.config.sieve
    assert reloaded.config.sieve == {**block, "results": {} if fitting else block["results"]}
    if fitting:
        sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "quantized", directories[name])]
        assert sizes[0] < sizes[1]


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_quantized_model_generates(storage: Any, tmp_path: Path) -> None:
    directory = save(make_pruned_model("llama", storage=storage), tmp_path)
    quantized = load(directory, fit(directory, BitsAndBytesConfig(load_in_8bit=True)))
    options = {"attention_mask": torch.ones(2, 7, dtype=torch.long), "max_new_tokens": 5, "min_new_tokens": 5}
    cached, again = (
        quantized.generate(make_input_ids(), **options, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert cached.shape == (2, 12)
    assert torch.equal(cached, again)


def test_two_precisions_in_one_model(directories: dict[str, Path], tmp_path: Path) -> None:
    pruned = load(directories["wide"])
    quantized = load(directories["wide"], fit(directories["wide"], TorchAoConfig(mixed())))
    kinds: dict[str, set[str]] = {}
    for name, linear in factors(quantized):
        if linear.weight.numel() and linear.in_features > 1:
            kinds.setdefault(name.rpartition(".")[2], set()).add(type(linear.weight).__name__)
    assert kinds["right"] == kinds["pivot"] == {"IntxUnpackedToInt8Tensor"}
    assert kinds["left"] == kinds["rest"] == {"Int8Tensor"}
    found = logits(quantized)
    assert relative_error(found, logits(pruned)) < MODEL_ERROR[4]
    assert torch.equal(logits(load(save(quantized, tmp_path))), found)


@pytest.mark.parametrize("method", ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"])
def test_some_factors_stay_in_full_precision(method: str, directories: dict[str, Path]) -> None:
    config = fit(directories["wide"], METHODS[method][0](), exclude_modules=("left", "*.rest"))
    quantized = load(directories["wide"], config)
    found = {name.rpartition(".")[2] for name, linear in factors(quantized) if is_quantized(linear)}
    assert found == {"right", "pivot"}
    with pytest.raises(ValueError, match=r"`exclude_modules` must match linear layers of the model, got 'middle'"):
        fit(directories["wide"], config, exclude_modules=("middle",))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("method", ["torchao int8", "torchao int4 groups of 32", "bitsandbytes int8"])
def test_without_it_layers_of_rank_0_cannot_be_loaded(method: str, directories: dict[str, Path]) -> None:
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        logits(load(directories["llama"], METHODS[method][0]()))


SCRIPT = '''
"""Load the quantized models `sys.argv[1:]` where optimum-sieve is not installed, and compare their logits."""

import importlib.util, json, sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

found = {"installed": importlib.util.find_spec("optimum_sieve") is not None}
for path in sys.argv[1:]:
    expected = load_file(path + "/expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    found[path] = bool((model(expected["input_ids"]).logits == expected["logits"]).all())
print(json.dumps(found))
'''


def test_quantized_models_load_by_trusted_code_alone(directories: dict[str, Path], tmp_path: Path) -> None:
    paths = []
    for method in ("torchao int8", "bitsandbytes int8"):
        quantized = load(directories["llama"], fit(directories["llama"], METHODS[method][0]()))
        paths.append(str(save(quantized, tmp_path / method.replace(" ", "-"))))
        expected = {"input_ids": make_input_ids(), "logits": logits(quantized)}
        save_file(expected, f"{paths[-1]}/expected.safetensors")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [make_clean_environment(tmp_path), "-c", SCRIPT, *paths],
        cwd=tmp_path,
        env={**clean, "HF_HOME": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"installed": False, **dict.fromkeys(paths, True)}
