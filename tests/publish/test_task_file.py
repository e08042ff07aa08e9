"""`sieve_task.json` stays with what is made from a pruned model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from lora_models import OLD_NAMES, config_for, peft
from toy import make_model, make_tokenizer, parity_rows, task_spec, unhealed, write_rows
from transformers import AutoModelForCausalLM, pipeline

from optimum_sieve import SievePruner, Task
from optimum_sieve.publish.task_file import inherited_files, public_task, sieve_task_json


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXTS = [row["text"] for row in parity_rows(30)]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a pruned model with label offsets."""
    root = tmp_path_factory.mktemp("pruned")
    write_rows(root / "rows.jsonl", parity_rows(60))
    spec = task_spec(limit={"test": 10}, seed=4, group="text")
    pruner = SievePruner(make_model(), make_tokenizer(), Task.from_dict(spec, root), base_model="toy/base")
    pruner.prune(unhealed(pruning_ratio=0.3, rank_multiple=1, label_offsets="prior"), progress=False)
    return pruner.save_pretrained(root / "pruned")


def task_of(directory: Path) -> dict[str, Any]:
    (task,) = json.loads((directory / "sieve_task.json").read_text())["tasks"]
    return dict(task)


def test_nothing_of_the_data_is_written(pruned: Path) -> None:
    task = task_of(pruned)
    assert task.keys() == {"name", "kind", "prompt", "answer", "labels", "results"}
    assert task["results"].keys() >= {"split", "metric", "count", "dense", "pruned", "paired_difference"}


def test_a_dense_export_answers_with_the_same_offsets(
    pruned: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, err = cli("export", "--model", pruned, "--output", tmp_path / "dense", "--dense")
    assert status == 0, err
    task = task_of(tmp_path / "dense")
    assert task["results"] == task_of(pruned)["results"]
    assert task["label_offsets"][0]["candidates"] == [" odd", " even"]
    made = [pipeline("sieve", model=str(directory), device=-1)(TEXTS) for directory in (pruned, tmp_path / "dense")]
    found = np.array([[list(answer["probabilities"].values()) for answer in answers] for answers in made])
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)


@OLD_NAMES
def test_a_merged_model_keeps_its_task_without_scores(
    pruned: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    peft.get_peft_model(model, config_for(model, "factors")).save_pretrained(tmp_path / "adapter")
    status, _, err = cli("merge", "--model", pruned, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert status == 0, err
    before = task_of(pruned)
    assert task_of(tmp_path / "merged") == {key: value for key, value in before.items() if key != "results"}


def test_models_without_a_task_have_none_to_pass_on(tmp_path: Path) -> None:
    assert not inherited_files(None)
    assert not inherited_files(tmp_path)
    (tmp_path / "sieve_task.json").write_text("{")
    assert not inherited_files(tmp_path)


def test_scores_of_several_tasks_go_to_their_tasks() -> None:
    blocks = [{"task": name, "split": "test", "count": count} for name, count in (("one", 1), ("two", 2))]
    files = sieve_task_json([task_spec(name="two"), task_spec(name="one")], {"tasks": blocks})
    content = json.loads(files["sieve_task.json"])
    assert [task["results"]["count"] for task in content["tasks"]] == [2, 1]


def test_absolute_paths_are_not_published() -> None:
    spec = task_spec(
        data={"files": {"calibration": "/home/alice/rows.jsonl", "test": "sub/rows.jsonl"}},
        metric={"evaluate": "/home/alice/my_metric", "key": "score"},
    )
    other = {"name": "other", "lm_eval": "/home/alice/task.yaml", "data": {"dataset": "/home/alice/data"}}
    public = [public_task(each) for each in (spec, other)]
    assert "alice" not in json.dumps(public)
    assert public[0]["data"] == {"files": {"calibration": "rows.jsonl", "test": "sub/rows.jsonl"}}
    assert public[1]["lm_eval"] == "task.yaml"
    assert "alice" in json.dumps([spec, other])
