"""Tasks of lm-evaluation-harness: the same rows get the same score as from the package's own command."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from toy import make_model, make_tokenizer, parity_rows, unhealed, write_rows

from optimum_sieve import HealConfig, SievePruner, Task, evaluate
from optimum_sieve.metrics.identity import metric_source
from optimum_sieve.publish.recipe import Recipe, located
from optimum_sieve.tasks.harness import rows


if TYPE_CHECKING:
    from collections.abc import Iterator

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


CONTINUED = {
    "output_type": "loglikelihood",
    "doc_to_text": "Number: {{text}} Parity:",
    "doc_to_target": "{{' ' + written.split()[0] if written.split() else ' odd'}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Their package and its dependencies warn of what they will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Every result lists the machine and what pip has installed there, which takes seconds.
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
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
    made = parity_rows(260)
    for number, row in enumerate(made):
        # Half of the answers are what the model writes.
        row["written"] = written(row["text"]) if number % 2 else row["label"]
    for name, part in (("train", made[:100]), ("validation", made[100:160]), ("test", made[160:])):
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
    # Takes seconds, and every worker collects this file.
    import lm_eval
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


@pytest.mark.parametrize(
    ("name", "shots", "config"),
    [
        ("plain", 0, {}),
        ("examples", 2, {}),
        (
            "lengths",
            1,
            {"doc_to_choice": ["odd", "even very very"], "doc_to_target": "{{['odd', 'even'].index(label)}}"},
        ),
        (
            "bytes",
            0,
            {
                "metric_list": [{"metric": "acc_bytes"}],
                "doc_to_choice": "{{['odd', 'even ?']}}",
                "doc_to_target": "{{0 if label == 'odd' else 1}}",
            },
        ),
        ("space", 2, {"doc_to_text": "Number: {{text}} Parity: ", "target_delimiter": ""}),
        (
            "instruction",
            2,
            {"description": "Number : ", "fewshot_delimiter": " ? ", "fewshot_config": {"sampler": "first_n"}},
        ),
    ],
)
def test_multiple_choice(world: Path, name: str, shots: int, config: dict[str, Any]) -> None:
    path = write_harness(world, name, **{**CHOICES, **config}, num_fewshot=shots)
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
                {"function": "regex", "regex_pattern": "^(.+)$", "group_select": -1, "fallback": "none"},
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
    path = write_harness(world, f"continuation_{shots}", **CONTINUED, num_fewshot=shots, fewshot_delimiter=" ")
    scores, requests = theirs(world, path)
    task = Task.from_file(f"lm_eval:{path}")
    score = ours(world, task)
    assert score == pytest.approx(scores["acc,none"], abs=1e-6)
    assert 0 < score < 1
    examples = task.examples("test", make_tokenizer())
    assert {example.prompt + example.answer for example in examples} == set(map("".join, requests))


def test_few_shot_examples_are_never_the_row_itself_or_of_the_test_split(world: Path) -> None:
    path = write_harness(world, "many_shots", **CHOICES, num_fewshot=3)
    task = Task.from_file(f"lm_eval:{path}")
    test = {json.loads(line)["text"] for line in (world / "test.jsonl").read_text().splitlines()}
    for split in task.splits:
        for example in task.examples(split, make_tokenizer()):
            *shown, last = re.findall(r"Number: ([\d ]+) Parity:", example.prompt)
            assert len(shown) == 3
            assert last not in shown
            assert not test & set(shown)
    with pytest.raises(
        ValueError, match="`num_fewshot` must not take examples from the split that is scored, got 3 from "
    ):
        Task.from_file(f"lm_eval:{write_harness(world, 'leak', **CHOICES, num_fewshot=3, fewshot_split='test')}")
    alone = {"training_split": None, "validation_split": None}
    with pytest.raises(
        ValueError, match="`num_fewshot` must not take examples from the split that is scored, got 2 from "
    ):
        Task.from_dict({"lm_eval": str(write_harness(world, "alone", **CHOICES, **alone)), "num_fewshot": 2})
    listed = {"num_fewshot": 1, "fewshot_config": {"samples": [{"text": "1", "label": "odd"}]}}
    task = Task.from_file(f"lm_eval:{write_harness(world, 'listed', **CHOICES, **alone, **listed)}")
    assert task.splits == {"calibration": 50, "selection": 25, "test": 25}
    assert all(
        example.prompt.startswith("Number: 1 Parity: odd") for example in task.examples("test", make_tokenizer())
    )


def test_splits_fractions_and_limits(world: Path) -> None:
    path = write_harness(world, "without_validation", **CHOICES, validation_split=None)
    spec = {"lm_eval": path.name, "name": "named", "seed": 3}
    data = {"fractions": {"calibration": 4, "selection": 1}}
    task = Task.from_dict({**spec, "data": data, "limit": {"calibration": 30}}, world)
    assert (task.name, task.splits) == ("named", {"calibration": 30, "selection": 20, "test": 100})
    assert task.labelled
    path = write_harness(world, "without_test", **CHOICES, test_split=None)
    assert Task.from_file(f"lm_eval:{path}").splits == {"calibration": 67, "selection": 33, "test": 60}
    data = {"splits": {"calibration": "validation", "test": "train"}}
    assert Task.from_dict({"lm_eval": str(path), "data": data}).splits == {"calibration": 60, "test": 100}


def test_a_part_of_large_splits_is_drawn_by_seed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MOST_DOCUMENTS", 30)
    path = str(write_harness(world, "large", **CHOICES))
    tasks = [Task.from_dict({"lm_eval": path, "seed": seed}) for seed in (0, 0, 1)]
    assert tasks[0].splits == {"calibration": 30, "selection": 30, "test": 100}
    prompts = [{example.prompt for example in task.examples("calibration", make_tokenizer())} for task in tasks]
    assert prompts[0] == prompts[1] != prompts[2]


def test_rows_of_two_splits_are_left_out_of_those_that_are_not_scored(world: Path, tmp_path: Path, caplog: Any) -> None:
    made = parity_rows(60)
    for name, part in (("train", made[:40]), ("validation", made[30:50]), ("test", made[35:])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    with caplog.at_level(logging.WARNING):
        task = Task.from_file(f"lm_eval:{write_harness(tmp_path, 'shared', **CHOICES)}")
    # Train loses rows 35 to 39; validation 35 to 49, and 30 to 34 to train.
    assert task.splits == {"calibration": 23, "selection": 12, "test": 25}
    assert "5 of 40 rows of the train split of lm_eval:shared occur in another split too" in caplog.text
    assert "20 of 20 rows of the validation split of lm_eval:shared occur in another split too" in caplog.text


def test_rows_without_a_right_answer_are_left_out_and_counted(tmp_path: Path, caplog: Any) -> None:
    made = [{**row, "label": "neither" if number < 7 else row["label"]} for number, row in enumerate(parity_rows(100))]
    for name, part in (("train", made[7:50]), ("validation", made[50:70]), ("test", [*made[:7], *made[70:]])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    with caplog.at_level(logging.WARNING):
        task = Task.from_file(f"lm_eval:{write_harness(tmp_path, 'wrong', **CHOICES)}")
    assert task.splits["test"] == 30
    assert (
        "7 of 37 rows of the test split of lm_eval:wrong cannot be scored and are left out; the first, row 1: its "
        in (caplog.text)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"output_type": "loglikelihood_rolling"},
            "`output_type: loglikelihood_rolling` is none of multiple_choice, gen",
        ),
        ({"metric_list": [{"metric": "f1"}]}, "`metric_list` has f1, and none of acc, acc_norm, acc_bytes, averaged"),
        ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, "`metric_list` has acc, and none of"),
        ({"group": "all"}, "it is a group of tasks; name one of them .`group`."),
        ({"doc_to_image": "image"}, "it has images .`doc_to_image`."),
        ({"use_prompt": "promptsource:x"}, "its prompt is promptsource's .`use_prompt`."),
        ({"unsafe_code": True}, "it runs what the model writes .`unsafe_code`."),
        ({"repeats": 4}, "`repeats: 4` samples several answers"),
        ({**WRITTEN, "generation_kwargs": {"do_sample": True}}, "`generation_kwargs: .*` is no greedy decoding"),
        ({**WRITTEN, "generation_kwargs": {"temperature": 0.7}}, ".*is no greedy decoding"),
        ({**WRITTEN, "generation_kwargs": {"num_beams": 4}}, ".*is no greedy decoding"),
        (
            {**WRITTEN, "filter_list": [{"name": "vote", "filter": [{"function": "majority_vote"}]}]},
            "the filter `majority_vote` is none of lowercase, map, regex",
        ),
        (
            {**WRITTEN, "filter_list": [{"name": "all", "filter": [{"function": "lowercase"}]}]},
            "its filters return several answers, without `take_first`",
        ),
        (
            {"doc_to_text": "{{0 if label == 'odd' else 1}}", "doc_to_target": "{{text}}"},
            "each choice has a prompt of its",
        ),
        ({"doc_to_target": "{{[0, 1]}}"}, "several choices of a row are right"),
        ({"doc_to_text": ""}, "its prompts are empty"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_name(world: Path, config: dict[str, Any], message: str) -> None:
    path = write_harness(world, "refused", **{**CHOICES, **config})
    with pytest.raises(ValueError, match=f"`task` must be a task that can be mapped, got lm_eval:.*: {message}"):
        Task.from_file(f"lm_eval:{path}")


def test_functions_run_only_if_they_are_trusted(world: Path, tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text(
        "from pathlib import Path\n"
        "(Path(__file__).parent / 'ran').touch()\n"
        "def process(rows):\n    return rows.filter(lambda row: row['label'] == 'odd')\n"
    )
    path = write_harness(world, "with_functions", **CHOICES)
    text = path.read_text() + "process_docs: !function functions.process\n"
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "task.yaml").write_text("include: base.yaml\ntask: with_functions\n")
    message = r"`process_docs: !function functions.process` is code. Pass `trust_remote_code` to run it"
    for name in ("base", "task"):
        with pytest.raises(ValueError, match=message):
            Task.from_file(f"lm_eval:{tmp_path / name}.yaml")
    assert not (tmp_path / "ran").exists()
    task = Task.from_file(f"lm_eval:{tmp_path / 'task.yaml'}", trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert all(example.answer == " odd" for example in task.examples("test", make_tokenizer()))
    (tmp_path / "scored.yaml").write_text(text.replace("process_docs", "process_results"))
    with pytest.raises(ValueError, match=r"a function scores its answers .`process_results`."):
        Task.from_file(f"lm_eval:{tmp_path / 'scored.yaml'}", trust_remote_code=True)


def test_templates_run_in_a_sandbox(world: Path) -> None:
    harmful = "{{ cycler.__init__.__globals__.os.getcwd() }} {{text}}"
    path = write_harness(world, "harmful", **{**CHOICES, "doc_to_text": harmful})
    with pytest.raises(ValueError, match=r"SecurityError.*access to attribute '__init__'"):
        Task.from_file(f"lm_eval:{path}")
    assert Task.from_file(f"lm_eval:{path}", trust_remote_code=True).splits["test"] == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "acc_byte"}, "`metric` must be one of acc, acc_norm for lm_eval:.*, got 'acc_byte'"),
        ({"num_fewshot": -1}, "`num_fewshot` must be a whole number of at least 0, got -1"),
        ({"prompt": "x"}, "`task` must have known keys only, got 'prompt'"),
        ({"data": {"files": "x.jsonl"}}, "`data` must have known keys only, got 'files'"),
        ({"lm_eval": "no/such.yaml"}, "`task` must be an existing YAML of lm-evaluation-harness, got no/such.yaml"),
        ({"name": "a\nb"}, "`name` must be a line of text"),
    ],
)
def test_errors_of_the_task_file(world: Path, changes: dict[str, Any], message: str) -> None:
    path = write_harness(world, "errors", **CHOICES)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Task.from_dict({"lm_eval": str(path), **changes})
    with pytest.raises(ValueError, match=r"`filter` must be one of none for lm_eval:.*, got 'strict'"):
        Task.from_dict({"lm_eval": str(write_harness(world, "errors_2", **WRITTEN)), "filter": "strict"})


def test_tasks_of_the_package_are_found_by_name() -> None:
    from optimum_sieve.tasks.harness.source import _yaml_path

    assert located("lm_eval:arc_easy", Path("somewhere")) == "lm_eval:arc_easy"
    path = _yaml_path("arc_easy", Path())
    assert yaml.safe_load(path.read_text())["task"] == "arc_easy"
    # Its data is on the Hub, which no test reaches.
    with pytest.raises(ValueError, match="`task` must be a task that lm-evaluation-harness can load, got arc_easy: "):
        Task.from_file("lm_eval:arc_easy")
    with pytest.raises(ValueError, match=r"`process_docs: !function utils.process_docs` is code"):
        Task.from_file("lm_eval:hellaswag")


@pytest.mark.parametrize("config", [CHOICES, WRITTEN, CONTINUED], ids=["choices", "written", "continued"])
def test_a_model_is_pruned_for_a_task_of_theirs(world: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    path = write_harness(world, "pruned_for", **config)
    task = Task.from_dict({"lm_eval": str(path), "limit": {"calibration": 16, "selection": 10, "test": 10}})
    pruner = SievePruner.from_pretrained(world / "model", task=task)
    config = unhealed(pruning_ratio=0.3, rounds=1, heal=HealConfig(steps=2))
    pruner.prune(config, work_dir=tmp_path / "work", progress=False)
    directory = pruner.save_pretrained(tmp_path / "out")
    card = (directory / "README.md").read_text()
    (stored,) = json.loads((directory / "sieve_task.json").read_text())["tasks"]
    assert stored["not_stored"] == "lm-evaluation-harness makes its prompts"
    # Its directory is not published.
    assert f"lm_eval: {path.name}" in card
    (again,) = Recipe.from_file(directory / "sieve.yaml").read_tasks(tmp_path, path.parent)
    tokenizer = pruner.tokenizer
    assert again.splits == task.splits
    assert all(again.examples(split, tokenizer) == task.examples(split, tokenizer) for split in task.splits)
    assert list((tmp_path / "work").glob("evaluation-*"))
    assert task.fingerprint() == Task.from_dict(task.spec).fingerprint()


def test_results_are_stored_under_what_their_metric_is(world: Path) -> None:
    path = write_harness(world, "stored", **WRITTEN)
    name, settings = metric_source(Task.from_file(f"lm_eval:{path}").metric)
    assert re.fullmatch(r"lm_eval \S+ exact_match", name)
    assert "take_first" in settings
