"""Scores do not outlive the weights they were measured on."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from edited_checkpoint import edit_config
from tiny_models import factorize_in_place, make_input_ids, make_tiny_model
from transformers import AutoModel, AutoModelForCausalLM, TorchAoConfig

from optimum_sieve.backbone.loading import offload_map
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.fingerprint import DIGEST_KEY, weights_digest
from optimum_sieve.publish import report


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCORE = {"score": 0.75, "standard_error": 0.01}
RESULTS = {"task": "parity", "metric": "accuracy", "split": "test", "count": 9, "dense": SCORE, "pruned": SCORE}
NOTICE = "The weights have changed since they were scored: the results are removed from the configuration."


def scored_model(results: dict[str, Any] = RESULTS) -> Any:
    model = make_tiny_model("llama")
    factorize_in_place(model)
    return sieve_model(model, base_model=None, settings={}, results=results)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    scored_model().save_pretrained(tmp_path / "first")
    return tmp_path / "first"


def saved_results(model: Any, directory: Path, **options: Any) -> dict[str, Any]:
    model.save_pretrained(directory, **options)
    results: dict[str, Any] = json.loads((directory / "config.json").read_text())["sieve"]["results"]
    return results


def test_results_carry_the_digest_of_their_weights(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.config.sieve["results"] == {**RESULTS, DIGEST_KEY: weights_digest(model)}
    assert report.DIGEST_KEY == DIGEST_KEY


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_results_stay_with_their_weights(saved: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    results = {**RESULTS, DIGEST_KEY: weights_digest(model)}
    assert saved_results(model, tmp_path / "again", **options) == results
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert saved_results(again, tmp_path / "third", state_dict=again.state_dict()) == results


def test_results_of_an_offloaded_model_stay(saved: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(saved)
    placed = offload_map(whole.config, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=placed, offload_folder=tmp_path / "folder")
    assert any(parameter.is_meta for parameter in model.parameters())
    with pytest.warns(UserWarning, match="offloaded modules"):
        assert saved_results(model, tmp_path / "again") == whole.config.sieve["results"]


def fine_tune(model: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(make_input_ids()).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    return model


def change_one_value(model: Any) -> Any:
    model.lm_head.weight.data[3, 5] += 1e-3
    return model


def tie(model: Any) -> Any:
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@pytest.mark.parametrize("change", [fine_tune, change_one_value, tie, lambda model: model.half()])
def test_results_of_other_weights_are_dropped(
    saved: Path, tmp_path: Path, change: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = change(AutoModelForCausalLM.from_pretrained(saved))
    with caplog.at_level(logging.WARNING):
        assert saved_results(model, tmp_path / "changed") == {"task": "parity"}
    assert [message for message in caplog.messages if message.startswith(NOTICE)] == [caplog.messages[-1]]
    caplog.clear()
    loaded = type(model).from_pretrained(tmp_path / "changed")
    assert saved_results(loaded, tmp_path / "third") == {"task": "parity"}
    assert not caplog.messages


def test_results_are_dropped_where_other_weights_are_passed(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    state_dict = {**model.state_dict(), "model.norm.weight": torch.zeros(32)}
    assert saved_results(model, tmp_path / "changed", state_dict=state_dict) == {"task": "parity"}


def test_results_are_dropped_under_another_head_and_after_quantization(saved: Path, tmp_path: Path) -> None:
    assert saved_results(AutoModel.from_pretrained(saved), tmp_path / "trunk") == {"task": "parity"}
    from torchao.quantization import Int8WeightOnlyConfig

    quantized = AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=["model"])
    )
    assert saved_results(quantized, tmp_path / "int8") == {"task": "parity"}


def test_results_of_several_tasks_keep_their_names(tmp_path: Path) -> None:
    model = scored_model({"tasks": [RESULTS, {**RESULTS, "task": "size"}]})
    assert DIGEST_KEY in model.config.sieve["results"]
    assert saved_results(change_one_value(model), tmp_path) == {"tasks": [{"task": "parity"}, {"task": "size"}]}


@pytest.mark.parametrize("results", [{"task": "parity", "pruned": SCORE}, {}, None, 5])
def test_results_without_a_digest_stay_as_they_are(saved: Path, tmp_path: Path, results: object) -> None:
    edit_config(saved, lambda config: config["sieve"].update(results=results))
    model = change_one_value(AutoModelForCausalLM.from_pretrained(saved))
    assert saved_results(model, tmp_path / "again") == results
