"""Train a causal model on the right answers of a task, the prompt left out of the loss."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.calibration.losses import answer_loss
from optimum_sieve.evaluation.batches import input_device, make_batches


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.tasks import Example


def train_on_answers(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    learning_rate: float,
    batch_size: int,
    epochs: int,
    seed: int,
) -> list[float]:
    """Train what requires a gradient with AdamW, at a rate that falls linearly to 0; return the loss of each batch.

    Args:
        model (`PreTrainedModel` or `PeftModel`): In evaluation mode afterwards.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        examples (`Sequence[Example]`): At least one.
        learning_rate (`float`): Of the first step.
        batch_size (`int`): Examples of each step, which are of similar length.
        epochs (`int`): How often each example is seen.
        seed (`int`): Of the order of the batches.

    Returns:
        `list[float]`: Negative log-likelihood of an answer in nats, mean over the examples of each batch.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    batches = make_batches(examples, tokenizer, batch_size=batch_size, candidates=False, inputs=input_format(model))
    order = [batch for _ in range(epochs) for batch in batches]
    random.Random(seed).shuffle(order)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(order))
    device, losses = input_device(model), []
    model.train()
    for batch in order:
        loss = answer_loss(model, batch.to(device)) / batch.num_examples
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses
