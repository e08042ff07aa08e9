"""Pruning with healing: sizes are searched healed, rounds alternate, and every kind of model is healed."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from healed_world import TOKENIZER, assert_same
from model_kinds import make_model as make_other_model
from toy import load_task, make_tokenizer
from transformers import AutoModelForCausalLM

from optimum_sieve import SieveConfig, SievePruner, evaluate
from optimum_sieve.calibration import stage as calibration_stage
from optimum_sieve.calibration.stage import calibrate, collect_moments
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.healing import loop as healing_loop
from optimum_sieve.healing import monitor
from optimum_sieve.healing import stage as healing_stage
from optimum_sieve.healing.loop import heal
from optimum_sieve.healing.optimizer import norm_parameters
from optimum_sieve.healing.stage import Healer
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.publish import result as result_module
from optimum_sieve.surgery.apply import truncated


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Task

QUICK = HealConfig(steps=40, learning_rate=3e-2, eval_steps=10)
FAR = {"pruning_ratio": 0.97, "rank_multiple": 1, "rounds": 1}


@pytest.fixture
def pruner(dense: PreTrainedModel, task: Task) -> SievePruner:
    return SievePruner(copy.deepcopy(dense), TOKENIZER, task, base_model="toy/base")


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_healed_model_is_saved_with_the_ranks_it_was_pruned_to(
    dense: PreTrainedModel, task: Task, pruner: SievePruner, tmp_path: Path
) -> None:
    plain = SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(SieveConfig(**FAR), progress=False)
    config = SieveConfig(**FAR, heal=QUICK)
    result = pruner.prune(config, progress=False)
    assert result.rank_pattern == plain.rank_pattern
    assert result.report["parameters"] == plain.report["parameters"]
    assert result.report["kl"] < 0.5 * plain.report["kl"]
    healing = result.report["healing"]
    assert healing["steps"] <= QUICK.steps
    assert (healing["examples"], healing["monitored"]) == (300, round(150 * 0.25))
    assert healing["after"]["score"] > healing["before"]["score"]
    assert healing["seconds"] > 0
    assert result.report["seconds"]["healing"] > 0

    directory = pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    found = evaluate(loaded, task.examples("test", TOKENIZER), TOKENIZER, metric="accuracy", batch_size=16,
                     progress=False)  # fmt: skip
    assert found.score == result.report["pruned"]["score"]
    assert json.loads((directory / "sieve_report.json").read_text())["healing"] == healing
    card = (directory / "README.md").read_text()
    assert f"trained for {healing['steps']} steps on {healing['examples']} calibration examples" in card
    assert "--heal-steps 40 --heal-learning-rate 0.03" in card
    assert loaded.config.sieve["settings"]["heal"] == QUICK.to_dict()


def test_the_size_within_a_tolerance_is_searched_healed_and_decided_on_examples_healing_did_not_see(
    dense: PreTrainedModel, task: Task, pruner: SievePruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tolerance": 0.05, "rank_multiple": 1, "search_steps": 6, "rounds": 1}
    plain = SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(SieveConfig(**settings), progress=False)
    seen: dict[str, set[str]] = {"monitor": set(), "search": set()}

    def watching(part: str) -> Callable[..., Any]:
        def score(model: Any, examples: Any, *args: Any, **options: Any) -> Any:
            seen[part] |= {example.prompt for example in examples if "test" not in options.get("description", "")}
            return evaluate(model, examples, *args, **options)

        return score

    monkeypatch.setattr(monitor, "evaluate", watching("monitor"))
    healed = pruner.prune(SieveConfig(**settings, heal=QUICK), work_dir=tmp_path, progress=False)
    # Both halve the interval in the same way until they differ in what holds.
    pairs = [(one, two) for one, two in zip(healed.trials, plain.trials, strict=True) if one["kept"] == two["kept"]]
    assert sum(one["kl"] for one, _ in pairs) < 0.5 * sum(two["kl"] for _, two in pairs)
    parameters = [result.report["parameters"]["targets_after"] for result in (healed, plain)]
    assert parameters[0] <= parameters[1]
    assert len(healed.trials) == 6
    assert {trial["count"] for trial in healed.trials} == {task.splits["selection"] - len(seen["monitor"])}
    assert len(seen["monitor"]) == round(150 * 0.25)

    # All is taken from the work directory the second time.
    monkeypatch.setattr(healing_loop.FactorTraining, "step", None)
    again = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    second = again.prune(SieveConfig(**settings, heal=QUICK), work_dir=tmp_path, progress=False)
    assert second.trials == healed.trials
    assert_same(state(second.model), state(healed.model))


def test_a_search_without_a_work_directory_leaves_no_files(
    pruner: SievePruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = SieveConfig(tolerance=0.3, rank_multiple=1, search_steps=2, rounds=1, heal=HealConfig(steps=2))
    steps = []
    monkeypatch.setattr(
        healing_stage, "heal", lambda *args, **options: steps.append(list(tmp_path.iterdir())) or
        heal(*args, **options),
    )  # fmt: skip
    pruner.prune(config, progress=False)
    # Two sizes, and the one that is taken.
    assert len(steps) == 3
    assert all(steps)
    assert not list(tmp_path.iterdir())


def test_rounds_of_pruning_and_healing_reach_the_same_size_in_steps(
    dense: PreTrainedModel, task: Task, pruner: SievePruner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moments, kept = [], []

    def watching(model: Any, targets: Any, *args: Any, **options: Any) -> Any:
        weights = [model.get_submodule(target.name).weight.detach() for target in targets]
        moments.append(sum(int(torch.linalg.matrix_rank(weight, rtol=1e-4)) for weight in weights))
        return collect_moments(model, targets, *args, **options)

    def healing(model: Any, *args: Any, **options: Any) -> Any:
        kept.append(sum(p.numel() for p in model.model.layers.parameters()))
        return heal(model, *args, **options)

    monkeypatch.setattr(calibration_stage, "collect_moments", watching)
    monkeypatch.setattr(healing_stage, "heal", healing)
    config = SieveConfig(**FAR, heal=HealConfig(steps=20, learning_rate=3e-2, rounds=3))
    result = pruner.prune(config, work_dir=tmp_path, progress=False)
    # Moments of the dense model, then of two that were healed, whose matrices have the ranks of their round.
    assert len(moments) == len(kept) == 3
    assert moments == sorted(moments, reverse=True)
    assert moments[2] < moments[0]
    assert kept == sorted(kept, reverse=True)
    assert result.report["parameters"]["targets_after"] <= 0.031 * result.report["parameters"]["targets_before"]
    assert len(result.report["healing"]["rounds"]) == 3
    once = SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(SieveConfig(**FAR), progress=False)
    assert result.report["kl"] < once.report["kl"]

    monkeypatch.setattr(calibration_stage, "collect_moments", None)
    monkeypatch.setattr(healing_loop.FactorTraining, "step", None)
    again = SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(config, work_dir=tmp_path, progress=False)
    assert_same(state(again.model), state(result.model))


@pytest.mark.parametrize("fails", [(healing_loop.FactorTraining, "step"), (result_module, "sieve_model")])
def test_an_error_leaves_the_dense_model(
    dense: PreTrainedModel, pruner: SievePruner, fails: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    heal_config = HealConfig(
        steps=4, rounds=2 if fails[0] is result_module else 1, train_norms=True, learning_rate=3e-2
    )
    monkeypatch.setattr(*fails, fail)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(SieveConfig(**FAR, heal=heal_config), progress=False)
    assert_same(state(pruner.model), state(dense))


def test_trained_norms_are_put_back_between_sizes(dense: PreTrainedModel, task: Task) -> None:
    model = copy.deepcopy(dense)
    config = SieveConfig(**FAR, heal=HealConfig(steps=4, train_norms=True, learning_rate=3e-2, patience=9))
    run = prepare(model, TOKENIZER, [task], config, work_dir=None, study_storage=None, progress=False)
    bases = calibrate(run)
    healer = Healer(run)
    ranks = {target.name: 1 for target in run.targets}
    with healer.healed(bases, ranks):
        changed = [name for name, p in norm_parameters(model).items() if not torch.equal(p, dense.get_parameter(name))]
    assert changed
    assert_same(state(model), state(dense))


def test_a_size_at_which_nothing_is_factorized_is_not_healed(dense: PreTrainedModel, task: Task) -> None:
    model = copy.deepcopy(dense)
    config = SieveConfig(**FAR, heal=QUICK)
    run = prepare(model, TOKENIZER, [task], config, work_dir=None, study_storage=None, progress=False)
    healer = Healer(run)
    healer.apply(calibrate(run), dict.fromkeys(target.name for target in run.targets))
    assert_same(state(model), state(dense))
    assert (healer.report()["steps"], healer.report()["rounds"]) == (0, [])


def test_a_multiplied_out_model_computes_what_the_healed_one_does(task: Task) -> None:
    """GPT-2's linears have biases and are transposed."""
    import transformers

    sizes = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    config = SieveConfig(**{**FAR, "pruning_ratio": 0.5}, heal=HealConfig(steps=3, rounds=2, learning_rate=1e-2))
    run = prepare(model, TOKENIZER, [task], config, work_dir=None, study_storage=None, progress=False)
    bases = calibrate(run)
    healer = Healer(run)
    ids = torch.tensor([[1, 7, 30, 40]])
    before = state(model)
    with truncated(model, bases, {target.name: 9 for target in run.targets}), torch.no_grad():
        healer._heal()
        expected = model(ids).logits
        healer._multiply_out()
        assert {type(model.get_submodule(target.name)).__name__ for target in run.targets} == {"Conv1D"}
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert_same(state(model), before)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_encoder_decoders_and_classifiers_are_pruned_and_healed(name: str, task: Task) -> None:
    tokenizer = make_tokenizer(after="</s>")
    config = SieveConfig(pruning_ratio=0.7, rank_multiple=1, rounds=1, heal=HealConfig(steps=8, eval_steps=2))
    report = SievePruner(make_other_model(name), tokenizer, task).prune(config, progress=False).report
    assert report["healing"]["steps"] == 8
    assert [one["step"] for one in report["healing"]["rounds"][0]["evaluations"]] == [0, 2, 4, 6, 8]
    after = report["healing"]["after"]
    assert after["score"] >= report["healing"]["before"]["score"]


def test_the_plan_states_the_cost(pruner: SievePruner) -> None:
    plan = pruner.plan(SieveConfig(tolerance=0.02, search_steps=5, heal=HealConfig(steps=100, rounds=2)))
    line = "healing                at most 5 sizes x 2 rounds x 100 steps of 16 examples, 16,000 forward and backward"
    assert line in plan.format()
    # Pivots are trained as factors, which may have twice as many parameters.
    assert plan.heal_bytes == 2 * (plan.targets_parameters // 2) * 20
    assert "healing" not in pruner.plan(SieveConfig(tolerance=0.02)).format()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.1, "allocation": "genetic"}, "`heal` with a `tolerance` or several rounds must go with"),
        ({"pruning_ratio": 0.5, "projection": "learned", "allocation": "uniform"}, r"`heal\.rounds` must be 1 with"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SieveConfig(**settings, heal=HealConfig(rounds=2))
    with pytest.raises(TypeError, match="`heal` must be a HealConfig or None, got 3"):
        SieveConfig(pruning_ratio=0.5, heal=3)  # type: ignore[arg-type]


def test_too_few_selection_examples_are_refused_before_any_work(dense: PreTrainedModel, tmp_path: Path) -> None:
    pruner = SievePruner(dense, TOKENIZER, load_task(tmp_path, limit={"selection": 4}))
    with pytest.raises(ValueError, match=r"`heal\.monitor_fraction` must monitor at least 2"):
        pruner.prune(SieveConfig(**FAR, heal=QUICK), progress=False)
