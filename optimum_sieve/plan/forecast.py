"""Predict memory, disk and time of a run from a model's configuration alone: no weights, no task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.loading import dtype_of, empty_model, read_dtype
from optimum_sieve.backbone.sources import naming_model, read_config
from optimum_sieve.backbone.targets import find_targets

from .flops import Work, count_work
from .hardware import rates_of
from .healing import settle_training
from .memory import BatchSizes, expert_shares
from .plan import PrunePlan, make_plan


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.config.sieve import SieveConfig


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predicted cost of a run.

    Args:
        plan (`PrunePlan`): Sizes.
        work (`Work`): Floating-point operations.
        seconds (`dict[str, float]`): Time of each stage.
        hardware (`str`): Hardware that the times are for.
    """

    plan: PrunePlan
    work: Work
    seconds: dict[str, float]
    hardware: str

    def format(self) -> str:
        """Format the forecast for a terminal."""
        work = self.work
        moments, factors = work.passes + work.moments, work.products + work.eigenvectors
        return "\n".join([
            self.plan.format(),
            f"moments                {moments / 1e12:,.1f} TFLOP, about {_time(self.seconds['moments'])} on "
            f"{self.hardware}",
            f"factors                {factors / 1e12:,.1f} TFLOP in float64, about {_time(self.seconds['factors'])}",
        ])  # fmt: skip


def forecast(
    model: str | Path,
    config: SieveConfig,
    *,
    examples: int,
    tokens: int,
    hardware: str = "this",
    dtype: str = "bfloat16",
    **options: Any,
) -> Forecast:
    """Predict the cost of calibrating and factorizing a model.

    Args:
        model (`str | Path`): Hub id, directory or config.json of the model. Its weights are not needed.
        config (`SieveConfig`): The settings.
        examples (`int`): Number of calibration examples.
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
    rows = min(config.batch_size, examples)
    head: Any = empty.get_output_embeddings()  # type: ignore[no-untyped-call]
    num_logits = 0 if head is None else head.weight.shape[0]
    batch = BatchSizes(tokens=rows * tokens, logits=rows * num_logits, states=examples * tokens)

    def plan_of(settled: SieveConfig) -> PrunePlan:
        return make_plan(empty, targets, settled, {str(model): {"calibration": examples}}, batch)

    plan = plan_of(settle_training(config, plan_of))
    work = count_work(
        targets,
        config,
        tokens=examples * tokens,
        by_block=plan.blocks is not None,
        shares=expert_shares(empty, targets),
    )
    return Forecast(plan=plan, work=work, seconds=work.seconds(rates_of(hardware, kind)), hardware=hardware)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
