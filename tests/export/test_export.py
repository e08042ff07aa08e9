"""A pruned model becomes a dense one of its base architecture, with the same outputs, that any transformers loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import architectures
import pytest
import tiny_models
import torch
import transformers
from clean_environment import make_clean_environment
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_models import assert_same_tensors, make_tiny_model, save, tensor_names
from toy import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_sieve.backbone.kinds import auto_class_name
from optimum_sieve.export.dense import export_dense, save_dense
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.experts import SeparateExperts, separate_experts
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.publish.origin.terms import Terms


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

RESULTS = {
    "task": "parity", "split": "test", "metric": "accuracy", "count": 40,
    "dense": {"score": 0.75, "standard_error": 0.0685}, "pruned": {"score": 0.7, "standard_error": 0.0725},
}  # fmt: skip
OTHERS = ("t5", "bart", "roberta", "modernbert", "falcon", "mixtral", "qwen3_moe", "llama-classifier")
SCRIPT = '''
"""Load every model below `sys.argv[1]` without optimum-sieve and without trust, and compare its logits."""

import importlib.util, json, sys
from pathlib import Path

import torch, transformers
from safetensors.torch import load_file

assert importlib.util.find_spec("optimum_sieve") is None
found = {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    loader = getattr(transformers, (directory / "auto_class.txt").read_text())
    model = loader.from_pretrained(directory).eval()
    inputs = load_file(directory / "expected.safetensors")
    expected = inputs.pop("logits")
    with torch.no_grad():
        error = float((model(**inputs).logits - expected).abs().max())
    tokens = transformers.AutoTokenizer.from_pretrained(directory)("Number: 7").input_ids
    found[directory.name] = [type(model).__module__.partition(".")[0], error, tokens]
print(json.dumps(found))
'''


def make_base(name: str, **settings: Any) -> PreTrainedModel:
    """Make a tiny model of one of the architectures of the other tests."""
    if name in tiny_models.ARCHITECTURES:
        return make_tiny_model(name, **settings)
    if name == "llama-classifier":
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**tiny_models._GATED, "num_labels": 3, **settings})
        return transformers.LlamaForSequenceClassification(config).eval()
    class_name, config_name, defaults = architectures.ARCHITECTURES[name]
    torch.manual_seed(0)
    made: PreTrainedModel = getattr(transformers, class_name)(
        getattr(transformers, config_name)(**{**defaults, **settings})
    )
    return made.eval()


def make_pruned(name: str, *, biases: bool = False, storage: Any = None, **settings: Any) -> PreTrainedModel:
    """Make a pruned model with layers of all kinds, experts too; without `biases` where the base has none."""
    model = make_base(name, **settings)
    separate_experts(model.base_model)
    has_bias = {layer: linear.bias is not None for layer, linear in tiny_models.block_linears(model).items()}
    for layer in tiny_models.factorize_in_place(model, storage=storage):
        module: Any = model.base_model.get_submodule(layer)
        if not (has_bias[layer] or biases):
            set_bias(module, 0.0)
    return sieve_model(model, base_model="org/base", settings={}, results=RESULTS)


def set_bias(layer: FactorizedLinear, value: float) -> None:
    for child in layer.children():
        if child.bias is not None:
            torch.nn.init.constant_(child.bias, value)


def logits(model: PreTrainedModel) -> torch.Tensor:
    return architectures.logits(model)


def added_biases(model: PreTrainedModel) -> list[str]:
    """Name the factorized layers with a bias, in the order of the model."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, FactorizedLinear))
    return [name for name, layer in layers if layer.bias is not None]


@pytest.mark.parametrize("name", [*tiny_models.ARCHITECTURES, *OTHERS])
def test_the_dense_model_gives_the_logits_of_the_pruned_one(name: str, tmp_path: Path) -> None:
    pruned, base = make_pruned(name), make_base(name)
    expected = logits(pruned)
    dense = export_dense(pruned)
    assert dense is pruned
    assert type(dense) is type(base)
    assert {type(c) for m in dense.modules() if (c := getattr(m, "config", None)) is not None} == {type(base.config)}
    assert not any(isinstance(module, FactorizedLinear | SeparateExperts) for module in dense.modules())
    torch.testing.assert_close(logits(dense), expected, rtol=1e-5, atol=1e-5)

    loaded = getattr(transformers, auto_class_name(dense.config)).from_pretrained(save(dense, tmp_path / "dense"))
    assert_same_tensors(loaded, dense)
    assert torch.equal(logits(loaded.eval()), logits(dense))
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (base.config.model_type, [type(base).__name__])
    assert not {"sieve", "auto_map"} & config.keys()
    assert not list((tmp_path / "dense").glob("*.py"))
    # On disk too, where the experts of some architectures have names of their own.
    assert tensor_names(tmp_path / "dense") == tensor_names(save(base, tmp_path / "base"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weights_are_what_the_layers_do_to_the_unit_vectors(architecture: str) -> None:
    pruned = make_pruned(architecture)
    layers = {n: m for n, m in pruned.named_modules() if isinstance(m, FactorizedLinear)}
    assert {(layer.storage, bool(layer.rank)) for layer in layers.values()} == {
        ("factors", True), ("factors", False), ("pivoted", True)
    }  # fmt: skip
    with torch.no_grad():
        constants = {name: layer(torch.zeros(layer.in_features)) for name, layer in layers.items()}
        columns = {n: layer(torch.eye(layer.in_features)) - constants[n] for n, layer in layers.items()}
    dense = export_dense(pruned)
    for name, constant in constants.items():
        linear: Any = dense.get_submodule(name)
        weight = linear.weight if architecture == "gpt2" else linear.weight.T
        torch.testing.assert_close(weight.detach(), columns[name], rtol=1e-4, atol=1e-5)
        bias = torch.zeros_like(constant) if linear.bias is None else linear.bias.detach()
        torch.testing.assert_close(bias, constant, rtol=1e-5, atol=1e-6)


def test_products_are_rounded_once_to_the_working_dtype() -> None:
    pruned = make_pruned("gpt2").to(torch.bfloat16)
    exact = export_dense(make_pruned("gpt2").to(torch.bfloat16).float())
    dense = export_dense(pruned)
    assert dense.dtype == torch.bfloat16
    assert_same_tensors(dense, exact.to(torch.bfloat16))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(architecture: str, tied: bool, tmp_path: Path) -> None:
    dense = export_dense(make_pruned(architecture, tie_word_embeddings=tied))
    assert ("lm_head.weight" in tensor_names(save(dense, tmp_path))) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    assert torch.equal(logits(loaded), logits(dense))


def test_biases_move_to_the_options_of_the_configuration(tmp_path: Path) -> None:
    pruned = make_pruned("llama", biases=True)
    expected = logits(pruned)
    assert {name.split(".")[3] for name in added_biases(pruned)} == {"self_attn", "mlp"}
    dense = export_dense(pruned)
    assert (dense.config.attention_bias, dense.config.mlp_bias) == (True, True)
    loaded = AutoModelForCausalLM.from_pretrained(save(dense, tmp_path))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_only_the_options_that_are_needed_are_set() -> None:
    pruned = make_pruned("llama", biases=True)
    first, *others = added_biases(pruned)
    for name in others:
        set_bias(pruned.get_submodule(name), 0.0)
    expected = logits(pruned)
    dense = export_dense(pruned)
    assert first == "model.layers.0.self_attn.q_proj"
    assert (dense.config.attention_bias, dense.config.mlp_bias) == (True, False)
    biases = {name: bool(b.any()) for name, b in dense.named_parameters() if name.endswith("bias")}
    assert biases == {
        f"model.layers.{layer}.self_attn.{kind}_proj.bias": (layer, kind) == (0, "q")
        for layer in range(2)
        for kind in "qkvo"
    }
    torch.testing.assert_close(logits(dense), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "count", "layer"),
    [("mistral", "5 of 10", "model.layers.0.mlp.down_proj"), ("qwen3", "3 of 10", "model.layers.0.mlp.down_proj")],
)
def test_biases_without_a_place_are_refused(architecture: str, count: str, layer: str, tmp_path: Path) -> None:
    pruned = make_pruned(architecture, biases=True)
    before, config = logits(pruned), pruned.config.to_dict()
    with pytest.raises(ValueError, match=rf"`model` must .*not zero in {count} factorized layers, such as '{layer}'"):
        save_dense(pruned, make_tokenizer(), tmp_path / "dense")
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(pruned), before)
    assert pruned.config.to_dict() == config
    assert type(pruned).__name__.startswith("Sieve")


def test_the_directory_is_whole(tmp_path: Path) -> None:
    pruned = make_pruned("llama", vocab_size=113)
    pruned.generation_config.max_new_tokens = 7
    expected = logits(pruned)
    terms = Terms({"license": "mit"}, {"LICENSE": "MIT"})
    output = save_dense(pruned, make_tokenizer(), tmp_path / "new", terms=terms, max_shard_size="10KB")
    assert (output / "LICENSE").read_text() == "MIT"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert len(list(output.glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert loaded.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(output)("Number: 7").input_ids == make_tokenizer()("Number: 7").input_ids
    card = ModelCard.load(output / "README.md")
    assert (card.data.base_model, card.data.license, card.data.pipeline_tag) == ("org/base", "mit", "text-generation")
    assert "an ordinary `LlamaForCausalLM`" in card.text
    assert "accuracy on 40 examples of the test split: dense 0.7500 (standard error 0.0685), pruned 0.7000" in card.text


def test_models_that_cannot_be_multiplied_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`model` must be a pruned model .*got 'llama'"):
        export_dense(make_tiny_model("llama"))
    directory = save(make_pruned("llama", storage="factors"), tmp_path / "pruned")
    offloaded = AutoModelForCausalLM.from_pretrained(
        directory, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match="`model` must be in memory, got weights that are offloaded"):
        export_dense(offloaded)


# PEFT starts adapters of layers of rank 0 too, which have nothing to learn, and asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_adapters_are_refused_until_they_are_merged() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_pruned("llama"), peft.LoraConfig(target_modules=["right"], r=2))
    torch.nn.init.ones_(adapted.base_model.model.model.layers[1].mlp.up_proj.right.lora_B["default"].weight)
    with pytest.raises(ValueError, match=r"`model` must .*plain factors, got Linear.* merge"):
        export_dense(adapted.base_model.model)
    merged = adapted.merge_and_unload()
    expected = logits(merged)
    torch.testing.assert_close(logits(export_dense(merged)), expected, rtol=1e-4, atol=1e-4)


def test_quantized_models_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = make_base("llama")
    linear: Any = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = tiny_models.factors_layer(linear.weight.detach(), 8, None)
    directory = save(sieve_model(model, base_model=None, settings={}, results={}), tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(
        ValueError, match=r"`model` must .*plain factors, got Linear8bitLt in 'model\.layers\.0\.mlp\.up_proj'"
    ):
        export_dense(AutoModelForCausalLM.from_pretrained(directory, quantization_config=config))


def test_it_loads_where_the_package_is_not_installed(tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "t5", "bert", "mixtral"):
        # As the command does, from files.
        directory = save(make_pruned(name), tmp_path / "pruned" / name)
        pruned = getattr(transformers, auto_class_name(AutoConfig.from_pretrained(directory))).from_pretrained(
            directory
        )
        expected = {**architectures.make_inputs(pruned), "logits": logits(pruned)}
        output = save_dense(pruned, make_tokenizer(), tmp_path / "models" / name)
        save_file(expected, output / "expected.safetensors")
        (output / "auto_class.txt").write_text(auto_class_name(pruned.config))
    result = subprocess.run(
        [make_clean_environment(tmp_path), "-c", SCRIPT, str(tmp_path / "models")],
        cwd=tmp_path,
        env={n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() == {"llama", "gpt2", "t5", "bert", "mixtral"}
    tokens = make_tokenizer()("Number: 7").input_ids
    for module, error, ids in found.values():
        assert (module, ids) == ("transformers", tokens)
        assert error < 1e-4


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run `optimum-cli sieve export` with these words; return its exit status."""
    from optimum.commands.optimum_cli import main

    monkeypatch.setattr(sys, "argv", ["optimum-cli", "sieve", "export", *map(str, words)])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model in bfloat16 with its tokenizer and a card."""
    directory = save(make_pruned("llama", vocab_size=113).bfloat16(), tmp_path_factory.mktemp("saved") / "pruned")
    make_tokenizer().save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return directory


def test_the_command_writes_a_dense_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "dense"
    assert run(monkeypatch, "--model", saved, "--output", output, "--dense", "--max-shard-size", "20KB") == 0
    assert f"saved in {output}" in capsys.readouterr().out
    assert len(list(output.glob("*.safetensors"))) > 1
    assert {tensor.dtype for file in output.glob("*.safetensors") for tensor in load_file(file).values()} == {
        torch.bfloat16
    }
    assert ModelCard.load(output / "README.md").data.license == "apache-2.0"
    expected = logits(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32))
    error = logits(AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)) - expected
    assert error.norm() < 0.02 * expected.norm()


def test_the_command_refuses_before_it_loads_weights(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    dense = save(make_tiny_model("llama"), tmp_path / "dense")
    for words, status, message in (
        (["--model", saved, "--output", tmp_path / "full", "--dense"], 1, "must be new or empty"),
        (["--model", dense, "--output", tmp_path / "new", "--dense"], 1, "must be a pruned model"),
        (["--model", saved, "--output", tmp_path / "new"], 2, "arguments --dense --factors --onnx --gguf is required"),
        (["--model", saved, "--output", tmp_path / "new", "--dense", "--max-difference", "1"], 2, "requires --onnx"),
        (["--model", saved, "--output", tmp_path / "new", "--onnx", "--max-shard-size", "1GB"], 2, "requires --dense"),
        (["--model", saved, "--output", tmp_path / "new", "--dense", "--outtype", "f16"], 2, "requires --gguf"),
        (
            ["--model", saved, "--output", tmp_path / "new", "--gguf", "--converter", tmp_path],
            1,
            "must be a checkout of",
        ),
    ):
        assert run(monkeypatch, *words) == status, words
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
