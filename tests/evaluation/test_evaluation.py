"""Evaluation and comparison of models."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from toy import make_model, make_tokenizer, parity_rows

from optimum_sieve.allocation.certainty import certain_error
from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.evaluation import scores as evaluation_scores
from optimum_sieve.evaluation.batches import log_likelihoods, make_batches
from optimum_sieve.evaluation.comparison import Comparison, compare
from optimum_sieve.evaluation.scores import Evaluation, evaluate
from optimum_sieve.tasks import Example


if TYPE_CHECKING:
    from pathlib import Path


LABELS = (" odd", " even", " very even")


def make_examples(count: int = 40) -> list[Example]:
    return [
        Example(prompt=f"Number: {row['text']} Parity:", answer=LABELS[target], candidates=LABELS, target=target)
        for row in parity_rows(count)
        for target in [len(row["text"]) % 3]
    ]


def run(model: torch.nn.Module | None = None, examples: list[Example] | None = None, **options: Any) -> Evaluation:
    return evaluate(
        model or make_model(),
        examples or make_examples(),
        make_tokenizer(before="<s>"),
        **{"metric": "accuracy", "batch_size": 8, "progress": False, **options},
    )


def assert_same(one: Evaluation, other: Evaluation) -> None:
    for field in dataclasses.fields(Evaluation):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


def test_predictions_are_the_likeliest_candidates() -> None:
    model, examples, tokenizer = make_model(), make_examples(), make_tokenizer(before="<s>")
    evaluation = run(model, examples)
    for i, example in enumerate(examples):
        (batch,) = make_batches([example], tokenizer, batch_size=8)
        scores = log_likelihoods(model, batch)[0].detach().double()
        assert evaluation.predictions[i] == scores.argmax()
        np.testing.assert_allclose(evaluation.log_probs[i], scores.log_softmax(0), atol=1e-5)
    np.testing.assert_allclose(np.exp(evaluation.log_probs).sum(axis=1), 1)
    assert len(set(evaluation.predictions)) > 1


def test_accuracy_and_its_standard_error() -> None:
    evaluation = run()
    targets = np.array([example.target for example in make_examples()])
    matches = evaluation.predictions == targets
    np.testing.assert_array_equal(evaluation.targets, targets)
    assert evaluation.score == matches.mean()
    assert 0 < evaluation.score < 1
    assert evaluation.standard_error == pytest.approx(math.sqrt(matches.var(ddof=1) / 40))
    assert evaluation.majority_score == np.bincount(targets).max() / 40
    assert evaluation.count == 40


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    one, other = run(batch_size=batch_size), run(batch_size=3)
    np.testing.assert_array_equal(one.predictions, other.predictions)
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_examples_keep_their_order() -> None:
    examples = make_examples()
    forward, backward = run(examples=examples), run(examples=examples[::-1])
    np.testing.assert_allclose(forward.log_probs, backward.log_probs[::-1], atol=1e-5)
    assert forward.score == backward.score


def test_candidates_may_differ_in_number() -> None:
    examples = make_examples()
    examples[3] = dataclasses.replace(examples[3], candidates=LABELS[:2], target=0)
    evaluation = run(examples=examples)
    assert np.isneginf(evaluation.log_probs).sum() == 1
    assert np.isneginf(evaluation.log_probs[3, 2])
    comparison = compare(evaluation, run(make_model(1), examples))
    assert math.isfinite(comparison.kl)
    assert comparison.kl > 0


def test_the_model_is_left_as_it_was() -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_off_while_evaluating() -> None:
    assert_same(run(make_model(attention_dropout=0.5).train()), run(make_model()))


def test_what_a_forward_pass_caches_stays_usable_by_autograd() -> None:
    model = make_model()
    kept: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _, __, output: kept.append(output))
    run(model)
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in kept)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    run(progress=False)
    assert capsys.readouterr().err == ""
    run(progress=True, description="dense")
    shown = capsys.readouterr().err
    assert "dense" in shown
    assert "40/40" in shown


def test_save_and_load(tmp_path: Path) -> None:
    for metric in ("accuracy", "macro_f1"):
        evaluation = run(metric=metric)
        evaluation.save(tmp_path / "evaluation.safetensors")
        assert_same(Evaluation.load(tmp_path / "evaluation.safetensors"), evaluation)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.safetensors"]


def test_files_of_earlier_versions_do_not_say_where_errors_come_from(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.safetensors"
    for metric, method in (("accuracy", "examples"), ("macro_f1", "jackknife")):
        evaluation = run(metric=metric)
        assert evaluation.error_method == method
        # Empty values are left out.
        dataclasses.replace(evaluation, error_method="").save(path)
        assert Evaluation.load(path).error_method == method


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evaluation.safetensors"
    run().save(path)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        run(make_model(1)).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_load_refuses_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evaluation.safetensors"
    run().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"must be a file written by `Evaluation\.save`, got .*evaluation"):
        Evaluation.load(path)
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"must be a file written by `Evaluation\.save`.*format_version"):
        Evaluation.load(path)
    monkeypatch.setattr(evaluation_scores, "FORMAT_VERSION", 2)
    run().save(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"`path` must have format_version 1 or older, got 2 .*Upgrade optimum-sieve"):
        Evaluation.load(path)


def test_to_dict_holds_what_a_report_shows() -> None:
    evaluation = run()
    assert evaluation.to_dict() == {
        "metric": "accuracy",
        "score": evaluation.score,
        "standard_error": evaluation.standard_error,
        "count": 40,
        "majority_score": evaluation.majority_score,
    }


def test_compare_with_itself() -> None:
    comparison = compare(run(), run())
    assert comparison == Comparison(mean=0.0, standard_error=0.0, agreement=1.0, kl=0.0, count=40)


def test_compare_against_torch() -> None:
    dense, pruned = run(make_model()), run(make_model(1))
    comparison = compare(dense, pruned)
    differences = (pruned.predictions == pruned.targets).astype(float) - (dense.predictions == dense.targets)
    assert comparison.mean == pytest.approx(differences.mean())
    assert comparison.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(40))
    assert comparison.agreement == (dense.predictions == pruned.predictions).mean()
    kl = torch.nn.functional.kl_div(
        torch.tensor(pruned.log_probs), torch.tensor(dense.log_probs), reduction="batchmean", log_target=True
    )
    assert comparison.kl == pytest.approx(kl.item())
    assert comparison.to_dict() == dataclasses.asdict(comparison)


def test_lower_bound_is_the_one_sided_normal_one() -> None:
    comparison = Comparison(mean=-0.01, standard_error=0.02, agreement=1.0, kl=0.0, count=100_000)
    assert comparison.lower_bound(0.5) == -0.01
    assert comparison.lower_bound(0.975) == pytest.approx(-0.01 - 1.959964 * 0.02, rel=1e-3)
    few = dataclasses.replace(comparison, count=100)
    assert few.lower_bound(0.975) == -0.01 - NormalDist().inv_cdf(0.975) * certain_error(-0.01, 0.02, 100)
    assert few.lower_bound(0.975) < comparison.lower_bound(0.975) - 0.01
    for confidence in (0.4, 1.0):
        with pytest.raises(ValueError, match=f"`confidence` must be at least 0.5 and below 1, got {confidence}"):
            comparison.lower_bound(confidence)


def test_compare_refuses_other_examples_and_metrics() -> None:
    examples = make_examples()
    with pytest.raises(ValueError, match="`pruned` must be scored on the same 40 examples as `dense`"):
        compare(run(), run(examples=examples[::-1]))
    with pytest.raises(ValueError, match=r"same 40 examples as `dense`, got 39"):
        compare(run(), run(examples=examples[:39]))
    with pytest.raises(ValueError, match="`pruned` must be scored with the dense model's 'accuracy', got 'macro_f1'"):
        compare(run(), run(metric="macro_f1"))


def test_a_model_that_returns_nan_is_refused() -> None:
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[20] = float("nan")
    with pytest.raises(
        ValueError, match=r"`model` must .*finite logits, got NaN or infinity for \d+ of 40 examples. Load it with"
    ):
        run(model)


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        (make_examples(1), {}, "`examples` must hold at least 2 examples to compute a standard error, got 1"),
        (
            [*make_examples(), Example(prompt="7", answer=" odd", candidates=(" odd",), target=0)],
            {},
            r"`examples\[40\]` must have at least two candidates .* got 1 candidates and target 0",
        ),
        (
            [*make_examples(), Example(prompt="7", answer=" odd", candidates=LABELS)],
            {},
            r"`examples\[40\]` must have .* the index of the gold one, got 3 candidates and target None",
        ),
        (make_examples(), {"metric": "bleu"}, "`metric` must be one of accuracy, macro_f1, got 'bleu'"),
        (
            [*make_examples(), Example(prompt="7 " * 80, answer=" odd", candidates=LABELS, target=0)],
            {},
            "must fit in the 64 tokens the model takes",
        ),
    ],
)
def test_bad_examples_are_refused_before_the_model_runs(
    examples: list[Example], options: dict[str, str], message: str
) -> None:
    model = make_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        run(model, examples, **options)
