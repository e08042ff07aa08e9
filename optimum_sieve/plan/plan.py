"""Predict the sizes of a pruning run from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.offloading import execution_device
from optimum_sieve.backbone.sizes import tensor_bytes

from .blocks import BlockPlan, plan_blocks
from .certainty import describe_certainty
from .flops import count_work
from .healing import describe_healing, heal_bytes
from .memory import (
    bases_at_once,
    basis_bytes,
    element_size,
    expert_shares,
    moments_bytes,
    size_text,
    whole_activation_bytes,
)
from .stages import count_passes
from .tuning import describe_tuning, tune_bytes


if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.vocabulary import TaskVocabulary

    from .flops import Work
    from .memory import BatchSizes

# CPU memory of a process after importing the libraries and a first computation (measured: 550 MB).
_LIBRARY_BYTES = 600_000_000
# In half precision on the CPU, oneDNN caches up to 1,024 compiled products, one for each rank and number of tokens
# (measured: .7 MB each).
_KERNEL_BYTES = 700_000_000


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Predicted sizes of a run.

    Args:
        num_targets (`int`): Number of matrices to prune.
        targets_parameters (`int`): Parameters of these matrices.
        model_parameters (`int`): Parameters of the whole model.
        expected_targets_parameters (`int`, *optional*): Target parameters after pruning; `None` if a search decides.
        model_bytes (`int`): Bytes of the dense model.
        expected_bytes (`int`, *optional*): Bytes of the pruned model.
        moments_bytes (`int`): Bytes of the moments, on the device of the model.
        bases_bytes (`int`): Bytes of the factor bases.
        bases_at_once (`int`): Most sets of bases held at once: two if a later round makes new ones from the old.
        activation_bytes (`int`): Most bytes of activations for one batch of examples.
        examples (`dict[str, dict[str, int]]`): Number of examples in each split of each task, and of the prompts that
            the model writes (`"written"`), if any.
        heal_bytes (`int`): Bytes of factors, adapters, gradients and optimizer state while the largest size is healed.
        tune_bytes (`int`): Bytes of the adapters and their optimizer state, and of the weights before tuning.
        tuning (`str`, *optional*): Steps of tuning, as text; `None` without it.
        healing (`str`, *optional*): Upper bound of the healing steps, as text; `None` without healing.
        vocabulary (`dict[str, int]`, *optional*): Rows of the embeddings `"before"` and, at least, `"after"`; `None`
            if the vocabulary is not cut.
        library_bytes (`int`): Additional CPU memory of Python and its libraries.
        certainty (`dict[str, str]`): What tolerance the selection examples of each task can show, as text; empty
            without a `tolerance`.
        candidates (`dict[str, str]`): What the candidates of each task cost, as text; empty where they have no tokens.
        blocks (`BlockPlan`, *optional*): Sizes of a run that holds one block at a time, if the model is offloaded or
            the whole run exceeds the `memory_limit`.
        disk_bytes (`int`): Peak bytes of the work directory, without scores and what training stores.
        work (`Work`, *optional*): Operations of the stages.
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
    activation_bytes: int
    examples: dict[str, dict[str, int]]
    heal_bytes: int = 0
    tune_bytes: int = 0
    tuning: str | None = None
    healing: str | None = None
    vocabulary: dict[str, int] | None = None
    library_bytes: int = _LIBRARY_BYTES
    certainty: dict[str, str] = field(default_factory=dict)
    candidates: dict[str, str] = field(default_factory=dict)
    blocks: BlockPlan | None = None
    disk_bytes: int = 0
    work: Work | None = None

    @property
    def whole_bytes(self) -> int:
        """Peak bytes with the whole model in memory: model, bases, activations, and moments or healing state."""
        while_calibrating = self.moments_bytes + self.bases_at_once * self.bases_bytes
        held = self.model_bytes + max(while_calibrating, self.bases_bytes + self.heal_bytes)
        return held + self.tune_bytes + self.activation_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the run, without Python and its libraries."""
        return self.whole_bytes if self.blocks is None else self.blocks.peak_bytes

    def format(self) -> str:
        """Format the plan for a terminal."""
        after = self.expected_targets_parameters
        lines = [
            f"matrices to prune      {self.num_targets:,} ({self.targets_parameters:,} parameters, "
            f"{self.targets_parameters / self.model_parameters:.0%} of the model's)",
            f"parameters of the model {self.model_parameters:,}",
            "kept after pruning     "
            + (f"about {after:,} of the matrices' parameters" if after is not None else "decided by the search"),
            f"weights on disk        {size_text(self.model_bytes)} dense"
            + (f", about {size_text(self.expected_bytes)} pruned" if self.expected_bytes is not None else ""),
            *self._memory_lines(),
            *_task_lines("examples", {name: _counts(splits) for name, splits in self.examples.items()}),
            *_task_lines("candidates", self.candidates),
            *_task_lines("tolerance that shows", self.certainty),
        ]
        if self.vocabulary is not None:
            lines.append(
                f"vocabulary             {self.vocabulary['after']:,} of {self.vocabulary['before']:,} tokens or more"
            )
        if self.tuning is not None:
            lines.append(f"tuning                 {self.tuning}; {size_text(self.tune_bytes)} of state")
        if self.healing is not None:
            lines.append(f"healing                {self.healing}; {size_text(self.heal_bytes)} of state")
        return "\n".join(lines)

    def _memory_lines(self) -> list[str]:
        peak = f"memory                 {size_text(self.peak_bytes)} at most: "
        if self.blocks is None:
            return [
                f"{peak}model {size_text(self.model_bytes)}, moments {size_text(self.moments_bytes)}, factor bases "
                f"{self.bases_at_once} x {size_text(self.bases_bytes)}, activations "
                f"{size_text(self.activation_bytes)}",
                f"disk                   {size_text(self.disk_bytes)} in the work directory, if one is given",
            ]
        return [
            f"{peak}one block of {self.blocks.count} at a time; whole model {size_text(self.whole_bytes)}; "
            f"Python and its libraries take about {self.library_bytes / 1e6:,.0f} MB more of CPU memory",
            f"passes                 {self.blocks.passes} over the calibration examples, with two forward passes each",
            f"disk                   {size_text(self.disk_bytes)} in the work directory",
        ]


def make_plan(
    model: nn.Module,
    targets: list[Target],
    config: SieveConfig,
    splits: Mapping[str, dict[str, int]],
    batch: BatchSizes,
    vocabulary: TaskVocabulary | None = None,
    candidates: Mapping[str, str] | None = None,
    *,
    labelled: bool = True,
    has_offsets: bool = True,
    device: torch.device | None = None,
) -> PrunePlan:
    """Compute the plan of a run. A model without weights counts as one with offloaded blocks.

    Args:
        model (`torch.nn.Module`): The dense model, whose experts are separate linears.
        targets (`list[Target]`): The matrices to prune.
        config (`SieveConfig`): The settings; `heal="auto"` counts as `None`, see `settle_training`.
        splits (`Mapping[str, dict[str, int]]`): Number of examples in each split of each task.
        batch (`BatchSizes`): Sizes of the batches of all examples.
        vocabulary (`TaskVocabulary`, *optional*): Vocabulary of the calibration splits.
        candidates (`Mapping[str, str]`, *optional*): What the candidates of each task cost, as text.
        labelled (`bool`): Whether the data of every task has gold answers.
        has_offsets (`bool`): Whether a task has labels with gold answers, which get label offsets.
        device (`torch.device`, *optional*): Device that computes. Default: that of the weights.

    Raises:
        ValueError: If the `memory_limit` is too low; the message gives the lowest one.
    """
    total = sum(target.num_parameters for target in targets)
    model_bytes = tensor_bytes(model)
    after = None if config.pruning_ratio is None else round(total * (1 - config.pruning_ratio))
    element = element_size(model, targets)
    on_cpu = (device or execution_device(model.get_submodule(targets[0].name))).type == "cpu"
    removed = 0 if vocabulary is None else vocabulary.rows.removed_elements
    plan = PrunePlan(
        num_targets=len(targets),
        targets_parameters=total,
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
        expected_targets_parameters=after,
        model_bytes=model_bytes,
        expected_bytes=None if after is None else model_bytes - (total - after + removed) * element,
        moments_bytes=moments_bytes(targets, config, len(splits)),
        bases_bytes=sum(map(basis_bytes, targets)),
        bases_at_once=bases_at_once(config),
        activation_bytes=whole_activation_bytes(model, targets, batch, element),
        examples=dict(splits),
        heal_bytes=heal_bytes(config, targets, element),
        tune_bytes=tune_bytes(model, targets, config, on_cpu=on_cpu),
        tuning=describe_tuning(config),
        healing=describe_healing(config),
        vocabulary=None if vocabulary is None else vocabulary.sizes,
        certainty=describe_certainty(splits, config),
        candidates=dict(candidates or {}),
        library_bytes=_LIBRARY_BYTES + (_KERNEL_BYTES if on_cpu and element == 2 else 0),
    )
    blocks = plan_blocks(plan, model, targets, config, batch)
    shares = expert_shares(model, targets)
    tokens = batch.seen("moments").tokens
    work = count_work(targets, config, tokens=tokens, by_block=blocks is not None, shares=shares)
    stages = count_passes(
        targets, config, batch, width=_head_width(model), labelled=labelled, has_offsets=has_offsets, shares=shares
    )
    # A file of moments for every task, and one of bases, for every round.
    stored = config.num_rounds * (len(splits) * moments_bytes(targets, config) + plan.bases_bytes)
    disk = stored if blocks is None else blocks.disk_bytes
    return replace(plan, blocks=blocks, disk_bytes=disk, work=replace(work, stages=stages))


def _head_width(model: Any) -> int:
    """Return the inputs of the head over the vocabulary; 0 without one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return 0 if head is None else int(head.weight.shape[-1])


def _task_lines(title: str, texts: Mapping[str, str]) -> list[str]:
    """Return a line for each task, with its name if there are several."""
    if len(texts) == 1:
        return [f"{title:23}{text}" for text in texts.values()]
    return [f"{title:23}{name}: {text}" for name, text in texts.items()]


def _counts(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in splits.items())
