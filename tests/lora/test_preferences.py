"""TRL's trainers of preferences and distillation train all factors of pruned models, which are saved as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
import pytest
import torch
from lora_models import OLD_NAMES
from tiny_models import logits, make_pruned_model, make_tiny_model, save
from toy import VOCABULARY, make_tokenizer
from transformers import AutoModelForCausalLM


if TYPE_CHECKING:
    from pathlib import Path

trl = pytest.importorskip("trl")
pytestmark = [OLD_NAMES, *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning"))]
SETTINGS = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False,
            "per_device_train_batch_size": 4, "learning_rate": 0.02, "max_steps": 6, "logging_steps": 1}  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(make_pruned_model("llama", vocab_size=len(VOCABULARY)), tmp_path / "pruned")


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    return tokenizer


def check_trained(trainer: Any, tmp_path: Path) -> None:
    """Train, and check that factors moved and the saved model is the trained one, with its ranks."""
    model = trainer.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.endswith(".left.weight") for name in moved)
    assert any(name.endswith(".pivot.weight") for name in moved)
    trainer.save_model(tmp_path / "trained")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(reloaded), logits(model.eval()))


def test_direct_preference_optimization(directory: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(
        [{"prompt": f"Number: {n} Parity:", "chosen": " even", "rejected": " odd"} for n in range(0, 48, 2)]
    )
    arguments = trl.DPOConfig(tmp_path / "run", max_length=16, **SETTINGS)
    # The reference model is loaded from the same directory.
    model = AutoModelForCausalLM.from_pretrained(directory)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    check_trained(trainer, tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


def test_generalized_knowledge_distillation(directory: Path, tokenizer: Any, tmp_path: Path) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    rows = datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "content": f"Number: {n} Parity:"}, {"role": "assistant", "content": "even"}]}
         for n in range(0, 48, 2)]
    )  # fmt: skip
    arguments = gkd.GKDConfig(tmp_path / "run", max_length=16, max_new_tokens=4, lmbda=0.5, **SETTINGS)
    teacher = make_tiny_model("llama", vocab_size=len(VOCABULARY))
    model = AutoModelForCausalLM.from_pretrained(directory)
    trainer = gkd.GKDTrainer(model, teacher, args=arguments, train_dataset=rows, processing_class=tokenizer)
    check_trained(trainer, tmp_path)
