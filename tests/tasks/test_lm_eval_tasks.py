"""Tasks of lm-evaluation-harness: the same rows get the same score as from the package's own command."""

from __future__ import annotations

import json
import logging
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from toy import make_model, make_tokenizer, parity_rows, unhealed, write_rows

from optimum_sieve import SievePruner, Task, evaluate
from optimum_sieve.evaluation.stage import score_cache
from optimum_sieve.tasks.task import metric_source


lm_eval = pytest.importorskip("lm_eval")

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "Number: {{text}} Parity:",
    "doc_to_choice": ["odd", "even"],
    "doc_to_target": "label",
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_text": "Number: {{text}} Parity:",
    "doc_to_target": "{{written}}",
    "generation_kwargs": {"until": ["?", "user"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 5},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Their package and its dependencies warn of what they will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def written(text: str) -> str:
    """Return what the model writes after a prompt, as a plain loop gives it."""
    model, tokenizer = make_model(), make_tokenizer()
    ids = tokenizer(f"Number: {text} Parity:", return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model and three files of rows."""
    directory = tmp_path_factory.mktemp("harness")
    make_model().save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")
    rows = parity_rows(260)
    for number, row in enumerate(rows):
        # Half of the answers are what the model writes.
        row["written"] = written(row["text"]) if number % 2 else row["label"]
    for name, part in (("train", rows[:100]), ("validation", rows[100:160]), ("test", rows[160:])):
        write_rows(directory / f"{name}.jsonl", part)
    return directory


def write_harness(world: Path, name: str, **config: Any) -> Path:
    files = {split: str(world / f"{split}.jsonl") for split in ("train", "validation", "test")}
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "validation_split": "validation",
        "test_split": "test",
        "metadata": {"version": 1.0},
        **config,
    }
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def theirs(world: Path, path: Path) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Return the package's own scores by metric, and the prompt and continuation of each of its requests."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(world / "model"), device="cpu", dtype="float32", batch_size=8)
    manager = TaskManager(include_path=str(world), include_defaults=False)
    results = lm_eval.simple_evaluate(model=model, tasks=[path.stem], task_manager=manager, bootstrap_iters=0)
    requests = []
    for sample in results["samples"][path.stem]:
        requests += [tuple(each[:2]) for each in sample["arguments"]]
    return results["results"][path.stem], requests


def ours(world: Path, task: Task) -> float:
    pruner = SievePruner.from_pretrained(world / "model", task=task, dtype="float32", device="cpu")
    examples = task.examples("test", pruner.tokenizer)
    scored = evaluate(pruner.model, examples, pruner.tokenizer, metric=task.metric, batch_size=8, progress=False)
    return scored.score


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("plain", CHOICES),
        ("lengths", {"doc_to_choice": ["odd", "even very very"], "doc_to_target": "{{['odd', 'even'].index(label)}}"}),
        (
            "bytes",
            {
                "metric_list": [{"metric": "acc_bytes"}],
                "doc_to_choice": "{{['odd', 'even ?']}}",
                "doc_to_target": "{{0 if label == 'odd' else 1}}",
            },
        ),
        ("space", {"doc_to_text": "Number: {{text}} Parity: ", "target_delimiter": ""}),
        (
            "instruction",
            {"description": "Number : ", "fewshot_delimiter": " ? ", "fewshot_config": {"sampler": "first_n"}},
        ),
    ],
)
def test_multiple_choice(world: Path, name: str, config: dict[str, Any], shots: int) -> None:
    path = write_harness(world, f"{name}_{shots}", **{**CHOICES, **config}, num_fewshot=shots)
    scores, requests = theirs(world, path)
    found = []
    for entry in config.get("metric_list", [{"metric": "acc"}, {"metric": "acc_norm"}]):
        task = Task.from_dict({"lm_eval": str(path), "metric": entry["metric"]})
        assert (task.name, task.kind, task.metric) == (path.stem, "choices", "accuracy")
        assert task.splits == {"calibration": 100, "selection": 60, "test": 100}
        found.append(ours(world, task))
        assert found[-1] == pytest.approx(scores[f"{entry['metric']},none"], abs=1e-6)
    assert 0.2 < min(found) < 1
    texts = [
        example.prompt + text for example in task.examples("test", make_tokenizer()) for text in example.candidates
    ]
    assert sorted(texts) == sorted(map("".join, requests))


@pytest.mark.parametrize(
    ("name", "changes", "filter_name"),
    [
        ("as_written", {}, None),
        ("stripped", {"filter_list": [{"name": "strip", "filter": [
            {"function": "remove_whitespace"}, {"function": "take_first"}]}]}, "strip"),
        ("pattern", {"filter_list": [
            {"name": "first", "filter": [{"function": "take_first"}]},
            {"name": "word", "filter": [
                {"function": "regex", "regex_pattern": "([a-z]+)", "group_select": -1, "fallback": "none"},
                {"function": "uppercase"}, {"function": "take_first"}]}]}, "word"),
    ],
)  # fmt: skip
def test_written_answers(world: Path, name: str, changes: dict[str, Any], filter_name: str | None) -> None:
    metric = {**WRITTEN["metric_list"][0], "ignore_case": True, "regexes_to_ignore": [",", "very"]}
    config = {**WRITTEN, "metric_list": [metric], **changes}
    path = write_harness(world, name, **config)
    scores, requests = theirs(world, path)
    task = Task.from_dict({"lm_eval": str(path), **({"filter": filter_name} if filter_name else {})})
    assert task.kind == "generate"
    score = ours(world, task)
    assert score == pytest.approx(scores[f"exact_match,{filter_name or 'none'}"], abs=1e-6)
    assert 0.1 < score < 0.9
    assert {example.prompt for example in task.examples("test", make_tokenizer())} == {prompt for prompt, _ in requests}


@pytest.mark.parametrize("shots", [0, 1])
def test_the_most_likely_continuation(world: Path, shots: int) -> None:
    config = {
        "output_type": "loglikelihood",
        "doc_to_text": "Number: {{text}} Parity:",
        "doc_to_target": "{{' ' + written.split()[0] if written.split() else ' odd'}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = write_harness(world, f"continuation_{shots}", **config, num_fewshot=shots, fewshot_delimiter=" ")
    scores, requests = theirs(world, path)
    task = Task.from_file(f"lm_eval:{path}")
    score = ours(world, task)
    assert score == pytest.approx(scores["acc,none"], abs=1e-6)
    assert 0 < score < 1
    examples = task.examples("test", make_tokenizer())
    assert {example.prompt + example.answer for example in examples} == set(map("".join, requests))
