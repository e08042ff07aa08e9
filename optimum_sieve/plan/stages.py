"""Count the forward and backward passes of the stages of a run that score or train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_sieve.allocation.certainty import LEAST_LOOK, LOOKS
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.tune import TuneConfig
from optimum_sieve.search.presets import PRESETS
from optimum_sieve.tasks.data import INPUTS
from optimum_sieve.training.negatives import COPIES

from .memory import SplitSizes


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig

    from .memory import BatchSizes

# How many sizes a run within a tolerance heals, and what they keep in the mean; what its bisection keeps. The runs of
# docs/measurements.md healed two to four, of .27 to .18, or more if a size surely lost nothing.
HEALED_SIZES = 4
_HEALED, _BISECTED = 0.3, 0.4
# The share of many selection examples that is scored for a size in the mean, as a first look often decides. It was .5
# to .9 in those runs.
_LOOKED = 0.7
# The part of a dense pass's time that a pass with factors takes even if they keep nothing: small products are slow.
_SMALL_PRODUCTS = 0.4
# Time of a training step in dense forward passes: of the adapters of tuning, of those of both factors, and of all
# entries of the factors. Measured with the default settings on two cores, docs/large.md#measurements.
_TUNED, _ADAPTED, _TRAINED = 2.5, 3.0, 3.6


@dataclass(frozen=True)
class _Passes:
    """Operations of dense forward passes that take as long as the passes of a stage.

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
        """Return the operations of one dense pass that take as long as one with a part of the parameters."""
        share = 1.0 if kept == 1.0 else _SMALL_PRODUCTS + (1 - _SMALL_PRODUCTS) * kept
        return 2.0 * (size.tokens * self.weights * share + size.logits * self.width)

    def tried(self, kept: float = 1.0) -> float:
        """Return the operations of trying a size on the selection split."""
        size = self.sizes.splits.get("selection", SplitSizes())
        return self.of(size, kept) * (_LOOKED if size.examples >= LOOKS * LEAST_LOOK else 1.0)

    def drawn(self, count: int, size: SplitSizes) -> float:
        """Return the operations of dense passes over a number of examples that are drawn from those of `size`."""
        return self.of(size) * count / max(size.examples, 1)


def count_passes(
    targets: Sequence[Target],
    config: SieveConfig,
    sizes: BatchSizes,
    *,
    width: int,
    labelled: bool = True,
    has_offsets: bool = True,
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
        has_offsets (`bool`): Whether a task has labels with gold answers, which get label offsets.
        shares (`Mapping[str, float]`, *optional*): Share of the tokens that the matrices of experts receive.
    """
    weights = sum(target.num_parameters * (shares or {}).get(target.name, 1.0) for target in targets)
    passes = _Passes(weights, width, sizes)
    kept = _HEALED if config.pruning_ratio is None else 1 - config.pruning_ratio
    tunes = isinstance(config.tune, TuneConfig)
    test = passes.over("test") * (2 if tunes else 1) + passes.over("test", kept=kept)
    if has_offsets and config.label_offsets != "none":
        # They are fitted to what the pruned model predicts there. Of a healed size that was compared, much is known.
        known = passes.tried(kept) if config.compares and config.heal is not None else 0.0
        test += passes.over("selection", kept=kept) - known
    stages = {
        "examples": passes.of(sizes.written) + (0.0 if labelled else passes.over("calibration", "selection", "test")),
        "tuning": _tuning(passes, config),
        # Candidates are drawn by the dense model's probabilities of all.
        "moments": passes.over(*INPUTS) if "moments" in sizes.drawn else 0.0,
        "ranks": _ranks(passes, config),
        "healing": _healing(passes, config),
        "test": test,
    }
    return {stage: operations for stage, operations in stages.items() if operations}


def _tuning(passes: _Passes, config: SieveConfig) -> float:
    tune = config.tune
    if not isinstance(tune, TuneConfig):
        return 0.0
    trained = passes.drawn(tune.steps * tune.batch_size, passes.sizes.seen("tuning")) * _TUNED
    # The model before it is scored with the ranks, if anything is compared with it there.
    before = 0.0 if config.compares else passes.over("selection")
    return trained + before + (passes.over("selection") if config.reference == "tuned" else passes.tried())


def _ranks(passes: _Passes, config: SieveConfig) -> float:
    reference = passes.over("selection") if config.compares else 0.0
    if config.allocation == "genetic":
        preset = PRESETS[config.search_preset]
        count = (config.population_size or preset.population_size) * (config.generations or preset.generations)
        kept = _BISECTED if config.pruning_ratio is None else 1 - config.pruning_ratio
        return reference + count * config.search_fraction * passes.over("selection", kept=kept)
    if config.tolerance is None:
        return reference
    return reference + config.search_steps * passes.tried(_BISECTED)


def _healing(passes: _Passes, config: SieveConfig) -> float:
    heal = config.heal
    if not isinstance(heal, HealConfig):
        return 0.0
    rows = passes.sizes.splits.get("calibration", SplitSizes())
    scored = 0.0 if config.tolerance is None else passes.tried(_HEALED)
    sizes = config.healed_sizes or range(HEALED_SIZES)
    each = _ADAPTED if heal.adapter_rank else _TRAINED
    trained = passes.drawn(heal.steps * heal.batch_size, passes.sizes.seen("healing")) * each
    crossed = heal.crossed_prompts // (COPIES if "healing" in passes.sizes.drawn else 1)
    taught = passes.over(*INPUTS) + passes.drawn(crossed, rows)
    return taught + len(sizes) * (trained + scored)
