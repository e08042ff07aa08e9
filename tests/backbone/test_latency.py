"""Layers are timed as they are used, and a run keeps within the time that it is given."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import toy
from toy import unhealed

from optimum_sieve import FactorizedLinear, SievePruner
from optimum_sieve.allocation.budget import rank_choices
from optimum_sieve.backbone import latency as module
from optimum_sieve.pipeline.prepare import prepare


if TYPE_CHECKING:
    from pathlib import Path


def slow_factors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a factorized layer sleep for as long as its rank is large, half of that a dense one."""
    calls: list[int] = []

    def forward(self: FactorizedLinear, x: torch.Tensor) -> torch.Tensor:
        calls.append(self.rank)
        time.sleep(2e-5 * self.rank)
        return x.new_zeros(*x.shape[:-1], self.out_features)

    monkeypatch.setattr(FactorizedLinear, "forward", forward)
    return calls


def test_times_rise_with_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_factors(monkeypatch)
    measured = module._measure_shape((48, 32), "factors", 1, torch.float32, torch.device("cpu"))
    ranks = rank_choices(48, 32, "factors", 1)
    assert len(measured) == len(ranks) + 1
    assert (np.diff(measured[:-1]) >= 0).all()
    assert measured[len(ranks) - 1] > 2e-5 * ranks[-1]
    assert measured[-1] < measured[len(ranks) - 1]


def test_weights_do_not_stay_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, torch.nn.Module] = {}
    forward = torch.nn.Linear.forward

    def watched(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        seen[id(self)] = self
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    with torch.device("meta"):
        empty = torch.nn.Linear(1000, 1000, bias=False)
    assert module._seconds(empty, 1000, torch.float32, torch.device("cpu")) > 0
    assert sum(each.weight.nbytes for each in seen.values()) > module._COLD_BYTES


def test_every_storage_and_dtype_is_timed() -> None:
    for storage, dtype in itertools.product(("factors", "pivoted"), (torch.float32, torch.bfloat16)):
        measured = module._measure_shape((24, 32), storage, 8, dtype, torch.device("cpu"))
        assert len(measured) == len(rank_choices(24, 32, storage, 8)) + 1
        assert min(measured) > 0


@pytest.fixture
def pruner(tmp_path: Path) -> SievePruner:
    options: dict[str, Any] = {"tokenizer": toy.make_tokenizer(), "task": toy.load_task(tmp_path)}
    return SievePruner.from_pretrained(toy.make_model(), **options)


def test_a_run_keeps_within_its_time(pruner: SievePruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []

    def measure_shape(shape: tuple[int, int], storage: Any, multiple: int, *_: Any) -> list[float]:
        counted.append(shape)
        # As long as the rank, whatever the shape; dense as one and a half of the largest.
        ranks = rank_choices(*shape, storage, multiple)
        return [1e-6 * (rank + 1) for rank in ranks] + [1.5e-6 * ranks[-1]]

    monkeypatch.setattr(module, "_measure_shape", measure_shape)
    config = unhealed(pruning_ratio=0.2, latency_target=0.4, rank_multiple=1, rounds=1)
    result = pruner.prune(config, work_dir=tmp_path / "work", progress=False)
    found = result.report["latency"]
    assert 0.3 * found["dense"] < found["pruned"] <= 0.4 * found["dense"]
    after, before = (result.report["parameters"][f"targets_{when}"] for when in ("after", "before"))
    assert after < 0.75 * before
    assert result.report["settings"]["latency_target"] == 0.4
    assert len(counted) == len(set(counted))

    # What was measured is kept: a run that goes on takes the same ranks.
    again = SievePruner.from_pretrained(toy.make_model(), tokenizer=pruner.tokenizer, task=pruner.tasks[0])
    assert again.prune(config, work_dir=tmp_path / "work", progress=False).rank_pattern == result.rank_pattern
    assert len(counted) == len(set(counted))


def test_another_processor_is_measured_again(
    pruner: SievePruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_measure_shape", lambda *_: [1.0])
    counts = []
    for name in ("one", "other", "one"):
        monkeypatch.setattr(module, "_hardware", lambda device, name=name: name)
        config = unhealed(pruning_ratio=0.2, latency_target=0.4)
        run = prepare(
            pruner.model, pruner.tokenizer, pruner.tasks, config, work_dir=tmp_path, study_storage=None, progress=False
        )
        module.measure_latencies(run)
        counts.append(len(list(tmp_path.glob("latencies-*"))))
    assert counts == [1, 2, 2]
    monkeypatch.undo()
    assert module._hardware(torch.device("cpu"))


def test_the_report_shows_the_time() -> None:
    from optimum_sieve.publish.table import size_changes

    report = {"latency": {"dense": 0.0021, "pruned": 0.0014}}
    assert size_changes(report) == [("microseconds of the target matrices for one row", 2100, 1400)]


@pytest.mark.parametrize("changes", [{"allocation": "uniform"}, {"latency_target": 1.0}, {"latency_target": 0.0}])
def test_settings_that_do_not_go_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`latency_target` must"):
        unhealed(**{"pruning_ratio": 0.5, "latency_target": 0.5, **changes})
