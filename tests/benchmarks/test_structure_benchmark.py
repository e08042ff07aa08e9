"""`benchmarks/structure.py` removes neurons and heads, fits the rest and compares with ranks, on a tiny model."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from benchmark_module import load_benchmark
from healed_world import save_learned
from toy import make_model


if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


def load_units() -> ModuleType:
    """Import `benchmarks/structure/units.py`."""
    load_benchmark("structure")
    return sys.modules["structure.units"]


def test_all_ways_have_the_size_asked_for_and_a_stopped_run_goes_on(tmp_path: Path, capsys: Any) -> None:
    save_learned(tmp_path)
    words = ["--model", tmp_path / "model", "--tasks", "--files", tmp_path / "task.json", "--rows", 100, 50, 100,
             "--kept", 0.3, 0.6, "--removed", 0, 0.2, 1, "--steps", 2, "--work-dir", tmp_path / "work",
             "--json", tmp_path / "found.jsonl"]  # fmt: skip
    benchmark = load_benchmark("structure")
    benchmark.main([*map(str, words)])
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    models = [row for row in rows if "removed" in row]
    assert [(row["kept"], row["removed"]) for row in models] == [(k, r) for k in (0.3, 0.6) for r in (0, 0.2, 1)]
    total = benchmark.count_parameters(make_model())
    assert all(0.8 * row["kept"] * total < row["parameters"] <= row["kept"] * total for row in models)
    assert [sum(row["neurons"]) for row in models[:3]] == sorted(sum(row["neurons"]) for row in models[:3])[::-1]
    assert models[0]["against"]["ranks at 0.3"]["mean"] == 0
    assert {"ranks at 0.3", "ranks at 0.6"} < models[-1]["against"].keys()
    ways = [f"kept {kept:g}, {removed:.0%} by structure" for kept in (0.3, 0.6) for removed in (0, 0.2, 1)]
    assert list(rows[-1]["decode"]) == list(rows[-1]["prefill"]) == ["dense", *ways]
    assert "heads [" in capsys.readouterr().out
    benchmark.main([*map(str, words)])
    again = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()][len(rows) :]
    assert [row.get("score") for row in again] == [row.get("score") for row in rows]


def test_the_last_projection_takes_over_what_a_removed_unit_repeats() -> None:
    units = load_units()
    model = make_model()
    network = model.model.layers[0].mlp
    with torch.no_grad():
        for layer in (network.gate_proj, network.up_proj):
            layer.weight[0] = layer.weight[1]
    x = torch.randn(200, network.gate_proj.in_features)
    with torch.no_grad():
        expected, inner = network(x), network.act_fn(network.gate_proj(x)) * network.up_proj(x)
    ends = units.count_units(model)
    losses = {end: torch.arange(1.0, count + 1) for end, count in ends.items()}
    end = "model.layers.0.mlp.down_proj"
    losses[end][0] = 0
    moments = {name: torch.eye(model.get_submodule(name).in_features) for name in ends} | {end: inner.T @ inner}
    before = units.count_parameters(model)
    units.remove_units(model, before - 3 * network.gate_proj.in_features, losses, moments)
    assert units.count_units(model)[end] == ends[end] - 1
    assert torch.allclose(network(x), expected, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("end", ["mlp.down_proj", "self_attn.o_proj"])
def test_a_block_may_lose_all_units_of_a_part(end: str) -> None:
    units = load_units()
    model = make_model()
    ids = torch.arange(6)[None] + 3
    with torch.no_grad():
        model.get_submodule(f"model.layers.0.{end}").weight.zero_()
        expected = model(ids).logits
        units.set_weights(model, f"model.layers.0.{end}", {})
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        # Generation goes on from the cache.
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        assert (model.generate(ids, **options) == model.generate(ids, use_cache=False, **options)).all()
    assert f"model.layers.0.{end}" not in units.count_units(model)
