"""The stages up to the factor bases, each a function from values to a value, kept in the work directory when done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from optimum_sieve.allocation.allocators import predicted_loss
from optimum_sieve.allocation.stage import allocate_ranks
from optimum_sieve.backbone.offloading import execution_device
from optimum_sieve.backbone.targets import linear_weight
from optimum_sieve.evaluation.batches import input_device
from optimum_sieve.evaluation.stage import label_examples
from optimum_sieve.factorization.closed_form import FactorBasis, factorize
from optimum_sieve.factorization.learned import learn_adapter
from optimum_sieve.factorization.moments import Moments, weighted_sum
from optimum_sieve.run import distributed
from optimum_sieve.run.context import BASIS_SETTINGS, MOMENT_SETTINGS, timed
from optimum_sieve.run.workdir import flatten, on_device, unflatten
from optimum_sieve.surgery.apply import truncated

from .blockwise import BlockCalibration, stored_bases
from .collect import collect_moments
from .factors import factor_together, token_weights
from .losses import calibration_batches


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.tasks import Example


# Predicted rise of the loss, in nats per example, of the model on which a later round takes its moments.
_ROUND_RISE = 0.01


def calibrate(run: Run, seconds: dict[str, float], *, must_exist: bool = False) -> dict[str, FactorBasis]:
    """Return a factor basis of every target's dense weight, from moments taken in one or more rounds.

    Moments are taken on the calibration examples of every task and summed with the tasks' weights.

    The first round's moments are the dense model's. Each later round takes them on the model pruned part of the way
    with the bases so far (see [`ranks_in_round`]), where inputs and gradients are what the pruned layers will really
    meet. Of joint moments it weights the tokens by those bases.

    Args:
        run (`Run`): The run.
        seconds (`dict[str, float]`): Wall-clock time is added under `"moments"` and `"factors"`.
        must_exist (`bool`): Only read what lies in the work directory.

    Raises:
        ValueError: If it must exist and does not.
    """
    names = [target.name for target in run.targets]
    bases: dict[str, FactorBasis] = {}
    history: list[Ranks] = []
    gold: list[Sequence[Example]] | None = None
    for number in range(run.config.num_rounds):
        if number:
            history.append(ranks_in_round(run, bases, number))
        key = run.key(*BASIS_SETTINGS, names=names, history=history, learned=_learned(run.config))
        found = _load_bases(run, key)
        if found is None and must_exist:
            raise ValueError(
                f"`work_dir` must hold the bases of the search, got {run.work.path} without bases-{key}. Give the "
                "worker the leader's work directory, or a copy of it."
            )
        if found is None:
            with timed(seconds, "moments"):
                gold = gold or [gold_examples(run, task) for task in run.tasks]
            if run.by_block:
                found = BlockCalibration(run, gold, history[-1] if history else {}, bases).compute(key, seconds)
            else:
                bases = _calibrate_once(run, gold, history, bases, seconds)
                run.work.save("bases", key, flatten(bases))
                if run.work.path is not None:
                    # As a run that goes on will have them: products of tensors that lie otherwise in memory round
                    # otherwise. Not two sets at once.
                    bases.clear()
                    found = _load_bases(run, key)
        bases = found or bases
    return bases


def _calibrate_once(
    run: Run,
    gold: Sequence[Sequence[Example]],
    history: Sequence[Ranks],
    bases: Mapping[str, FactorBasis],
    seconds: dict[str, float],
) -> dict[str, FactorBasis]:
    """Take the moments of one round, on the model pruned to the last ranks of `history`, and factor every weight."""
    weights = {target.name: linear_weight(run.model.get_submodule(target.name)) for target in run.targets}
    with (
        timed(seconds, "moments"),
        truncated(run.model, bases, history[-1] if history else {}, storage="factors"),
    ):
        moments = collect(run, gold, weights, history, bases)
    with timed(seconds, "factors"):
        return factor(run, weights, moments)


def _load_bases(run: Run, key: str) -> dict[str, FactorBasis] | None:
    """Take bases from the work directory, if they are there."""
    if run.by_block:
        return stored_bases(run, key)
    found = run.work.load("bases", key)
    if found is None:
        return None
    return {
        name: FactorBasis(**on_device(tensors, execution_device(run.model.get_submodule(name))))
        for name, tensors in unflatten(found).items()
    }


def gold_examples(run: Run, task: TaskRun) -> Sequence[Example]:
    """Return a task's calibration examples with the answers whose likelihood counts; the model must be dense."""
    config, examples = run.config, task.calibration
    # The Fisher information of candidates looks at no answer, and `svd` at no example.
    unused = config.projection == "svd" or (config.loss == "fisher" and bool(examples[0].candidates))
    if config.label_source == "data" or unused:
        return examples
    return label_examples(run, examples, config.seed if config.label_source == "sampled" else None)


def _learned(config: SieveConfig) -> list[object]:
    """What adapters depend on beside the moments: they are trained for one rank."""
    return [config.pruning_ratio, config.storage, config.rank_multiple] if config.projection == "learned" else []


def kept_in_round(config: SieveConfig, number: int) -> float:
    """Kept fraction at which round `number` (from 1) takes its moments: in equal ratios on the way to the goal.

    The goal is what `pruning_ratio` keeps, or a quarter where a search has yet to find it.
    """
    goal = 0.25 if config.pruning_ratio is None else 1 - config.pruning_ratio
    return float(goal ** (number / config.rounds))


def ranks_in_round(run: Run, bases: Mapping[str, FactorBasis], number: int) -> Ranks:
    """Ranks at which round `number` (from 1) takes its moments: those of [`kept_in_round`], or of less pruning.

    A model that is much worse than the dense one has other inputs and gradients than the one that will be accepted, and
    moments of it lead to a worse one than the dense model's. So what is removed is halved until the predicted rise of
    the loss is within `_ROUND_RISE`. Only the joint projection predicts it.
    """
    kept = kept_in_round(run.config, number)
    ranks = allocate_ranks(run, bases, kept)
    if run.config.projection == "joint":
        curves = run.loss_curves(bases)
        while predicted_loss(curves, ranks) > _ROUND_RISE:
            kept = (1 + kept) / 2
            ranks = allocate_ranks(run, bases, kept)
    return ranks


def collect(
    run: Run,
    gold: Sequence[Sequence[Example]],
    weights: Mapping[str, torch.Tensor],
    history: Sequence[Ranks] = (),
    bases: Mapping[str, FactorBasis] | None = None,
) -> dict[str, Moments]:
    """Collect the moments of every target, the weighted sum of the tasks' own; none for the `svd` projection."""
    if run.config.projection == "svd":
        return {}
    pairs = zip(run.tasks, gold, strict=True)
    return weighted_sum(
        (task.weight, collect_task(run, task, examples, weights, history, bases or {})) for task, examples in pairs
    )


def collect_task(
    run: Run,
    task: TaskRun,
    examples: Sequence[Example],
    weights: Mapping[str, torch.Tensor],
    history: Sequence[Ranks],
    bases: Mapping[str, FactorBasis],
) -> dict[str, Moments]:
    """Collect the moments of every target over one task's calibration examples, or read them.

    Tokens are weighted by the bases of the round before, where there are any.
    """
    config = run.config
    settings = BASIS_SETTINGS if history else MOMENT_SETTINGS
    # A model that is pruned part of the way depends on all tasks of the run.
    shared = {"together": run.fingerprint} if history and len(run.tasks) > 1 else {}
    key = run.key(*settings, task=task, names=list(weights), history=list(history), **shared)
    kept = run.work.load("moments", key)
    if kept is not None:
        return {
            name: Moments.from_tensors(on_device(tensors, weights[name].device))
            for name, tensors in unflatten(kept).items()
        }
    batches, loss = calibration_batches(run, examples)
    device = input_device(run.model)
    description = f"moments, round {len(history) + 1}" + (f", {task.name}" if len(run.tasks) > 1 else "")
    with tqdm(distributed.share(batches), desc=description, unit="batch", disable=not run.progress) as bar:
        moments = collect_moments(
            run.model,
            run.targets,
            (batch.to(device) for batch in bar),
            loss,
            projection=config.projection,
            num_examples=len(examples),
            weights=weights,
            token_weights=token_weights(config, bases),
        )
    distributed.add_up(tensor for own in moments.values() for tensor in own.tensors().values())
    run.work.save("moments", key, flatten(moments))
    return moments


def factor(run: Run, weights: Mapping[str, torch.Tensor], moments: Mapping[str, Moments]) -> dict[str, FactorBasis]:
    """Factor every weight; one basis serves every rank, but for `learned`, which is trained for its rank."""
    config = run.config
    ranks = _ranks_to_learn(run) if config.projection == "learned" else {}

    def one(name: str, weight: torch.Tensor) -> FactorBasis:
        if config.projection == "learned":
            rank = ranks[name]
            return learn_adapter(weight, moments[name], min(weight.shape) if rank is None else rank)
        return factorize(weight, moments.get(name), projection=config.projection, damping=config.damping)

    return factor_together(weights, one, progress=run.progress)


def _ranks_to_learn(run: Run) -> Ranks:
    """Ranks of the uniform allocation, which looks at no energy."""
    config = run.config
    flat = {t.name: FactorBasis(torch.empty(0), torch.empty(0), torch.zeros(t.max_rank)) for t in run.targets}
    return allocate_ranks(run, flat, 1 - (config.pruning_ratio or 0.0))
