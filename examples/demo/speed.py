"""Time the generation of several models in one process, alternating, so that background load affects all alike."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch


def decode_speeds(
    models: dict[str, Any], tokenizer: Any, *, new_tokens: int = 48, rounds: int = 5
) -> dict[str, tuple[float, float]]:
    """Return for each model the median generated tokens per second (batch 1), and (max - min) / median over rounds.

    Copy memory-mapped weights into ordinary memory first, see `optimum_sieve.modeling.layout.copy_parameters`.
    """
    texts = tokenizer("The film begins with", return_tensors="pt")
    inputs = {name: texts.to(model.device) for name, model in models.items()}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            with torch.no_grad():
                model.generate(**inputs[name], max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
            if number > 0:  # the first round warms up
                speeds[name].append(new_tokens / (time.perf_counter() - start))
    return {name: (statistics.median(x), (max(x) - min(x)) / statistics.median(x)) for name, x in speeds.items()}
