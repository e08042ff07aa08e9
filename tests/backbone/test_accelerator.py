"""Every stage on an accelerator, where the machine has one: the same models as on the CPU, but for rounding."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from healed_world import learn
from toy import load_task, make_tokenizer, parity_rows, unhealed
from transformers import AutoModelForCausalLM
from vocabulary_world import byte_level
from written_world import ANSWER, WRITTEN, byte_model

from optimum_sieve import HealConfig, SievePruner, compare, evaluate
from optimum_sieve.backbone.loading import default_device


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve import Task

DEVICE = default_device()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="this machine has no accelerator"),
]

KINDS: dict[str, dict[str, Any]] = {"labels": {}, "generate": {**WRITTEN, **ANSWER}}
HALF: dict[str, Any] = {"pruning_ratio": 0.5, "rank_multiple": 2}
WITHIN: dict[str, Any] = {"tolerance": 0.2, "rank_multiple": 2, "confidence": 0.5, "rounds": 1}
GENETIC: dict[str, Any] = {"allocation": "genetic", "population_size": 4, "generations": 2}
HEALED: dict[str, Any] = {"heal": HealConfig(steps=12, learning_rate=1e-2)}
QUIET: dict[str, Any] = {"progress": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "joint": HALF,
    "uniform": {**HALF, "allocation": "uniform", "storage": "factors"},
    "activation": {**HALF, "projection": "activation", "allocation": "uniform", "storage": "factors"},
    "svd": {**HALF, "projection": "svd"},
    "learned": {**HALF, "projection": "learned", "allocation": "uniform", "storage": "factors"},
    "labels": {**HALF, "loss": "labels"},
    "sampled": {**HALF, "loss": "answer", "label_source": "sampled"},
    "healed": {**HALF, **HEALED},
}


@pytest.fixture(scope="module", params=KINDS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(400), **KINDS[request.param])


@pytest.fixture(scope="module")
def dense(task: Task) -> PreTrainedModel:
    return learn(task)


def pruner_on(device: Any, dense: PreTrainedModel, task: Task) -> SievePruner:
    return SievePruner(copy.deepcopy(dense).to(device), make_tokenizer(), task, base_model="toy/base")


def logits(model: PreTrainedModel) -> torch.Tensor:
    inputs = make_tokenizer()("Number: 7 51 30 Parity:", return_tensors="pt").to(model.device)
    with torch.no_grad():
        return model(**inputs).logits.log_softmax(dim=-1).cpu()


@pytest.mark.parametrize("name", SETTINGS)
def test_pruned_as_on_the_cpu(name: str, dense: PreTrainedModel, task: Task) -> None:
    config = unhealed(**SETTINGS[name])
    there, here = (pruner_on(device, dense, task).prune(config, **QUIET) for device in (DEVICE, "cpu"))
    assert {parameter.device.type for parameter in there.model.parameters()} == {DEVICE.type}
    # Trained factors and drawn answers part ways by rounding; the sizes do not.
    if name in ("learned", "sampled", "healed"):
        assert there.report["parameters"] == here.report["parameters"]
    else:
        assert there.rank_pattern == here.rank_pattern
        torch.testing.assert_close(logits(there.model), logits(here.model), atol=0.05, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"allocation": "uniform"}, GENETIC, HEALED], ids=str)
def test_within_the_tolerance_saved_and_loaded(
    settings: dict[str, Any], dense: PreTrainedModel, task: Task, tmp_path: Path
) -> None:
    pruner, config = pruner_on(DEVICE, dense, task), unhealed(**{**WITHIN, **settings})
    result = pruner.prune(config, work_dir=tmp_path / "work", **QUIET)
    again = pruner_on(DEVICE, dense, task).prune(config, work_dir=tmp_path / "work", **QUIET)
    assert again.rank_pattern == result.rank_pattern
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(result.model), atol=1e-3, rtol=0)
    scored = evaluate(
        loaded, task.examples("test", make_tokenizer()), make_tokenizer(), metric=task.metric, batch_size=32, **QUIET
    )
    assert compare(result.scores[0].pruned, scored).agreement > 0.9


def test_two_tasks_and_their_vocabulary(tmp_path: Path) -> None:
    tasks = [load_task(tmp_path, parity_rows(160), name=name, **KINDS[name]) for name in KINDS]
    pruner = SievePruner(byte_model().to(DEVICE), byte_level(), tasks, base_model="toy/base")
    config = unhealed(**{**WITHIN, **GENETIC, "tolerance": 0.9, "vocabulary": "task"})
    result = pruner.prune(config, **QUIET)
    assert result.model.config.vocab_size < 960
    assert result.model.device.type == DEVICE.type


def test_the_commands_work_there(
    dense: PreTrainedModel, task: Task, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    load_task(tmp_path, parity_rows(400), **KINDS[task.kind])
    dense.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    out, healed, rows = tmp_path / "out", tmp_path / "healed", ("--task", tmp_path / "task.json")
    size = ("--pruning-ratio", 0.9, "--rank-multiple", 2, "--rounds", 1, "--heal-steps", 4)
    assert cli("prune", "--model", tmp_path / "dense", *rows, *size, "--output", out)[0] == 0
    steps = ("--heal-steps", 4)
    assert cli("heal", "--model", out, "--dense", tmp_path / "dense", *rows, *steps, "--output", healed)[0] == 0
    assert json.loads((healed / "sieve_report.json").read_text())["task"] == "parity"
    status, output, _ = cli("evaluate", "--model", healed, *rows, "--compare-to", tmp_path / "dense")
    assert status == 0
    assert "agreement" in output
