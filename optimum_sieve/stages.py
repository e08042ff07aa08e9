"""The stages of a pruning run, each a function from values to a value, kept in the work directory when done."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from .adapters import learn_adapter
from .allocation import LossCurve, allocate
from .calibration import collect_moments
from .evaluation import Comparison, Evaluation, compare, evaluate
from .factorization import FactorBasis, factorize
from .losses import calibration_loss
from .moments import Moments
from .scoring import input_device, make_batches, max_positions
from .surgery import truncated
from .targets import Target, linear_weight
from .workdir import WorkDir, content_key, flatten, unflatten


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from .config import SieveConfig
    from .tasks import Example


logger = logging.getLogger(__name__)

Ranks = dict[str, "int | None"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every stage of one run reads.

    Args:
        model (`torch.nn.Module`): The dense model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        config (`SieveConfig`): The settings.
        metric (`str`): The task's metric.
        targets (`list[Target]`): The layers to prune.
        work (`WorkDir`): Where finished stages are kept.
        fingerprint (`str`): Hash of the model and the task.
        progress (`bool`): Whether progress bars are shown.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: SieveConfig
    metric: str
    targets: list[Target]
    work: WorkDir
    fingerprint: str
    progress: bool

    def key(self, *settings: str, **more: object) -> str:
        """Hash the named settings together with the model, the task and `more`."""
        values = self.config.to_dict()
        return content_key(run=self.fingerprint, **{name: values[name] for name in settings}, **more)


def score(setting: Setting, examples: Sequence[Example], description: str, **key: object) -> Evaluation:
    """Score the model as it is now, or take the score from the work directory."""
    name = setting.key(description=description, **key)
    path = None if setting.work.path is None else setting.work.path / f"evaluation-{name}.safetensors"
    if path is not None and path.exists():
        return Evaluation.load(path)
    evaluation = evaluate(
        setting.model,
        examples,
        setting.tokenizer,
        metric=setting.metric,
        batch_size=setting.config.batch_size,
        progress=setting.progress,
        description=description,
    )
    if path is not None:
        evaluation.save(path)
    return evaluation


def collect(setting: Setting, examples: Sequence[Example]) -> dict[str, Moments]:
    """Collect the moments of every target over the calibration examples; none for the `svd` projection."""
    config = setting.config
    if config.projection == "svd":
        return {}
    names = [target.name for target in setting.targets]
    key = setting.key("projection", "loss", "seed", names=names)
    kept = setting.work.load("moments", key)
    if kept is not None:
        return {name: Moments.from_tensors(tensors) for name, tensors in unflatten(kept).items()}
    loss, by_candidate = calibration_loss(config.loss, examples, config.seed)
    device = input_device(setting.model)
    batches = make_batches(
        examples,
        setting.tokenizer,
        batch_size=config.batch_size,
        candidates=by_candidate,
        max_length=max_positions(setting.model),
    )
    with tqdm(batches, desc="moments", unit="batch", disable=not setting.progress) as bar:
        moments = collect_moments(
            setting.model,
            setting.targets,
            (batch.to(device) for batch in bar),
            loss,
            projection=config.projection,
            num_examples=len(examples),
        )
    setting.work.save("moments", key, flatten(moments))
    return moments


def factor(setting: Setting, moments: Mapping[str, Moments]) -> dict[str, FactorBasis]:
    """Factor every target's weight; one basis serves every rank, but for `learned`, which is trained for its rank."""
    config = setting.config
    names = [target.name for target in setting.targets]
    learned = ("pruning_ratio", "storage", "rank_multiple") if config.projection == "learned" else ()
    key = setting.key("projection", "loss", "seed", "damping", *learned, names=names)
    kept = setting.work.load("bases", key)
    if kept is not None:
        return {name: FactorBasis(**tensors) for name, tensors in unflatten(kept).items()}
    ranks = _ranks_to_learn(setting) if config.projection == "learned" else {}
    bases: dict[str, FactorBasis] = {}
    for target in tqdm(setting.targets, desc="factors", unit="matrix", disable=not setting.progress):
        weight = linear_weight(setting.model.get_submodule(target.name))
        if config.projection == "learned":
            rank = ranks[target.name]
            bases[target.name] = learn_adapter(weight, moments[target.name], target.max_rank if rank is None else rank)
            continue
        bases[target.name] = factorize(
            weight,
            moments.get(target.name),
            projection=config.projection,
            damping=config.damping,
        )
    setting.work.save("bases", key, flatten(bases))
    return bases


def _ranks_to_learn(setting: Setting) -> Ranks:
    """Ranks of the uniform allocation, which needs no curve."""
    bases = {target.name: torch.zeros(target.max_rank) for target in setting.targets}
    return _allocate(setting, bases, 1 - (setting.config.pruning_ratio or 0.0))


def _allocate(setting: Setting, energies: Mapping[str, torch.Tensor], kept: float) -> Ranks:
    config = setting.config
    curves = [
        LossCurve(target.name, target.out_features, target.in_features, energies[target.name].cpu().numpy())
        for target in setting.targets
    ]
    total = sum(target.num_parameters for target in setting.targets)
    return allocate(
        curves,
        int(kept * total),
        allocation=config.allocation,
        storage=config.storage,
        multiple=config.rank_multiple,
    )


def choose_ranks(
    setting: Setting, bases: Mapping[str, FactorBasis], examples: Sequence[Example]
) -> tuple[Ranks, list[dict[str, float]]]:
    """Choose every target's rank, by `pruning_ratio` or by search within `tolerance`.

    Returns:
        `tuple[dict, list[dict]]`: Ranks by name (`None` = dense), and what the search tried.

    Raises:
        RuntimeError: If the search found nothing within the tolerance.
    """
    energies = {name: basis.energy for name, basis in bases.items()}
    config = setting.config
    if config.pruning_ratio is not None:
        return _allocate(setting, energies, 1 - config.pruning_ratio), []
    dense = score(setting, examples, "dense model on selection")

    def compare_at(kept: float) -> Comparison:
        ranks = _allocate(setting, energies, kept)
        with truncated(setting.model, bases, ranks, storage=config.storage):
            pruned = score(
                setting,
                examples,
                f"kept {kept:.1%} on selection",
                ranks=ranks,
                config={name: config.to_dict()[name] for name in ("projection", "loss", "seed", "damping", "storage")},
            )
        return compare(dense, pruned)

    kept, trials = search_kept_fraction(
        compare_at, tolerance=config.tolerance or 0.0, confidence=config.confidence, steps=config.search_steps
    )
    return _allocate(setting, energies, kept), trials


def search_kept_fraction(
    compare_at: Callable[[float], Comparison], *, tolerance: float, confidence: float, steps: int
) -> tuple[float, list[dict[str, float]]]:
    """Halve the interval of kept fractions `steps` times; return the least that stayed within `tolerance`.

    A fraction is within the tolerance where the lower bound of the paired score difference, pruned minus dense, at
    one-sided `confidence` is at least `-tolerance`: the mean difference alone would accept a loss hidden by noise.

    Args:
        compare_at (`Callable`): Maps a kept fraction to the comparison of the pruned model with the dense one.
        tolerance (`float`): Loss accepted, in points of the metric.
        confidence (`float`): One-sided confidence, at least 0.5.
        steps (`int`): Fractions tried.

    Returns:
        `tuple[float, list[dict]]`: The kept fraction, and each trial with its figures.

    Raises:
        RuntimeError: If no fraction tried was within the tolerance.
    """
    low, high = 0.0, 1.0
    trials: list[dict[str, float]] = []
    for _ in range(steps):
        kept = (low + high) / 2
        comparison = compare_at(kept)
        bound = comparison.lower_bound(confidence)
        trials.append({"kept": kept, "lower_bound": bound, **comparison.to_dict()})
        logger.info(
            "Kept %.1f %%: score difference %+.4f +- %.4f, lower bound %+.4f, agreement %.3f.",
            100 * kept, comparison.mean, comparison.standard_error, bound, comparison.agreement,
        )  # fmt: skip
        low, high = (low, kept) if bound >= -tolerance else (kept, high)
    if high == 1.0:
        best = max(trials, key=lambda trial: trial["lower_bound"])
        raise RuntimeError(
            f"`tolerance` must leave room for pruning, got {tolerance}: keeping {best['kept']:.1%} of the parameters "
            f"already costs {-best['mean']:.4f} +- {best['standard_error']:.4f}. Accept a larger tolerance, use more "
            "selection examples (a smaller standard error), or set `pruning_ratio`."
        )
    return high, trials
