from __future__ import annotations

import argparse
import re
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard
from toy import load_task

from optimum_sieve import SieveConfig, Task
from optimum_sieve.commands.base.settings import add_settings, settings_from
from optimum_sieve.config.tune import TuneConfig
from optimum_sieve.publish.card import build_card
from optimum_sieve.publish.origin.terms import Terms
from optimum_sieve.publish.recipe import recipe_files
from optimum_sieve.publish.reproduction import reproduction_command
from optimum_sieve.tasks.templates.python_values import only_in_python


SPEC = {"name": "toy", "prompt": "Review: {{ text }}\nSentiment:", "labels": {"no": " no", "yes": " yes"}}
PATTERN = {
    "layers.0.self_attn.q_proj": {"rank": 16, "storage": "pivoted", "bias": True},
    "layers.0.mlp.up_proj": {"rank": 24, "storage": "factors", "bias": True},
    "layers.1.mlp.up_proj": {"rank": 0, "storage": "pivoted", "bias": True},
    "adapter": {"rank": 8, "storage": "pivoted", "bias": False},
}


@pytest.fixture
def report():
    return {
        "task": "toy",
        "split": "test",
        "metric": "accuracy",
        "count": 1234,
        "majority_score": 0.5125,
        "dense": {"score": 0.7891, "standard_error": 0.0116},
        "pruned": {"score": 0.7812, "standard_error": 0.0118},
        "paired_difference": {"mean": -0.0079, "standard_error": 0.0052},
        "agreement": 0.9312,
        "kl": 0.0234,
        "largest_coefficient": 5.25,
        "parameters": {"targets_before": 2000, "targets_after": 900, "model_before": 3000, "model_after": 1900},
        "bytes": {"before": 6000, "after": 3800},
        "seconds": {"moments": 3.5},
        "settings": SieveConfig(tolerance=0.02, seed=3).to_dict(),
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }


def test_metadata_survives_the_hub_library(report, tmp_path):
    terms = Terms({"license": "apache-2.0"})
    build_card(report, PATTERN, base_model="org/base", terms=terms).save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.license, data.library_name) == ("org/base", "apache-2.0", "transformers")
    assert data.pipeline_tag == "text-generation"
    assert {"sieve", "low-rank", "pruned"} <= set(data.tags)
    assert [(result.metric_name, result.metric_value) for result in data.eval_results] == [
        ("accuracy (pruned model)", 0.7812),
        ("accuracy (dense model)", 0.7891),
    ]


RATE = {"evaluate": "wer", "key": "wer", "greater_is_better": False, "scale": 0.5}


@pytest.mark.parametrize(
    ("keys", "kind", "arguments", "value"),
    [
        ({"metric": "macro_f1"}, "f1", {"average": "macro"}, 0.7812),
        ({"metric": "rougeL"}, "rouge", {"rouge_types": ["rougeL"]}, 0.7812),
        ({"metric": "f1 (k=1)", "metric_module": {"evaluate": "f1", "args": {"k": 1}}}, "f1", {"k": 1}, 0.7812),
        # The module's own score.
        ({"metric": "neg_wer (scale=0.5)", "metric_module": RATE, "score": -0.25}, "wer", None, 0.5),
    ],
)
def test_metrics_have_the_names_of_the_hub(report, tmp_path, keys, kind, arguments, value):
    report |= keys
    report["pruned"]["score"] = report.pop("score", 0.7812)
    build_card(report, PATTERN, base_model="org/base").save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.metrics == [kind]
    result = data.eval_results[0]
    assert (result.metric_type, result.metric_args, result.metric_value) == (kind, arguments, value)
    assert result.metric_name == f"{keys['metric'].removeprefix('neg_')} (pruned model)"


def test_a_metric_that_is_no_mean_says_so(report):
    report["error_method"] = "jackknife, 100 groups"
    del report["majority_score"]
    one = build_card(report, PATTERN, base_model="org/base").text
    assert "The metric is no mean over examples: standard errors are those of the jackknife, 100 groups." in one
    assert "always the most frequent answer" not in one
    several = build_card({**report, "tasks": [report, {**report, "task": "b"}]}, PATTERN, base_model="org/base").text
    assert "The metric of `b` is no mean over examples" in several


def test_text_has_every_figure(report):
    text = build_card(report, PATTERN, base_model="org/base", base_revision="abc123").text
    for figure in (
        "1,234",
        "0.7891 | 0.0116",
        "0.7812 | 0.0118",
        "-0.0079 | 0.0052",
        "0.5125",
        "93.1 %",
        "0.0234",
        "pivoted matrix is 5.2",
    ):
        assert figure in text
    for row in ("2,000 | 900 | -55.0%", "3,000 | 1,900 | -36.7%", "6,000 | 3,800 | -36.7%"):
        assert row in text
    assert "`org/base` at revision `abc123`" in text
    assert "python 3.11.7, torch 2.13.0." in text


def test_the_card_names_the_recipe_that_repeats_the_run(report):
    command = "```bash\noptimum-cli sieve run sieve.yaml --data-dir DIR --output pruned\n```"
    text = build_card(report, PATTERN, base_model="org/base", task_specs=[SPEC]).text
    assert command in text
    assert "optimum-cli sieve prune" not in text
    local = build_card(report, PATTERN, base_model="a/path/to/base", task_specs=[SPEC]).text
    assert "--data-dir DIR --model DENSE --output pruned\n```" in local


def test_a_recipe_that_runs_code_says_so(report):
    for spec in ({**SPEC, "metric": {"evaluate": "rouge", "key": "rougeL"}}, {"name": "toy", "lm_eval": "boolq"}):
        text = build_card(report, PATTERN, base_model="org/base", task_specs=[spec]).text
        assert "sieve run sieve.yaml --data-dir DIR --trust-remote-code --output pruned" in text
        assert "runs the code that the task names" in text
        files = recipe_files(report, [spec], base_model="org/base", revision=None)
        assert "--trust-remote-code" in files["sieve.yaml"]
    assert "--trust-remote-code" not in build_card(report, PATTERN, base_model="org/base", task_specs=[SPEC]).text


def test_a_metric_of_python_is_no_part_of_a_recipe(report, tmp_path):
    def longest(answer, accepted):
        return float(len(answer))

    task = load_task(tmp_path)
    assert only_in_python(task.spec) == {}
    spec = Task.from_dict(task.spec, tmp_path, metric=longest).spec
    assert only_in_python(spec) == {"metric": "the function longest"}
    assert "sieve run" not in build_card(report, PATTERN, base_model="org/base", task_specs=[spec]).text
    assert (
        "`metric` was the function longest"
        in recipe_files(report, [spec], base_model=None, revision=None)["sieve.yaml"]
    )


@pytest.mark.parametrize("reason", ["healed later", "made in Python"])
def test_a_model_that_no_recipe_repeats_has_the_commands_that_made_it(report, reason):
    specs = [SPEC] if reason == "healed later" else [{**SPEC, "prompt": {"function": "ask"}}]
    if reason == "healed later":
        report["healing"] = {"settings": {"steps": 4}, "kept": None}
    report["loading"] = {"dtype": "bfloat16", "gguf_file": "a b.gguf"}
    text = build_card(report, PATTERN, base_model="org/base", task_specs=specs).text
    assert "--task task.yaml --dtype bfloat16 --gguf-file 'a b.gguf' " in text
    assert ("optimum-cli sieve heal" in text) == (reason == "healed later")
    assert "sieve.yaml" not in text


def test_rank_table_has_a_row_for_each_layer(report):
    text = build_card(report, PATTERN, base_model="org/base").text
    table = re.search(r"## Ranks\n\n.*?\n\n(.*?)\n\n", text, flags=re.DOTALL)[1].splitlines()
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in table] == [
        ["layer", "self_attn.q_proj", "mlp.up_proj", "adapter"],
        ["---", "---:", "---:", "---:"],
        ["layers.0", "16", r"24\*", "-"],
        ["layers.1", "-", "0", "-"],
        ["", "-", "-", "8"],
    ]


def test_card_quotes_settings_and_task_as_yaml_that_reads_back(report):
    text = build_card(report, PATTERN, base_model="org/base", task_specs=[SPEC]).text
    settings, task = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL))
    assert settings == report["settings"]
    assert task == SPEC
    assert "prompt: |-\n  Review: {{ text }}\n  Sentiment:" in text


def test_card_of_a_bare_report_has_no_empty_sections(report):
    bare = {key: report[key] for key in ("task", "split", "metric", "count", "majority_score", "pruned", "versions")}
    text = build_card(bare, {}, base_model="org/base").text
    assert re.findall(r"^## (.*)", text, flags=re.MULTILINE) == ["Scores", "How to use", "How it was made"]
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    ("kind", "pipeline_tag", "auto_class"),
    [
        ("causal", "text-generation", "AutoModelForCausalLM"),
        ("classification", "text-classification", "AutoModelForSequenceClassification"),
        ("seq2seq", "text-generation", "AutoModelForSeq2SeqLM"),
    ],
)
def test_loading_example_names_the_auto_class(report, kind, pipeline_tag, auto_class):
    card = build_card(report, PATTERN, base_model="org/base", kind=kind)
    assert card.data.pipeline_tag == card.data.eval_results[0].task_type == pipeline_tag
    assert ("text2text-generation" in card.data.tags) == (kind == "seq2seq")
    assert f"from transformers import {auto_class}, AutoTokenizer" in card.text
    assert "trust_remote_code=True" in card.text


def test_the_pipeline_comes_first_in_how_to_use(report):
    text = build_card(report, PATTERN, base_model="org/base", task_specs=[SPEC]).text
    (first, *_) = re.findall(r"```python\n(.*?)```", text[text.index("## How to use") :], flags=re.DOTALL)
    assert first == (
        'from transformers import pipeline\n\nanswer = pipeline("sieve", model="path/or/hub-id")\nanswer("...")\n'
    )


TASK = {**SPEC, "kind": "labels"}
CHAT = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "{{ title }}: {{ text }}"}]
WRITTEN = {"name": "toy", "kind": "generate", "prompt": "{{ question }} Answer:", "max_new_tokens": 7}


@pytest.mark.parametrize(
    ("spec", "kind", "example"),
    [
        (TASK, "causal", {"text": "Review: [text]\nSentiment:"}),
        (TASK, "seq2seq", {"text": "Review: [text]\nSentiment:"}),
        (TASK, "classification", {"text": "Review: [text]\nSentiment:"}),
        (
            WRITTEN,
            "causal",
            {"text": "[question] Answer:", "parameters": {"max_new_tokens": 7, "do_sample": False}},
        ),
        (
            {
                "name": "toy",
                "kind": "choices",
                "choices": ["{{ a }}", "{{ b }}"],
                "prompt": "{{ lettered_choices }}\nIt is",
            },
            "causal",
            {"text": "A. [a]\nB. [b]\nIt is"},
        ),
        (
            {**TASK, "prompt": None, "chat": CHAT},
            "causal",
            {
                "messages": [
                    {"role": "system", "content": "Judge."},
                    {"role": "user", "content": "[title]: [text]"},
                ]
            },
        ),
    ],
)
def test_the_widget_has_the_prompt_with_names_in_place_of_a_row(report, tmp_path, spec, kind, example):
    build_card(report, PATTERN, base_model="org/base", task_specs=[spec], kind=kind).save(tmp_path / "README.md")
    # Keys of the Hub's widgets, after a round through the Hub's library.
    assert ModelCard.load(tmp_path / "README.md").data.widget == [{"example_title": "toy", **example}]


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        # Computed from fields: a row is needed to show what the model reads.
        ({**TASK, "prompt": "{{ text | length }} letters:"}, "causal"),
        ({**TASK, "prompt": "{{ number | float + 1 }} is"}, "causal"),
        ({**TASK, "prompt": "{% if long %}Long: {% endif %}{{ text }}"}, "causal"),
        ({"name": "toy", "kind": "choices", "choices": "{{ texts }}", "prompt": "{{ lettered_choices }}"}, "causal"),
        # Nothing that a widget can send: an answer already begun, and messages for a model that takes a text.
        ({**TASK, "prompt": None, "chat": [*CHAT, {"role": "assistant", "content": "It is"}]}, "causal"),
        ({**TASK, "prompt": None, "chat": CHAT}, "classification"),
        ({"name": "toy", "lm_eval": "boolq"}, "causal"),
        ({**TASK, "prompt": {"function": "ask"}}, "causal"),
    ],
)
def test_prompts_that_no_widget_can_show_have_no_example(report, spec, kind):
    assert "widget" not in build_card(report, PATTERN, base_model="org/base", task_specs=[spec], kind=kind).data


def test_each_task_has_an_example_with_its_name(report):
    specs = [TASK, {**TASK, "name": "other", "prompt": "{{ title }}"}]
    data = build_card({**report, "tasks": [report, report]}, PATTERN, base_model="org/base", task_specs=specs).data
    assert [example["example_title"] for example in data.widget] == ["toy", "other"]


def test_a_local_path_stays_out_of_the_card(report, tmp_path):
    base = tmp_path / "private" / "my-base"
    base.mkdir(parents=True)
    for base_model, name in ((str(base), "my-base"), (str(tmp_path / "gone" / "other"), "other"), (None, "model")):
        card = build_card(report, PATTERN, base_model=base_model, base_revision="abc")
        assert card.data.base_model is None
        assert str(tmp_path) not in str(card)
        assert f"# {name}, pruned for toy" in card.text
        assert "revision" not in card.text


def test_data_sets_of_the_hub_are_named(report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "rows").mkdir(parents=True)
    named = ["org/reviews", "mine/rows", "org/reviews"]
    specs = [{**TASK, "data": {"dataset": name}} for name in named] + [{**TASK, "data": {"files": "rows.jsonl"}}, TASK]
    assert build_card(report, PATTERN, base_model="org/base", task_specs=specs).data.datasets == ["org/reviews"]
    assert build_card(report, PATTERN, base_model="org/base", task_specs=[TASK]).data.datasets is None


@pytest.mark.parametrize(
    "config",
    [
        SieveConfig(tolerance=0.02),
        SieveConfig(pruning_ratio=0.5, storage="factors", target_modules=("*.q_proj", "up proj"), seed=7),
        SieveConfig(tolerance=0.02, tune=TuneConfig()),
        SieveConfig(tolerance=0.02, tune=TuneConfig(rank=4, gradient_checkpointing=True)),
        SieveConfig(tolerance=0.0, projection="svd", exclude_modules=("lm_head",), damping=0.5, rank_multiple=1),
    ],
)
def test_reproduction_command_parses_back_to_the_same_settings(config):
    words = shlex.split(reproduction_command("org/base", config.to_dict()))
    assert words[:7] == ["optimum-cli", "sieve", "prune", "--model", "org/base", "--task", "task.yaml"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    parser.add_argument("--config")
    add_settings(parser)
    assert settings_from(parser.parse_args(words[7:])) == config
