"""The search on a real (tiny) model: live ranks, scores, the whole run through `SievePruner`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed

from optimum_sieve import SievePruner
from optimum_sieve import pruner as pruner_module
from optimum_sieve.backbone.targets import find_targets, linear_weight
from optimum_sieve.evaluation.comparison import compare, expected_rises
from optimum_sieve.evaluation.scores import evaluate
from optimum_sieve.factorization.closed_form import factorize
from optimum_sieve.search.labels import calibrated_labels, expected_difference
from optimum_sieve.search.page.page import find_summary
from optimum_sieve.search.scoring.by_likelihood import CandidateScorer
from optimum_sieve.search.scoring.scorer import JointScorer
from optimum_sieve.surgery.apply import truncated
from optimum_sieve.surgery.live import LiveRanks
from optimum_sieve.tasks import Task


SETTINGS = {"allocation": "genetic", "rank_multiple": 2, "population_size": 4, "generations": 3, "rounds": 1}
# Of a random model any loss is acceptable here: what counts is that the parts work together.
TOLERANT = {"tolerance": 0.9, "confidence": 0.5}


def make_pruner(tmp_path, **options):
    return SievePruner(make_model(**options), make_tokenizer(), load_task(tmp_path, parity_rows(160)))


def make_bases(model):
    targets = find_targets(model)
    return {t.name: factorize(linear_weight(model.get_submodule(t.name)), projection="svd") for t in targets}


@pytest.fixture(params=[False, True], ids=["plain", "biased"])
def model(request):
    model = make_model(attention_bias=request.param)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


INPUT = torch.arange(3, 23)[None]


def logits(model):
    with torch.no_grad():
        return model(INPUT).logits


def test_live_ranks_compute_what_truncated_layers_compute(model):
    bases = make_bases(model)
    names = list(bases)
    before = logits(model)
    patterns = [dict(zip(names, [8, None, 0, 20, 4] * 10, strict=False)), dict.fromkeys(names, 12), {names[0]: 30}]
    with LiveRanks(model, bases) as live:
        for ranks in patterns:
            live.hold(ranks)
            held = logits(model)
            live.hold({})
            with truncated(model, bases, ranks, storage="factors"):
                torch.testing.assert_close(held, logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(before, logits(model))


def test_only_changed_layers_are_touched(model):
    bases = make_bases(model)
    names = list(bases)
    with LiveRanks(model, bases) as live:
        assert live.hold(dict.fromkeys(names, 8)) == len(names)
        held = {name: model.get_submodule(name) for name in names}
        assert live.hold({**dict.fromkeys(names, 8), names[3]: 4}) == 1
        assert [name for name in names if model.get_submodule(name) is not held[name]] == [names[3]]
        assert model.get_submodule(names[0]).right.weight.data_ptr() == bases[names[0]].right.data_ptr()
        with pytest.raises(KeyError, match="`ranks` must name layers that have a basis, got 'lm_head'"):
            live.hold({"lm_head": 4})
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in names)


def test_dense_layers_come_back_after_an_error(model):
    before = logits(model)

    def fail():
        with LiveRanks(model, make_bases(model)) as live:
            live.hold(dict.fromkeys(make_bases(model), 4))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(before, logits(model))


def make_scorer(live, tmp_path, ends):
    examples = load_task(tmp_path, parity_rows(160)).examples("selection", make_tokenizer())[: ends[-1]]
    scorer = CandidateScorer(live, examples, ends, make_tokenizer(), metric="accuracy", batch_size=8)
    return scorer, JointScorer([scorer]), examples


def count_scored(monkeypatch, kind, name):
    """Return a list that grows by the number of examples that a scorer's method scores at each call."""
    counts, method = [], getattr(kind, name)

    def counting(self, number):
        counts.append(len(self._parts[number]))
        return method(self, number)

    monkeypatch.setattr(kind, name, counting)
    return counts


def test_scores_are_those_of_an_evaluation(model, tmp_path, monkeypatch):
    bases = make_bases(model)
    counts = count_scored(monkeypatch, CandidateScorer, "_score")
    ranks = dict.fromkeys(bases, 8)
    with LiveRanks(model, bases) as live:
        _, joint, examples = make_scorer(live, tmp_path, [8, 16, 30])
        outcome = joint.score(ranks)
        options = {"metric": "accuracy", "batch_size": 8, "progress": False}
        live.hold({})
        dense = evaluate(model, examples, make_tokenizer(), **options)
        live.hold(ranks)
        pruned = evaluate(model, examples, make_tokenizer(), **options)
    expected = compare(dense, pruned)
    assert outcome.complete
    assert outcome.count == 30
    for field in ("mean", "standard_error", "agreement", "kl"):
        assert getattr(outcome, field) == pytest.approx(getattr(expected, field), abs=1e-5)
    labels = calibrated_labels(dense)
    assert outcome.rises == pytest.approx(expected_rises(labels, dense, pruned), abs=1e-4)
    assert outcome.expected == pytest.approx(expected_difference(labels, dense, pruned), abs=1e-4)
    # The dense model once, then the candidate.
    assert sum(counts) == 60


def test_a_candidate_below_the_tolerance_is_dropped(tmp_path):
    model = make_model()
    bases = make_bases(model)
    with LiveRanks(model, bases) as live:
        scorer, joint, examples = make_scorer(live, tmp_path, [16, 30])
        joint.score({})
        # A dense model that is always right: pruning can only lose.
        for row, example in enumerate(examples):
            scorer._dense[row] = [0.0 if place == example.target else -9.0 for place in range(2)]
        outcome = joint.score(dict.fromkeys(bases, 0), tolerance=0.01)
        tolerated = joint.score(dict.fromkeys(bases, 0), tolerance=0.99)
    assert not outcome.complete
    assert outcome.count == 16
    assert outcome.mean < -0.2
    assert outcome.rises == pytest.approx(tolerated.rises[:16], abs=1e-6)
    assert tolerated.complete


@pytest.mark.parametrize("preset", ["fast", "paper"])
@pytest.mark.parametrize("stop", [TOLERANT, {"pruning_ratio": 0.5}], ids=["tolerance", "ratio"])
def test_pruning_with_a_search(tmp_path, preset, stop):
    pruner = make_pruner(tmp_path)
    result = pruner.prune(unhealed(**SETTINGS, **stop, search_preset=preset), progress=False)
    parameters = result.report["parameters"]
    kept = parameters["targets_after"] / parameters["targets_before"]
    assert kept < 1
    parts = {trial["part"] for trial in result.trials}
    assert parts == ({"search", "confirm"} if "tolerance" in stop else {"search"})
    if "pruning_ratio" in stop:
        assert kept <= 0.5
    assert any(trial["kept"] == pytest.approx(kept) for trial in result.trials)


def test_search_then_prune_scores_no_candidate_twice(tmp_path, monkeypatch):
    config, work = unhealed(**SETTINGS, **TOLERANT), tmp_path / "work"
    found = make_pruner(tmp_path).search(config, work_dir=work, num_bottlenecks=3, progress=False)
    assert 0 < len(found["bottlenecks"]) <= 3
    assert find_summary(work) == found

    def forbidden(*args, **options):
        raise AssertionError("scored again")

    monkeypatch.setattr(JointScorer, "score", forbidden)
    result = make_pruner(tmp_path).prune(config, work_dir=work, progress=False)
    ranks = {f"model.{name}": entry["rank"] for name, entry in result.rank_pattern.items()}
    assert ranks == {name: rank for name, rank in found["ranks"].items() if rank is not None}


def test_search_leaves_the_model_dense(tmp_path):
    pruner = make_pruner(tmp_path)
    before = logits(pruner.model)
    pruner.search(unhealed(**SETTINGS, **TOLERANT), progress=False)
    assert torch.equal(before, logits(pruner.model))


def test_other_settings_are_another_study(tmp_path):
    work = tmp_path / "work"
    for seed in (0, 1):
        config = unhealed(**SETTINGS, pruning_ratio=0.5, seed=seed)
        make_pruner(tmp_path).search(config, work_dir=work, progress=False)
    assert len(list(work.glob("search-*.json"))) == 2


def test_a_search_needs_the_genetic_allocation(tmp_path):
    with pytest.raises(ValueError, match="`allocation` must be 'genetic' for a search, got 'energy'"):
        make_pruner(tmp_path).search(unhealed(tolerance=0.1), progress=False)


def test_too_few_selection_examples_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(pruner_module, "calibrate", None)
    with pytest.raises(ValueError, match="`search_fraction` must leave at least 2 selection examples"):
        make_pruner(tmp_path).prune(unhealed(**SETTINGS, **TOLERANT, search_fraction=0.001), progress=False)


def scaled(value, answer, accepted):
    return value * (answer == accepted[0])


def test_a_search_by_a_metric_without_source_is_neither_stored_nor_shared(tmp_path):
    task = Task.from_dict(load_task(tmp_path, parity_rows(160)).spec, tmp_path, metric=partial(scaled, 0.5))
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    config, work = unhealed(**SETTINGS, **TOLERANT), tmp_path / "work"
    pruner.search(config, work_dir=work, progress=False)
    assert not (work / "search.db").exists()
    for search, options in (
        (pruner.search, {"study_storage": f"sqlite:///{tmp_path / 'shared.db'}"}),
        (pruner.join_search, {"work_dir": work}),
    ):
        with pytest.raises(ValueError, match="`metric` must be a function from a file"):
            search(config, progress=False, **options)
