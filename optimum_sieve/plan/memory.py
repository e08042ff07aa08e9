"""Predict the memory of a run from shapes alone: with the whole model, and with one block at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.blockwise import find_blocks
from optimum_sieve.backbone.sizes import shard_bytes
from optimum_sieve.modeling.experts import separate_names
from optimum_sieve.tasks.data import INPUTS


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig

_FLOAT32, _FLOAT64 = 4, 8
# Copies of a layer's inputs and outputs in memory at once: for the backward pass, and in float32 for the moments.
_ACTIVATION_COPIES = 2
# Logits in float32, their softmax, and the gradients of both.
_LOGIT_COPIES = 4


@dataclass(frozen=True, kw_only=True)
class SplitSizes:
    """What one pass over the examples of a split computes.

    Args:
        examples (`int`): Number of examples.
        tokens (`int`): Tokens in all batches, with padding.
        logits (`int`): Logits in all batches.
    """

    examples: int = 0
    tokens: int = 0
    logits: int = 0

    def __add__(self, other: SplitSizes) -> SplitSizes:
        return SplitSizes(
            examples=self.examples + other.examples,
            tokens=self.tokens + other.tokens,
            logits=self.logits + other.logits,
        )

    def times(self, factor: float) -> SplitSizes:
        """Return what so many times the examples compute."""
        return SplitSizes(
            examples=round(factor * self.examples),
            tokens=round(factor * self.tokens),
            logits=round(factor * self.logits),
        )


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Sizes of the largest of several batches, and of all of them.

    Args:
        tokens (`int`): Rows times length of the largest batch.
        logits (`int`): Most logits computed for one batch.
        states (`int`): Total tokens, with padding, of the larger one of the calibration and the unlabelled split, whose
            states between all blocks a run by blocks keeps.
        splits (`Mapping[str, SplitSizes]`): What one pass over each split of all tasks computes, with all candidates.
        drawn (`Mapping[str, SplitSizes]`): What one pass over the `inputs` computes in the stages that draw some of
            many candidates, by the stages' names.
        written (`SplitSizes`): What writing more prompts computes.
    """

    tokens: int
    logits: int
    states: int
    splits: Mapping[str, SplitSizes] = field(default_factory=dict)
    drawn: Mapping[str, SplitSizes] = field(default_factory=dict)
    written: SplitSizes = SplitSizes()

    @property
    def inputs(self) -> SplitSizes:
        """What one pass over the calibration and unlabelled splits computes."""
        return sum((self.splits[split] for split in INPUTS if split in self.splits), SplitSizes())

    def seen(self, stage: str) -> SplitSizes:
        """Return what one pass over the calibration and unlabelled splits computes in a stage."""
        return self.drawn.get(stage, self.inputs)


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Bytes of the largest block of a model, of its moments and of its bases.

    Args:
        resident (`int`): Weights outside the blocks, and those of blocks that are not offloaded.
        weights (`int`): Weights of the block.
        moments (`int`): Moments of the block.
        bases (`int`): Factor bases of the block.
        workspace (`int`): Temporary memory for factorizing its largest matrix, without weight and moments.
        features (`float`): Number of inputs and outputs of its layers per token.
        shard (`int`): A shard of the saved model, see [`shard_bytes`].
    """

    resident: int
    weights: int
    moments: int
    bases: int
    workspace: int
    features: float
    shard: int

    @classmethod
    def of(cls, model: nn.Module, targets: Sequence[Target], projection: str) -> BlockSizes:
        """Measure a model, which needs no weights.

        Raises:
            ValueError: If the model does not have exactly one sequence of blocks.
        """
        blocks = find_blocks(model)
        total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        sizes = {block: _bytes(model.get_submodule(block)) for block in blocks}
        offloaded = sum(size for block, size in sizes.items() if _is_offloaded(model.get_submodule(block)))
        shares = expert_shares(model, targets)
        in_block = {block: [t for t in targets if t.name.startswith(f"{block}.")] for block in blocks}
        return cls(
            resident=total - offloaded,
            weights=max(sizes.values()),
            moments=max(sum(moment_elements(t, projection) for t in group) for group in in_block.values()) * _FLOAT32,
            bases=max(sum(map(basis_bytes, group)) for group in in_block.values()),
            workspace=max(_workspace(target) for target in targets),
            features=max(_features(group, shares) for group in in_block.values()),
            shard=shard_bytes(model),
        )


def by_block_bytes(sizes: BlockSizes, batch: BatchSizes, config: SieveConfig, pruned: int) -> int:
    """Return the peak bytes of a run that holds one block at a time.

    Args:
        sizes (`BlockSizes`): Sizes of the model.
        batch (`BatchSizes`): Sizes of the batches of all tasks.
        config (`SieveConfig`): The settings.
        pruned (`int`): Bytes of the pruned targets, which are all in memory at the end.
    """
    later = config.num_rounds > 1
    activations = round(batch.tokens * sizes.features) * _FLOAT32 * _ACTIVATION_COPIES
    # A later round also holds the block's factors, and its bases, which weight the tokens.
    held = sizes.weights * (2 if later else 1) + sizes.moments
    calibrating = held + max(activations + (sizes.bases if later else 0), sizes.bases + sizes.workspace)
    logits = batch.logits * _FLOAT32 * _LOGIT_COPIES
    return sizes.resident + max(calibrating, logits, pruned + max(activations // 2, logits // 2, sizes.shard))


def whole_activation_bytes(model: nn.Module, targets: Sequence[Target], batch: BatchSizes, element: int) -> int:
    """Return the bytes of activations that a backward pass over one batch keeps, at `element` bytes per element."""
    features = _features(targets, expert_shares(model, targets))
    return round(batch.tokens * features) * element + batch.logits * _LOGIT_COPIES * _FLOAT32


def expert_shares(model: nn.Module, targets: Sequence[Target]) -> dict[str, float]:
    """Return the share of the tokens that the matrices of each expert receive, assuming balanced routing."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    inside = tuple(f"{name}." for name in separate_names(model))
    chosen = getattr(text, "num_experts_per_tok", None)
    counts = (getattr(text, name, None) for name in ("num_local_experts", "num_experts"))
    count = next(filter(None, counts), None)
    if not inside or not chosen or not count:
        return {}
    return {target.name: chosen / count for target in targets if target.name.startswith(inside)}


def _features(targets: Iterable[Target], shares: Mapping[str, float]) -> float:
    """Count inputs and outputs of layers per token, weighted by the share of tokens that reach them."""
    return sum((target.in_features + target.out_features) * shares.get(target.name, 1.0) for target in targets)


def moments_bytes(targets: Sequence[Target], config: SieveConfig, num_tasks: int = 1) -> int:
    """Return the bytes of all moments. The moments of each further task are added to a running sum."""
    return min(num_tasks, 2) * sum(moment_elements(target, config.projection) for target in targets) * _FLOAT32


def bases_at_once(config: SieveConfig) -> int:
    """Return the most sets of bases held at once: a later round makes new ones from the old."""
    return 2 if config.num_rounds > 1 else 1


def calibration_bytes(targets: Sequence[Target], config: SieveConfig) -> int:
    """Return the bytes of moments and bases of a run with the whole model in memory."""
    return moments_bytes(targets, config) + bases_at_once(config) * sum(map(basis_bytes, targets))


def moment_elements(target: Target, projection: str) -> int:
    """Return the number of elements in a target's moments."""
    if projection == "svd":
        return 0
    if projection == "learned":
        return target.in_features**2
    return target.max_rank**2 * (2 if projection == "joint" else 1)


def basis_bytes(target: Target) -> int:
    """Return the bytes of a target's factor basis."""
    return target.max_rank * (target.out_features + target.in_features + 4) * _FLOAT32


def _workspace(target: Target) -> int:
    """Return the bytes of weight, two factors and about eight square matrices of the smaller side, in float64."""
    rows, columns, rank = target.out_features, target.in_features, target.max_rank
    return (rows * columns + rank * (rows + columns) + 8 * rank**2) * _FLOAT64


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _is_offloaded(block: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in block.parameters())


def element_size(model: nn.Module, targets: Sequence[Target]) -> int:
    """Return the bytes of one element of the targets' weights."""
    first: Any = model.get_submodule(targets[0].name)
    return int(first.weight.element_size())


def size_text(count: int) -> str:
    """Return a number of bytes for a terminal."""
    return f"{count / 1e6:,.1f} MB" if count < 1e10 else f"{count / 1e9:,.1f} GB"
