"""Predict memory, disk and time of a run from a model's configuration alone: no weights, no task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve.backbone.loading import dtype_of, empty_model, read_dtype
from optimum_sieve.backbone.sources import naming_model, read_config
from optimum_sieve.backbone.targets import find_targets
from optimum_sieve.tasks.data import SPLITS

from .hardware import device_of, rates_of
from .healing import settle_training
from .memory import BatchSizes, SplitSizes
from .plan import PrunePlan, make_plan
from .stages import HEALED_SIZES


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from optimum_sieve.config.sieve import SieveConfig


# The stages in the order of a run, which the report's `seconds` name.
_STAGES = ("examples", "tuning", "moments", "factors", "ranks", "healing", "test")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predicted cost of a run.

    Args:
        plan (`PrunePlan`): Sizes and operations.
        seconds (`dict[str, float]`): Time of each stage, by its name in a report.
        hardware (`str`): Hardware that the times are for.
    """

    plan: PrunePlan
    seconds: dict[str, float]
    hardware: str

    @classmethod
    def of(
        cls,
        plan: PrunePlan,
        hardware: str = "this",
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Forecast:
        """Predict the times of a plan.

        Args:
            plan (`PrunePlan`): Its `work` must be counted.
            hardware (`str`): One of `HARDWARE`, a single device. `"this"` measures this machine in about two seconds.
            dtype (`torch.dtype`): Type that the model computes in.
            device (`torch.device`, *optional*): Device of this machine. Default: the one a model would be loaded on.
        """
        assert plan.work is not None
        seconds = plan.work.seconds(rates_of(hardware, dtype, device))
        return cls(plan=plan, seconds={name: seconds[name] for name in _STAGES if name in seconds}, hardware=hardware)

    def format(self) -> str:
        """Format the forecast for a terminal."""
        total = _time(sum(self.seconds.values()))
        stages = ", ".join(f"{stage} {_time(seconds)}" for stage, seconds in self.seconds.items() if seconds >= 0.5)
        where = "this machine" if self.hardware == "this" else self.hardware
        return f"{self.plan.format()}\ntime                   about {total} on {where}: {stages}{self._guess()}"

    def _guess(self) -> str:
        healed = "healing" in self.seconds and self.plan.expected_targets_parameters is None
        return f"; if {HEALED_SIZES} sizes are healed" if healed else ""


def forecast(
    model: str | Path,
    config: SieveConfig,
    *,
    examples: int | Sequence[int],
    tokens: int,
    hardware: str = "this",
    dtype: str = "bfloat16",
    **options: Any,
) -> Forecast:
    """Predict the cost of pruning a model for a task of given size.

    Args:
        model (`str | Path`): Hub id, directory or config.json of the model. Its weights are not needed.
        config (`SieveConfig`): The settings.
        examples (`int | Sequence[int]`): Numbers of calibration, selection and test examples; those left out are 0.
        tokens (`int`): Tokens per example.
        hardware (`str`): One of `HARDWARE`, a single device. `"this"` measures this machine.
        dtype (`str`): Type that the model is loaded in.
        options (`Any`): Options of transformers' `AutoConfig.from_pretrained`.

    Raises:
        OSError: If there is no configuration.
        ValueError: If `dtype` is not a floating-point type, the model has no linear layers to prune, or the
            `memory_limit` is too low.
    """
    read_dtype(dtype)
    described = read_config(model, **options)
    with naming_model(model):
        kind = dtype_of(described, dtype)
        empty = empty_model(described, separate=True)
    empty.to(dtype=kind)  # type: ignore[call-arg]
    targets = find_targets(empty, config.target_modules, config.exclude_modules)
    counts = dict(zip(SPLITS, [examples] if isinstance(examples, int) else examples, strict=False))
    head: Any = empty.get_output_embeddings()  # type: ignore[no-untyped-call]
    num_logits = 0 if head is None else head.weight.shape[0]
    rows = min(config.batch_size, counts["calibration"])
    splits = {
        split: SplitSizes(examples=count, tokens=count * tokens, logits=count * num_logits)
        for split, count in counts.items()
    }
    batch = BatchSizes(
        tokens=rows * tokens,
        logits=rows * num_logits,
        states=splits["calibration"].tokens,
        splits=splits,
    )

    def plan_of(settled: SieveConfig) -> PrunePlan:
        return make_plan(empty, targets, settled, {str(model): counts}, batch, device=device_of(hardware))

    return Forecast.of(plan_of(settle_training(config, plan_of)), hardware, kind)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
