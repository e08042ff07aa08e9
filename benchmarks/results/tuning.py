"""Tune a dense model for a task that it cannot do as it is: LoRA adapters trained on other rows, and merged."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import torch
from bench import (
    answer_loss,
    find_targets,
    forget_quantization,
    input_format,
    load_model,
    make_batches,
    model_fingerprint,
    save_model,
)

from .cells import content_key, weights_key


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.tasks import Example

    from .dense import Setup
    from .suite import Job, Tuning

SEED = 0


def tuned_model(job: Job, tuning: Tuning, model: Any, tokenizer: Any, setup: Setup) -> tuple[Any, dict[str, Any]]:
    """Tune `model`, in place, or read the tuned model from the cache; return it and how it was tuned."""
    name = f"tuned-{job.name}-{weights_key(job, setup.model_name)}"
    directory = setup.places.cache / name
    # More rows of the split that calibration is taken from; selection and test are cut off before.
    training = setup.places.read(job.rows, {"calibration": tuning.skip + tuning.rows})
    fingerprint = content_key(model=model_fingerprint(model), task=training.fingerprint())
    record = setup.figures.read(name, fingerprint)
    if record is None or not directory.exists():
        examples = training.examples("calibration", tokenizer)[tuning.skip :]
        start = time.perf_counter()
        model, losses = tune(model, tokenizer, examples, tuning)
        tenth = max(1, len(losses) // 10)
        record = {
            "fingerprint": fingerprint,
            "rows": len(examples),
            "epochs": tuning.epochs,
            "learning_rate": tuning.learning_rate,
            "steps": len(losses),
            "seconds": round(time.perf_counter() - start, 1),
            "first_loss": sum(losses[:tenth]) / tenth,
            "last_loss": sum(losses[-tenth:]) / tenth,
        }
        save_model(model, tokenizer, directory)
        setup.figures.write(name, record)
    return load_model(directory, dtype=setup.dtype)[0], record


def tune(model: Any, tokenizer: Any, examples: Sequence[Example], tuning: Tuning) -> tuple[Any, list[float]]:
    """Train adapters on every linear of the blocks and merge them; prompts are left out of the loss.

    Returns:
        `tuple[PreTrainedModel, list[float]]`: The model, and each batch's mean loss of an answer in nats.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    targets = [target.name for target in find_targets(model)]
    adapted = get_peft_model(model, LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, target_modules=targets))
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=tuning.learning_rate, weight_decay=0.0)
    options = {"batch_size": tuning.batch_size, "candidates": False, "inputs": input_format(adapted)}
    order = make_batches(examples, tokenizer, **options) * tuning.epochs
    random.Random(SEED).shuffle(order)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(order))
    losses = []
    adapted.train()
    for batch in order:
        loss = answer_loss(adapted, batch.to(adapted.device)) / batch.num_examples
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    merged = adapted.eval().merge_and_unload()
    forget_quantization(merged)
    return merged, losses
