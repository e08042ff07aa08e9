"""What a pruning run would do, from shapes alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .surgery import count_target_parameters
from .targets import Target, linear_weight


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from .config import SieveConfig
    from .heal_config import HealConfig
    from .tasks import Task
    from .vocabulary import TaskVocabulary

# Of each trained parameter: its gradient, both moments of AdamW, the weight from before and the best one, in float32.
_HEAL_BYTES = 5 * 4


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Sizes of a run before it is made.

    Args:
        num_targets (`int`): Matrices to prune.
        targets_parameters (`int`): Their parameters.
        model_parameters (`int`): Parameters of the whole model.
        expected_targets_parameters (`int`, *optional*): Target parameters afterwards; `None` while a search decides.
        model_bytes (`int`): Bytes of the dense model.
        expected_bytes (`int`, *optional*): Bytes of the pruned model.
        moments_bytes (`int`): Bytes of the moments, on the model's device.
        bases_bytes (`int`): Bytes of the factor bases.
        bases_at_once (`int`): Sets of bases held at most: two where a later round makes new ones from the old.
        examples (`dict[str, dict[str, int]]`): Examples of each split of each task.
        heal_bytes (`int`): Bytes of the optimizer's state, gradients and kept weights while the largest size is healed.
        healing (`str`, *optional*): What healing costs at most; `None` without it.
        vocabulary (`dict[str, int]`, *optional*): Rows of the embeddings `"before"` and, at least, `"after"`; `None`
            where they stay.
    """

    num_targets: int
    targets_parameters: int
    model_parameters: int
    expected_targets_parameters: int | None
    model_bytes: int
    expected_bytes: int | None
    moments_bytes: int
    bases_bytes: int
    bases_at_once: int
    examples: dict[str, dict[str, int]]
    heal_bytes: int = 0
    healing: str | None = None
    vocabulary: dict[str, int] | None = None

    @property
    def peak_bytes(self) -> int:
        """Bytes held at most beside the activations: model and bases, with the moments or what healing needs."""
        while_calibrating = self.moments_bytes + self.bases_at_once * self.bases_bytes
        return self.model_bytes + max(while_calibrating, self.bases_bytes + self.heal_bytes)

    def format(self) -> str:
        """Return the plan as lines for a terminal."""
        after = self.expected_targets_parameters
        lines = [
            f"matrices to prune      {self.num_targets:,} ({self.targets_parameters:,} parameters, "
            f"{self.targets_parameters / self.model_parameters:.0%} of the model's)",
            f"parameters of the model {self.model_parameters:,}",
            "kept after pruning     "
            + (f"about {after:,} of the matrices' parameters" if after is not None else "decided by the search"),
            f"weights on disk        {_megabytes(self.model_bytes)} dense"
            + (f", about {_megabytes(self.expected_bytes)} pruned" if self.expected_bytes is not None else ""),
            f"memory                 {_megabytes(self.peak_bytes)} at most: model {_megabytes(self.model_bytes)}, "
            f"moments {_megabytes(self.moments_bytes)}, factor bases {self.bases_at_once} x "
            f"{_megabytes(self.bases_bytes)}; "
            "activations come on top",
            *self._example_lines(),
        ]
        if self.vocabulary is not None:
            lines.append(
                f"vocabulary             {self.vocabulary['after']:,} of {self.vocabulary['before']:,} tokens or more"
            )
        if self.healing is not None:
            lines.append(f"healing                {self.healing}; {_megabytes(self.heal_bytes)} of state")
        return "\n".join(lines)

    def _example_lines(self) -> list[str]:
        """Return one line of examples for each task, which names it where there are several."""
        texts = {
            name: ", ".join(f"{split} {count:,}" for split, count in splits.items())
            for name, splits in self.examples.items()
        }
        if len(texts) == 1:
            return [f"examples               {text}" for text in texts.values()]
        return [f"examples               {name}: {text}" for name, text in texts.items()]


def make_plan(
    model: nn.Module,
    targets: list[Target],
    config: SieveConfig,
    tasks: Sequence[Task],
    vocabulary: TaskVocabulary | None = None,
) -> PrunePlan:
    """Work out a `PrunePlan`; `vocabulary` is that of the calibration splits."""
    total = sum(target.num_parameters for target in targets)
    model_bytes = tensor_bytes(model)
    after = None if config.pruning_ratio is None else round(total * (1 - config.pruning_ratio))
    element = linear_weight(model.get_submodule(targets[0].name)).element_size()
    # A search begins at half of the parameters.
    kept = total // 2 if after is None else after
    removed = 0 if vocabulary is None else vocabulary.rows.removed_elements
    return PrunePlan(
        num_targets=len(targets),
        targets_parameters=total,
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
        expected_targets_parameters=after,
        model_bytes=model_bytes,
        expected_bytes=None if after is None else model_bytes - (total - after + removed) * element,
        # Those of a further task are added to the sum of the ones before it.
        moments_bytes=min(len(tasks), 2) * sum(_moment_elements(target, config.projection) * 4 for target in targets),
        bases_bytes=sum(target.max_rank * (target.out_features + target.in_features + 2) * 4 for target in targets),
        bases_at_once=2 if config.rounds > 1 and config.projection in ("joint", "activation") else 1,
        examples={task.name: task.splits for task in tasks},
        heal_bytes=0 if config.heal is None else _trained(config, kept) * _HEAL_BYTES,
        healing=None if config.heal is None else _describe_healing(config, config.heal),
        vocabulary=None if vocabulary is None else vocabulary.sizes,
    )


def _trained(config: SieveConfig, kept: int) -> int:
    """Parameters that healing trains at most: pivots are trained as factors, which have up to twice as many."""
    return 2 * kept if config.storage == "pivoted" else kept


def _describe_healing(config: SieveConfig, heal: HealConfig) -> str:
    sizes = 1 if config.tolerance is None else config.search_steps
    examples = sizes * heal.rounds * heal.steps * heal.batch_size
    times = f"{sizes} sizes x " if sizes > 1 else ""
    times += f"{heal.rounds} rounds x " if heal.rounds > 1 else ""
    return f"at most {times}{heal.steps:,} steps of {heal.batch_size} examples, {examples:,} forward and backward"


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as a checkpoint holds them: shared tensors once, buffers that are saved included."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    distinct = {id(tensor): tensor for tensor in state.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def _moment_elements(target: Target, projection: str) -> int:
    if projection == "svd":
        return 0
    if projection == "learned":
        return target.in_features**2
    return target.max_rank**2 * (2 if projection == "joint" else 1)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def measure_sizes(
    model: nn.Module, targets: Sequence[Target], vocabulary: TaskVocabulary | None = None
) -> dict[str, int]:
    """Return the parameters of the targets and of the model, and its bytes; with all tokens of `vocabulary`."""
    with nullcontext() if vocabulary is None else vocabulary.undone():
        return {
            "targets": count_target_parameters(model, targets),
            "model": sum(parameter.numel() for parameter in model.parameters()),
            "bytes": tensor_bytes(model),
        }
