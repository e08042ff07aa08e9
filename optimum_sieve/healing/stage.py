"""Healing as a stage of a run: the descent through falling sizes."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve.allocation.stage import allocate_ranks, kept_fraction
from optimum_sieve.backbone.targets import linear_weight
from optimum_sieve.evaluation.on_policy import lessons_of
from optimum_sieve.evaluation.teacher import lessons_fingerprint
from optimum_sieve.run.workdir import content_key
from optimum_sieve.surgery.apply import apply_ranks, restore
from optimum_sieve.training.steps import Training

from .factors import norm_parameters
from .lessons import heal_config, make_lessons, training_examples
from .loop import FORMAT, heal
from .size import HealedSize, plain_layer, stored_layer


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.calibration.rounds import Bases
    from optimum_sieve.evaluation.teacher import Lesson
    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.modeling.layers import FactorizedLinear
    from optimum_sieve.run.context import Run


# Sizes in a row that are refused before a descent ends. One alone says little: training moves the score of each size.
_REFUSALS = 2


def make_healer(run: Run) -> Healer | None:
    """Make the healer of a run whose model is still dense; `None` if the settings have no `heal`."""
    if run.config.heal is None:
        return None
    with run.timed("healing"):
        return Healer(run)


def hold_ranks(run: Run, bases: Mapping[str, FactorBasis], ranks: Ranks, healer: Healer | None) -> Callable[[], None]:
    """Put the chosen size into the dense model; return what makes the model dense again.

    This is the healer's last accepted size, or `ranks` if there is no healer or it accepted none.
    """
    if healer is None or healer.best is None:
        return partial(restore, run.model, apply_ranks(run.model, bases, ranks, storage=run.config.storage))
    healer.put(healer.best)
    return healer.restore


def held_key(healer: Healer | None) -> str | None:
    """Return the hash under which the size that [`hold_ranks`] holds is scored.

    `None` without healing: while sizes are searched, a layer may then hold other tensors than it is saved with.
    """
    return None if healer is None or healer.best is None else healer.best.key


class Healer:
    """Prunes the model of a run to falling sizes and heals each one, going on from the healed factors.

    The factors are trained on the calibration examples of every task, in proportion to the tasks' weights. Each size
    but the first keeps the first directions of the healed factors of a larger one, as many as the dense weights' bases
    give it. The model is dense between calls.

    Args:
        run (`Run`): The run, whose model is dense and whose settings have `heal`.

    The attribute `best` is the last size that was accepted, or `None`; `kept_without` is the smallest kept fraction
    within the tolerance without training, if that was searched and there is one. `stopped` says why a descent ended:
    `"refused"`, or what the sizes' iterator gave as its reason; `None` if all given sizes were healed.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = heal_config(run)
        self.best: HealedSize | None = None
        self.kept_without: float | None = None
        self.stopped: str | None = None
        self.lessons = make_lessons(run)
        self._dense = {target.name: run.model.get_submodule(target.name) for target in run.targets}
        norms = norm_parameters(run.model) if self.config.train_norms else {}
        self._norms = {name: parameter.detach().clone() for name, parameter in norms.items()}
        self._figures: list[tuple[dict[str, float], Training]] = []

    @property
    def key(self) -> str:
        """Hash of everything that a healed model depends on, besides the first bases and the sizes."""
        # They limit the ranks.
        latencies = self.run.latencies
        return self.run.key(
            *("heal", "seed", "storage", "allocation", "rank_multiple", "latency_target"),
            lessons=lessons_fingerprint(self.lessons),
            latencies=None if latencies is None else {name: times.tolist() for name, times in latencies.items()},
            format=FORMAT,
        )

    def descend(
        self,
        bases: Bases,
        sizes: Iterable[float],
        accept: Callable[[HealedSize], bool],
        *,
        first_ranks: Ranks | None = None,
    ) -> None:
        """Prune to one size after the other, heal it, and go on until `accept` has refused two in a row.

        Args:
            bases (`Bases`): Bases of the dense weights.
            sizes (`Iterable[float]`): Falling kept fractions. They are taken one by one, so they may end early. One
                larger than the size before, but smaller than the `best`, goes on from that.
            accept (`Callable`): Called while the model holds the healed size. The last one that it accepts is `best`.
            first_ranks (`Mapping[str, int | None]`, *optional*): Ranks of the first size. Default: allocated.
        """
        start = content_key(healer=self.key, bases=bases.key, ranks=first_ranks)
        size: HealedSize | None = None
        refused = 0
        try:
            for kept in sizes:
                # The model holds no layer that is about to be freed.
                self.restore()
                back = size is not None and kept > size.asked
                if back:
                    size = self.best
                # The steps before decide on the examples that are drawn, the number of sizes on the written answers.
                taken = {"steps_before": self._steps, "sizes_before": len(self._figures)}
                key = content_key(before=start if size is None else size.key, kept=kept, **taken)
                factors = self._pruned(kept, size, bases, first_ranks if size is None else None)
                norms = {} if size is None else size.norms
                # Nothing but the best one stays in memory while the next one is trained.
                size = None
                size = self._healed(key, kept, factors, norms)
                self._figures.append(({"kept": size.kept, "asked": size.asked}, size.healing))
                self.put(size)
                if accept(size):
                    # The smaller one before was refused, as it would be after this one.
                    self.best, refused = size, int(back)
                else:
                    refused += 1
                    if refused == _REFUSALS:
                        self.stopped = "refused"
                        break
        finally:
            self.restore()

    def put(self, size: HealedSize) -> None:
        """Put a healed size into the model."""
        self._hold(size.layers, size.norms)

    def restore(self) -> None:
        """Make the model dense again."""
        self._hold({}, {})

    def report(self) -> dict[str, Any]:
        """Return the figures for the report."""
        return {
            "steps": self._steps,
            **training_examples(self.lessons),
            "seconds": round(sum(healing.seconds for _, healing in self._figures), 3),
            "sizes": [{**size, **healing.to_dict()} for size, healing in self._figures],
            "kept": None if self.best is None else self.best.kept,
            "kept_without": self.kept_without,
        }

    @property
    def _steps(self) -> int:
        return sum(healing.steps for _, healing in self._figures)

    def _pruned(
        self, kept: float, previous: HealedSize | None, bases: Mapping[str, FactorBasis], ranks: Ranks | None
    ) -> dict[str, FactorizedLinear]:
        """Return the layers of a size before they are healed: the first directions of the size before, or of a basis.

        Training changes the directions little, so they keep the order of the bases. A size before that is not the best
        one is freed layer by layer, as three whole sizes may not fit in memory.
        """
        layers = {}
        for name, rank in (ranks or allocate_ranks(self.run, bases, kept)).items():
            before = None
            if previous is not None:
                before = previous.factors.get(name) if previous is self.best else previous.take(name)
            if before is not None:
                # What was removed does not come back, also where a limit on the latency would allow it.
                rank = before.rank if rank is None else min(rank, before.rank)
                parts = before.last.weight.detach()[:, :rank], before.first.weight.detach()[:rank]
                layers[name] = plain_layer(*parts, before.bias, self._weight(name))
            elif rank is not None:
                bias = self._dense[name].bias
                layers[name] = plain_layer(
                    *bases[name].truncate(rank), bias if isinstance(bias, torch.Tensor) else None, self._weight(name)
                )
        return layers

    def _healed(
        self, key: str, kept: float, factors: dict[str, FactorizedLinear], norms: Mapping[str, torch.Tensor]
    ) -> HealedSize:
        """Heal layers of plain factors, in place; `norms` are the normalization weights of the size before."""
        run = self.run
        self._hold(factors, norms)
        healing = Training(examples=0)
        # A large size may keep so much that no layer is factorized.
        if factors:
            healing = heal(
                run.model, self._lessons_now(key, factors, norms), run.tokenizer, self.config, seed=run.config.seed,
                steps_before=self._steps, work=run.work, pruned_key=key, progress=run.progress,
            )  # fmt: skip
        ranks = {target.name: factors[target.name].rank if target.name in factors else None for target in run.targets}
        return HealedSize(
            kept=kept_fraction(run, ranks),
            asked=kept,
            key=key,
            factors=factors,
            layers={name: stored_layer(layer, run.config.storage) for name, layer in factors.items()},
            norms={name: run.model.get_parameter(name).detach().clone() for name in self._norms},
            healing=healing,
        )

    def _lessons_now(
        self, key: str, factors: Mapping[str, nn.Module], norms: Mapping[str, torch.Tensor]
    ) -> list[Lesson]:
        """Return the lessons of a size: for written answers also those that the model writes now."""

        @contextmanager
        def as_dense() -> Iterator[None]:
            self.restore()
            try:
                yield
            finally:
                self._hold(factors, norms)

        run, draws = self.run, self.config.steps * self.config.batch_size
        lessons: list[Lesson] = []
        for lesson in self.lessons:
            lessons += lessons_of(
                lesson,
                run.model,
                run.tokenizer,
                as_dense=as_dense,
                written_share=self.config.written_share,
                # No more than the steps draw.
                max_examples=math.ceil(self.config.written_share * lesson.weight * draws) or None,
                prompt_sites=self.config.prompt_sites,
                seed=run.config.seed + len(self._figures),
                batch_size=run.config.batch_size,
                work=run.work,
                model_key=run.model_key,
                pruned_key=key,
                progress=run.progress,
            )
        return lessons

    def _weight(self, name: str) -> torch.Tensor:
        return linear_weight(self._dense[name])

    def _hold(self, layers: Mapping[str, nn.Module], norms: Mapping[str, torch.Tensor]) -> None:
        restore(self.run.model, {**self._dense, **layers})
        with torch.no_grad():
            for name, value in {**self._norms, **norms}.items():
                self.run.model.get_parameter(name).copy_(value)
