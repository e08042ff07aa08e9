"""The stages of a pruning run, each a function from values to a value, kept in the work directory when done."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from .adapters import learn_adapter
from .allocation import allocate
from .calibration import collect_moments
from .comparison import compare
from .factorization import FactorBasis, factorize
from .inputs import input_format
from .labelling import label_by_model
from .losses import calibration_loss
from .moments import Moments
from .scoring import input_device, make_batches
from .search.live import LiveRanks
from .search.stage import run_search
from .setting import Setting, score, score_dense, timed
from .surgery import truncated
from .targets import linear_weight
from .tolerance import search_kept_fraction
from .workdir import flatten, on_device, unflatten


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from .comparison import Comparison
    from .config import SieveConfig
    from .healer import Healer
    from .search.genome import Ranks
    from .tasks import Example, Task


logger = logging.getLogger(__name__)


def calibrate(
    setting: Setting, examples: Sequence[Example], seconds: dict[str, float], *, must_exist: bool = False
) -> dict[str, FactorBasis]:
    """Return a factor basis of every target's dense weight, from moments taken in one or more rounds.

    The first round's moments are the dense model's. Each later round takes them on the model pruned part of the way
    with the bases so far, where inputs and gradients are what the pruned layers will really meet.

    Args:
        setting (`Setting`): The run.
        examples (`Sequence[Example]`): The calibration examples.
        seconds (`dict[str, float]`): Wall-clock time is added under `"moments"` and `"factors"`.
        must_exist (`bool`): Only read what lies in the work directory.

    Raises:
        ValueError: If it must exist and does not.
    """
    weights = {target.name: linear_weight(setting.model.get_submodule(target.name)) for target in setting.targets}
    rounds = setting.config.rounds if setting.config.projection in ("joint", "activation") else 1
    bases: dict[str, FactorBasis] = {}
    history: list[Ranks] = []
    gold: Sequence[Example] | None = None
    for number in range(rounds):
        if number:
            history.append(allocate_ranks(setting, bases, kept_in_round(setting.config, number)))
        key = setting.key(*_BASIS_SETTINGS, names=list(weights), history=history, learned=_learned(setting.config))
        found = setting.work.load("bases", key)
        if found is not None:
            bases = {
                name: FactorBasis(**on_device(tensors, weights[name].device))
                for name, tensors in unflatten(found).items()
            }
            continue
        if must_exist:
            raise ValueError(
                f"`work_dir` must hold the bases of the search, got {setting.work.path} without bases-{key}. Give the "
                "worker the leader's work directory, or a copy of it."
            )
        with timed(seconds, "moments"):
            gold = gold or gold_examples(setting, examples)
        with (
            timed(seconds, "moments"),
            truncated(setting.model, bases, history[-1] if history else {}, storage="factors"),
        ):
            moments = collect(setting, gold, weights, history, number)
        with timed(seconds, "factors"):
            bases = factor(setting, weights, moments)
        del moments
        setting.work.save("bases", key, flatten(bases))
    return bases


_BASIS_SETTINGS = ("projection", "loss", "label_source", "seed", "damping")


def read_examples(setting: Setting, task: Task, *splits: str) -> list[list[Example]]:
    """Return the examples of each split; without labels, the dense model's likeliest answers are gold."""
    found = [task.examples(split, setting.tokenizer) for split in splits]
    return found if task.labelled else [label_examples(setting, examples) for examples in found]


def gold_examples(setting: Setting, examples: Sequence[Example]) -> Sequence[Example]:
    """Return the calibration examples with the answers whose likelihood counts; the model must be dense."""
    config = setting.config
    # The Fisher information of candidates looks at no answer, and `svd` at no example.
    unused = config.projection == "svd" or (config.loss == "fisher" and bool(examples[0].candidates))
    if config.label_source == "data" or unused:
        return examples
    return label_examples(setting, examples, config.seed if config.label_source == "sampled" else None)


def label_examples(setting: Setting, examples: Sequence[Example], seed: int | None = None) -> list[Example]:
    """Return the examples with the model's own answers for gold: the likeliest, or drawn with a seed."""
    size, progress = setting.config.batch_size, setting.progress
    return label_by_model(setting.model, examples, setting.tokenizer, batch_size=size, seed=seed, progress=progress)


def _learned(config: SieveConfig) -> list[object]:
    """What adapters depend on beside the moments: they are trained for one rank."""
    return [config.pruning_ratio, config.storage, config.rank_multiple] if config.projection == "learned" else []


def kept_in_round(config: SieveConfig, number: int) -> float:
    """Kept fraction at which round `number` (from 1) takes its moments: in equal ratios on the way to the goal.

    The goal is what `pruning_ratio` keeps, or a quarter where a search has yet to find it.
    """
    goal = 0.25 if config.pruning_ratio is None else 1 - config.pruning_ratio
    return float(goal ** (number / config.rounds))


def collect(
    setting: Setting,
    examples: Sequence[Example],
    weights: Mapping[str, torch.Tensor],
    history: Sequence[Ranks] = (),
    number: int = 0,
) -> dict[str, Moments]:
    """Collect the moments of every target over the calibration examples; none for the `svd` projection."""
    config = setting.config
    if config.projection == "svd":
        return {}
    settings = ("projection", "loss", "label_source", "seed", *(("damping",) if history else ()))
    key = setting.key(*settings, names=list(weights), history=list(history))
    kept = setting.work.load("moments", key)
    if kept is not None:
        return {
            name: Moments.from_tensors(on_device(tensors, weights[name].device))
            for name, tensors in unflatten(kept).items()
        }
    loss, by_candidate = calibration_loss(config.loss, examples, config.seed)
    device = input_device(setting.model)
    batches = make_batches(
        examples,
        setting.tokenizer,
        batch_size=config.batch_size,
        candidates=by_candidate,
        inputs=input_format(setting.model),
    )
    description = f"moments, round {number + 1}"
    with tqdm(batches, desc=description, unit="batch", disable=not setting.progress) as bar:
        moments = collect_moments(
            setting.model,
            setting.targets,
            (batch.to(device) for batch in bar),
            loss,
            projection=config.projection,
            num_examples=len(examples),
            weights=weights,
        )
    setting.work.save("moments", key, flatten(moments))
    return moments


def factor(
    setting: Setting, weights: Mapping[str, torch.Tensor], moments: Mapping[str, Moments]
) -> dict[str, FactorBasis]:
    """Factor every weight; one basis serves every rank, but for `learned`, which is trained for its rank."""
    config = setting.config
    ranks = _ranks_to_learn(setting) if config.projection == "learned" else {}
    bases: dict[str, FactorBasis] = {}
    for name, weight in tqdm(weights.items(), desc="factors", unit="matrix", disable=not setting.progress):
        if config.projection == "learned":
            rank = ranks[name]
            bases[name] = learn_adapter(weight, moments[name], min(weight.shape) if rank is None else rank)
        else:
            bases[name] = factorize(weight, moments.get(name), projection=config.projection, damping=config.damping)
    return bases


def _ranks_to_learn(setting: Setting) -> Ranks:
    """Ranks of the uniform allocation, which looks at no energy."""
    config = setting.config
    flat = {t.name: FactorBasis(torch.empty(0), torch.empty(0), torch.zeros(t.max_rank)) for t in setting.targets}
    return allocate_ranks(setting, flat, 1 - (config.pruning_ratio or 0.0))


def allocate_ranks(setting: Setting, bases: Mapping[str, FactorBasis], kept: float) -> Ranks:
    """Choose every target's rank (`None` = dense) so that the fraction `kept` of their parameters is left."""
    config = setting.config
    total = sum(target.num_parameters for target in setting.targets)
    return allocate(
        setting.loss_curves(bases),
        int(kept * total),
        # A genetic search starts from the energy allocation.
        allocation="uniform" if config.allocation == "uniform" else "energy",
        storage=config.storage,
        multiple=config.rank_multiple,
    )


def choose_ranks(
    setting: Setting,
    bases: Mapping[str, FactorBasis],
    examples: Sequence[Example],
    calibration: Sequence[Example] = (),
    healer: Healer | None = None,
) -> tuple[Ranks, list[dict[str, Any]]]:
    """Choose every target's rank, by `pruning_ratio` or by search within `tolerance`.

    Args:
        setting (`Setting`): The run.
        bases (`Mapping[str, FactorBasis]`): A basis of every target.
        examples (`Sequence[Example]`): The selection examples.
        calibration (`Sequence[Example]`): The calibration examples, which a genetic search uses too.
        healer (`Healer`, *optional*): Heals every size that is tried; the examples it has not seen decide.

    Returns:
        `tuple[dict, list[dict]]`: Ranks by name (`None` = dense), and what the search tried.

    Raises:
        RuntimeError: If the search found nothing within the tolerance.
    """
    config = setting.config
    if config.allocation == "genetic":
        found = run_search(setting, bases, examples, calibration)
        return found["ranks"], found["candidates"]
    if config.pruning_ratio is not None:
        return allocate_ranks(setting, bases, 1 - config.pruning_ratio), []
    part = "selection"
    if healer is not None:
        examples = healer.unseen
        part = f"{len(examples)} unmonitored examples of selection"
    dense = score_dense(setting, examples, part)
    names = (*_BASIS_SETTINGS, "rounds", "allocation", "storage", "rank_multiple", *(("heal",) if healer else ()))
    if dense.score <= dense.majority_score:
        logger.warning(
            "The dense model scores %.4f on the selection split, always giving the most frequent answer %.4f: there is "
            "nothing to lose, and any size may pass. Improve the prompt, or take another model.",
            dense.score, dense.majority_score,
        )  # fmt: skip

    with LiveRanks(setting.model, bases) as live:

        def compare_at(kept: float) -> Comparison:
            ranks = allocate_ranks(setting, bases, kept)
            with nullcontext(live.hold(ranks)) if healer is None else healer.healed(bases, ranks):
                pruned = score(
                    setting, examples, f"kept {kept:.1%} on {part}", ranks=ranks, settings=setting.key(*names)
                )
            return compare(dense, pruned)

        kept, trials = search_kept_fraction(
            compare_at, tolerance=config.tolerance or 0.0, confidence=config.confidence, steps=config.search_steps
        )
    return allocate_ranks(setting, bases, kept), trials
