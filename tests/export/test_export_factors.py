"""A pruned model becomes one of plain factors with the same outputs, in a directory that is still that of its task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import tiny_models
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_export import OTHERS, logits, make_pruned, run
from tiny_models import assert_same_tensors, make_tiny_model, save
from toy import make_tokenizer, save_pruned
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from optimum_sieve.backbone.loading import load_model
from optimum_sieve.export.factors import export_factors, save_factors
from optimum_sieve.modeling.fingerprint import weights_digest
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern
from optimum_sieve.publish.hub import check_folder
from optimum_sieve.publish.origin.terms import Terms
from optimum_sieve.surgery.factors import factors_of


if TYPE_CHECKING:
    from pathlib import Path


def factorized(model: Any) -> dict[str, FactorizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)}


@pytest.mark.parametrize("name", [*tiny_models.ARCHITECTURES, *OTHERS])
def test_the_logits_stay(name: str, tmp_path: Path) -> None:
    pruned = make_pruned(name, biases=True)
    expected, before = logits(pruned), read_rank_pattern(pruned)
    assert {(entry["storage"], entry["rank"] == 0) for entry in before.values()} >= {
        ("pivoted", False), ("factors", True)
    }  # fmt: skip
    assert export_factors(pruned) is pruned
    pattern = read_rank_pattern(pruned)
    assert pattern == pruned.config.sieve["rank_pattern"]
    assert pattern == {n: {**entry, "storage": "factors", "rank": entry["rank"] or 1} for n, entry in before.items()}
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-5, atol=1e-5)

    loaded = type(pruned).from_pretrained(save(pruned, tmp_path))
    assert_same_tensors(loaded, pruned)
    assert loaded._tp_plan == pruned._tp_plan
    torch.testing.assert_close(logits(loaded.eval()), expected, rtol=1e-5, atol=1e-5)


def test_factors_hold_the_numbers_of_the_pivots() -> None:
    pruned = make_pruned("llama").bfloat16()
    expected = {name: factors_of(layer) for name, layer in factorized(pruned).items()}
    ranks = {name: layer.rank for name, layer in factorized(pruned).items()}
    assert not all(ranks.values())
    for name, layer in factorized(export_factors(pruned)).items():
        assert (layer.left.weight.dtype, layer.training) == (torch.bfloat16, False)
        if ranks[name]:
            assert torch.equal(layer.left.weight.float(), expected[name][0])
            assert torch.equal(layer.right.weight.float(), expected[name][1])
        else:
            assert not layer.left.weight.any()
            assert not layer.right.weight.any()


def test_dense_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`model` must be a pruned model .*got 'llama'"):
        save_factors(make_tiny_model("llama"), make_tokenizer(), tmp_path / "new")
    assert not list(tmp_path.iterdir())


# The directory of a run


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned directory whose layers are pivoted, or of rank 0."""
    directory = save_pruned(tmp_path_factory.mktemp("run"), pruning_ratio=0.9, storage="pivoted")
    entries = json.loads((directory / "config.json").read_text())["sieve"]["rank_pattern"].values()
    assert {entry["rank"] == 0 for entry in entries} == {True, False}
    assert "pivoted" in {entry["storage"] for entry in entries}
    return directory


@pytest.fixture(scope="module")
def exported(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer, _ = load_model(pruned, device="cpu")
    return save_factors(
        model, tokenizer, tmp_path_factory.mktemp("export") / "factors", terms=Terms({"license": "mit"})
    )


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def test_the_directory_is_still_that_of_the_task(pruned: Path, exported: Path) -> None:
    names = {path.name for path in pruned.iterdir()}
    assert {path.name for path in exported.iterdir()} == names
    for name in ("sieve_task.json", "sieve.yaml", "tokenizer.json", "modeling_sieve.py"):
        assert (exported / name).read_bytes() == (pruned / name).read_bytes(), name
    check_folder(exported)
    row = "7 51 30"
    before, after = (pipeline("sieve", model=str(directory))(row) for directory in (pruned, exported))
    assert after["prediction"] == before["prediction"]
    assert after["probabilities"] == pytest.approx(before["probabilities"], abs=1e-5)


def test_scores_stay_with_the_digest_of_the_new_weights(pruned: Path, exported: Path) -> None:
    before, after = (read(directory, "config.json")["sieve"]["results"] for directory in (pruned, exported))
    digest = weights_digest(AutoModelForCausalLM.from_pretrained(exported))
    assert digest != before["weights_sha256"]
    assert after == {**before, "weights_sha256": digest}
    # It is compared again on loading.
    load_model(exported, device="cpu")


def test_the_report_counts_the_factors(pruned: Path, exported: Path) -> None:
    before, after = (read(directory, "sieve_report.json") for directory in (pruned, exported))
    scores = ("task", "count", "dense", "pruned", "paired_difference", "agreement", "kl", "answers", "settings")
    assert {key: before[key] for key in scores} == {key: after[key] for key in scores}
    assert (before.get("exported"), after["exported"]) == (None, "factors")
    assert "largest_coefficient" in before
    assert "largest_coefficient" not in after
    model = AutoModelForCausalLM.from_pretrained(exported)
    layers = factorized(model)
    weights = sum(layer.left.weight.numel() + layer.right.weight.numel() for layer in layers.values())
    dense = sum(
        module.weight.numel() for name, module in model.named_modules()
        if name.startswith("model.layers.") and name.endswith("_proj") and name not in layers
    )  # fmt: skip
    assert after["parameters"]["targets_after"] == weights + dense
    assert after["parameters"]["model_after"] == model.num_parameters()
    assert after["parameters"]["targets_before"] == before["parameters"]["targets_before"]
    assert after["bytes"]["after"] == (exported / "model.safetensors").stat().st_size
    assert sum(after["parts"]["after"].values()) == 4 * model.num_parameters()
    places = {key: after["ranks"][key] for key in ("layers", "kinds")}
    assert places == {key: before["ranks"][key] for key in ("layers", "kinds")}
    name = next(name for name, layer in layers.items() if layer.rank > 1)
    row, column = (places["kinds"].index(name.split(".", 3)[3]), places["layers"].index(".".join(name.split(".")[:3])))
    layer = layers[name]
    assert after["ranks"]["rank"][row][column] == layer.rank
    fraction = (layer.left.weight.numel() + layer.right.weight.numel()) / (layer.in_features * layer.out_features)
    assert after["ranks"]["kept"][row][column] == pytest.approx(fraction, abs=1e-4)


def test_the_card_says_what_was_measured(pruned: Path, exported: Path) -> None:
    before, card = (ModelCard.load(directory / "README.md") for directory in (pruned, exported))
    assert card.data.eval_results == before.data.eval_results
    assert (card.data.license, card.data.base_model) == ("mit", "toy/base")
    assert "every pruned matrix was stored as two plain factors" in card.text
    assert 'stored as "factors"' in card.text
    assert "optimum-cli sieve export --model pruned --output factors --factors" in card.text
    # The task is quoted with its data.
    assert "files: rows.jsonl" in card.text


def test_scores_of_other_weights_are_not_taken_over(
    pruned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer, _ = load_model(pruned, device="cpu", dtype="bfloat16")
    with caplog.at_level("WARNING"):
        output = save_factors(model, tokenizer, tmp_path / "new")
    assert "The weights have changed since they were scored" in caplog.text
    assert read(output, "config.json")["sieve"]["results"] == {"task": "parity"}
    assert "results" not in read(output, "sieve_task.json")["tasks"][0]
    assert not {"pruned", "paired_difference", "weights_sha256"} & read(output, "sieve_report.json").keys()
    assert "| pruned model |" not in (output / "README.md").read_text()


@pytest.mark.parametrize("report", [None, "{", "[]", "{}"])
def test_a_model_without_a_report_gets_a_short_card(report: str | None, tmp_path: Path) -> None:
    directory = save(make_pruned("llama", vocab_size=113), tmp_path / "pruned")
    if report is not None:
        (directory / "sieve_report.json").write_text(report)
    model = AutoModelForCausalLM.from_pretrained(directory)
    expected = logits(model)
    output = save_factors(model, make_tokenizer(), tmp_path / "new", max_shard_size="10KB")
    assert len(list(output.glob("*.safetensors"))) > 3
    assert not (output / "sieve_report.json").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(output)), expected, rtol=1e-5, atol=1e-5)
    card = (output / "README.md").read_text()
    assert "accuracy on 40 examples of the test split: dense 0.7500" in card
    assert "up to rounding" in card


def test_the_command_writes_factors(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new"
    words = ("--model", pruned, "--output", output, "--factors", "--max-shard-size", "20KB")
    assert run(monkeypatch, *words) == 0
    assert f"saved in {output}" in capsys.readouterr().out
    names = {name for file in output.glob("*.safetensors") for name in load_file(file)}
    assert not [name for name in names if "pivot" in name or "row_order" in name]
    assert AutoTokenizer.from_pretrained(output)("7").input_ids == make_tokenizer()("7").input_ids
    # Again, of its own output.
    assert run(monkeypatch, "--model", output, "--output", tmp_path / "again", "--factors") == 0
    models = [AutoModelForCausalLM.from_pretrained(directory) for directory in (output, tmp_path / "again")]
    assert_same_tensors(*models)
