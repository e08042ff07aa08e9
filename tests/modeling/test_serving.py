"""Pruned models under what serves models: compilers, exporters, kernels, caches, drafts, offloading, harness."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import tiny_models
import torch
from tiny_models import logits, make_input_ids, make_pruned_model, make_tiny_model, save
from torch import nn
from toy import VOCABULARY, load_task, make_tokenizer, write_rows
from transformers import AutoModelForCausalLM, pipeline

from optimum_sieve import evaluate
from optimum_sieve.modeling.conversion import sieve_model


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Example

# Mixed: factors, pivoted and dense layers, among them some of rank 0.
STORAGES = [None, "factors", "pivoted"]
IDS = ["mixed", "factors", "pivoted"]
LENGTH = 12
GREEDY = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}


@pytest.fixture(params=STORAGES, ids=IDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_pruned_model("llama", storage=request.param)


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Machine code that an earlier run left, on another processor perhaps, brought the whole run down.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Generate greedily from rows without padding."""
    options = {"attention_mask": torch.ones_like(ids), **GREEDY, **options}
    output: torch.Tensor = model.generate(ids, **options)
    return output


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_into_one_graph(model: PreTrainedModel) -> None:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
def test_compiles_to_machine_code() -> None:
    model = make_pruned_model("llama", num_hidden_layers=1)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


def test_exports_with_a_dynamic_length(model: PreTrainedModel) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.model(input_ids, use_cache=False).logits
            return output

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Logits(), (make_input_ids(),), dynamic_shapes={"input_ids": {1: length}})
    for tokens in (3, 13, 40):
        ids = make_input_ids(seed=tokens, length=tokens)
        torch.testing.assert_close(program.module()(ids), logits(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_attention_kernels_agree(attention: str, tmp_path: Path) -> None:
    pruned = make_pruned_model("llama", num_hidden_layers=1)
    loaded = AutoModelForCausalLM.from_pretrained(save(pruned, tmp_path), attn_implementation=attention)
    assert loaded.config._attn_implementation == attention
    torch.testing.assert_close(logits(loaded), logits(pruned), rtol=1e-4, atol=1e-4)


def test_a_static_cache_generates_the_same(model: PreTrainedModel) -> None:
    dynamic = generate(model, make_input_ids())
    static = generate(model, make_input_ids(), cache_implementation="static", disable_compile=True)
    assert torch.equal(static, dynamic)


def test_rows_padded_on_the_left_generate_as_they_do_alone(model: PreTrainedModel) -> None:
    rows = [make_input_ids(seed=seed, rows=1, length=length)[0] for seed, length in enumerate((3, 7, 5))]
    padded = torch.zeros(len(rows), 7, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for number, row in enumerate(rows):
        padded[number, -len(row) :], mask[number, -len(row) :] = row, 1
    together = generate(model, padded, attention_mask=mask)
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(found[7:], generate(model, row[None])[0, len(row) :])


def test_pipelines_batch_prompts_of_several_lengths(tmp_path: Path) -> None:
    save(make_pruned_model("llama", vocab_size=len(VOCABULARY)), tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), return_full_text=False)
    prompts = ["Number: 7 Parity:", "Number: 7 51 30 Parity:"]
    options = {"max_new_tokens": 5, "do_sample": False}
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = [found[0]["generated_text"] for found in generator(prompts, batch_size=2, **options)]
    assert together == alone
    assert len(set(alone)) == 2


def count_passes(model: PreTrainedModel) -> list[int]:
    """Return a list that grows by one number, the tokens read, with every forward pass."""
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, arguments, keywords: passes.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    return passes


def test_a_pruned_draft_does_not_change_what_the_dense_model_writes(model: PreTrainedModel) -> None:
    dense = make_tiny_model("llama")
    passes = count_passes(model)
    for seed in range(3):
        ids = make_input_ids(seed=seed, rows=1)
        assert torch.equal(generate(dense, ids, assistant_model=model), generate(dense, ids))
    assert passes


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_draft_that_agrees_saves_passes_of_the_dense_model(storage: Any, tmp_path: Path) -> None:
    dense = make_tiny_model("llama")
    exact = make_tiny_model("llama")
    tiny_models.factorize_in_place(exact, storage=storage, exact=True)
    save(sieve_model(exact, base_model=None, settings={}, results={}), tmp_path)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path)
    draft.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    ids = make_input_ids(rows=1)
    expected = generate(dense, ids)
    passes = count_passes(dense)
    assert torch.equal(generate(dense, ids, assistant_model=draft), expected)
    # Each pass checks four drafted tokens and adds one.
    assert len(passes) <= -(-LENGTH // 5)


def test_layers_that_do_not_fit_into_memory_go_to_disk(model: PreTrainedModel, tmp_path: Path) -> None:
    offloaded = AutoModelForCausalLM.from_pretrained(
        save(model, tmp_path / "model"), device_map="auto", max_memory={"cpu": "35KB"}, offload_folder=tmp_path
    )
    assert {"cpu", "disk"} == {str(place) for place in offloaded.hf_device_map.values()}
    assert torch.equal(logits(offloaded), logits(model))
    assert torch.equal(generate(offloaded, make_input_ids()), generate(model, make_input_ids()))


HARNESS_TASK = """
task: parity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: candidates
doc_to_target: target
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def score_by_harness(model: Path, examples: list[Example], directory: Path) -> dict[str, Any]:
    """Score a saved model on examples by lm-evaluation-harness, which puts the space before a candidate itself."""
    harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: `pip install lm_eval`")
    from lm_eval.tasks import TaskManager

    write_rows(
        directory / "rows.jsonl",
        [{"prompt": e.prompt, "candidates": [c.strip() for c in e.candidates], "target": e.target} for e in examples],
    )
    (directory / "parity.yaml").write_text(HARNESS_TASK.format(rows=directory / "rows.jsonl"))
    results: dict[str, Any] = harness.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "backend": "causal"},
        tasks=["parity"],
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    return results


def test_the_evaluation_harness_finds_the_scores_of_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="lm-evaluation-harness is not installed")
    # The machine and what pip has installed there, which takes seconds.
    monkeypatch.setattr(evaluator, "add_env_info", lambda storage: None)
    pruned = make_pruned_model("llama", vocab_size=len(VOCABULARY))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(save(pruned, tmp_path / "model"))
    examples = load_task(tmp_path).examples("test", tokenizer)
    expected = evaluate(pruned, examples, tokenizer, metric="accuracy", batch_size=8, progress=False)
    assert 0 < expected.score < 1
    (tmp_path / "harness").mkdir()
    found = score_by_harness(tmp_path / "model", examples, tmp_path / "harness")
    assert found["results"]["parity"]["acc,none"] == pytest.approx(expected.score)
    sums = [[sum_ for sum_, _ in row["filtered_resps"]] for row in found["samples"]["parity"]]
    assert torch.tensor(sums).log_softmax(-1).numpy() == pytest.approx(expected.log_probs, abs=1e-4)
