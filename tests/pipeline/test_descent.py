"""The descent: healed sizes fall until two in a row exceed the tolerance, or to the size that was asked for."""

from __future__ import annotations

import copy
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from healed_world import TOKENIZER, assert_same, learn, score
from toy import load_task, parity_rows
from transformers import AutoModelForCausalLM

from optimum_sieve import HealConfig, SieveConfig, SievePruner
from optimum_sieve.allocation.tolerance import SMALLEST_KEPT, ToleranceError
from optimum_sieve.evaluation.comparison import Comparison
from optimum_sieve.healing import stage
from optimum_sieve.healing.loop import heal
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.pipeline import descent, ranks
from optimum_sieve.publish.page.load import read_report
from optimum_sieve.publish.page.page import report_page


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.publish.result import SieveResult
    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Task

QUIET: dict[str, Any] = {"progress": False}
HEAL = HealConfig(steps=3, learning_rate=1e-2, train_norms=True)
SMALL: dict[str, Any] = {
    **{"rank_multiple": 1, "rounds": 1, "search_steps": 2},
    **{"heal": HEAL, "tune": None, "label_offsets": "none"},
}
WITHIN: dict[str, Any] = {"tolerance": 0.1, **SMALL}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(600))


@pytest.fixture(scope="module")
def dense(task: Task) -> PreTrainedModel:
    return learn(task)


@pytest.fixture
def pruner(dense: PreTrainedModel, task: Task) -> SievePruner:
    return SievePruner(copy.deepcopy(dense), TOKENIZER, task, base_model="toy/base")


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def kept_of(result: SieveResult) -> float:
    parameters = result.report["parameters"]
    return float(parameters["targets_after"] / parameters["targets_before"])


def script(monkeypatch: pytest.MonkeyPatch, module: Any, verdicts: Iterable[bool | float]) -> None:
    """Let the sizes that `module` tests hold or not, or have a mean difference, in turn, whatever they score."""
    given = iter(verdicts)

    def compared(run: Run, reference: Sequence[Evaluation], **options: Any) -> dict[str, Comparison]:
        verdict = next(given)
        mean = (0.0 if verdict else -0.5) if isinstance(verdict, bool) else verdict
        shared: dict[str, Any] = {"mean": mean, "standard_error": 0.0, "agreement": 1.0, "kl": 0.0}
        pairs = zip(run.tasks, reference, strict=True)
        return {task.name: Comparison(**shared, count=before.count) for task, before in pairs}

    monkeypatch.setattr(module, "compare_selection", compared)


def healed_trials(result: SieveResult) -> list[dict[str, Any]]:
    return [trial for trial in result.trials if trial.get("healed")]


def test_the_tolerance_holds_at_a_smaller_size_than_without_healing(
    dense: PreTrainedModel, task: Task, pruner: SievePruner
) -> None:
    """Nothing is scripted. Two steps of the bisection end at a quarter; healing goes on from there."""
    settings = {**WITHIN, "search_steps": 2}
    plain = SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(SieveConfig(**{**settings, "heal": None}), **QUIET)
    result = pruner.prune(SieveConfig(**{**settings, "heal": HealConfig(steps=16, learning_rate=3e-3)}), **QUIET)
    assert kept_of(result) < 0.5 * kept_of(plain)
    trials = healed_trials(result)
    assert all(trial["accepted"] == (trial["lower_bound"] >= -0.1) for trial in trials)
    # It goes on past one size that fails, never past two.
    verdicts = "".join("01"[trial["accepted"]] for trial in trials)
    assert "00" not in verdicts[:-1]
    assert result.trials[: len(plain.trials)] == plain.trials
    healing = result.report["healing"]
    assert healing["kept_without"] == pytest.approx(kept_of(plain), abs=1e-9)
    assert healing["kept"] == [trial["kept"] for trial in trials if trial["accepted"]][-1]


def test_the_last_accepted_size_is_the_result(
    pruner: SievePruner, task: Task, dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, ranks, [True, True])
    script(monkeypatch, descent, [True] * 4 + [False] * 2)
    held: list[dict[str, Any]] = []

    def put(self: stage.Healer, size: Any) -> None:
        plain_put(self, size)
        held.append({"kept": size.kept, "state": state(self.run.model)})

    plain_put = stage.Healer.put
    monkeypatch.setattr(stage.Healer, "put", put)
    result = pruner.prune(SieveConfig(**WITHIN), **QUIET)
    trials = healed_trials(result)
    # Two bisection steps end at a quarter.
    assert result.report["healing"]["kept_without"] == pytest.approx(0.25, abs=0.01)
    # From one below it on.
    without = result.report["healing"]["kept_without"]
    assert [trial["asked"] for trial in trials] == pytest.approx(
        [without * HEAL.shrink**power for power in range(1, 7)]
    )
    assert [trial["accepted"] for trial in trials] == [True] * 4 + [False] * 2
    # Every selection example decides.
    assert {trial["count"] for trial in result.trials} == {task.splits["selection"]}
    # Each of the six while it was scored, and the fourth one again.
    assert [each["kept"] for each in held] == [trial["kept"] for trial in (*trials, trials[3])]
    assert_same(held[6]["state"], held[3]["state"])
    assert_same(state(result.model), held[3]["state"])
    assert kept_of(result) == pytest.approx(trials[3]["kept"])
    healing = result.report["healing"]
    assert (healing["steps"], healing["kept"]) == (18, trials[3]["kept"])
    assert [size["steps"] for size in healing["sizes"]] == [3] * 6
    norm = "model.norm.weight"
    assert not torch.equal(result.model.get_parameter(norm), dense.get_parameter(norm))


def test_two_sizes_in_a_row_that_fail_end_the_descent(pruner: SievePruner, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, ranks, [True, True])
    script(monkeypatch, descent, [True, False, True, True, False, False, True])
    result = pruner.prune(SieveConfig(**WITHIN), **QUIET)
    trials = healed_trials(result)
    assert [trial["accepted"] for trial in trials] == [True, False, True, True, False, False]
    # The fourth, which goes on from a third that goes on from one that was refused.
    assert result.report["healing"]["kept"] == trials[3]["kept"]
    assert kept_of(result) == pytest.approx(trials[3]["kept"])


def test_every_size_goes_on_from_the_healed_factors_of_the_one_before(
    pruner: SievePruner, dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, ranks, [True, True])
    script(monkeypatch, descent, [True, True, False, False])
    started: list[dict[str, FactorizedLinear]] = []
    ended: list[dict[str, FactorizedLinear]] = []
    norms: list[torch.Tensor] = []

    def factors(model: PreTrainedModel) -> dict[str, FactorizedLinear]:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)}
        assert {layer.storage for layer in layers.values()} == {"factors"}
        return copy.deepcopy(layers)

    def healing(model: Any, *arguments: Any, **options: Any) -> Any:
        started.append(factors(model))
        norms.append(model.model.norm.weight.detach().clone())
        done = heal(model, *arguments, **options)
        ended.append(factors(model))
        return done

    monkeypatch.setattr(stage, "heal", healing)
    pruner.prune(SieveConfig(**WITHIN), **QUIET)
    assert len(started) == 4
    fewer = 0
    for number in (1, 2, 3):
        assert started[number].keys() >= ended[number - 1].keys()
        for name, healed in ended[number - 1].items():
            layer = started[number][name]
            fewer += layer.rank < healed.rank
            assert torch.equal(layer.last.weight, healed.last.weight[:, : layer.rank])
            assert torch.equal(layer.first.weight, healed.first.weight[: layer.rank])
    assert fewer
    assert torch.equal(norms[0], dense.model.norm.weight)
    assert not torch.equal(norms[1], norms[0])


def test_a_size_may_hold_only_healed(pruner: SievePruner, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, ranks, [False, False])
    script(monkeypatch, descent, [True, True, False, False])
    result = pruner.prune(SieveConfig(**WITHIN), **QUIET)
    trials = healed_trials(result)
    assert [trial["asked"] for trial in trials] == pytest.approx([0.9, 0.765, 0.65025, 0.5527125])
    assert all(trial["asked"] - 0.03 < trial["kept"] <= trial["asked"] for trial in trials)
    healing = result.report["healing"]
    assert (healing["kept_without"], healing["kept"]) == (None, pytest.approx(kept_of(result)))
    assert kept_of(result) == pytest.approx(trials[1]["kept"])


def test_a_size_may_hold_only_unhealed(
    dense: PreTrainedModel, task: Task, pruner: SievePruner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(monkeypatch, ranks, [True, True] * 2)
    script(monkeypatch, descent, [False, False])
    plain = SieveConfig(**{**WITHIN, "heal": None})
    unhealed = SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(plain, **QUIET)
    result = pruner.prune(SieveConfig(**WITHIN), **QUIET)
    assert result.rank_pattern == unhealed.rank_pattern
    assert_same(state(result.model), state(unhealed.model))
    healing = result.report["healing"]
    assert (healing["kept"], healing["kept_without"]) == (None, pytest.approx(kept_of(unhealed)))
    card = (pruner.save_pretrained(tmp_path / "out") / "README.md").read_text()
    assert "the factors were trained" not in card


def test_small_sizes_fall_faster(pruner: SievePruner, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, ranks, [True, True, True])
    script(monkeypatch, descent, [True] * 4)
    result = pruner.prune(SieveConfig(**{**WITHIN, "search_steps": 3}), **QUIET)
    asked = [trial["asked"] for trial in healed_trials(result)]
    assert asked[0] == pytest.approx(0.125 * HEAL.shrink, abs=0.01)
    # One step until a size is below a tenth, then four.
    assert asked == pytest.approx([*(asked[0] * HEAL.shrink**power for power in (0, 1, 5)), SMALLEST_KEPT])


@pytest.mark.parametrize(
    ("verdicts", "powers", "best"),
    [
        # Two sizes that surely lose nothing, one that may lose a little, and two that fail.
        ([0.5, 0.5, True, False, False], [1, 3, 5, 6, 7], 2),
        # The one after a leap fails, so the one left out is tried; it holds. From large to small two in a row fail.
        ([0.5, False, True, False], [1, 3, 2, 4], 2),
        ([0.5, False, True, True, False, False], [1, 3, 2, 4, 5, 6], 3),
        ([True, 0.5, False, False], [1, 2, 4, 3], 1),
        # No second leap from a size that was left out.
        ([0.5, False, 0.5, False], [1, 3, 2, 4], 2),
    ],
    ids=["leaps", "back", "back and down", "back in vain", "back for good"],
)
def test_a_size_that_surely_loses_nothing_leads_to_the_second_one_below(
    pruner: SievePruner,
    monkeypatch: pytest.MonkeyPatch,
    verdicts: list[bool | float],
    powers: list[int],
    best: int,
) -> None:
    script(monkeypatch, ranks, [True])
    script(monkeypatch, descent, verdicts)
    begun: list[dict[str, FactorizedLinear]] = []
    ended: list[dict[str, FactorizedLinear]] = []

    def healing(model: Any, *arguments: Any, **options: Any) -> Any:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)}
        begun.append(copy.deepcopy(layers))
        done = heal(model, *arguments, **options)
        ended.append(copy.deepcopy(layers))
        return done

    monkeypatch.setattr(stage, "heal", healing)
    result = pruner.prune(SieveConfig(**{**WITHIN, "search_steps": 1}), **QUIET)
    trials = healed_trials(result)
    sizes = [0.5 * HEAL.shrink**power for power in powers]
    assert [trial["asked"] for trial in trials] == pytest.approx(sizes, rel=0.02)
    assert kept_of(result) == pytest.approx(trials[best]["kept"])
    for number in range(1, len(powers)):
        # One that was left out goes on from the accepted one above it, not from the smaller one that failed.
        before = number - 1 if powers[number] > powers[number - 1] else number - 2
        for name, healed in ended[before].items():
            layer = begun[number][name]
            assert torch.equal(layer.last.weight, healed.last.weight[:, : layer.rank])


def test_no_size_at_all_is_an_error_that_leaves_the_dense_model(
    dense: PreTrainedModel, pruner: SievePruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, ranks, [False, False])
    script(monkeypatch, descent, [False, False])
    with pytest.raises(ToleranceError, match=r"No size meets tolerance=0\.1: keeping (50\.0|49\.\d)% of the param"):
        pruner.prune(SieveConfig(**WITHIN), **QUIET)
    assert_same(state(pruner.model), state(dense))


@pytest.mark.parametrize("fails", ["heal", "stored_layer", "compare_selection"])
def test_an_error_leaves_the_dense_model(
    dense: PreTrainedModel, pruner: SievePruner, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, ranks, [True, True])
    script(monkeypatch, descent, [True] * 9)
    owner = descent if fails == "compare_selection" else stage
    plain, calls = getattr(owner, fails), iter(range(10**6))

    def failing(*arguments: Any, **options: Any) -> Any:
        # In the second size: there are many layers.
        if next(calls) == {"stored_layer": 20}.get(fails, 1):
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, fails, failing)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(SieveConfig(**WITHIN), **QUIET)
    assert_same(state(pruner.model), state(dense))


def test_a_ratio_is_reached_in_falling_sizes(
    dense: PreTrainedModel, task: Task, pruner: SievePruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def healing(model: Any, *arguments: Any, **options: Any) -> Any:
        kept.append(sum(p.numel() for p in model.model.layers.parameters()))
        return heal(model, *arguments, **options)

    monkeypatch.setattr(stage, "heal", healing)
    heal_config = HealConfig(steps=16, learning_rate=1e-2, gold_weight=0.0)
    config = SieveConfig(pruning_ratio=0.97, **{**SMALL, "heal": heal_config})
    result = pruner.prune(config, **QUIET)
    healing_report = result.report["healing"]
    sizes = [size["asked"] for size in healing_report["sizes"]]
    assert sizes == HealConfig().sizes_to(1 - 0.97)
    assert healing_report["sizes"][-1]["kept"] == healing_report["kept"] == pytest.approx(kept_of(result))
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(sizes) == 3
    assert result.trials == []
    assert kept_of(result) <= 0.03
    plain = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    unhealed = plain.prune(SieveConfig(pruning_ratio=0.97, **{**SMALL, "heal": None}), **QUIET)
    assert result.report["kl"] < 0.5 * unhealed.report["kl"]

    directory = pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert score(loaded, task).score == result.report["pruned"]["score"]
    assert json.loads((directory / "sieve_report.json").read_text())["healing"] == healing_report
    card = (directory / "README.md").read_text()
    assert "trained for 48 steps on 300 calibration examples" in card
    assert "3 falling sizes were trained" in card
    assert loaded.config.sieve["settings"]["heal"] == config.to_dict()["heal"]


def test_the_default_heals(pruner: SievePruner) -> None:
    result = pruner.prune(SieveConfig(pruning_ratio=0.4, rank_multiple=1, rounds=1, tune=None), **QUIET)
    assert [size["asked"] for size in result.report["healing"]["sizes"]] == [0.6]
    assert result.report["healing"]["steps"] == HealConfig().steps
    assert result.report["settings"]["heal"] == HealConfig().to_dict()


@pytest.mark.parametrize(("limit", "sizes"), [("1800s", 4), ("40min", 5), (None, 6)])
def test_the_descent_ends_before_a_size_that_would_exceed_the_time_limit(
    pruner: SievePruner, monkeypatch: pytest.MonkeyPatch, limit: str | None, sizes: int
) -> None:
    """By a clock on which every size takes 400 seconds: the fifth would end after 2,000, the sixth after 2,400."""
    script(monkeypatch, ranks, [True, True])
    script(monkeypatch, descent, [True] * 6 + [False] * 9)
    clock, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed[0])

    def healing(*arguments: Any, **options: Any) -> Any:
        passed[0] += 400
        return heal(*arguments, **options)

    monkeypatch.setattr(stage, "heal", healing)
    result = pruner.prune(SieveConfig(**WITHIN, time_limit=limit), **QUIET)
    trials = healed_trials(result)
    assert [trial["accepted"] for trial in trials][:sizes] == [True] * sizes
    assert len(trials) == sizes + 2 * (limit is None)
    assert result.report["stopped"] == {"unhealed": "search_steps", "healed": "time_limit" if limit else "refused"}
    assert result.report["healing"]["kept"] == trials[sizes - 1]["kept"]
    assert kept_of(result) == pytest.approx(trials[sizes - 1]["kept"])


@pytest.mark.parametrize("unhealed", [[False, False], [False, True, True]], ids=["none", "a small one"])
def test_a_descent_may_start_at_the_largest_size_or_at_a_small_one(
    pruner: SievePruner, monkeypatch: pytest.MonkeyPatch, unhealed: list[bool]
) -> None:
    """Nothing holds without training, or a size holds that is so small that training may still change it a lot."""
    script(monkeypatch, ranks, unhealed)
    monkeypatch.setattr(descent, "FINE", 0.65)
    script(monkeypatch, descent, [True, False, False])
    result = pruner.prune(SieveConfig(**{**WITHIN, "search_steps": len(unhealed)}), **QUIET)
    without = result.report["healing"]["kept_without"]
    assert healed_trials(result)[0]["asked"] == pytest.approx(0.9 if without is None else without)


@pytest.mark.parametrize("unhealed", [0.013, 0.02, 0.1, 0.11, 0.95, None])
def test_no_size_is_larger_than_the_one_that_holds_without_training(unhealed: float | None) -> None:
    sizes = descent._ladder(unhealed, 0.85)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= (unhealed or 0.9)
    assert sizes[-1] == min(SMALLEST_KEPT, unhealed or 1.0)


def test_no_size_is_healed_where_the_time_is_over(
    dense: PreTrainedModel, task: Task, pruner: SievePruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, ranks, [True, True])
    monkeypatch.setattr(stage, "heal", None)
    result = pruner.prune(SieveConfig(**WITHIN, time_limit=1e-9), **QUIET)
    assert healed_trials(result) == []
    assert result.report["stopped"] == {"unhealed": "time_limit", "healed": "time_limit"}
    assert result.report["healing"]["kept"] is None
    assert kept_of(result) == pytest.approx(result.report["healing"]["kept_without"])


def test_sizes_are_printed_as_they_are_scored(
    pruner: SievePruner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script(monkeypatch, ranks, [True, True])
    script(monkeypatch, descent, [True, False, False])
    pruner.prune(SieveConfig(**WITHIN), progress=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept ")]
    assert [line.split()[2] for line in lines] == ["pruned"] * 2 + ["healed"] * 3
    assert "accuracy +0.000 ± 0.000" in lines[2]
    assert [line.rpartition(": ")[2] for line in lines] == ["accepted"] * 3 + ["beyond the tolerance"] * 2


def test_a_descent_that_nothing_refuses_ends_at_the_smallest_size(
    pruner: SievePruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, ranks, [True, True])
    script(monkeypatch, descent, [True] * 30)
    result = pruner.prune(SieveConfig(**{**WITHIN, "heal": HealConfig(steps=1, shrink=0.5)}), **QUIET)
    assert result.report["stopped"] == {"unhealed": "search_steps", "healed": "smallest_size"}
    sizes = [trial["asked"] for trial in healed_trials(result)]
    assert sizes[-1] == SMALLEST_KEPT
    assert SMALLEST_KEPT / sizes[-2] <= 0.5


def test_the_work_directory_shows_the_sizes_of_a_run_that_was_stopped(
    pruner: SievePruner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(monkeypatch, ranks, [True, False])
    script(monkeypatch, descent, [True, True])
    with pytest.raises(StopIteration):
        # The third healed size has no verdict.
        pruner.prune(SieveConfig(**WITHIN), work_dir=tmp_path, **QUIET)
    report = read_report(tmp_path)
    assert report["complete"] is False
    assert [(trial["healed"], trial["accepted"]) for trial in report["trials"]] == [
        *((False, True), (False, False), (True, True), (True, True)),
    ]
    assert [len(size["losses"]) for size in report["healing"]["sizes"]] == [1, 1]
    page = report_page(report)
    assert "The run has not ended" in page
    assert "4 sizes as a table" in page
