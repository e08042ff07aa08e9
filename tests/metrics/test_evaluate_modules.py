"""Modules of the evaluate library as metrics, with the real library and modules written here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from metric_modules import ACCURACY, F1, LISTS, TEXTS, module_metric, write_module
from sklearn.metrics import f1_score

from optimum_sieve.metrics import ModuleMetric
from optimum_sieve.metrics import module_metric as module_metric_file
from optimum_sieve.metrics.class_metrics import majority_class_score, score_classes
from optimum_sieve.metrics.identity import metric_name, metric_source
from optimum_sieve.metrics.module_scores import GROUPS, check_module, module_score, score_by_module
from optimum_sieve.metrics.scored import Scored, jackknifed, jackknifed_by_group, standard_error
from optimum_sieve.metrics.text_metrics import majority_text_score, score_texts


MATCHES = "matches = [text in (each if isinstance(each, list) else [each]) for text, each in zip(predictions, gold)]"


def classes(count: int, seed: int = 0, right: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.choice(2, count, p=[0.6, 0.4])
    return np.where(rng.random(count) < right, targets, 1 - targets), targets


def test_a_mean_has_the_values_of_its_examples(tmp_path: Path) -> None:
    predictions, targets = classes(300)
    found = score_classes(module_metric(tmp_path, "accuracy", ACCURACY), predictions, targets)
    expected = score_classes("accuracy", predictions, targets)
    assert (found.score, found.error_method) == (expected.score, "examples")
    np.testing.assert_array_equal(found.values, expected.values)


def test_another_metric_has_the_pseudo_values_of_the_jackknife(tmp_path: Path) -> None:
    predictions, targets = classes(60)
    found = score_classes(module_metric(tmp_path, "f1", F1), predictions, targets)
    left_out = np.array([f1_score(np.delete(targets, i), np.delete(predictions, i)) for i in range(60)])
    assert found.score == pytest.approx(f1_score(targets, predictions))
    assert found.error_method == "jackknife"
    np.testing.assert_allclose(found.values, 60 * found.score - 59 * left_out)


def bootstrap(statistic: Any, count: int, resamples: int = 2000) -> float:
    rng = np.random.default_rng(1)
    return float(np.std([statistic(rng.integers(0, count, count)) for _ in range(resamples)]))


def f1_of(predictions: np.ndarray, targets: np.ndarray) -> float:
    return (
        2 * float(((predictions == 1) & (targets == 1)).sum()) / float((predictions == 1).sum() + (targets == 1).sum())
    )


# The same metric of texts.
F1_OF_TEXTS = """
hits, total = 2 * ((found == "1") & (np.array(gold) == "1")).sum(), (found == "1").sum() + (np.array(gold) == "1").sum()
return {"f1": hits / max(total, 1)}
"""


def score(directory: Path, kind: str, predictions: np.ndarray, targets: np.ndarray, before: str = "") -> Scored:
    """Score classes as they are, or written as texts."""
    if kind == "classes":
        return score_classes(module_metric(directory, "f1", before + F1.strip()), predictions, targets)
    metric = module_metric(directory, "f1", before + F1_OF_TEXTS.strip(), features=TEXTS)
    return score_texts(metric, list(map(str, predictions)), [[str(target)] for target in targets])


@pytest.mark.parametrize(
    ("kind", "count", "method"),
    [("classes", 450, "jackknife"), ("texts", 90, "jackknife"), ("texts", 450, "jackknife, 100 groups")],
)
def test_the_jackknife_agrees_with_the_bootstrap_alone_and_paired(
    tmp_path: Path, kind: str, count: int, method: str
) -> None:
    dense, targets = classes(count)
    changed = np.random.default_rng(2).random(count) < 0.1
    pruned = np.where(changed, 1 - dense, dense)
    before, after = (score(tmp_path, kind, predictions, targets) for predictions in (dense, pruned))
    assert before.error_method == method
    assert len(before.values) == count
    alone = bootstrap(lambda rows: f1_of(dense[rows], targets[rows]), count)
    assert before.standard_error == pytest.approx(alone, rel=0.15)
    paired = bootstrap(lambda rows: f1_of(pruned[rows], targets[rows]) - f1_of(dense[rows], targets[rows]), count)
    assert standard_error(after.values - before.values) == pytest.approx(paired, rel=0.15)
    # The differences say more than two errors that are taken to be independent.
    assert paired < 0.8 * np.hypot(before.standard_error, after.standard_error)


@pytest.mark.parametrize(("kind", "left_out", "most"), [("classes", 999, 4), ("texts", 990, GROUPS)])
def test_the_jackknife_calls_a_module_a_bounded_number_of_times(
    tmp_path: Path, kind: str, left_out: int, most: int
) -> None:
    count = f"with open({str(tmp_path / 'calls')!r}, 'a') as file: file.write(f'{{len(found)}}\\n')\n"
    score(tmp_path, kind, *classes(1000), before=count)
    sizes = [int(line) for line in (tmp_path / "calls").read_text().split()]
    assert sizes.count(left_out) == most
    # All examples, at most the four pairs of classes alone, and the check whether it is their mean.
    assert len(sizes) <= most + 6


def test_groups_of_one_example_give_the_jackknife() -> None:
    left_out = np.random.default_rng(0).random(50)
    by_group = jackknifed_by_group(0.5, left_out, np.arange(50))
    np.testing.assert_allclose(by_group.values, jackknifed(0.5, left_out).values)


@pytest.mark.parametrize("groups", [np.arange(240) % 60, np.arange(240) % 7])
def test_the_groups_of_a_mean_have_the_standard_error_of_their_means(groups: np.ndarray) -> None:
    values = np.random.default_rng(0).random(240)
    left_out = np.array([values[groups != group].mean() for group in range(groups.max() + 1)])
    found = jackknifed_by_group(values.mean(), left_out, groups)
    means = np.array([values[groups == group].mean() for group in range(groups.max() + 1)])
    assert found.values.mean() == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(standard_error(means), rel=1e-6 if 240 % len(means) == 0 else 0.05)


def test_a_module_that_is_a_mean_of_some_parts_only_is_none(tmp_path: Path) -> None:
    body = "score = (found == np.array(gold)).mean()\nreturn {'odd': score if len(found) in (1, 16, 80) else score / 2}"
    found = score_classes(module_metric(tmp_path, "odd", body), *classes(80))
    assert found.error_method == "jackknife"


def test_numbers_of_the_examples_are_taken_as_they_are(tmp_path: Path) -> None:
    texts, answers = ["a", "b", "x"], [["a"], ["b", "c"], ["d"]]
    one_each = module_metric(tmp_path, "each", f"{MATCHES}\nreturn {{'each': np.float32(matches)}}", features=LISTS)
    found = score_texts(one_each, texts, answers)
    assert (found.values.tolist(), found.error_method) == ([1, 1, 0], "examples")
    # As `rouge`, which aggregates by a bootstrap unless it is told not to.
    body = f"{MATCHES}\nreturn {{'key': 99.0 if use_aggregator else [float(match) for match in matches]}}"
    spec = {"key": "key"}
    aggregated = module_metric(tmp_path, "rouge", body, features=LISTS, parameters=", use_aggregator=True", spec=spec)
    check_module(aggregated, answers[:1], texts=True)
    assert score_texts(aggregated, texts, answers).values.tolist() == [1, 1, 0]


def test_references_are_lists_where_a_module_takes_them(tmp_path: Path) -> None:
    texts, answers = ["a", "c", "c"], [["a", "b"], ["b", "c"], ["c", "d"]]
    body = f"{MATCHES}\nreturn {{'match': np.mean(matches)}}"
    lists = score_texts(module_metric(tmp_path, "match", body, features=LISTS), texts, answers)
    first = score_texts(module_metric(tmp_path / "other", "match", body, features=TEXTS), texts, answers)
    assert (lists.values.tolist(), first.values.tolist()) == ([1, 1, 1], [1, 0, 1])
    assert majority_text_score(module_metric(tmp_path, "match", body, features=LISTS), answers) == pytest.approx(1 / 3)


def test_an_error_rate_is_negated_and_percents_are_scaled(tmp_path: Path) -> None:
    predictions, targets = classes(50)
    # As `wer`, it returns the number alone.
    body = "return float(100 * (found != np.array(gold)).mean())"
    spec = {"greater_is_better": False, "scale": 0.01}
    metric = module_metric(tmp_path, "error", body, spec=spec)
    found = score_classes(metric, predictions, targets)
    accuracy = score_classes("accuracy", predictions, targets)
    assert found.score == pytest.approx(accuracy.score - 1)
    assert found.standard_error == pytest.approx(accuracy.standard_error)
    assert majority_class_score(metric, targets) == pytest.approx(majority_class_score("accuracy", targets) - 1)
    assert metric_name(metric) == "neg_error (scale=0.01)"


def test_a_module_without_a_score_for_constant_answers_has_no_majority_score(tmp_path: Path) -> None:
    body = "return {'r': float('nan') if len(set(predictions)) == 1 else float(np.corrcoef(found, gold)[0, 1])}"
    metric = module_metric(tmp_path, "r", body)
    predictions, targets = classes(40)
    # It cannot score one example alone.
    assert score_classes(metric, predictions, targets).error_method == "jackknife"
    assert np.isnan(module_score(metric, [1] * 40, targets.tolist()))


def test_names_say_module_score_and_arguments() -> None:
    def name(**spec: Any) -> str:
        return metric_name(ModuleMetric.from_spec(spec, Path(), trusted=False))

    assert name(evaluate="accuracy") == "accuracy"
    assert name(evaluate="rouge", key="rougeL") == "rouge/rougeL"
    assert name(evaluate="f1", args={"average": "macro"}) == "f1 (average=macro)"
    assert name(evaluate="glue", config="mrpc", key="f1") == "glue/f1 mrpc"
    assert name(evaluate="user/wer", greater_is_better=False) == "neg_wer"


def test_the_source_covers_all_that_decides_the_scores(tmp_path: Path) -> None:
    metric = module_metric(tmp_path, "f1", F1)
    changes = [{"key": "hits"}, {"args": {"x": 1}}, {"config": "c"}, {"greater_is_better": False}, {"scale": 2.0}]
    sources = [metric_source(metric), *(metric_source(replace(metric, **change)) for change in changes)]
    write_module(tmp_path, "f1", F1, imports="import math")
    sources.append(metric_source(ModuleMetric.from_spec({"evaluate": "./f1.py"}, tmp_path)))
    sources.append(metric_source(replace(metric, module="f1", revision="abc")))
    assert len({json.dumps(source) for source in sources}) == len(sources)
    # Another place is no other metric.
    same = module_metric(tmp_path / "copy", "f1", F1, imports="import math")
    assert metric_source(same) == sources[-2]
    assert str(tmp_path) not in json.dumps([metric_source(same), same.to_dict()])


def test_a_file_next_to_the_module_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("VALUE = 0.25\n")
    code = {"imports": "from .helper import VALUE"}
    metric = module_metric(tmp_path, "constant", "return {'constant': VALUE}", **code)
    assert score_classes(metric, *classes(20)).score == 0.25
    (tmp_path / "helper.py").write_text("VALUE = 0.5\n")
    changed = ModuleMetric.from_spec({"evaluate": "./constant.py"}, tmp_path)
    assert metric_source(changed) != metric_source(metric)
    assert score_classes(changed, *classes(20)).score == 0.5


def test_a_directory_holds_a_file_of_its_name(tmp_path: Path) -> None:
    write_module(tmp_path / "accuracy", "accuracy", ACCURACY)
    metric = ModuleMetric.from_spec({"evaluate": "./accuracy"}, tmp_path)
    assert score_classes(metric, *classes(20)).score == score_classes("accuracy", *classes(20)).score


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ({}, ValueError, r"`metric.evaluate` must be given as a text that is not empty, got None"),
        ({"evaluate": "a b"}, ValueError, r"`metric.evaluate` must be a Hub id such as `rouge` .* got 'a b'"),
        (
            {"evaluate": "f1", "scal": 1},
            ValueError,
            r"`metric` must have known keys only, got 'scal'. Did you mean `scale`",
        ),
        ({"evaluate": "f1", "args": [1]}, TypeError, r"`metric.args` must be a mapping of arguments, got \[1\]"),
        ({"evaluate": "f1", "args": {"references": 1}}, ValueError, r"`metric.args` must not hold `references`"),
        ({"evaluate": "f1", "scale": 0}, ValueError, r"`metric.scale` must be a number above 0, got 0"),
        ({"evaluate": "f1", "scale": True}, ValueError, r"`metric.scale` must be a number above 0, got True"),
        (
            {"evaluate": "./no.py"},
            FileNotFoundError,
            r"`metric.evaluate` must be a Hub id, a `.py` file .* no file .*no.py",
        ),
        (
            {"evaluate": "~nobody/x" * 1000},
            FileNotFoundError,
            r"`metric.evaluate` must be a Hub id, a `.py` file",
        ),
        ({"evaluate": "./a\nb.py"}, ValueError, r"`metric.evaluate` must be a line of text, which reports show"),
        ({"evaluate": "./no.py", "revision": "a"}, ValueError, r"`metric.revision` must go with a module on the Hub"),
    ],
)
def test_keys_are_checked_when_a_task_is_read(tmp_path: Path, spec: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        ModuleMetric.from_spec(spec, tmp_path)


@pytest.mark.parametrize(
    ("body", "spec", "features", "message"),
    [
        (F1, {"key": "f2"}, None, r"`metric.key` must be one of the scores of '.*', f1, hits, by_class, got 'f2'"),
        (F1, {"key": "by_class"}, None, r"`metric.key` must name a number, got \[0.5, 1.0\] as 'by_class'"),
        (F1, {"key": "hits"}, None, r"`metric.scale` must bring scores to at most 1, .* for the right answers"),
        (F1, {"args": {"avrage": 1}}, None, r"`metric` must be able to score 16 examples, got an error of .*avrage"),
        ("return {'m': 'good'}", {}, None, r"`metric.key` must name a number, got 'good'"),
        ("return {'m': True}", {}, None, r"`metric.key` must name a number, got True"),
        (
            F1,
            {},
            TEXTS,
            r"`metric.evaluate` must name a module whose .* are classes as numbers, got .*Value\('string'\)",
        ),
        ("]", {}, None, r"`metric.evaluate` must be a module with an `evaluate.Metric`, got an error .* SyntaxError"),
    ],
)
def test_a_module_that_does_not_fit_is_found_before_long_work(
    tmp_path: Path, body: str, spec: Any, features: str | None, message: str
) -> None:
    code = {} if features is None else {"features": features}
    name = "f1" if body is F1 else "m"
    with pytest.raises(ValueError, match=message):
        check_module(module_metric(tmp_path, name, body, spec=spec, **code), classes(40)[1].tolist(), texts=False)


def test_as_many_classes_as_examples_are_no_numbers_of_examples(tmp_path: Path) -> None:
    metric = module_metric(tmp_path, "f1", F1, spec={"key": "by_class"})
    with pytest.raises(ValueError, match=r"`metric.key` must name a number, got \[0.5, 1.0\]"):
        score_classes(metric, np.array([0, 1]), np.array([0, 1]))


def test_a_score_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    metric = module_metric(tmp_path, "m", "return {'m': float('nan')}")
    with pytest.raises(ValueError, match=r"`metric` must give a finite number, got nan as 'm' of .* for 20 examples"):
        score_classes(metric, *classes(20))


def test_after_an_error_a_module_holds_no_examples(tmp_path: Path) -> None:
    body = "if len(found) == 7: raise RuntimeError('seven')\n" + ACCURACY
    metric = module_metric(tmp_path, "accuracy", body)
    with pytest.raises(ValueError, match=r"got an error of .*RuntimeError: seven"):
        score_by_module(metric, [0] * 7, [0] * 7)
    assert score_by_module(metric, [1, 0], [1, 1]).values.tolist() == [1, 0]


def test_packages_that_a_module_lacks_are_named(tmp_path: Path) -> None:
    missing = module_metric(tmp_path, "m", "return {}", imports="import no_such_package")
    with pytest.raises(ImportError, match=r"`metric` must have the packages of '.*m.py' installed: .*no_such_package"):
        check_module(missing, [], texts=False)


def cache_of_the_hub(repository: str, commit: str, revision: str) -> Path:
    """Return the directory of a snapshot in the Hub's cache, where the files of a commit are."""
    root = Path(huggingface_hub.constants.HF_HUB_CACHE, f"spaces--{repository.replace('/', '--')}")
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    return root / "snapshots" / commit


def test_a_module_of_the_hub_is_that_of_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for revision, commit, value in (("main", "a" * 40, 0.25), ("v2", "b" * 40, 0.5)):
        directory = cache_of_the_hub("evaluate-metric/constant", commit, revision)
        write_module(directory, "constant", "return {'constant': VALUE}", imports="from .helper import VALUE")
        (directory / "helper.py").write_text(f"VALUE = {value}")
    write_module(cache_of_the_hub("me/mine", "c" * 40, "main"), "mine", ACCURACY)
    # A directory of this name is not what the id names.
    write_module(tmp_path / "constant", "constant", "raise ValueError")
    monkeypatch.chdir(tmp_path)

    def read(**spec: Any) -> ModuleMetric:
        return ModuleMetric.from_spec(spec, tmp_path)

    latest, other = read(evaluate="constant"), read(evaluate="constant", revision="v2")
    assert [score_classes(metric, *classes(20)).score for metric in (latest, other)] == [0.25, 0.5]
    assert metric_source(latest) != metric_source(other)
    assert score_classes(read(evaluate="me/mine", key="accuracy"), *classes(20)).score == 0.75
    must = r"`metric.evaluate` must be a metric on the Hub or in its cache, or a path, got "
    with pytest.raises(FileNotFoundError, match=f"{must}'constant' of revision 'v3'"):
        read(evaluate="constant", revision="v3")
    with pytest.raises(FileNotFoundError, match=f"{must}'no-such-thing'"):
        read(evaluate="no-such-thing")
    # The name of a task that came with a model is not looked up.
    assert ModuleMetric.from_spec({"evaluate": "no-such-thing"}, tmp_path, trusted=False).name == "no-such-thing"


def test_without_evaluate_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_metric_file, "evaluate_version", lambda: None)
    with pytest.raises(ImportError, match=r"got a module of it. Install it: `pip install 'optimum-sieve\[evaluate\]'`"):
        ModuleMetric.from_spec({"evaluate": "rouge"}, tmp_path)


def test_code_that_changes_during_a_run_is_not_run(tmp_path: Path) -> None:
    metric = module_metric(tmp_path, "accuracy", ACCURACY)
    write_module(tmp_path, "accuracy", F1)
    with pytest.raises(ValueError, match=r"`metric.evaluate` must not change while a task is in use"):
        check_module(metric, [], texts=False)


def test_code_that_came_with_a_model_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    write_module(tmp_path, "accuracy", ACCURACY, imports=f"open({str(marker)!r}, 'w').close()")
    metric = ModuleMetric.from_spec({"evaluate": "./accuracy.py"}, tmp_path, trusted=False)
    assert metric_name(metric) == "accuracy"
    for score in (lambda: check_module(metric, [], texts=False), lambda: score_classes(metric, *classes(20))):
        with pytest.raises(
            ValueError, match=r"`metric` must not be code that came with a model, got the module '.*acc"
        ):
            score()
    assert not marker.exists()
    check_module(ModuleMetric.from_spec({"evaluate": "./accuracy.py"}, tmp_path), [], texts=False)
    assert marker.exists()
