"""Fine-tune a pruned model with TRL and LoRA: `python examples/lora_sft.py PRUNED TASK_FILE ADAPTER [EPOCHS]`.

Trains adapters on the factors with the task's calibration examples, with the loss on the answers only, and saves them.
Needs `pip install peft trl`.
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from optimum_sieve import Task
from optimum_sieve.lora import factor_targets


def main(pruned: str, task_file: str, adapter: str, epochs: str = "1") -> None:
    """Train and save the adapter, and print the command that merges it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pruned), AutoTokenizer.from_pretrained(pruned)
    examples = Task.from_file(task_file).examples("calibration", tokenizer)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            f"{adapter}-run",
            num_train_epochs=float(epochs),
            learning_rate=2e-4,
            per_device_train_batch_size=8,
            # TRL enables bfloat16 by default, and transformers refuses it on devices without support.
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": row.prompt, "completion": row.answer} for row in examples]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=factor_targets(model), task_type="CAUSAL_LM"),
    )
    print(f"training loss {trainer.train().training_loss:.4f}, mean over {epochs} epochs of {len(examples)} examples")
    trainer.save_model(adapter)
    print(f"optimum-cli sieve merge --model {pruned} --adapter {adapter} --output {adapter}-merged")


if __name__ == "__main__":
    main(*sys.argv[1:])
