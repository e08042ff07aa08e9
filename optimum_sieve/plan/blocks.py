"""Plan a run that holds one block of the model at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_sieve.backbone.blockwise import find_blocks
from optimum_sieve.backbone.offloading import holds_offloaded

from .memory import BlockSizes, by_block_bytes, element_size, size_text


if TYPE_CHECKING:
    from torch import nn

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig

    from .memory import BatchSizes
    from .plan import PrunePlan


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """Sizes of a run that holds one block of the model at a time.

    Args:
        count (`int`): Number of blocks.
        passes (`int`): Passes over the calibration examples.
        peak_bytes (`int`): Peak memory in bytes.
        disk_bytes (`int`): Peak size of the work directory in bytes: bases, and the states between the blocks.
    """

    count: int
    passes: int
    peak_bytes: int
    disk_bytes: int


def plan_blocks(
    plan: PrunePlan, model: nn.Module, targets: list[Target], config: SieveConfig, batch: BatchSizes
) -> BlockPlan | None:
    """Plan a run by blocks if the model is offloaded or the whole run exceeds the limit."""
    limit = config.memory_bytes
    if not holds_offloaded(model) and (limit is None or plan.whole_bytes <= limit):
        return None
    _refuse_whole_runs(plan, config, limit)
    element = element_size(model, targets)
    sizes = BlockSizes.of(model, targets, config.projection)
    # A search may end near the dense model.
    kept = plan.targets_parameters if config.pruning_ratio is None else plan.expected_targets_parameters or 0
    peak = by_block_bytes(sizes, batch, config, kept * element)
    if limit is not None and peak > limit:
        raise ValueError(
            f"`memory_limit` must be at least {size_text(peak)} here, with {size_text(sizes.resident)} of weights that "
            f"stay in memory, got {size_text(limit)}. Raise it, or lower `batch_size`."
        )
    hidden = max(target.in_features for target in targets)
    blocks = find_blocks(model)
    return BlockPlan(
        count=len(blocks),
        passes=config.num_rounds,
        peak_bytes=peak,
        disk_bytes=plan.bases_at_once * plan.bases_bytes + (len(blocks) + 1) * batch.states * hidden * element,
    )


def _refuse_whole_runs(plan: PrunePlan, config: SieveConfig, limit: int | None) -> None:
    """Refuse settings that need the whole model in memory.

    Raises:
        ValueError: If there is one; the message names it.
    """
    refused = [
        name
        for name, whole in (
            ("projection='learned'", config.projection == "learned"),
            ("allocation='genetic'", config.allocation == "genetic"),
            ("tune", config.tune not in (None, "auto")),
            ("heal", config.heal is not None),
            ("vocabulary='task'", config.vocabulary == "task"),
        )
        if whole
    ]
    if refused:
        room = "a model in memory" if limit is None else f"a `memory_limit` of {size_text(plan.whole_bytes)} or more"
        given = "an offloaded model" if limit is None else size_text(limit)
        raise ValueError(
            f"`{refused[0]}` must go with {room}, got {given}: with less, one block of the model is held at a time. "
            "Prune without it; `optimum-cli sieve heal` heals the result."
        )
