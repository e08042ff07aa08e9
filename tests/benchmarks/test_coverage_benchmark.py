"""`benchmarks/coverage.py` counts what it says, on evaluations with known losses."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from benchmark_module import load_benchmark
from toy import load_task, make_model, make_tokenizer, parity_rows

from optimum_sieve import Evaluation, SieveConfig, SievePruner


if TYPE_CHECKING:
    from pathlib import Path


def save(path: Path, wrong: range, *, count: int = 1000, fingerprint: str = "same", **changes: Any) -> str:
    """Save the evaluation of a model that is wrong on the examples in `wrong`."""
    values = np.ones(count)
    values[list(wrong)] = 0.0
    empty = np.zeros(0, dtype=np.int64)
    settings: dict[str, Any] = {"metric": "accuracy", "score": values.mean(), "fingerprint": fingerprint, **changes}
    Evaluation(
        standard_error=0.0, majority_score=0.5, predictions=empty, targets=empty, values=values,
        log_probs=np.zeros((0, 0)), **settings,
    ).save(path)  # fmt: skip
    return str(path)


def rows_of(tmp_path: Path, *words: object) -> list[dict[str, Any]]:
    """Run the benchmark and return its rows."""
    out = tmp_path / "rows-out.jsonl"
    load_benchmark("coverage").main([*map(str, words), "--json", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    out.unlink()
    return rows


def test_losses_and_sizes_are_those_of_the_population(tmp_path: Path, capsys: Any) -> None:
    dense = save(tmp_path / "dense.safetensors", range(100))
    # Nothing lost; ten points lost twice; better again, which a descent never reaches.
    sizes = [save(tmp_path / f"{name}.safetensors", wrong) for name, wrong in
             (("a", range(100)), ("b", range(200)), ("b2", range(200)), ("c", range(50)))]  # fmt: skip
    words = [dense, *(f"{kept}={file}" for kept, file in zip((0.5, 0.3, 0.2, 0.1), sizes, strict=True))]
    rows = rows_of(tmp_path, *words, "--rows", 400, "--resamples", 50, "--tolerances", 0.02, 0.5)
    assert capsys.readouterr().out.startswith("1000 examples, 4 sizes that lose +0.000, +0.100, +0.100, -0.050")
    found = {(row["bound"], row["tolerance"]): row for row in rows}
    assert len(found) == len(rows) == 4
    for bound in ("normal", "package"):
        assert found[bound, 0.02]["beyond"] == 0
        assert (found[bound, 0.02]["kept"], found[bound, 0.02]["kept_deviation"]) == (0.5, 0)
        assert found[bound, 0.5]["kept"] == pytest.approx(0.1)
    # If three failures end it, it goes on.
    assert rows_of(tmp_path, *words, "--rows", 400, "--resamples", 9, "--tolerances", 0.02, "--failures", 3)[0][
        "kept"
    ] == pytest.approx(0.1)
    # At 100 rows two points cannot be shown even of a model that is never wrong.
    (normal, package) = rows_of(tmp_path, *words, "--rows", 100, "--resamples", 50, "--tolerances", 0.02)
    assert (normal["kept"], package["kept"]) == (0.5, 1.0)


def test_a_bisection_skips_sizes_and_goes_back_to_larger_ones(tmp_path: Path) -> None:
    dense = save(tmp_path / "dense.safetensors", range(100))
    # Two sizes in the middle fail, which stops a descent, and a bisection never tries them.
    wrong = {0.75: 100, 0.5: 100, 0.45: 400, 0.4: 400, 0.25: 100, 0.1: 500}
    words = [dense, *(f"{kept}={save(tmp_path / str(kept), range(count))}" for kept, count in wrong.items())]
    words += ["--rows", 400, "--resamples", 20, "--tolerances", 0.02]
    assert {row["kept"] for row in rows_of(tmp_path, *words)} == {0.5}
    # A single failure is passed.
    assert {row["kept"] for row in rows_of(tmp_path, *(word for word in words if "0.45=" not in str(word)))} == {0.25}
    # .5, .25, and then .125, .1875, .21875, .234375, all of which the size of .25 stands for.
    assert {row["kept"] for row in rows_of(tmp_path, *words, "--bisect")} == {0.25}
    with pytest.raises(ValueError, match="`sizes` must be KEPT=FILE with `--bisect`"):
        rows_of(tmp_path, dense, tmp_path / "0.5", "--bisect", "--rows", 400)


def test_a_loss_at_the_edge_is_accepted_as_often_as_allowed_with_the_correction_alone(tmp_path: Path) -> None:
    dense, lossy = save(tmp_path / "dense.safetensors", range(0)), save(tmp_path / "lossy.safetensors", range(11))
    normal, package = rows_of(tmp_path, dense, f"0.5={lossy}", "--rows", 100, "--resamples", 1000, "--tolerances", 0.01)
    # Without a wrong example among the 100, which has a probability of .989 ** 100, the normal bound is 0.
    assert normal["beyond"] == pytest.approx(0.989**100, abs=0.05)
    assert normal["edge"] >= normal["beyond"]
    assert package["beyond"] == 0
    assert package["edge"] <= 0.1


def test_other_examples_are_left_out(tmp_path: Path) -> None:
    dense = save(tmp_path / "dense.safetensors", range(5))
    other = save(tmp_path / "other.safetensors", range(900), fingerprint="other")
    same = save(tmp_path / "same.safetensors", range(5))
    rows = rows_of(tmp_path, dense, other, same, "--rows", 300, "--resamples", 10, "--tolerances", 0.02)
    assert [row["kept"] for row in rows] == [1, 1]
    with pytest.raises(ValueError, match=r"`sizes` must be evaluations on the examples of .*, got none of 1\."):
        rows_of(tmp_path, dense, other)
    skewed = save(tmp_path / "skewed.safetensors", range(5), metric="macro_f1", score=0.1)
    with pytest.raises(ValueError, match="`reference` must have a metric that is a mean over examples, got macro_f1"):
        rows_of(tmp_path, skewed, same)


def test_the_files_of_a_work_directory(tmp_path: Path) -> None:
    task = load_task(tmp_path, parity_rows(200))
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    config = SieveConfig(tolerance=0.9, heal=None, search_steps=2, rank_multiple=1)
    pruner.prune(config, work_dir=tmp_path / "work", progress=False)
    files = sorted((tmp_path / "work").glob("evaluation-*"), key=os.path.getmtime)
    trials = pruner.result.trials
    rows = rows_of(tmp_path, *files, "--rows", 50, "--resamples", 20, "--tolerances", 0.95)
    assert {row["kept"] for row in rows} == {len(trials)}
