"""Make a dense model do a task that it cannot do as it comes: adapters trained on rows apart, and merged."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from training import train_on_answers

from optimum_sieve.backbone.fingerprint import model_fingerprint
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.modeling.conversion import forget_gguf
from optimum_sieve.run.files import whole_directory
from optimum_sieve.run.workdir import content_key

from .cells import weights_key


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.tasks import Example

    from .setup import Setup
    from .suite import Job, Tuning

SEED = 0


def tuned_model(job: Job, tuning: Tuning, model: Any, tokenizer: Any, setup: Setup) -> tuple[Any, dict[str, Any]]:
    """Return the tuned model, from the cache if it is there, and how it was tuned.

    Args:
        job (`Job`): The task.
        tuning (`Tuning`): How the model is tuned for it.
        model (`PreTrainedModel`): The model as it comes; it is changed.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        setup (`Setup`): Model, rows and cache.
    """
    name = f"tuned-{job.name}-{weights_key(job, setup.source.name)}"
    directory = setup.places.cache / name
    # More rows of the split that calibration is taken from; selection and test are cut off before.
    training = setup.places.read(job.rows, {"calibration": tuning.skip + tuning.rows})
    fingerprint = content_key(model=model_fingerprint(model), task=training.fingerprint())
    record = setup.figures.read(name, fingerprint)
    if record is None or not directory.exists():
        examples = training.examples("calibration", tokenizer)[tuning.skip :]
        start = time.perf_counter()
        model, losses = tune(model, tokenizer, examples, tuning)
        part = max(1, len(losses) // 10)
        record = {
            "fingerprint": fingerprint,
            "rows": len(examples),
            "epochs": tuning.epochs,
            "learning_rate": tuning.learning_rate,
            "steps": len(losses),
            "seconds": round(time.perf_counter() - start, 1),
            "first_loss": sum(losses[:part]) / part,
            "last_loss": sum(losses[-part:]) / part,
        }
        setup.places.cache.mkdir(parents=True, exist_ok=True)
        with whole_directory(directory) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        setup.figures.write(name, record)
    return load_model(directory, dtype=setup.source.dtype)[0], record


def tune(model: Any, tokenizer: Any, examples: Sequence[Example], tuning: Tuning) -> tuple[Any, list[float]]:
    """Train adapters on every linear of the blocks and merge them; return the model and the loss of each batch."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    targets = [target.name for target in find_targets(model)]
    adapted = get_peft_model(model, LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, target_modules=targets))
    losses = train_on_answers(
        adapted,
        tokenizer,
        examples,
        learning_rate=tuning.learning_rate,
        batch_size=tuning.batch_size,
        epochs=tuning.epochs,
        seed=SEED,
    )
    merged = adapted.merge_and_unload()
    forget_gguf(merged)
    return merged, losses
