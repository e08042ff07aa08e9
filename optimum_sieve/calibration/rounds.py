"""A round of calibration: the model that its moments are taken on, and the cache keys of its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from optimum_sieve.factorization.closed_form import FactorBasis
from optimum_sieve.tasks.data import INPUTS

from .sampled import draws_key


if TYPE_CHECKING:
    from collections.abc import Mapping

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.run.context import Run, TaskRun


# Raise it when the same inputs give other moments or bases: results of earlier versions are then computed again.
FORMAT = 1
# Settings that moments and bases depend on, besides those that choose the ranks of a later round.
MOMENT_SETTINGS = ("projection", "loss", "fisher_temperature", "label_source", "seed")
BASIS_SETTINGS = (*MOMENT_SETTINGS, "damping", "weighting")


class Bases(dict[str, FactorBasis]):
    """The factor basis of every target by name.

    Args:
        bases (`Mapping[str, FactorBasis]`): The bases.
        key (`str`): Hash of everything that they depend on.
    """

    def __init__(self, bases: Mapping[str, FactorBasis], key: str) -> None:
        super().__init__(bases)
        self.key = key


@dataclass(frozen=True, eq=False)
class Round:
    """One round: moments of a model, and the bases they give.

    Args:
        run (`Run`): The run.
        number (`int`): Number of the round, from 1.
        ranks (`Mapping[str, int | None]`): Ranks that the model is pruned to while moments are taken. Empty in the
            first round, which takes them on the dense model.
        before (`Bases`, *optional*): Bases of the round before, which `ranks` truncates.
    """

    run: Run
    number: int = 1
    ranks: Ranks = field(default_factory=dict)
    before: Bases = field(default_factory=lambda: Bases({}, ""))

    @property
    def names(self) -> list[str]:
        """Names of the targets."""
        return [target.name for target in self.run.targets]

    def moments_key(self, task: TaskRun) -> str:
        """Return the cache key of one task's moments."""
        pruned: dict[str, Any] = {}
        if self.ranks:
            pruned = {"ranks": self.ranks, "bases": self.before.key, "weighting": self.run.config.weighting}
        splits = [split for split in INPUTS if task.examples(split)]
        # One alone as it is, so that work directories of earlier versions stay valid.
        examples = [task.fingerprint(split) for split in splits] if len(splits) > 1 else task.fingerprint(splits[0])
        parts = {**draws_key(task), **pruned}
        return self.run.key(*MOMENT_SETTINGS, examples=examples, targets=self.names, format=FORMAT, **parts)

    @cached_property
    def key(self) -> str:
        """The cache key of the bases."""
        config = self.run.config
        settings = ["projection", "damping"]
        if config.projection == "learned":
            # An adapter is trained for one rank.
            settings += ["pruning_ratio", "storage", "rank_multiple"]
        # `svd` factors the weights alone.
        tasks = self.run.tasks if config.projection != "svd" else ()
        moments = [[self.moments_key(task), task.weight] for task in tasks]
        return self.run.key(*settings, moments=moments, targets=self.names, format=FORMAT)
