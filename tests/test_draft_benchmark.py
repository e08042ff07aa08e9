"""`benchmarks/draft.py` counts what it says it counts, on a tiny model and task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny_models
from benchmark_module import load_benchmark
from tiny_models import save
from toy import make_model, make_tokenizer, write_task

from optimum_sieve.conversion import sieve_model


if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

ROUNDS = 2
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def draft_benchmark() -> ModuleType:
    return load_benchmark("draft")


def measure(draft_benchmark: ModuleType, directory: Path, *, exact: bool) -> list[dict[str, Any]]:
    """Run the benchmark's main function and return the rows that it writes."""
    dense = make_model(max_position_embeddings=128)
    make_tokenizer().save_pretrained(save(dense, directory / "dense"))
    tiny_models.factorize_in_place(dense, exact=exact)
    pruned = save(sieve_model(dense, base_model=None, settings={}, results={}), directory / "pruned")
    make_tokenizer().save_pretrained(pruned)
    task = write_task(directory)
    rows = directory / "rows-out.jsonl"
    options = {"pruned": pruned, "model": directory / "dense", "task": task, "json": rows, "limit": 3}
    options |= {"rounds": ROUNDS, "new-tokens": NEW_TOKENS}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    draft_benchmark.main([*words, "--draft-tokens", "3"])
    return [json.loads(line) for line in rows.read_text().splitlines()]


@pytest.mark.parametrize("exact", [True, False])
def test_rows_hold_together(draft_benchmark: ModuleType, tmp_path: Path, exact: bool, capsys: Any) -> None:
    rows = measure(draft_benchmark, tmp_path, exact=exact)
    assert [(row["name"], row["prompts"], row["draft_tokens"]) for row in rows] == [("task", 3, 3), ("free", 8, 3)]
    for row in rows:
        assert row["same_text"] == row["prompts"]
        assert row["ratio"] > 0
        assert row["ratio_standard_error"] >= 0
        # All or few of the drafts are accepted; three drafted tokens and one of the dense model's own are the most.
        if exact:
            assert row["acceptance"] == pytest.approx(1)
            assert row["tokens_a_pass"] == pytest.approx(4)
        else:
            assert row["acceptance"] < 0.7
            assert row["tokens_a_pass"] == pytest.approx(1 + 3 * row["acceptance"], abs=0.35)
    printed = capsys.readouterr().out
    assert "of the dense model's parameters" in printed
    assert printed.count("tokens/s alone") == 2


def test_the_error_of_a_ratio_is_that_of_a_mean_where_all_prompts_draft_as_much(draft_benchmark: ModuleType) -> None:
    part, whole = np.array([1, 2, 4, 5]), np.full(4, 10)
    assert draft_benchmark.ratio_error(part, whole) == pytest.approx((part / whole).std(ddof=1) / 2)


def test_one_round_has_no_standard_error(draft_benchmark: ModuleType, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        draft_benchmark.main(["--rounds", "1"])
    assert "`--rounds` must be at least 2 to have a standard error, got 1." in capsys.readouterr().err
