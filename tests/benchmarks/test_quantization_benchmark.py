"""`benchmarks/quantization.py` measures what it says it measures, on a tiny model and task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import tiny_models
import torch
from benchmark_module import load_benchmark
from tiny_models import logits, save
from toy import make_model, make_tokenizer, write_task
from transformers import AutoModelForCausalLM

from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.layers import FactorizedLinear


if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("quantization")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, the same with layers of rank 0, 4, 9 and full, and a task."""
    directory = tmp_path_factory.mktemp("benchmark")
    model = make_model(max_position_embeddings=128, hidden_size=64, intermediate_size=128)
    make_tokenizer().save_pretrained(save(model, directory / "dense"))
    tiny_models.factorize_in_place(model)
    pruned = save(sieve_model(model, base_model=None, settings={}, results={}), directory / "pruned")
    make_tokenizer().save_pretrained(pruned)
    write_task(directory)
    return directory


def run(benchmark: ModuleType, directory: Path, *words: str) -> list[dict[str, Any]]:
    """Run the benchmark's main function and return the rows that it writes."""
    options = {"pruned": directory / "pruned", "model": directory / "dense", "task": directory / "task.json"}
    options |= {"json": directory / "rows-out.jsonl", "examples": 20, "dtype": "float32"}
    benchmark.main([word for name, value in options.items() for word in (f"--{name}", str(value))] + list(words))
    return [json.loads(line) for line in options["json"].read_text().splitlines()]


def test_rows_hold_together(benchmark: ModuleType, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(benchmark, directory)
    plain, mixed = list(benchmark.PLAIN), [*benchmark.MIXED, benchmark.SMALLER]
    names = [("pruned", "none"), ("dense", "none")]
    names += [("dense", name) for name in plain] + [("pruned", name) for name in plain + mixed]
    assert [(row["model"], row["quantization"]) for row in rows] == names
    found = dict(zip(names, rows, strict=True))
    for (side, variant), row in found.items():
        before = found[side, "none"]
        assert (row["metric"], row["count"]) == ("accuracy", 20)
        assert row["to_before"] == pytest.approx(row["score"] - before["score"])
        assert row["to_pruned"] == pytest.approx(row["score"] - found["pruned", "none"]["score"])
        if variant == "none":
            assert (row["quantized"], row["kl"], row["agreement"]) == (0, 0, 1)
            assert row["num_bytes"] == row["packed_bytes"]
            assert row["num_bytes"] == (directory / side / "model.safetensors").stat().st_size
        else:
            assert 0 < row["quantized"] <= 1
            assert 0 < row["kl"] < 2
            assert row["kl_standard_error"] > 0
            assert row["packed_bytes"] <= row["num_bytes"] < before["num_bytes"]
            assert (row["packed_bytes"] < row["num_bytes"]) is ("int4" in variant)
    for variant in ("int8", "int4 rows", "bitsandbytes int8", "bitsandbytes nf4"):
        assert found["dense", variant]["quantized"] == pytest.approx(1)
    assert found["pruned", "int8"]["quantized"] == pytest.approx(1)
    assert found["pruned", "int8"]["kl"] < found["pruned", "int4 rows"]["kl"]
    # Rank 4 and 9 are no multiples of 32.
    assert found["pruned", "int4 groups"]["quantized"] < found["pruned", "int4 groups or rows"]["quantized"]
    bits = [found["pruned", name]["packed_bytes"] for name in ("int4 groups or rows", "first int4, last int8", "int8")]
    assert bits == sorted(bits)
    printed = capsys.readouterr().out
    assert "20 examples, float32 where not quantized" in printed
    assert printed.count("\n| ") == len(rows) + 2


def test_mixed_variants_hold_the_factors_as_their_names_say(benchmark: ModuleType, directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory / "pruned")
    for variant, expected in benchmark.MIXED.items():
        settings = benchmark.mixed_config(variant, model, 32).quant_type.fqn_to_config
        for name, layer in model.named_modules():
            if isinstance(layer, FactorizedLinear):
                found = [settings.get(f"{name}.{child}.weight") for child, _ in layer.named_children()]
                assert tuple(map(bits_of, found)) == expected
    settings = benchmark.mixed_config(benchmark.SMALLER, model, 32).quant_type.fqn_to_config
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear) and layer.rank:
            found = {child: bits_of(settings[f"{name}.{child}.weight"]) for child, _ in layer.named_children()}
            sizes = {child: linear.weight.numel() for child, linear in layer.named_children()}
            assert sorted(found.values()) == [4, 8]
            assert min(sizes.values()) == sizes[max(found, key=found.get)]


def bits_of(settings: Any) -> int | None:
    """Return the bits of a weight with these settings of torchao."""
    return None if settings is None else 4 if getattr(settings, "weight_dtype", None) == torch.int4 else 8


def test_chosen_variants_alone_are_measured(benchmark: ModuleType, directory: Path) -> None:
    rows = run(benchmark, directory, "--variants", "int8", "larger int4, smaller int8", "--group-size", "8")
    assert [row["quantization"] for row in rows] == ["none", "none", "int8", "int8", "larger int4, smaller int8"]


def test_the_models_are_left_as_they_were(benchmark: ModuleType, directory: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(directory / "pruned"))
    run(benchmark, directory, "--variants", "bitsandbytes nf4")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory / "pruned")), expected)


@pytest.mark.parametrize(("option", "low"), [("--examples", 2), ("--batch-size", 1), ("--group-size", 2)])
def test_too_few_are_refused(benchmark: ModuleType, option: str, low: int, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        benchmark.main([option, str(low - 1)])
    assert f"`{option}` must be at least {low}, got {low - 1}." in capsys.readouterr().err
