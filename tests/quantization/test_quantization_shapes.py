"""`compatible` leaves out what a method of quantization cannot take, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from quantized_models import (
    MODEL_ERROR,
    WIDE,
    factors,
    fit,
    int4,
    int8_int4,
    is_quantized,
    load,
    relative_error,
    save_models,
)
from tiny_models import factors_layer, logits, make_pruned_model, make_tiny_model, save
from torchao.quantization import (
    FqnToConfig,
    Int8WeightOnlyConfig,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from toy import VOCABULARY, load_task, make_model, make_tokenizer, unhealed
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    TorchAoConfig,
)

from optimum_sieve import SievePruner
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.quantization import compatible


if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("pruned"))


def skipped(quantization_config: Any) -> list[str]:
    """Name the modules that `quantization_config` leaves out."""
    if isinstance(quantization_config, BitsAndBytesConfig):
        return quantization_config.llm_int8_skip_modules
    return quantization_config.modules_to_not_convert


@pytest.fixture(scope="module")
def odd_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with layers of rank 0, 1, 24 and 32."""
    model = make_tiny_model("llama", **WIDE)
    for name, rank in (("k_proj", 0), ("q_proj", 1), ("v_proj", 24), ("o_proj", 32)):
        linear = model.model.layers[0].self_attn.get_submodule(name)
        model.model.layers[0].self_attn.set_submodule(name, factors_layer(linear.weight.detach(), rank, None))
    pruned = sieve_model(model, base_model=None, settings={}, results={})
    return save(pruned, tmp_path_factory.mktemp("odd_ranks"))


EMPTY = "k.right k.left q.left"
BY_PARAMETER = {"model.layers.0.self_attn.v_proj.left.weight": int4(PerGroup(16)), "re:.*left": int4(PerGroup(8))}
BY_PATTERN = {"re:.*v_proj.left": None, "re:.*left": int4(PerGroup(64))}


def attention_names(short: str) -> set[str]:
    """Spell `"q.left"` out."""
    return {"model.layers.0.self_attn." + word.replace(".", "_proj.") for word in short.split()}


@pytest.mark.parametrize(
    ("quantization_config", "expected"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), EMPTY),
        (BitsAndBytesConfig(load_in_4bit=True), f"{EMPTY} q.right v.left v.right o.left"),
        (TorchAoConfig(Int8WeightOnlyConfig()), EMPTY),
        (TorchAoConfig(int4(PerAxis(0))), EMPTY),
        (TorchAoConfig(int4(PerGroup(8))), EMPTY),
        (TorchAoConfig(int4(PerGroup(32))), f"{EMPTY} v.left"),
        (TorchAoConfig(int8_int4(32)), f"{EMPTY} v.left"),
        (TorchAoConfig(FqnToConfig(BY_PARAMETER)), f"{EMPTY} v.left"),
        (TorchAoConfig(FqnToConfig(BY_PATTERN)), f"{EMPTY} o.left"),
    ],
)
def test_the_shapes_say_what_is_left_out(odd_ranks: Path, quantization_config: Any, expected: str) -> None:
    names = skipped(fit(odd_ranks, quantization_config))
    assert names[0] == "lm_head"
    assert set(names[1:]) == attention_names(expected)
    assert skipped(quantization_config) is None
    assert logits(load(odd_ranks, fit(odd_ranks, quantization_config))).isfinite().all()


def test_only_the_cpu_restricts_the_shapes_of_4_bits(odd_ranks: Path) -> None:
    config = AutoConfig.from_pretrained(odd_ranks)
    names = compatible(config, BitsAndBytesConfig(load_in_4bit=True), device="cuda").llm_int8_skip_modules
    assert set(names[1:]) == attention_names(EMPTY)


def test_modules_that_were_left_out_stay_so(odd_ranks: Path) -> None:
    own = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["model.layers.1", "lm_head"])
    names = fit(odd_ranks, own).modules_to_not_convert
    assert names[:2] == ["model.layers.1", "lm_head"]
    assert set(names[2:]) == attention_names(EMPTY)
    assert own.modules_to_not_convert == ["model.layers.1", "lm_head"]


def test_tied_embeddings_are_left_out(tmp_path: Path) -> None:
    directory = save(make_pruned_model("llama", tie_word_embeddings=True), tmp_path)
    config = fit(directory, BitsAndBytesConfig(load_in_8bit=True))
    assert {"lm_head", "model.embed_tokens"} < set(config.llm_int8_skip_modules)
    assert not is_quantized(load(directory, config).lm_head)


def test_a_classifier_is_fitted_by_its_own_names(tmp_path: Path) -> None:
    directory = save(make_pruned_model("bert"), tmp_path)
    config = fit(directory, BitsAndBytesConfig(load_in_8bit=True))
    pruned = make_pruned_model("bert")
    empty = {name for name, linear in factors(pruned) if not linear.weight.numel()}
    assert empty
    assert empty < set(config.llm_int8_skip_modules)
    quantized = AutoModelForSequenceClassification.from_pretrained(directory, quantization_config=config).eval()
    assert {name for name, linear in factors(quantized) if not is_quantized(linear)} == empty
    assert relative_error(logits(quantized), logits(pruned)) < MODEL_ERROR[8]


def test_ranks_that_are_multiples_of_a_group_all_fit(tmp_path: Path) -> None:
    model = make_model(**WIDE, max_position_embeddings=128)
    pruner = SievePruner(model, make_tokenizer(), load_task(tmp_path))
    pruner.prune(unhealed(pruning_ratio=0.6, rank_multiple=32, batch_size=32, rounds=1), progress=False)
    directory = pruner.save_pretrained(tmp_path / "pruned")
    config = AutoConfig.from_pretrained(directory)
    ranks = {entry["rank"] for entry in config.sieve["rank_pattern"].values()}
    assert 32 in ranks
    assert ranks <= {0, 32, 64}
    quantized = load(directory, fit(directory, TorchAoConfig(int4(PerGroup(32)))))
    for name, linear in factors(quantized):
        assert is_quantized(linear) is bool(linear.weight.numel()), name
    assert logits(quantized, torch.tensor([[3, 4, 5]])).shape == (1, 3, len(VOCABULARY))


def test_quantized_models_and_other_methods_are_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    eight = BitsAndBytesConfig(load_in_8bit=True)
    directory = save(load(directories["llama"], fit(directories["llama"], eight)), tmp_path)
    with pytest.raises(ValueError, match="`config` must be of a model that is not quantized, got one that is"):
        fit(directory, eight)
    with pytest.raises(
        ValueError, match=r"`quantization_config` must be a BitsAndBytesConfig, .* of llm-compressor, got LlamaConfig"
    ):
        fit(directories["llama"], LlamaConfig())


@dataclass
class QuantizationModifier:
    """What `compatible` reads of a modifier of llm-compressor, which no environment of these tests has."""

    group_size: int | None
    block_structure: list[int] | None = None
    ignore: list[str] = field(default_factory=list)

    def resolve_quantization_config(self) -> Any:
        scheme = SimpleNamespace(weights=self)
        return SimpleNamespace(config_groups={"group_0": scheme, "group_1": SimpleNamespace(weights=None)})

    def model_dump(self, *, exclude_unset: bool) -> dict[str, Any]:
        assert exclude_unset
        return vars(self).copy()


@pytest.mark.parametrize(
    ("size", "block", "expected"),
    [
        (None, None, EMPTY),
        (-1, None, EMPTY),
        (32, None, f"{EMPTY} v.left"),
        (None, [16, 16], f"{EMPTY} v.left v.right q.right"),
    ],
)
def test_a_modifier_of_llm_compressor(
    odd_ranks: Path, size: int | None, block: list[int] | None, expected: str
) -> None:
    given = QuantizationModifier(size, block)
    fitted = fit(odd_ranks, given)
    assert fitted.ignore[0] == "lm_head"
    assert set(fitted.ignore[1:]) == attention_names(expected)
    assert (given.ignore, fitted.group_size) == ([], size)
    assert fit(odd_ranks, QuantizationModifier(None, ignore=["embed"])).ignore[0] == "embed"
