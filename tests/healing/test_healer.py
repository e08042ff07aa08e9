"""The healer: sizes of every kind of model and storage, by energy or by a search, with labels and without."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from healed_world import TOKENIZER, assert_same
from model_kinds import make_model as make_other_model
from toy import load_task, make_model, make_tokenizer, parity_rows

from optimum_sieve import SieveConfig, SievePruner
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.evaluation.teacher import CandidateTeacher
from optimum_sieve.healing import stage
from optimum_sieve.healing.loop import heal
from optimum_sieve.healing.stage import Healer
from optimum_sieve.pipeline import ranks
from optimum_sieve.pipeline.prepare import prepare


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.healing.size import HealedSize
    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Task

QUIET: dict[str, Any] = {"progress": False}
FAR: dict[str, Any] = {"pruning_ratio": 0.9, "rank_multiple": 1, "rounds": 1, "tune": None}
QUICK = HealConfig(steps=2, learning_rate=1e-2)


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def make_run(model: PreTrainedModel, task: Task, **settings: Any) -> Run:
    config = SieveConfig(**{**FAR, "heal": QUICK, **settings})
    return prepare(model, TOKENIZER, [task], config, work_dir=None, study_storage=None, progress=False)


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def mixtral() -> PreTrainedModel:
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 2, "hidden_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**sizes, **heads, vocab_size=len(TOKENIZER), max_position_embeddings=64)
    return transformers.MixtralForCausalLM(config).eval()


MODELS = {
    "biased": lambda: make_model(attention_bias=True),
    "gpt2": gpt2,
    "mixtral": mixtral,
    "t5": lambda: make_other_model("t5"),
    "bert": lambda: make_other_model("bert"),
    "llama-classifier": lambda: make_other_model("llama-classifier"),
}


@pytest.mark.parametrize("storage", ["pivoted", "factors"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_healed_and_loads_with_plain_transformers(
    name: str, storage: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(after="</s>") if name in ("t5", "bert", "llama-classifier") else TOKENIZER
    task = load_task(tmp_path, parity_rows(60))
    pruner = SievePruner(MODELS[name](), tokenizer, task, base_model="toy/base")
    result = pruner.prune(SieveConfig(**{**FAR, "pruning_ratio": 0.7}, storage=storage, heal=QUICK), **QUIET)
    sizes = QUICK.sizes_to(1 - 0.7)
    assert [size["asked"] for size in result.report["healing"]["sizes"]] == sizes
    assert result.report["healing"]["steps"] == 2 * len(sizes)
    parameters = result.report["parameters"]
    assert parameters["targets_after"] <= 0.3 * parameters["targets_before"]
    auto = transformers.AutoModelForCausalLM
    if name in ("bert", "llama-classifier"):
        auto = transformers.AutoModelForSequenceClassification
    elif name == "t5":
        auto = transformers.AutoModelForSeq2SeqLM
    loaded = auto.from_pretrained(pruner.save_pretrained(tmp_path / "out"))
    assert_same(state(loaded), state(result.model))


@pytest.mark.parametrize("projection", ["activation", "svd"])
def test_other_projections_descend(dense: PreTrainedModel, task: Task, projection: str) -> None:
    pruner = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    result = pruner.prune(SieveConfig(**FAR, projection=projection, allocation="uniform", heal=QUICK), **QUIET)
    assert len(result.report["healing"]["sizes"]) == len(QUICK.sizes_to(1 - 0.9))
    assert result.report["parameters"]["targets_after"] <= 0.1 * result.report["parameters"]["targets_before"]


def test_adapters_are_learned_and_healed_at_one_size(dense: PreTrainedModel, tmp_path: Path) -> None:
    pruner = SievePruner(copy.deepcopy(dense), TOKENIZER, load_task(tmp_path, parity_rows(60)))
    settings = {**FAR, "projection": "learned", "allocation": "uniform", "storage": "factors"}
    result = pruner.prune(SieveConfig(**settings, heal=QUICK), **QUIET)
    assert [size["asked"] for size in result.report["healing"]["sizes"]] == [1 - 0.9]


def test_a_size_at_which_nothing_is_factorized_is_not_healed(
    dense: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(copy.deepcopy(dense), task)
    healer = Healer(run)
    monkeypatch.setattr(stage, "heal", None)
    accepted = []
    ranks = dict.fromkeys((target.name for target in run.targets), None)
    healer.descend(calibrate(run), [0.9], lambda size: accepted.append(size) or True, first_ranks=ranks)
    assert [size.ranks(ranks) for size in accepted] == [ranks]
    assert_same(state(run.model), state(dense))
    assert (healer.report()["steps"], healer.report()["kept"]) == (0, 1.0)


def test_given_ranks_are_those_of_the_first_size(dense: PreTrainedModel, task: Task) -> None:
    run = make_run(copy.deepcopy(dense), task)
    bases, healer = calibrate(run), Healer(run)
    given: dict[str, int | None] = {target.name: 1 + number % 5 for number, target in enumerate(run.targets)}
    given[run.targets[0].name], given[run.targets[1].name] = None, 0
    sizes: list[HealedSize] = []
    healer.descend(bases, [0.5, 0.2], lambda size: sizes.append(size) or True, first_ranks=given)
    first, second = sizes
    assert first.ranks(given) == given
    assert healer.best is second
    # What was removed does not come back.
    for name, rank in second.ranks(given).items():
        before = given[name]
        assert before is None or (rank is not None and rank <= before), name
    # Between calls the model is dense; the result can be put into it and taken out.
    assert_same(state(run.model), state(dense))
    healer.put(second)
    assert state(run.model).keys() != state(dense).keys()
    healer.restore()
    assert_same(state(run.model), state(dense))


def test_an_unlabelled_task_is_healed_on_the_dense_model_alone(
    dense: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons = []

    def healing(model: Any, given: Any, *arguments: Any, **options: Any) -> Any:
        lessons.extend(given)
        return heal(model, given, *arguments, **options)

    monkeypatch.setattr(stage, "heal", healing)
    task = load_task(tmp_path, parity_rows(120), answer=None)
    results = []
    for weight in (0.9, 0.0):
        config = SieveConfig(**FAR, label_source="model", heal=HealConfig(steps=4, gold_weight=weight))
        results.append(SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(config, **QUIET))
    assert [lesson.gold for lesson in lessons] == [False] * len(lessons)
    assert lessons
    # The weight of gold answers that do not exist changes nothing.
    assert_same(state(results[0].model), state(results[1].model))


def test_gold_answers_count_where_there_are_any(dense: PreTrainedModel, task: Task) -> None:
    models = [
        SievePruner(copy.deepcopy(dense), TOKENIZER, task)
        .prune(SieveConfig(**FAR, heal=HealConfig(steps=4, gold_weight=weight)), **QUIET)
        .model
        for weight in (0.9, 0.0)
    ]
    first, second = (state(model) for model in models)
    assert any(not torch.equal(tensor, second[name]) for name, tensor in first.items())


GENETIC: dict[str, Any] = {
    **{"allocation": "genetic", "population_size": 4, "generations": 2, "rank_multiple": 2, "rounds": 1},
    **{"search_fraction": 0.5, "heal": QUICK, "tune": None},
}


def test_the_winner_of_a_search_is_healed(dense: PreTrainedModel, task: Task, tmp_path: Path) -> None:
    plain = SieveConfig(pruning_ratio=0.6, **{**GENETIC, "heal": None})
    unhealed = SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(plain, work_dir=tmp_path, **QUIET)
    config = SieveConfig(pruning_ratio=0.6, **GENETIC)
    result = SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(config, work_dir=tmp_path, **QUIET)
    assert result.rank_pattern == unhealed.rank_pattern
    assert result.report["parameters"] == unhealed.report["parameters"]
    assert [size["asked"] for size in result.report["healing"]["sizes"]] == [1 - 0.6]
    assert result.report["healing"]["steps"] == 2
    after, before = state(result.model), state(unhealed.model)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_the_descent_goes_below_the_winner_of_a_search(
    dense: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a task on which any size holds the winner is tiny, so it counts as one of .4 here."""
    winners: list[Any] = []
    monkeypatch.setattr(ranks, "kept_fraction", lambda run, found: winners.append(found) or 0.4)
    config = SieveConfig(tolerance=0.9, confidence=0.5, **{**GENETIC, "heal": HealConfig(steps=2, shrink=0.5)})
    result = SievePruner(copy.deepcopy(dense), TOKENIZER, task).prune(config, **QUIET)
    trials = [trial for trial in result.trials if trial.get("healed")]
    assert len(winners) == 1
    assert result.report["healing"]["kept_without"] == 0.4
    # One size below it surely loses nothing.
    assert trials[0]["lower_bound"] >= 0
    assert [trial["asked"] for trial in trials[:2]] == pytest.approx([0.2, 0.02])
    assert trials[0]["count"] == task.splits["selection"]


def test_the_plan_states_the_cost(dense: PreTrainedModel, task: Task) -> None:
    pruner = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    plan = pruner.plan(SieveConfig(tolerance=0.02, tune=None, heal=HealConfig(steps=100)))
    line = "healing                100 steps of 16 examples for each of several falling sizes, until two in a row"
    assert line in plan.format()
    everything = pruner.plan(SieveConfig(tolerance=0.02, tune=None, heal=HealConfig(adapter_rank=0)))
    kept = round(0.9 * plan.targets_parameters)
    # Pivots are trained as factors, which may have twice as many parameters; two sizes are held, of four bytes each.
    assert everything.heal_bytes == 2 * kept * 20 + 2 * 3 * kept * 4
    assert 2 * 3 * kept * 4 < plan.heal_bytes < everything.heal_bytes
    small = pruner.plan(SieveConfig(pruning_ratio=0.75, storage="factors", tune=None, heal=HealConfig(steps=100)))
    assert (
        "healing                3 x 100 steps of 16 examples, 4,800 forward and backward; LoRA of rank 8 on both"
        in small.format()
    )
    # At the first size: two sizes, and adapters of rank 8 of its factors.
    first = 0.25 / HealConfig().shrink ** 2
    shapes = [weight.shape for name, weight in dense.named_parameters() if "_proj" in name]
    adapters = sum(
        8 * (rows + columns + 2 * math.ceil(rows * columns * first / (rows + columns))) for rows, columns in shapes
    )
    assert small.heal_bytes == 2 * round(small.targets_parameters * first) * 4 + adapters * 20
    # The default, and none.
    assert "healing                3 x 64 steps" in pruner.plan(SieveConfig(pruning_ratio=0.75)).format()
    assert "healing" not in pruner.plan(SieveConfig(tolerance=0.02, heal=None)).format()


def test_a_loss_that_is_not_finite_names_the_setting_and_leaves_the_dense_model(
    dense: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    plain, calls = CandidateTeacher.losses, iter(range(10**6))

    def losses(self: Any, model: Any, batch: Any) -> Any:
        divergence, gold = plain(self, model, batch)
        return divergence * (float("nan") if next(calls) > 2 else 1), gold

    monkeypatch.setattr(CandidateTeacher, "losses", losses)
    with pytest.raises(
        ValueError, match=r"loss of healing .* must be finite, got a loss of nan. Lower `heal\.learning_rate`"
    ):
        pruner.prune(SieveConfig(**FAR, heal=HealConfig(steps=2, train_norms=True)), **QUIET)
    assert_same(state(pruner.model), state(dense))
