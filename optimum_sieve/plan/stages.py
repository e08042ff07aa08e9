"""Count the forward and backward passes of the stages of a run that score or train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.tune import TuneConfig
from optimum_sieve.search.presets import PRESETS
from optimum_sieve.tasks.data import INPUTS

from .memory import SplitSizes


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig

    from .memory import BatchSizes

# How many sizes a run within a tolerance heals, and what they keep in the mean; what its bisection keeps. The runs of
# docs/measurements.md healed three to five, of .35 to .18.
HEALED_SIZES = 5
_HEALED, _BISECTED = 0.3, 0.4
# A forward pass, and a backward pass to the inputs and the few parameters of adapters; one to all parameters costs the
# same again.
_ADAPTED, _TRAINED = 2.0, 3.0


@dataclass(frozen=True)
class _Passes:
    """Operations of forward passes.

    Args:
        weights (`float`): Parameters of the targets that a token meets, counting experts by their share of the tokens.
        width (`int`): Inputs of the head.
        sizes (`BatchSizes`): The examples.
    """

    weights: float
    width: int
    sizes: BatchSizes

    def over(self, *splits: str, kept: float = 1.0) -> float:
        """Return the operations of one pass over splits with a part of the targets' parameters."""
        return sum(self.of(self.sizes.splits.get(split, SplitSizes()), kept) for split in splits)

    def of(self, size: SplitSizes, kept: float = 1.0) -> float:
        return 2.0 * (size.tokens * self.weights * kept + size.logits * self.width)

    def drawn(self, count: int, size: SplitSizes, kept: float = 1.0) -> float:
        """Return the operations of passes over a number of examples that are drawn from those of `size`."""
        return self.of(size, kept) * count / max(size.examples, 1)


def count_passes(
    targets: Sequence[Target],
    config: SieveConfig,
    sizes: BatchSizes,
    *,
    width: int,
    labelled: bool = True,
    shares: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Count the operations of every stage but the moments' own and the factors, by the stages' names in a report.

    Attention's own products and everything outside the blocks but the head are neglected. Answers that are written
    count as long as they may become. With a tolerance, the number of sizes that are healed is a guess, `HEALED_SIZES`.

    Args:
        targets (`Sequence[Target]`): The matrices to prune.
        config (`SieveConfig`): The settings, with `heal` and `tune` decided.
        sizes (`BatchSizes`): What the passes over the examples compute.
        width (`int`): Inputs of the head.
        labelled (`bool`): Whether the data has gold answers. If not, the dense model gives them.
        shares (`Mapping[str, float]`, *optional*): Share of the tokens that the matrices of experts receive.
    """
    weights = sum(target.num_parameters * (shares or {}).get(target.name, 1.0) for target in targets)
    passes = _Passes(weights, width, sizes)
    kept = _HEALED if config.pruning_ratio is None else 1 - config.pruning_ratio
    tunes = isinstance(config.tune, TuneConfig)
    # The saved model's label offsets come from the selection split.
    test = passes.over("test") * (2 if tunes else 1) + passes.over("selection", "test", kept=kept)
    stages = {
        "examples": 0.0 if labelled else passes.over("calibration", "selection", "test"),
        "tuning": _tuning(passes, config),
        # Candidates are drawn by the dense model's probabilities of all.
        "moments": 0.0 if sizes.drawn is None else passes.over(*INPUTS),
        "ranks": _ranks(passes, config),
        "healing": _healing(passes, config),
        "test": test,
    }
    return {stage: operations for stage, operations in stages.items() if operations}


def _tuning(passes: _Passes, config: SieveConfig) -> float:
    tune = config.tune
    if not isinstance(tune, TuneConfig):
        return 0.0
    trained = passes.drawn(tune.steps * tune.batch_size, passes.sizes.answers) * _ADAPTED
    return trained + 2 * passes.over("selection")


def _ranks(passes: _Passes, config: SieveConfig) -> float:
    reference = passes.over("selection") if config.tolerance is not None and config.tune is None else 0.0
    if config.allocation == "genetic":
        preset = PRESETS[config.search_preset]
        count = (config.population_size or preset.population_size) * (config.generations or preset.generations)
        kept = _BISECTED if config.pruning_ratio is None else 1 - config.pruning_ratio
        return reference + count * config.search_fraction * passes.over("selection", kept=kept)
    if config.tolerance is None:
        return reference
    return reference + config.search_steps * passes.over("selection", kept=_BISECTED)


def _healing(passes: _Passes, config: SieveConfig) -> float:
    heal = config.heal
    if not isinstance(heal, HealConfig):
        return 0.0
    rows = passes.sizes.splits.get("calibration", SplitSizes())
    scored = 0.0 if config.tolerance is None else passes.over("selection", kept=_HEALED)
    sizes = config.healed_sizes or [_HEALED] * HEALED_SIZES
    each = _ADAPTED if heal.adapter_rank else _TRAINED
    trained = sum(passes.drawn(heal.steps * heal.batch_size, rows, kept) for kept in sizes) * each
    taught = passes.over(*INPUTS) + passes.drawn(heal.crossed_prompts, rows)
    return taught + trained + len(sizes) * scored
