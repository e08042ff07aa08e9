"""`benchmarks/projections.py` and `benchmarks/search.py` compare what they name, on a tiny model and task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from benchmark_module import load_benchmark
from healed_world import save_learned
from toy import make_tokenizer


if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    save_learned(directory)
    return directory


def run(name: str, world: Path, output: Path, *words: Any) -> list[dict[str, Any]]:
    options = ["--model", world / "model", "--task", world / "task.json", "--json", output / "rows", *words]
    load_benchmark(name).main([*map(str, options)])
    return [json.loads(line) for line in (output / "rows").read_text().splitlines()]


def test_projections_share_their_bases_between_sizes(world: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--only", "activation", "--fractions", 0.9, 0.5, "--limit", 50, "--learned"]
    rows = run("projections", world, tmp_path, *words)
    cells = [(row["method"], row["allocation"], row["storage"], row["kept"]) for row in rows]
    assert cells[:-1] == [
        ("activation", allocation, storage, kept)
        for allocation in ("energy", "uniform") for storage in ("pivoted", "factors") for kept in (0.9, 0.5)
    ]  # fmt: skip
    assert cells[-1] == ("learned", "uniform", "factors", 0.6)
    dense = rows[0]["score"] - rows[0]["mean"]
    for row in rows:
        assert row["count"] == 50
        assert row["mean"] == pytest.approx(row["score"] - dense)
    assert all(rows[place]["seconds"] == rows[place + 1]["seconds"] for place in (0, 2, 4, 6))
    assert capsys.readouterr().out.count("\nactivation") == 8


def test_every_allocation_is_held_to_the_tolerance(world: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--allocations", "uniform", "energy", "paper", "fast", "--tolerance", 0.1, "--seeds", 0, 1]
    words += ["--search", 60, "--confirm", 60, "--test", 50, "--population-size", 4, "--generations", 2]
    rows = run("search", world, tmp_path, *words)
    assert [(row["seed"], row["allocation"]) for row in rows] == [
        (seed, name) for seed in (0, 1) for name in ("uniform", "energy", "paper", "fast")
    ]
    assert all(0 < row["kept"] <= 1 for row in rows)
    assert all(row["examples"] > 0 for row in rows if row["allocation"] == "paper" and "nothing" not in row)
    printed = capsys.readouterr().out
    assert printed.count("fast: as small after") == sum(
        all("nothing" not in row for row in rows if row["seed"] == seed and row["allocation"] in ("fast", "paper"))
        for seed in (0, 1)
    )
    assert "fast removes" in printed


def test_each_seed_splits_the_rows_anew(world: Path) -> None:
    module = load_benchmark("search")
    arguments = module.parse_arguments(["--search", "60", "--confirm", "60", "--test", "50"])
    tasks = [module.split_task(world / "task.json", arguments, seed) for seed in (0, 1)]
    assert all(task.splits["selection"] <= 120 and task.splits["test"] <= 50 for task in tasks)
    first, second = ({e.prompt for e in task.examples("test", make_tokenizer())} for task in tasks)
    assert first != second
