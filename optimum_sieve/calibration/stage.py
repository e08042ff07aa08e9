"""Calibration as a stage of a run: rounds of moments and factor bases, cached in the work directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sieve.allocation.allocators import predicted_loss
from optimum_sieve.allocation.stage import allocate_ranks, loss_curves
from optimum_sieve.backbone.offloading import execution_device
from optimum_sieve.backbone.targets import linear_weight
from optimum_sieve.evaluation.batches import input_device
from optimum_sieve.evaluation.labelling import label_examples
from optimum_sieve.evaluation.on_policy import answer_unlabelled
from optimum_sieve.factorization.closed_form import FactorBasis, factorize
from optimum_sieve.factorization.learned import learn_adapter
from optimum_sieve.factorization.moments import Moments, weighted_sum
from optimum_sieve.run import distributed
from optimum_sieve.run.bars import progress_bar
from optimum_sieve.run.workdir import flatten, on_device, unflatten
from optimum_sieve.surgery.apply import truncated

from .blockwise import BlockRound
from .collect import collect_moments
from .factors import factor_together, token_weights
from .losses import calibration_batches
from .rounds import Bases, Round
from .sampled import CalibrationExamples, sampled_examples


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.run.context import Run, TaskRun


# Largest predicted loss increase, in nats per example, of a model on which a later round takes its moments.
_ROUND_RISE = 0.01


def calibrate(run: Run, *, must_exist: bool = False) -> Bases:
    """Return a factor basis of every target's dense weight, from moments taken in one or more rounds.

    Moments are taken on the calibration examples of every task and summed with the tasks' weights. The first round
    takes them on the dense model. Each later round takes them on the model pruned part of the way with the previous
    bases (see [`ranks_in_round`]), where the layers have the inputs and gradients that they will have in the pruned
    model; it weights the tokens of joint moments by those bases.

    Args:
        run (`Run`): The run, whose model is dense.
        must_exist (`bool`): Only read the work directory.

    Raises:
        ValueError: If bases must exist and do not.
    """
    taken: list[CalibrationExamples] | None = None
    bases = Bases({}, "")
    for number in range(1, run.config.num_rounds + 1):
        ranks = ranks_in_round(run, bases, number - 1) if number > 1 else {}
        step = (BlockRound if run.by_block else WholeRound)(run, number, ranks, bases)
        stored = step.load()
        if stored is None and must_exist:
            raise ValueError(
                f"`work_dir` must hold the bases of the search, got {run.work.path} without bases-{step.key}. Give the "
                "worker the leader's work directory, or a copy of it."
            )
        if stored is None:
            with run.timed("moments"):
                taken = taken or [calibration_examples(run, task) for task in run.tasks]
            stored = step.compute(taken)
        bases = stored
    return bases


class WholeRound(Round):
    """A round with the whole model, all moments and all bases in memory."""

    def load(self, *, verify: bool = True) -> Bases | None:
        """Return the bases from the work directory; `None` if they are not there."""
        stored = self.run.work.load("bases", self.key, verify=verify)
        if stored is None:
            return None
        model = self.run.model
        return Bases(
            {
                name: FactorBasis(**on_device(tensors, execution_device(model.get_submodule(name))))
                for name, tensors in unflatten(stored).items()
            },
            self.key,
        )

    def compute(self, taken: Sequence[CalibrationExamples]) -> Bases:
        """Take the moments, factor every weight and save the bases; return them as they were saved."""
        run = self.run
        weights = {target.name: linear_weight(run.model.get_submodule(target.name)) for target in run.targets}
        with run.timed("moments"), truncated(run.model, self.before, self.ranks, storage="factors"):
            moments = collect(self, taken, weights)
        with run.timed("factors"):
            bases = factor(run, weights, moments)
        run.work.save("bases", self.key, flatten(bases))
        if run.work.path is None:
            return Bases(bases, self.key)
        # Tensors with other strides round products differently, so a resumed run must get the same ones.
        # Freed first: two sets of bases may not fit in memory.
        bases.clear()
        saved = self.load(verify=False)
        assert saved is not None
        return saved


def calibration_examples(run: Run, task: TaskRun) -> CalibrationExamples:
    """Return a task's calibration and unlabelled examples with the answers that the loss is taken of.

    The model must be dense. It answers the unlabelled ones, and all where `label_source` says so. Of many candidates,
    some are drawn by their probabilities.
    """
    config, examples = run.config, [*task.calibration, *task.unlabelled]
    if task.draws:
        return sampled_examples(run, examples)
    # The Fisher information over candidates needs no answer, and `svd` no example.
    if not (config.projection == "svd" or (config.loss == "fisher" and examples[0].candidates)):
        if config.label_source == "data":
            examples = [*task.calibration, *answer_unlabelled(run, task)]
        else:
            examples = label_examples(run, examples, config.seed if config.label_source == "sampled" else None)
    return CalibrationExamples(examples)


def kept_in_round(config: SieveConfig, number: int) -> float:
    """Return the kept fraction of the model after round `number` (from 1): equal ratios on the way to the final size.

    The final size is that of `pruning_ratio`, or a quarter if it is yet to be searched.
    """
    final = 0.25 if config.pruning_ratio is None else 1 - config.pruning_ratio
    return float(final ** (number / config.rounds))


def ranks_in_round(run: Run, bases: Mapping[str, FactorBasis], number: int) -> Ranks:
    """Return the ranks of the model after round `number` (from 1), on which the next round takes its moments.

    They keep the fraction [`kept_in_round`], or more: a model much worse than the dense one has other inputs and
    gradients than the model that will be accepted, and moments taken on it give a worse result than those of the dense
    model. The removed fraction is halved until the predicted loss increase is at most `_ROUND_RISE`. Only the joint
    projection predicts it.
    """
    kept = kept_in_round(run.config, number)
    ranks = allocate_ranks(run, bases, kept)
    if run.config.projection == "joint":
        curves = loss_curves(run, bases)
        while predicted_loss(curves, ranks) > _ROUND_RISE:
            kept = (1 + kept) / 2
            ranks = allocate_ranks(run, bases, kept)
    return ranks


def collect(
    step: Round, taken: Sequence[CalibrationExamples], weights: Mapping[str, torch.Tensor]
) -> dict[str, Moments]:
    """Return the weighted sum of all tasks' moments of every target; none for the `svd` projection."""
    if step.run.config.projection == "svd":
        return {}
    pairs = zip(step.run.tasks, taken, strict=True)
    return weighted_sum((task.weight, _moments_of(step, task, each, weights)) for task, each in pairs)


def _moments_of(
    step: Round, task: TaskRun, taken: CalibrationExamples, weights: Mapping[str, torch.Tensor]
) -> dict[str, Moments]:
    """Return the moments of every target on one task's calibration examples, from the work directory if stored."""
    work, key = step.run.work, step.moments_key(task)
    stored = work.load("moments", key)
    if stored is not None:
        return {
            name: Moments.from_tensors(on_device(tensors, weights[name].device))
            for name, tensors in unflatten(stored).items()
        }
    moments = _collect(step, task, taken, weights)
    work.save("moments", key, flatten(moments))
    return moments


def _collect(
    step: Round, task: TaskRun, taken: CalibrationExamples, weights: Mapping[str, torch.Tensor]
) -> dict[str, Moments]:
    """Run the model over one task's calibration examples, with the processes sharing the batches."""
    run = step.run
    batches, loss = calibration_batches(run, taken)
    device = input_device(run.model)
    description = f"moments, round {step.number}" + (f", {task.name}" if len(run.tasks) > 1 else "")
    with progress_bar(distributed.share(batches), desc=description, unit="batch", progress=run.progress) as bar:
        moments = collect_moments(
            run.model,
            run.targets,
            (batch.to(device) for batch in bar),
            loss,
            projection=run.config.projection,
            num_examples=len(taken.examples),
            weights=weights,
            token_weights=token_weights(run.config, step.before),
        )
    distributed.sum_over_processes(tensor for each in moments.values() for tensor in each.tensors().values())
    return moments


def factor(run: Run, weights: Mapping[str, torch.Tensor], moments: Mapping[str, Moments]) -> dict[str, FactorBasis]:
    """Factor every weight. One basis serves every rank, except for `learned`, which is trained for its rank."""
    config = run.config
    ranks = _ranks_to_learn(run) if config.projection == "learned" else {}

    def one(name: str, weight: torch.Tensor) -> FactorBasis:
        if config.projection == "learned":
            rank = ranks[name]
            return learn_adapter(weight, moments[name], min(weight.shape) if rank is None else rank)
        return factorize(weight, moments.get(name), projection=config.projection, damping=config.damping)

    return factor_together(weights, one, progress=run.progress)


def _ranks_to_learn(run: Run) -> Ranks:
    """Return the ranks of the uniform allocation, which ignores energies."""
    config = run.config
    flat = {t.name: FactorBasis(torch.empty(0), torch.empty(0), torch.zeros(t.max_rank)) for t in run.targets}
    return allocate_ranks(run, flat, 1 - (config.pruning_ratio or 0.0))
