"""Tasks, methods, presets and numbers of the results table."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_file import write_gguf
from lora_models import OLD_NAMES
from results_world import part
from task_rows import ROWS
from toy import load_task, make_model, make_tokenizer, write_rows
from transformers import AutoModelForCausalLM

from optimum_sieve import SieveConfig, evaluate


def test_the_package_takes_the_settings_of_every_method() -> None:
    methods = {method.name: method for method in part("methods").METHODS}
    preset = part("methods").PRESETS["full"]
    with pytest.raises(
        ValueError, match="`projection='learned'` must go with allocation='uniform' and a `pruning_ratio`"
    ):
        SieveConfig.from_dict(preset.config("movie", methods["learned"], 0.02))
    for method in methods.values():
        if not method.by_ratio:
            assert SieveConfig.from_dict(preset.config("movie", method, 0.02)).tolerance == 0.02


@pytest.mark.parametrize("name", ["small", "medium", "full"])
def test_presets_name_what_there_is(name: str) -> None:
    suite, methods = part("suite"), part("methods")
    preset, jobs = methods.PRESETS[name], {job.name: job for job in suite.JOBS}
    assert preset.limits.keys() == preset.cells.keys() <= jobs.keys()
    for job, cells in preset.cells.items():
        assert cells.keys() <= {method.name for method in methods.METHODS}
        assert {tolerance for each in cells.values() for tolerance in each} <= set(methods.TOLERANCES)
        assert preset.splits(job).keys() == {"calibration", "selection", "test"}
        assert ("sibling" in preset.limits[job]) == bool(jobs[job].siblings)


@pytest.mark.parametrize(("job", "file"), [
    ("snips", "snips"), ("pubmedqa", "pubmedqa"), ("squad", "squad_xquad_en"), ("nq", "nq_open_oracle"),
])  # fmt: skip
def test_rows_of_the_data_sets_fit(job: str, file: str, tmp_path: Path) -> None:
    (found,) = (each for each in part("suite").JOBS if each.name == job)
    others = (name for rows in found.siblings.values() for name in rows.data["files"].values())
    for folder in {file, *(Path(name).parent.name for name in others)}:
        (tmp_path / folder).mkdir()
        own = ROWS[folder][0]
        field = "question" if "question" in own[0] else "text"
        for name in ("train", "validation", "test"):
            if job == "snips":
                own = [{**row, "label": label} for row, label in zip(own, ("RateBook", "GetWeather"), strict=True)]
            made = [
                {**row, field: f"{name} {row[field]} {copy}", "title": f"{name} {row.get('title')} {copy}"}
                for row in own
                for copy in range(4)
            ]
            write_rows(tmp_path / folder / f"{name}.jsonl", made)
    places = part("suite").Places(data=tmp_path, cache=tmp_path / "cache")
    task = places.read(found.rows, {})
    assert sum(task.splits.values()) == 24
    assert min(task.splits.values()) > 0
    for rows in found.siblings.values():
        assert places.read(rows, {"test": 2}).splits["test"] == 2
    assert str(tmp_path) not in json.dumps(found.rows.spec({}))


def test_sentences_are_divided_by_their_source(tmp_path: Path) -> None:
    sources = ("amazon", "imdb", "yelp")
    (tmp_path / "uci_sentences").mkdir()
    for name in ("train", "validation", "test"):
        made = [
            {"text": f"{name} {source} {place}", "label": ("positive", "negative")[place % 2], "source": source}
            for source in sources for place in range(20)
        ]  # fmt: skip
        write_rows(tmp_path / "uci_sentences" / f"{name}.jsonl", made)
    (job,) = (each for each in part("suite").JOBS if each.name == "uci-imdb")
    places = part("suite").Places(data=tmp_path, cache=tmp_path / "cache")
    task = places.read(job.rows, {})
    texts = [e.prompt for split in ("calibration", "selection", "test") for e in task.examples(split, make_tokenizer())]
    assert len(texts) == 60
    assert all("imdb" in text for text in texts)
    assert set(job.siblings) == {"amazon", "yelp"}
    yelp = places.read(job.siblings["yelp"], {"test": 50}).examples("test", make_tokenizer())
    assert len(yelp) == 50
    assert all("yelp" in example.prompt for example in yelp)


@OLD_NAMES
def test_a_tuned_model_that_came_from_gguf_can_be_saved(tmp_path: Path) -> None:
    write_gguf(make_model(), tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    examples = load_task(tmp_path).examples("calibration", make_tokenizer())
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    tuned, losses = part("tuning").tune(
        model, make_tokenizer(), examples, part("suite").Tuning(rows=60, epochs=1, learning_rate=0.01)
    )
    tuned.save_pretrained(tmp_path / "tuned")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").model.layers[0].self_attn.q_proj.weight
    assert len(losses) == -(-len(examples) // 8)
    assert not torch.equal(saved, before)
    assert torch.equal(saved, tuned.model.layers[0].self_attn.q_proj.weight)


def test_clear_means_above_the_largest_tolerance(tmp_path: Path) -> None:
    examples = load_task(tmp_path).examples("test", make_tokenizer())
    options = {"metric": "accuracy", "batch_size": 32, "progress": False}
    found = evaluate(make_model(), examples, make_tokenizer(), **options)
    edge = found.majority_score + 0.05 + 2 * found.standard_error
    assert part("dense").is_clear(dataclasses.replace(found, score=edge + 1e-6))
    assert not part("dense").is_clear(dataclasses.replace(found, score=edge - 1e-6))


def test_peak_memory_sees_what_is_let_go() -> None:
    measure = part("measure")
    with measure.peak_memory(torch.device("cpu")) as before:
        pass
    with measure.peak_memory(torch.device("cpu")) as peak:
        block = np.ones(50_000_000)
        time.sleep(3 * measure.MEMORY_SECONDS)
        del block
    assert peak["bytes"] - before["bytes"] > 300e6


def test_numbers_are_written_as_in_the_other_pages() -> None:
    table = part("table")
    assert [table.number(value) for value in (0.8125, 1.0, -0.034, 0.0)] == [".812", "1.000", "-.034", ".000"]
    assert table.with_error({"mean": 0.002, "standard_error": 0.01}) == "+.002 ± .010"
    assert table.with_error({"mean": -0.002, "standard_error": 0.01}) == "-.002 ± .010"
    assert table.with_error({"score": 0.5, "standard_error": 0.01}) == ".500 ± .010"
