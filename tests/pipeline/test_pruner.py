"""The main job end to end, on a tiny model that has learned the toy task."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from tiny_models import make_pruned_model, make_tiny_model
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_sieve import SievePruner, compare, evaluate
from optimum_sieve.allocation.allocators import predicted_loss
from optimum_sieve.allocation.stage import allocate_ranks, loss_curves
from optimum_sieve.calibration import stage as calibration_stage
from optimum_sieve.calibration.collect import collect_moments
from optimum_sieve.calibration.losses import answer_loss
from optimum_sieve.calibration.stage import calibrate, kept_in_round, ranks_in_round
from optimum_sieve.evaluation import stage as evaluation_stage
from optimum_sieve.evaluation.batches import make_batches
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.publish import result as result_module


QUIET = {"progress": False}
# Below this many parameters a pivoted matrix of the toy model keeps almost nothing.
HALF = unhealed(pruning_ratio=0.5, rank_multiple=1)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(900))


@pytest.fixture(scope="module")
def learned(task):
    """A toy model trained on the calibration split until it does the task."""
    model = make_model(initializer_range=0.05).train()
    batches = make_batches(
        task.examples("calibration", make_tokenizer()), make_tokenizer(), batch_size=32, candidates=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(200):
        optimizer.zero_grad()
        batch = batches[step % len(batches)]
        (answer_loss(model, batch) / batch.num_examples).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def pruner(learned, task):
    return SievePruner(copy.deepcopy(learned), make_tokenizer(), task, base_model="toy/base")


def score(model, task, split="test"):
    tokenizer = make_tokenizer()
    return evaluate(model, task.examples(split, tokenizer), tokenizer, metric="accuracy", batch_size=32, progress=False)


def test_tolerance_holds_on_the_test_split(pruner, learned, task):
    dense = score(learned, task)
    assert dense.score > 0.9
    result = pruner.prune(unhealed(tolerance=0.05, rank_multiple=1), **QUIET)
    difference = compare(dense, score(result.model, task))
    parameters = result.report["parameters"]
    assert parameters["targets_after"] < 0.5 * parameters["targets_before"]
    assert difference.mean + 2 * difference.standard_error >= -0.05
    assert result.report["paired_difference"]["mean"] == pytest.approx(difference.mean)
    found = compare(result.scores[0].dense, result.scores[0].pruned)
    assert (found.mean, found.agreement) == (difference.mean, difference.agreement)


def test_budget_is_met_and_counted_from_the_modules(pruner, learned):
    before = sum(p.numel() for p in learned.parameters())
    parameters = pruner.prune(HALF, **QUIET).report["parameters"]
    assert 0.45 * parameters["targets_before"] < parameters["targets_after"] <= 0.5 * parameters["targets_before"]
    assert parameters["model_before"] == before
    assert parameters["model_after"] == sum(p.numel() for p in pruner.model.parameters())
    saved = parameters["targets_before"] - parameters["targets_after"]
    assert parameters["model_before"] - parameters["model_after"] == saved


def kl_of(learned, task, **settings):
    pruner = SievePruner(copy.deepcopy(learned), make_tokenizer(), task)
    return pruner.prune(unhealed(**{"pruning_ratio": 0.7, "rank_multiple": 1, **settings}), **QUIET).report["kl"]


def test_joint_with_energy_keeps_more_than_the_baselines(learned, task):
    best = kl_of(learned, task)
    assert best < kl_of(learned, task, allocation="uniform")
    assert best < kl_of(learned, task, projection="svd")
    assert best < kl_of(learned, task, projection="activation", allocation="uniform", storage="factors")
    assert best < kl_of(learned, task, projection="learned", allocation="uniform", storage="factors")


@pytest.mark.parametrize("settings", [
    {"projection": "svd"},
    {"projection": "activation", "rounds": 1},
    {"projection": "learned", "allocation": "uniform"},
    {"loss": "labels", "storage": "factors"},
    {"loss": "answer", "allocation": "uniform"},
    {"rank_multiple": 8, "rounds": 3},
    {"weighting": "norms", "rounds": 3},
])  # fmt: skip
def test_every_setting_gives_a_model_of_the_size_asked(pruner, settings):
    parameters = pruner.prune(unhealed(**{"pruning_ratio": 0.4, **settings}), **QUIET).report["parameters"]
    assert parameters["targets_after"] <= 0.6 * parameters["targets_before"]


def test_saved_model_loads_with_plain_transformers(pruner, task, tmp_path):
    result = pruner.prune(HALF, **QUIET)
    pruner.save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("Number: 7 51 30 Parity:", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, result.model(**inputs).logits)
    assert score(model, task).score == result.report["pruned"]["score"]


def test_report_and_card_lie_beside_the_model(pruner, tmp_path):
    result = pruner.prune(HALF, **QUIET)
    pruner.save_pretrained(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "sieve_report.json").read_text())
    expected = {"task", "split", "count", "dense", "pruned", "majority_score", "paired_difference", "agreement", "kl"}
    assert expected | {"parameters", "bytes", "seconds", "settings", "versions"} <= report.keys()
    assert report["split"] == "test"
    assert 0 < report["largest_coefficient"] <= 32
    assert report["bytes"]["after"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report["settings"] == result.report["settings"] == HALF.to_dict()
    assert "toy/base" in (tmp_path / "out" / "README.md").read_text()


def test_work_directory_resumes_every_stage(learned, task, tmp_path, monkeypatch):
    config = unhealed(tolerance=0.1, rank_multiple=1, search_steps=3)
    first = SievePruner(copy.deepcopy(learned), make_tokenizer(), task).prune(config, work_dir=tmp_path, **QUIET)

    def forbidden(*args, **kwargs):
        raise AssertionError("a finished stage was run again")

    monkeypatch.setattr(calibration_stage, "collect_moments", forbidden)
    monkeypatch.setattr(calibration_stage, "factorize", forbidden)
    scored = []
    monkeypatch.setattr(
        evaluation_stage,
        "evaluate",
        lambda *args, description, **options: scored.append(description) or evaluate(*args, **options),
    )
    second = SievePruner(copy.deepcopy(learned), make_tokenizer(), task).prune(config, work_dir=tmp_path, **QUIET)
    assert second.rank_pattern == first.rank_pattern
    assert second.trials == first.trials
    # What will be saved is always scored as it is.
    assert scored == ["pruned model on test"]


def test_killed_run_resumes_to_the_same_result(learned, task, tmp_path, monkeypatch):
    config = unhealed(tolerance=0.1, rank_multiple=1, search_steps=3)
    whole = SievePruner(copy.deepcopy(learned), make_tokenizer(), task).prune(config, **QUIET)
    calls = iter(range(100))

    def interrupted(*args, **options):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    broken = SievePruner(copy.deepcopy(learned), make_tokenizer(), task)
    with monkeypatch.context() as patched:
        patched.setattr(evaluation_stage, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            broken.prune(config, work_dir=tmp_path, **QUIET)
    assert all(type(module).__name__ != "FactorizedLinear" for module in broken.model.modules())
    resumed = broken.prune(config, work_dir=tmp_path, **QUIET)
    assert resumed.rank_pattern == whole.rank_pattern
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_first_run_has_the_bases_as_one_that_goes_on(learned, task, tmp_path):
    """Where they lie otherwise in memory, products round otherwise, and a search that goes on finds something else."""
    run = prepare(
        copy.deepcopy(learned), make_tokenizer(), (task,), HALF, work_dir=tmp_path, study_storage=None, progress=False
    )
    first, second = calibrate(run), calibrate(run)
    for name, basis in first.items():
        for field, tensor in basis.tensors().items():
            again = second[name].tensors()[field]
            assert torch.equal(tensor, again)
            assert tensor.stride() == again.stride(), (name, field)


def test_other_data_or_weights_are_not_taken_from_the_work_directory(learned, task, tmp_path):
    SievePruner(copy.deepcopy(learned), make_tokenizer(), task).prune(HALF, work_dir=tmp_path, **QUIET)
    files = set(tmp_path.glob("*.safetensors"))
    changed = copy.deepcopy(learned)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    SievePruner(changed, make_tokenizer(), task).prune(HALF, work_dir=tmp_path, **QUIET)
    assert len(set(tmp_path.glob("*.safetensors"))) == 2 * len(files)


def test_test_split_is_scored_last(pruner, monkeypatch):
    order = []
    monkeypatch.setattr(
        evaluation_stage,
        "evaluate",
        lambda *args, description, **options: order.append(description) or evaluate(*args, **options),
    )
    pruner.prune(unhealed(tolerance=0.1, rank_multiple=1, search_steps=2), **QUIET)
    assert [description.rpartition(" ")[2] for description in order] == [*["selection"] * 3, *["test"] * 2]


@pytest.mark.parametrize("where", ["compare", "sieve_model"])
def test_failure_after_pruning_restores_the_dense_model(pruner, learned, where, monkeypatch):
    def fail(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(result_module, where, fail)
        with pytest.raises(KeyboardInterrupt):
            pruner.prune(HALF, **QUIET)
    state = pruner.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in learned.state_dict().items())
    assert pruner.prune(HALF, **QUIET).report["pruned"]["score"] > 0.5


def test_other_models_are_refused_at_once(task):
    trunk = make_tiny_model("bert").base_model
    with pytest.raises(ValueError, match=r"`model` must .*that writes, or a sequence classifier, got BertModel"):
        SievePruner(trunk, make_tokenizer(), task)
    with pytest.raises(ValueError, match="`model` must be a dense model, got one that is pruned already"):
        SievePruner(make_pruned_model("llama"), make_tokenizer(), task)


def test_an_encoder_with_a_language_model_head_is_refused(task):
    config = make_tiny_model("bert").config
    with pytest.raises(ValueError, match=r"`model` must .*or a sequence classifier, got BertLMHeadModel"):
        SievePruner(transformers.BertLMHeadModel(config), make_tokenizer(), task)


def test_a_model_with_adapters_is_refused(task):
    model = make_model()
    model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="`model` must be a plain model, got one with adapters"):
        SievePruner(model, make_tokenizer(), task)


def test_layers_that_share_a_weight_are_refused_if_they_are_named(pruner):
    layers = pruner.model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(
        ValueError, match=r"`model` must not share weights between the layers to prune, got 'model\.layers\.0"
    ):
        pruner.prune(replace(HALF, target_modules=("up_proj",)), **QUIET)


def test_quantized_models_are_refused(pruner):
    pruner.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="`model` must not be quantized"):
        pruner.prune(HALF, **QUIET)


def test_another_tokenizer_or_architecture_takes_nothing_from_the_work_directory(learned, task, tmp_path):
    SievePruner(copy.deepcopy(learned), make_tokenizer(), task).prune(HALF, work_dir=tmp_path, **QUIET)
    count = len(list(tmp_path.glob("*.safetensors")))
    SievePruner(copy.deepcopy(learned), make_tokenizer(), task).prune(HALF, work_dir=tmp_path, **QUIET)
    assert len(list(tmp_path.glob("*.safetensors"))) == count
    SievePruner(copy.deepcopy(learned), make_tokenizer(before="<s>"), task).prune(HALF, work_dir=tmp_path, **QUIET)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 * count
    changed = copy.deepcopy(learned)
    changed.config.rms_norm_eps = 1e-5
    SievePruner(changed, make_tokenizer(), task).prune(HALF, work_dir=tmp_path, **QUIET)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 * count


def test_what_could_not_be_saved_is_refused_before_any_work(pruner):
    with pytest.raises(ValueError, match=r"`model` must .*inside its base model alone, got 'lm_head'"):
        pruner.prune(unhealed(pruning_ratio=0.5, target_modules=("lm_head",)), **QUIET)


@pytest.mark.parametrize("split", ["selection", "test"])
def test_examples_too_long_are_refused_before_any_work(learned, tmp_path, split, monkeypatch):
    rows = {name: parity_rows(10, seed) for seed, name in enumerate(("calibration", "selection", "test"))}
    rows[split][3]["text"] = "1 " * 100
    for name, some in rows.items():
        write_rows(tmp_path / f"{name}.jsonl", some)
    monkeypatch.setattr(calibration_stage, "collect_moments", None)
    task = load_task(tmp_path, data={"files": {name: f"{name}.jsonl" for name in rows}})
    with pytest.raises(ValueError, match="`examples` must fit in the 64 tokens the model takes, got 1 longer"):
        SievePruner(learned, make_tokenizer(), task).prune(HALF, **QUIET)


def test_later_rounds_watch_the_pruned_model(learned, task, monkeypatch):
    ranks = []

    def watching(model, targets, *args, **options):
        modules = [model.get_submodule(target.name) for target in targets]
        ranks.append(sum(type(module).__name__ == "FactorizedLinear" for module in modules))
        return collect_moments(model, targets, *args, **options)

    monkeypatch.setattr(calibration_stage, "collect_moments", watching)
    monkeypatch.setattr(calibration_stage, "_ROUND_RISE", math.inf)
    config = unhealed(pruning_ratio=0.6, rank_multiple=1, rounds=2)
    SievePruner(copy.deepcopy(learned), make_tokenizer(), task).prune(config, **QUIET)
    assert ranks[0] == 0
    assert ranks[1] > 0


@pytest.mark.parametrize("allocation", ["energy", "uniform"])
def test_later_rounds_watch_no_model_that_is_much_worse(learned, task, monkeypatch, allocation):
    taken = []

    def watching(run, bases, number):
        ranks = ranks_in_round(run, bases, number)
        curves = loss_curves(run, bases)
        goal = allocate_ranks(run, bases, kept_in_round(run.config, number))
        taken.append((predicted_loss(curves, ranks), predicted_loss(curves, goal)))
        return ranks

    monkeypatch.setattr(calibration_stage, "ranks_in_round", watching)
    config = unhealed(pruning_ratio=0.9, rank_multiple=1, rounds=2, allocation=allocation)
    for part in (math.inf, 0.5, 0.0):
        rise = part * taken[0][1] if taken else math.inf
        monkeypatch.setattr(calibration_stage, "_ROUND_RISE", rise)
        SievePruner(copy.deepcopy(learned), make_tokenizer(), task).prune(config, **QUIET)
    (free, goal), (held, _), (dense, _) = taken
    assert free == goal
    assert goal / 2 >= held > 0
    assert dense == 0


def test_later_rounds_of_other_projections_go_the_whole_way(learned, task, monkeypatch):
    monkeypatch.setattr(calibration_stage, "_ROUND_RISE", 0.0)
    monkeypatch.setattr(calibration_stage, "predicted_loss", None)
    config = unhealed(pruning_ratio=0.6, rank_multiple=1, projection="activation")
    result = SievePruner(copy.deepcopy(learned), make_tokenizer(), task).prune(config, **QUIET)
    assert result.report["parameters"]["targets_after"] < result.report["parameters"]["targets_before"]


def test_later_rounds_weight_tokens_by_the_factors_before(learned, task, tmp_path, monkeypatch):
    weighted, logits = [], []

    def watching(*args, token_weights=None, **options):
        weighted.append(token_weights is not None)
        return collect_moments(*args, token_weights=token_weights, **options)

    monkeypatch.setattr(calibration_stage, "collect_moments", watching)
    for weighting in ("norms", "likelihood", "balanced"):
        config = unhealed(pruning_ratio=0.6, rank_multiple=1, weighting=weighting)
        pruner = SievePruner(copy.deepcopy(learned), make_tokenizer(), task)
        model = pruner.prune(config, work_dir=tmp_path, **QUIET).model
        with torch.no_grad():
            logits.append(model(torch.tensor([[1, 2, 3]])).logits)
    # The first round's moments are the same and lie in the work directory.
    assert weighted == [False, False, True, True]
    assert not any(torch.allclose(*pair) for pair in itertools.combinations(logits, 2))


def test_bfloat16_model_is_pruned_in_bfloat16(learned, task):
    pruner = SievePruner(copy.deepcopy(learned).bfloat16(), make_tokenizer(), task)
    result = pruner.prune(HALF, **QUIET)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert result.report["pruned"]["score"] > 0.85


def test_second_prune_is_refused(pruner):
    pruner.prune(HALF, **QUIET)
    with pytest.raises(RuntimeError, match=r"`prune` must .*once per pruner"):
        pruner.prune(HALF, **QUIET)


def test_saving_before_pruning_is_refused(pruner, tmp_path):
    with pytest.raises(RuntimeError, match="must follow `prune`"):
        pruner.save_pretrained(tmp_path / "out")


def test_overwrite_replaces_the_directory_as_a_whole(pruner, tmp_path):
    pruner.prune(HALF, **QUIET)
    pruner.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "model-00002-of-00002.safetensors").write_text("of an older, larger model")
    with pytest.raises(FileExistsError, match="`output_dir` must be new or empty"):
        pruner.save_pretrained(tmp_path / "out")
    pruner.save_pretrained(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "model-00002-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_prune_loads_the_dense_model_again_and_uses_what_was_stored(task, learned, tmp_path, monkeypatch):
    learned.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    pruner = SievePruner.from_pretrained(tmp_path / "dense", task=task)
    options = {"work_dir": tmp_path / "work", **QUIET}
    # The moments of one round do not depend on the size.
    first, other = (unhealed(pruning_ratio=ratio, rank_multiple=1, rounds=1) for ratio in (0.5, 0.3))
    first = pruner.prune(first, **options)
    monkeypatch.setattr(calibration_stage, "collect_moments", None)
    second = pruner.prune(other, **options)
    sizes = [result.report["parameters"]["targets_after"] for result in (first, second)]
    assert sizes[0] < sizes[1]
    assert pruner.result is second
    assert pruner.model is second.model
    alone = SievePruner.from_pretrained(tmp_path / "dense", task=task)
    expected = alone.prune(other, **options)
    assert expected.report["pruned"] == second.report["pruned"]
