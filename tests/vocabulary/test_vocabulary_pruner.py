"""A model pruned together with its vocabulary: scored as it is saved, and loaded as any other."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from healed_world import learn
from lora_models import OLD_NAMES
from tiny_models import make_tiny_model
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from vocabulary_world import byte_level, load_reviews, unigram, wordpiece

from optimum_sieve import HealConfig, SievePruner, Task, compare, evaluate
from optimum_sieve import pruner as pruner_module
from optimum_sieve.export.dense import save_dense
from optimum_sieve.pipeline.heal import heal_pruned
from optimum_sieve.search.scoring.by_likelihood import CandidateScorer
from optimum_sieve.search.scoring.scorer import JointScorer
from optimum_sieve.surgery.live import LiveRanks
from optimum_sieve.vocabulary import task_vocabulary


TASK: dict[str, Any] = {"vocabulary": "task", "rank_multiple": 1, "rounds": 1}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return load_reviews(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def dense(task):
    tokenizer = byte_level()
    # With rows that no token has, and the head apart.
    model = make_tiny_model("llama", vocab_size=960, initializer_range=0.05, max_position_embeddings=128)
    return learn(task, model, tokenizer=tokenizer, steps=60)


def score(model, tokenizer, task, split="test"):
    examples = task.examples(split, tokenizer)
    return evaluate(model, examples, tokenizer, metric="accuracy", batch_size=32, progress=False)


def prune(dense, task, **settings):
    pruner = SievePruner(copy.deepcopy(dense), byte_level(), task, base_model="toy/base")
    pruner.prune(unhealed(**{"pruning_ratio": 0.3, **TASK, **settings}), **QUIET)
    return pruner


@pytest.fixture(scope="module")
def pruner(dense, task):
    return prune(dense, task)


@pytest.fixture(scope="module")
def output(pruner, tmp_path_factory):
    return pruner.save_pretrained(tmp_path_factory.mktemp("pruned") / "model")


def test_scores_are_those_of_what_is_saved_and_of_the_whole_dense_model(pruner, output, dense, task):
    report = pruner.result.report
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    whole, small = score(dense, byte_level(), task), score(loaded, tokenizer, task)
    assert report["dense"] == {"score": whole.score, "standard_error": whole.standard_error}
    assert report["pruned"] == {"score": small.score, "standard_error": small.standard_error}
    assert report["kl"] == pytest.approx(compare(whole, small).kl, rel=1e-4)
    # The test split has words that are cut into more tokens.
    texts = [example.prompt for example in task.examples("test", tokenizer)]
    assert sum(map(len, tokenizer(texts)["input_ids"])) > sum(map(len, byte_level()(texts)["input_ids"]))


def test_sizes_are_those_of_the_modules(pruner, output, dense):
    report, config = pruner.result.report, pruner.model.config
    sizes = report["vocabulary"]
    assert sizes == {"before": 960, "after": config.vocab_size}
    assert sizes["after"] == len(pruner.tokenizer) < 0.8 * len(byte_level())
    assert config.sieve["vocabulary"] == sizes
    parameters = report["parameters"]
    assert parameters["model_before"] == sum(p.numel() for p in dense.parameters())
    assert parameters["model_after"] == sum(p.numel() for p in pruner.model.parameters())
    removed = parameters["targets_before"] - parameters["targets_after"] + 2 * 32 * (960 - sizes["after"])
    assert parameters["model_before"] - parameters["model_after"] == removed
    tokenizer = byte_level()
    assert config.eos_token_id == pruner.tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(2))
    card = (output / "README.md").read_text()
    assert f"have {sizes['after']:,} of the dense model's 960 tokens" in card
    assert "vocabulary: task" in card
    assert "| tokens of the vocabulary | 960 |" in card


def test_selection_tokens_are_kept_only_where_the_selection_split_decides_nothing(dense, task):
    """Within a tolerance the search must meet words as they are cut when they are new."""
    words = {"given": prune(dense, task), "searched": prune(dense, task, pruning_ratio=None, tolerance=0.9)}
    kept = {name: set(pruner.tokenizer.get_vocab()) for name, pruner in words.items()}
    selection = {token for e in task.examples("selection", byte_level()) for token in byte_level().tokenize(e.prompt)}
    test = {token for e in task.examples("test", byte_level()) for token in byte_level().tokenize(e.prompt)}
    assert selection <= kept["given"]
    assert not selection <= kept["searched"]
    assert not test <= kept["given"]
    trials = words["searched"].result.trials
    assert trials[0]["count"] == task.splits["selection"]


@pytest.mark.parametrize("size", [{"pruning_ratio": 0.3}, {"pruning_ratio": None, "tolerance": 0.9}])
def test_tokens_of_unlabelled_rows_are_kept(dense, tmp_path, size):
    plain = load_reviews(tmp_path)
    write_rows(tmp_path / "more.jsonl", [{"text": "The octopus of the carpenter saw a volcano."}])
    files = {**plain.spec["data"]["files"], "unlabelled": "more.jsonl"}
    more = Task.from_dict({**plain.spec, "data": {"files": files}}, tmp_path)
    tokens = {token for e in more.examples("unlabelled", byte_level()) for token in byte_level().tokenize(e.prompt)}
    assert tokens <= set(prune(dense, more, **size).tokenizer.get_vocab())
    assert not tokens <= set(prune(dense, plain, pruning_ratio=None, tolerance=0.9).tokenizer.get_vocab())


@pytest.mark.parametrize(
    "settings", [{}, {"allocation": "genetic", "population_size": 2, "generations": 1, "search_fraction": 0.5}]
)
def test_after_an_error_the_model_is_as_it_was(dense, task, settings, monkeypatch):
    pruner = SievePruner(copy.deepcopy(dense), byte_level(), task)
    tokenizer, config = pruner.tokenizer, pruner.model.config
    monkeypatch.setattr(pruner_module, "pruned_result", None)
    stop = {"tolerance": 0.9, "confidence": 0.5} if settings else {"pruning_ratio": 0.3}
    with pytest.raises(TypeError, match="not callable"):
        pruner.prune(unhealed(**TASK, **stop, **settings), **QUIET)
    assert pruner.tokenizer is tokenizer
    assert pruner.model.config is config
    before = dense.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruner.model.state_dict().items())


def test_the_genetic_search_compares_with_the_whole_dense_model(dense, task):
    model, tokenizer = copy.deepcopy(dense), byte_level()
    examples = task.examples("test", tokenizer)
    whole = score(dense, tokenizer, task)
    vocabulary = task_vocabulary(model, tokenizer, task.examples("calibration", tokenizer))
    vocabulary.apply()
    small = score(model, vocabulary.tokenizer, task)
    assert np.abs(whole.log_probs - small.log_probs).max() > 1e-3
    with LiveRanks(model, {}) as live:
        scorer = CandidateScorer(
            live,
            examples,
            [len(examples)],
            vocabulary.tokenizer,
            metric="accuracy",
            batch_size=16,
            vocabulary=vocabulary,
        )
        (outcome,) = JointScorer([scorer]).score({}).parts
    assert outcome.kl == pytest.approx(compare(whole, small).kl, rel=1e-4)
    assert model.config.vocab_size == vocabulary.sizes["after"]


def test_a_genetic_search_runs_on_the_task_vocabulary(dense, task, tmp_path):
    search = {"allocation": "genetic", "population_size": 2, "generations": 1, "search_fraction": 0.5}
    config = unhealed(tolerance=0.9, confidence=0.5, **search, **TASK)
    pruner = SievePruner(copy.deepcopy(dense), byte_level(), task)
    found = pruner.search(config, work_dir=tmp_path, progress=False)
    assert found["ranks"]
    # A search leaves the model dense and whole.
    assert pruner.model.config.vocab_size == 960


def test_dry_run_counts_the_vocabulary(dense, task):
    pruner = SievePruner(copy.deepcopy(dense), byte_level(), task)
    plan = pruner.plan(unhealed(pruning_ratio=0.3, **TASK))
    whole = pruner.plan(unhealed(pruning_ratio=0.3, rank_multiple=1, rounds=1))
    assert plan.vocabulary["before"] == 960
    assert whole.expected_bytes - plan.expected_bytes == 4 * 2 * 32 * (960 - plan.vocabulary["after"])
    assert f"vocabulary             {plan.vocabulary['after']:,} of 960 tokens or more" in plan.format()


def test_dense_export_loads_as_the_base_architecture(output, task, tmp_path):
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    expected = score(loaded, tokenizer, task)
    save_dense(loaded, tokenizer, tmp_path / "dense")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert plain.config.vocab_size == len(tokenizer)
    found = score(plain, AutoTokenizer.from_pretrained(tmp_path / "dense"), task)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)


def test_remote_code_loads_it(pruner, output, task):
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = tokenizer(sys.argv[2], return_tensors='pt').input_ids\n"
        "print(json.dumps([type(model).__module__, model(ids).logits[0, -1].tolist()]))\n"
    )
    prompt = task.examples("test", pruner.tokenizer)[0].prompt
    done = subprocess.run(
        [sys.executable, "-c", script, str(output), prompt],
        env={**os.environ, "OPTIMUM_SIEVE_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    module, logits = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules.")
    ids = torch.tensor([pruner.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        expected = pruner.model(ids).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-5)


def test_evaluate_reads_each_model_with_its_own_tokenizer(output, dense, task, pruner, tmp_path, monkeypatch, capsys):
    from optimum.commands.optimum_cli import main

    dense.save_pretrained(tmp_path / "dense")
    byte_level().save_pretrained(tmp_path / "dense")
    spec = {**task.spec, "data": {"files": {}}}
    load_reviews(tmp_path)
    spec["data"]["files"] = {split: f"{split}.jsonl" for split in ("calibration", "selection", "test")}
    (tmp_path / "task.json").write_text(json.dumps(spec))
    words = ["evaluate", "--model", output, "--task", tmp_path / "task.json", "--compare-to", tmp_path / "dense"]
    words += ["--json", tmp_path / "scores.json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "sieve", *map(str, words)])
    main()
    found, report = json.loads((tmp_path / "scores.json").read_text()), pruner.result.report
    for key in ("dense", "pruned", "paired_difference", "vocabulary"):
        assert found[key] == report[key]
    assert "tokens of the vocabulary" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["candidates", "vocabulary"])
def test_healing_while_pruning(dense, task, loss):
    heal = HealConfig(steps=4, loss=loss)
    pruner = prune(dense, task, heal=heal)
    assert pruner.result.report["healing"]["steps"] == 4
    assert pruner.result.report["vocabulary"]["after"] == pruner.model.config.vocab_size


@pytest.mark.parametrize("loss", ["candidates", "vocabulary"])
def test_healing_afterwards(output, dense, task, pruner, tmp_path, loss):
    dense.save_pretrained(tmp_path / "dense")
    byte_level().save_pretrained(tmp_path / "dense")
    config = HealConfig(steps=4, loss=loss)
    result, tokenizer = heal_pruned(output, tmp_path / "dense", [task], config, device="cpu", progress=False)
    assert result.report["dense"] == pruner.result.report["dense"]
    assert result.report["vocabulary"] == pruner.result.report["vocabulary"] == result.model.config.sieve["vocabulary"]
    assert len(tokenizer) == result.model.config.vocab_size
    assert result.report["parameters"]["model_before"] == pruner.result.report["parameters"]["model_before"]


def test_written_answers_are_of_kept_tokens(tmp_path):
    changes = {"kind": "generate", "labels": None, "stop": "\n", "max_new_tokens": 6, "metric": "exact_match"}
    task = load_reviews(tmp_path, 24, **changes)
    model = make_tiny_model("llama", vocab_size=960, max_position_embeddings=128)
    pruner = SievePruner(model, byte_level(), task)
    result = pruner.prune(unhealed(pruning_ratio=0.2, **TASK), **QUIET)
    assert result.report["vocabulary"]["after"] == len(pruner.tokenizer)
    tokens = set(byte_level().tokenize(" good\n") + byte_level().tokenize(" bad\n"))
    assert tokens <= set(pruner.tokenizer.get_vocab())


def test_labels_of_the_dense_model_are_written_with_all_tokens(tmp_path):
    changes = {"kind": "generate", "labels": None, "answer": None, "stop": "\n", "max_new_tokens": 6}
    task = load_reviews(tmp_path, 24, **changes, metric="exact_match")
    model = make_tiny_model("llama", vocab_size=960, max_position_embeddings=128)
    pruner = SievePruner(model, byte_level(), task)
    result = pruner.prune(unhealed(pruning_ratio=0.2, label_source="model", **TASK), **QUIET)
    assert result.report["dense"]["score"] == 1.0


@pytest.mark.parametrize("kind", ["classification", "seq2seq"])
def test_other_kinds_of_models(tmp_path, kind):
    from transformers import T5Config, T5ForConditionalGeneration

    if kind == "classification":
        tokenizer = wordpiece()
        model = make_tiny_model("bert", vocab_size=len(tokenizer), num_labels=2, max_position_embeddings=128)
        model.config.id2label, model.config.label2id = {0: "good", 1: "bad"}, {"good": 0, "bad": 1}
        task = load_reviews(tmp_path, 24, labels={"good": "good", "bad": "bad"})
    else:
        tokenizer = unigram()
        torch.manual_seed(0)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
        model = T5ForConditionalGeneration(T5Config(vocab_size=800, decoder_start_token_id=0, **sizes)).eval()
        task = load_reviews(tmp_path, 24, labels={"good": "good", "bad": "bad"})
    whole = score(model, tokenizer, task)
    pruner = SievePruner(model, tokenizer, task)
    result = pruner.prune(unhealed(pruning_ratio=0.2, **TASK), **QUIET)
    assert result.report["dense"]["score"] == whole.score
    assert result.report["vocabulary"]["after"] == len(pruner.tokenizer) < 0.7 * len(tokenizer)
    pruner.save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == pruner.tokenizer.get_vocab()


@OLD_NAMES
def test_adapters_that_train_the_embeddings(output):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(output)
    config = LoraConfig(target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"], r=2)
    adapted = get_peft_model(model, config)
    ids = torch.tensor([[0, 5, model.config.vocab_size - 1]])
    adapted(ids, labels=ids).loss.backward()
    merged = adapted.merge_and_unload()
    assert merged.get_input_embeddings().weight.shape[0] == model.config.vocab_size


def test_refused_before_any_work(tmp_path):
    words = SievePruner(make_model(), make_tokenizer(), load_task(tmp_path, parity_rows(60)))
    with pytest.raises(
        ValueError, match=r"`vocabulary='task'` must .*of the kind BPE, WordPiece, Unigram, got WordLevel"
    ):
        words.plan(unhealed(pruning_ratio=0.3, **TASK))
