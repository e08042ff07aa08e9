"""`benchmarks/structure.py` removes what it says, predicts what it costs, and leaves the model as it was."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

import pytest
import torch
from benchmark_module import load_benchmark
from healed_world import learn
from toy import load_task, make_tokenizer, parity_rows


if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("structure")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("structure")
    model = learn(load_task(folder, parity_rows(300)))
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return folder


def words(folder: Path, **options: object) -> argparse.Namespace:
    given = {"model": folder / "model", "task": folder / "task.json", "limit": 60, "work_dir": None, "json": None}
    return argparse.Namespace(**given, kept=[0.45], removed=[0.0, 0.2, 1.0], **options)


def test_units_are_removed_up_to_the_share_and_given_back(benchmark: ModuleType, folder: Path) -> None:
    bench = benchmark.Bench(words(folder))
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    with bench.without(0.3) as shapes:
        left = sum(rows * columns for rows, columns in shapes.values())
        zeros = sum(int((bench.model.get_submodule(name).weight == 0).sum()) for name in shapes)
    assert 0.6 * bench.total < left < bench.total
    # Every parameter that is counted as gone is a zero of the weight.
    assert zeros >= bench.total - left
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.model.state_dict().items())
    # A group of two query heads has its keys and values with it.
    largest = max(bench.units, key=lambda unit: unit.parameters)
    assert {name.rpartition(".")[2] for name in largest.slices} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_units_without_effect_are_predicted_to_cost_nothing(benchmark: ModuleType, folder: Path) -> None:
    bench = benchmark.Bench(words(folder))
    dead = bench.model.model.layers[0].mlp
    dead.down_proj.weight.data[:, 3] = 0.0
    units = bench.units_of("model.layers.0.mlp.down_proj", [0.0] * dead.down_proj.in_features)
    measured = {tuple(sorted(unit.slices.items())): unit.loss for unit in bench.measure_units()}
    assert measured[tuple(sorted(units[3].slices.items()))] == 0.0
    assert min(measured[tuple(sorted(unit.slices.items()))] for unit in units[:3]) > 0.0


def test_rows_are_written(benchmark: ModuleType, folder: Path, tmp_path: Path) -> None:
    arguments = words(folder)
    arguments.json = tmp_path / "rows.jsonl"
    bench = benchmark.Bench(arguments)
    for share in arguments.removed:
        bench.run(share)
    rows = [json.loads(line) for line in arguments.json.read_text().splitlines()]
    assert [(row["kept"], row["structure"]) for row in rows] == [(0.45, 0.0), (0.45, 0.2), (0.45, 1.0)]
    assert all(row["count"] == 60 and row["kl"] >= 0 for row in rows)
