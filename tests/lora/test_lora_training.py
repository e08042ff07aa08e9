"""transformers' Trainer and TRL's SFTTrainer train adapters of pruned models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lora_models import OLD_NAMES, WAYS, assert_close, config_for, peft
from tiny_models import logits, make_pruned_model, save
from toy import VOCABULARY, make_tokenizer, parity_rows, write_task
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_sieve.lora.layer import whole_matrix
from optimum_sieve.lora.merge import merge_adapter


pytestmark = OLD_NAMES

EXAMPLE = Path(__file__).parents[2] / "examples" / "lora_sft.py"

QUIET = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}


def make_rows(count: int = 48) -> list[dict[str, list[int]]]:
    """Rows of one length whose last token is the parity of the number before it; the loss is on that one alone."""
    tokenizer, rows = make_tokenizer(), []
    for row in parity_rows(count, length=1):
        ids = tokenizer(f"Number: {row['text']} Parity: {row['label']}").input_ids
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:], "attention_mask": [1] * len(ids)})
    return rows


def pruned() -> Any:
    return make_pruned_model("llama", vocab_size=len(VOCABULARY))


@pytest.mark.parametrize("way", WAYS)
def test_one_epoch_of_trainer_lowers_the_loss_and_its_adapter_loads(way: str, tmp_path: Path) -> None:
    model = pruned()
    adapted = peft.get_peft_model(model, config_for(model, way, r=4))
    rows = datasets.Dataset.from_list(make_rows())
    arguments = TrainingArguments(
        tmp_path / "run", num_train_epochs=1, per_device_train_batch_size=4, learning_rate=0.02, **QUIET
    )
    trainer = Trainer(adapted, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    trainer.save_model(tmp_path / "adapter")
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        pruned(), tmp_path / "adapter", config=whole_matrix(config) if way == "whole matrices" else config
    )
    assert torch.equal(logits(again), logits(adapted.eval()))


@pytest.mark.parametrize("way", WAYS)
def test_one_epoch_of_sft_trainer_lowers_the_loss_and_merges(way: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model, tokenizer = pruned(), make_tokenizer()
    tokenizer.pad_token = "<unk>"
    rows = datasets.Dataset.from_list(
        [
            {"prompt": f"Number: {row['text']} Parity:", "completion": f" {row['label']}"}
            for row in parity_rows(48, length=1)
        ]
    )
    arguments = trl.SFTConfig(
        str(tmp_path / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        max_length=16,
        bf16=False,
        **QUIET,
    )
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=config_for(model, way, r=4),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    adapted = trainer.model.eval()
    expected = logits(adapted)
    assert_close(logits(adapted.merge_and_unload()), expected)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_example_trains_an_adapter_that_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("trl")
    save(pruned(), tmp_path / "pruned")
    make_tokenizer().save_pretrained(tmp_path / "pruned")
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    specification = importlib.util.spec_from_file_location("lora_sft", EXAMPLE)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    example.main("pruned", "task.json", "adapter")
    printed = capsys.readouterr().out
    assert "training loss" in printed
    assert "optimum-cli sieve merge --model pruned --adapter adapter --output adapter-merged" in printed
    model = AutoModelForCausalLM.from_pretrained("adapter")
    expected = logits(model)
    before = AutoModelForCausalLM.from_pretrained("pruned")
    assert (expected - logits(before)).abs().max() > 1e-3
    assert_close(logits(merge_adapter(before, "adapter")), expected)
