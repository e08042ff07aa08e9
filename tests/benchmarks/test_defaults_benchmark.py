"""`benchmarks/defaults.py` measures what it says, on a tiny model and task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from benchmark_module import load_benchmark
from healed_world import learn
from toy import load_task, make_tokenizer, parity_rows, prompts, write_rows


if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    task = load_task(tmp_path, parity_rows(600))
    learn(task).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_rows_of_two_seeds(model: Path, tmp_path: Path, capsys: Any) -> None:
    benchmark = load_benchmark("defaults")
    words = ["--model", model, "--tasks", "--files", tmp_path / "task.json", "--rows", 200, 100, 150,
             "--tolerance", 0.3, "--seeds", 0, 1, "--json", tmp_path / "rows-out.jsonl"]  # fmt: skip
    benchmark.main([*map(str, words)])
    rows = [json.loads(line) for line in (tmp_path / "rows-out.jsonl").read_text().splitlines()]
    assert [(row["task"], row["seed"]) for row in rows] == [("task", 0), ("task", 1)]
    for row in rows:
        assert 0 < row["kept"] < row["kept_without"] or row["kept"] == pytest.approx(row["kept_without"])
        assert row["paired_difference"]["mean"] == pytest.approx(row["pruned"]["score"] - row["dense"]["score"])
        assert row["settings"]["heal"]["steps"] > 0
    # Other rows are drawn: the dense model's score shows it.
    assert rows[0]["settings"]["seed"] != rows[1]["settings"]["seed"]
    assert "task, 2 seeds: kept" in capsys.readouterr().out


def test_settings_of_the_command_line_reach_the_run(model: Path, tmp_path: Path) -> None:
    benchmark = load_benchmark("defaults")
    words = ["--model", model, "--tasks", "--files", tmp_path / "task.json", "--rows", 200, 100, 150,
             "--pruning-ratio", 0.4, "--no-heal", "--tune", "--set", "fisher_temperature=2", "storage=factors",
             "--json", tmp_path / "rows-out.jsonl"]  # fmt: skip
    benchmark.main([*map(str, words)])
    row = json.loads((tmp_path / "rows-out.jsonl").read_text())
    assert row["settings"]["heal"] is None
    assert row["kept"] <= 1 - row["settings"]["pruning_ratio"] == 0.6
    assert (row["settings"]["fisher_temperature"], row["settings"]["storage"]) == (2, "factors")
    assert {"dense", "tuned", "pruned", "difference_to_tuned"} <= row.keys()


def test_fractions_divide_all_rows_of_a_data_set_anew(tmp_path: Path) -> None:
    benchmark = load_benchmark("defaults")
    rows = [
        {"question": f"Is {number} a number?", "context": f"{number} is one.", "answer": "yes"} for number in range(60)
    ]
    folder = tmp_path / "data" / "pubmedqa"
    folder.mkdir(parents=True)
    for index, split in enumerate(("train", "validation", "test")):
        write_rows(folder / f"{split}.jsonl", rows[index * 20 : index * 20 + 20])
    words = ["--tasks", "pubmedqa", "--data", tmp_path / "data", "--cache", tmp_path / "cache", "--rows", 12, 24, 12]
    parser = benchmark.make_parser(benchmark.__doc__)
    benchmark.add_task_options(parser, tasks=[], rows=[1, 1, 1])
    arguments = parser.parse_args([*map(str, words), "--fractions", ".2", ".5", ".3"])
    task = benchmark.read_tasks(arguments, 0)["pubmedqa"]
    splits = [set(prompts(task, split)) for split in ("calibration", "selection", "test")]
    assert [len(split) for split in splits] == [12, 24, 12]
    assert len(set.union(*splits)) == 48
