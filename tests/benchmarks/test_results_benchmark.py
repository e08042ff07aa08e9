"""`benchmarks/results.py` measures what it says, once, and writes the page from its cache alone."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from healed_world import learn
from lora_models import OLD_NAMES
from results_world import SPLITS, load_benchmark, part
from sklearn.metrics import f1_score
from toy import load_task, make_model, make_tokenizer, parity_rows, task_spec, unhealed, write_rows

from optimum_sieve import SievePruner, compare, evaluate


if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: Any) -> Any:
    return learn(load_task(tmp_path_factory.mktemp("task"), parity_rows(600)))


@pytest.fixture
def world(benchmark: ModuleType, learned: Any, tmp_path: Path, monkeypatch: Any) -> Path:
    """A model that does the toy task, its rows, a job with a sibling and a preset of it in place of the real ones."""
    save(learned, tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", parity_rows(600))
    write_rows(tmp_path / "sibling.jsonl", parity_rows(60, seed=9, length=1))
    (tmp_path / "task.json").write_text(json.dumps(task_spec()))
    rows = part("suite").Rows(file=str(tmp_path / "task.json"), data={"files": "rows.jsonl"})
    sibling = dataclasses.replace(rows, data={"files": {"test": "sibling.jsonl"}})
    job = part("suite").Job(
        name="parity", title="Parity", rows=rows, siblings={"short rows": sibling}, also=("macro_f1",)
    )
    preset = part("methods").Preset(
        name="toy",
        limits={"parity": {**SPLITS, "sibling": 40}},
        cells={"parity": {"activation": (0.05,), "joint-energy": (0.02, 0.05)}},
        search_steps=4,
        ratio_steps=2,
        heal={"parity": {"steps": 8, "learning_rate": 0.03}},
        genetic={"parity": {"population_size": 4, "generations": 2, "rank_multiple": 2}},
        speed={"new_tokens": 2, "rounds": 2},
    )
    monkeypatch.setattr(benchmark, "JOBS", (job,))
    monkeypatch.setattr(benchmark, "PRESETS", {"toy": preset})
    return tmp_path


def save(model: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def run(benchmark: ModuleType, world: Path, *words: str) -> str:
    """Run the benchmark; return the page."""
    paths = (
        "--model",
        world / "model",
        "--data",
        world,
        "--cache",
        world / "cache",
        "--figures",
        world / "cache",
        "--output",
        world / "page.md",
    )
    benchmark.main(["--preset", "toy", *map(str, paths), *words])
    return (world / "page.md").read_text(encoding="utf-8")


def cells(world: Path) -> dict[tuple[str, float], dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (world / "cache").glob("cell-*.json")]
    return {(cell["method"], cell["tolerance"]): cell for cell in found}


def change_preset(benchmark: ModuleType, monkeypatch: Any, **changes: Any) -> None:
    preset = dataclasses.replace(benchmark.PRESETS["toy"], **changes)
    monkeypatch.setattr(benchmark, "PRESETS", {"toy": preset})


def change_job(benchmark: ModuleType, monkeypatch: Any, **changes: Any) -> None:
    monkeypatch.setattr(benchmark, "JOBS", (dataclasses.replace(benchmark.JOBS[0], **changes),))


def test_a_cell_holds_what_pruning_finds(benchmark: ModuleType, world: Path, learned: Any) -> None:
    page = run(benchmark, world)
    found = cells(world)
    assert set(found) == {("activation", 0.05), ("joint-energy", 0.02), ("joint-energy", 0.05)}
    cell = found["joint-energy", 0.05]
    job = benchmark.JOBS[0]
    places = part("suite").Places(data=world, cache=world)
    task, sibling = places.read(job.rows, SPLITS), places.read(job.siblings["short rows"], {"test": 40})
    pruner = SievePruner(copy.deepcopy(learned), make_tokenizer(), task)
    result = pruner.prune(unhealed(tolerance=0.05, search_steps=4), progress=False)
    parameters = result.report["parameters"]
    assert cell["kept"] == parameters["targets_after"] / parameters["targets_before"]
    assert (cell["test"], cell["dense"]) == (result.report["pruned"], result.report["dense"])
    assert cell["difference"] == result.report["paired_difference"]
    examples = sibling.examples("test", make_tokenizer())
    options = {"metric": "accuracy", "batch_size": 8, "progress": False}
    dense, pruned = (evaluate(model, examples, make_tokenizer(), **options) for model in (learned, result.model))
    own = cell["siblings"]["short rows"]
    assert (own["score"], own["difference"]["mean"]) == (pruned.score, pytest.approx(compare(dense, pruned).mean))
    predicted = result.scores[0].pruned
    macro = f1_score(predicted.targets, predicted.predictions, average="macro")
    assert cell["also"]["macro_f1"]["score"] == pytest.approx(macro)
    # A row of written answers alone.
    assert "\n| joint, energy |" in page
    assert "\n| joint, energy, answers alone |" not in page
    assert cell["seconds"]["whole"] > 0
    assert cell["peak_bytes"] > 50e6
    assert {"dense", "pruned"} == set(cell["tokens_per_second"])
    line = next(line for line in page.splitlines() if line.startswith("| joint, energy |"))
    number = part("table").number
    assert "not run" in line.split("|")[2]
    assert f"kept **{number(cell['kept'])}**: {number(cell['test']['score'])}" in line.split("|")[4]


def test_a_second_run_measures_nothing_and_the_page_needs_the_cache_alone(
    benchmark: ModuleType, world: Path, monkeypatch: Any, capsys: Any
) -> None:
    first = run(benchmark, world)
    pictures = {path.name: path.read_bytes() for path in world.glob("*.png")}
    assert set(pictures) == {"results-kept.png", "results-loss.png"}
    assert not list((world / "cache").glob("work-*"))
    monkeypatch.setattr(benchmark, "measure", None)
    assert run(benchmark, world) == first
    capsys.readouterr()
    run(benchmark, world, "--list")
    assert capsys.readouterr().out.count("done ") == 3
    for name in ("model", "rows.jsonl", "sibling.jsonl"):
        path = world / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (world / "page.md").unlink()
    assert run(benchmark, world, "--render") == first
    assert {path.name: path.read_bytes() for path in world.glob("*.png")} == pictures


def test_a_killed_run_goes_on(benchmark: ModuleType, world: Path, monkeypatch: Any) -> None:
    measure, measured = benchmark.measure, []

    def until_killed(cell: Any, *arguments: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(cell.name)
        return measure(cell, *arguments)

    monkeypatch.setattr(benchmark, "measure", until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(benchmark, world)
    assert len(cells(world)) == 2
    assert "not run" in run(benchmark, world, "--render")
    measured.clear()
    run(benchmark, world)
    assert len(measured) == 1
    assert len(cells(world)) == 3


def test_other_rows_or_settings_are_measured_anew(benchmark: ModuleType, world: Path, monkeypatch: Any) -> None:
    cut = {"parity": {"activation": (0.05,)}}
    change_preset(benchmark, monkeypatch, cells=cut)
    run(benchmark, world)
    measured: list[str] = []
    measure = benchmark.measure
    monkeypatch.setattr(benchmark, "measure", lambda cell, *rest: measured.append(cell.name) or measure(cell, *rest))
    write_rows(world / "rows.jsonl", parity_rows(600, seed=1))
    run(benchmark, world)
    change_preset(benchmark, monkeypatch, cells=cut, search_steps=3)
    run(benchmark, world)
    assert len(set(measured)) == len(measured) == 2
    save(make_model(seed=3, initializer_range=0.1), world / "model")
    assert "carries no result" in run(benchmark, world)


def test_every_method_runs(benchmark: ModuleType, world: Path, monkeypatch: Any) -> None:
    names = [method.name for method in part("methods").METHODS]
    change_preset(
        benchmark, monkeypatch, cells={"parity": dict.fromkeys(names, (0.05,))}, search_steps=2, ratio_steps=1
    )
    page = run(benchmark, world)
    assert set(cells(world)) == {(name, 0.05) for name in names}
    healed = cells(world)["joint-energy-healed", 0.05]
    assert healed["settings"]["heal"]["steps"] == 8
    assert healed["seconds"].get("healing", 0) > 0
    assert cells(world)["learned", 0.05].keys() & {"kept", "nothing"}
    searched = cells(world)["joint-genetic-healed", 0.05]
    assert searched["seconds"].get("healing", 0) > 0
    assert (
        next(line for line in page.splitlines() if line.startswith("| joint, genetic, healed |")).count("not run") == 2
    )


def test_nothing_within_the_tolerance_is_a_result(benchmark: ModuleType, world: Path, monkeypatch: Any) -> None:
    change_preset(benchmark, monkeypatch, cells={"parity": {"svd": (0.02,)}}, search_steps=1)
    page = run(benchmark, world)
    assert cells(world)["svd", 0.02]["nothing"].startswith("No size meets tolerance=0.02")
    assert next(line for line in page.splitlines() if line.startswith("| svd, uniform |")).count("| none; ") == 1


def test_where_nothing_is_within_the_tolerance_the_page_says_what_was_tried(benchmark: ModuleType) -> None:
    from results import table

    messages = (
        "`tolerance` must leave room: keeping 50.0% of the parameters already costs 0.0032 +- 0.0680. Accept",
        "`tolerance` ...: keeping 98.0% of the parameters costs -0.0066 +- 0.0114 on 262 fresh examples. Accept",
    )
    cells = {("svd", tolerance): {"nothing": text} for tolerance, text in zip((0.02, 0.05), messages, strict=True)}
    found = table.Results(job=benchmark.JOBS[0], dense={}, cells=cells)
    (method,) = (method for method in table.METHODS if method.name == "svd")
    assert table._cell(found, method, 0.02) == "none; .500 costs .003 ± .068"
    assert table._cell(found, method, 0.05) == "none; .980 costs -.007 ± .011"
    assert table._kept(found, method, 0.02) == "none"


def test_the_summary_names_no_winner_where_nothing_is_removed(benchmark: ModuleType, world: Path) -> None:
    table, setup = part("table"), part("methods")
    nothing = {(name, 0.02): {"nothing": "`tolerance` must leave room"} for name in ("svd", "activation")}
    found = table.Results(job=benchmark.JOBS[0], dense={}, cells=nothing)
    assert table._least(found, setup.METHODS) == ["within two points none of 2 removes anything."]
    nothing["joint-energy", 0.02] = {"kept": 0.5}
    assert "`joint, energy` keeps least, .500" in table._least(found, setup.METHODS)[0]


@OLD_NAMES
def test_a_model_that_cannot_do_the_task_is_tuned_once(benchmark: ModuleType, world: Path, monkeypatch: Any) -> None:
    save(make_model(initializer_range=0.05), world / "model")
    change_preset(benchmark, monkeypatch, cells={"parity": {}})
    assert "carries no result" in run(benchmark, world)
    tuning = part("suite").Tuning(rows=300, epochs=40, learning_rate=3e-3, batch_size=16)
    change_job(benchmark, monkeypatch, tuning=tuning)
    page = run(benchmark, world)
    assert "Tuned dense model: accuracy" in page
    assert "Tuned on 300 rows, 40 times each" in page
    (base,) = (
        found for path in (world / "cache").glob("base-*.json") if (found := json.loads(path.read_text()))["tuned"]
    )
    assert base["clear"]
    assert base["test"]["score"] > base["test"]["majority_score"] + 0.1
    assert base["tuned"]["last_loss"] < base["tuned"]["first_loss"]
    monkeypatch.setattr(part("tuning"), "tune", None)
    # Other numbers of rows to prune on take the same weights.
    change_preset(benchmark, monkeypatch, limits={"parity": {**SPLITS, "test": 100, "sibling": 30}})
    assert "on 100 test examples" in run(benchmark, world)


def test_tuning_sees_neither_selection_nor_test(benchmark: ModuleType, world: Path) -> None:
    places, rows = part("suite").Places(data=world, cache=world), benchmark.JOBS[0].rows
    training = {e.prompt for e in places.read(rows, {"calibration": 300}).examples("calibration", make_tokenizer())}
    task = places.read(rows, SPLITS)
    assert {e.prompt for e in task.examples("calibration", make_tokenizer())} <= training
    assert not training & {e.prompt for split in ("selection", "test") for e in task.examples(split, make_tokenizer())}


def test_missing_rows_are_named_before_any_work(benchmark: ModuleType, world: Path, monkeypatch: Any) -> None:
    (world / "sibling.jsonl").unlink()
    monkeypatch.setattr(benchmark, "run_job", None)
    with pytest.raises(
        SystemExit, match=r"`--data` must be a directory with the rows of 'parity', got .*sibling\.jsonl"
    ):
        run(benchmark, world)


def test_a_damaged_file_of_the_cache_is_named(benchmark: ModuleType, world: Path) -> None:
    cache = part("cells").Cache(world / "cache")
    cache.write("base", {"fingerprint": "a", "score": 0.5})
    assert cache.read("base", "a") == {"fingerprint": "a", "score": 0.5}
    assert cache.read("base", "b") is None
    (world / "cache" / "base.json").write_text("{")
    with pytest.raises(ValueError, match=r"base\.json` must hold figures as JSON, got .* Delete it and run again\."):
        cache.read("base")


@pytest.mark.parametrize("arguments", [["--tasks", "movie"], ["--methods", "magic"]])
def test_unknown_names_are_refused(benchmark: ModuleType, world: Path, arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run(benchmark, world, *arguments)
    assert "invalid choice" in capsys.readouterr().err


def test_a_task_that_the_preset_lacks_is_refused(benchmark: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--preset", "small", "--tasks", "squad"])
    assert "`--tasks` must be of the preset 'small', got squad. Use --preset full." in capsys.readouterr().err
