"""Healing as a stage of a run: its reference, the dense model, and its rounds of pruning and training."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum_sieve.allocation.budget import rank_parameters
from optimum_sieve.allocation.stage import allocate_ranks
from optimum_sieve.backbone.fingerprint import model_fingerprint
from optimum_sieve.backbone.targets import is_conv1d
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.evaluation.stage import score_cache, score_dense
from optimum_sieve.evaluation.teacher import Lesson, lessons_fingerprint, teach
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.run.workdir import content_key
from optimum_sieve.surgery.apply import apply_ranks, restore

from .loop import FORMAT, Healing, heal
from .monitor import Monitored, SelectionMonitor
from .optimizer import norm_parameters


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.config.heal import HealConfig
    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.run.context import Run, TaskRun


def make_healer(run: Run) -> Healer | None:
    """Make the healer of a run whose model is still dense; `None` if the settings have no `heal`."""
    if run.config.heal is None:
        return None
    with run.timed("healing"):
        return Healer(run)


def hold_ranks(run: Run, bases: Mapping[str, FactorBasis], ranks: Ranks, healer: Healer | None) -> Callable[[], None]:
    """Put `ranks` into the dense model and heal it if there is a healer; return what makes it dense again."""
    if healer is None:
        return partial(restore, run.model, apply_ranks(run.model, bases, ranks, storage=run.config.storage))
    with run.timed("healing"):
        healer.apply(bases, ranks)
    return healer.restore


def heal_config(run: Run) -> HealConfig:
    """Return the healing settings of a run that heals."""
    assert run.config.heal is not None
    return run.config.heal


def monitored_part(run: Run, task: TaskRun) -> slice:
    """Return the part of a task's selection split that is monitored while healing: the first examples."""
    return slice(heal_config(run).monitor_count(len(task.selection)))


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What healing needs of the dense model, which may be freed afterwards.

    Args:
        lessons (`Sequence[Lesson]`): The calibration examples of each task, with the dense model's predictions.
        monitor (`SelectionMonitor`): Compares a model with the dense one on part of each task's selection split.
    """

    lessons: Sequence[Lesson]
    monitor: SelectionMonitor

    @classmethod
    def of(cls, run: Run) -> Reference:
        """Evaluate the dense model, which the run must hold now."""
        monitor = SelectionMonitor(
            parts=[_monitored(run, task) for task in run.tasks],
            tokenizer=run.tokenizer,
            batch_size=run.config.batch_size,
        )
        return cls(lessons=[_lesson(run, task) for task in run.tasks], monitor=monitor)

    def heal(self, run: Run, pruned_key: str | None = None) -> Healing:
        """Train the factors of the model, which the run must hold pruned now, and whose hash may be known."""
        return heal(
            run.model,
            self.lessons,
            run.tokenizer,
            heal_config(run),
            monitor=self.monitor,
            seed=run.config.seed,
            # The monitor chooses the weights by the metrics.
            work=score_cache(run, run.tasks),
            pruned_key=pruned_key,
            progress=run.progress,
        )


def _lesson(run: Run, task: TaskRun) -> Lesson:
    teacher = teach(
        run.model,
        task.calibration,
        run.tokenizer,
        loss=heal_config(run).loss,
        batch_size=run.config.batch_size,
        work=run.work,
        model_key=run.model_key,
        progress=run.progress,
    )
    return Lesson(teacher=teacher, examples=task.calibration, weight=task.weight)


def _monitored(run: Run, task: TaskRun) -> Monitored:
    part = monitored_part(run, task)
    dense = score_dense(run, task, "selection", part)
    return Monitored(task=task.name, examples=task.examples("selection", part), metric=task.metric, dense=dense)


class Healer:
    """Prunes the model of a run to given ranks and heals it, as often as a search asks.

    The factors are trained on the calibration examples of every task, in proportion to the tasks' weights. The first
    selection examples of each task are monitored; the others decide the size.

    Args:
        run (`Run`): The run, whose model is dense and whose settings have `heal`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = heal_config(run)
        self.reference = Reference.of(run)
        self.rounds: list[Healing] = []
        self._dense = {target.name: run.model.get_submodule(target.name) for target in run.targets}
        norms = norm_parameters(run.model) if self.config.train_norms else {}
        self._norms = [(parameter, parameter.detach().clone()) for parameter in norms.values()]

    @property
    def key(self) -> str:
        """Hash of everything that a healed model depends on, besides its bases and ranks."""
        # They limit the ranks of the rounds before the last.
        latencies = self.run.latencies
        return self.run.key(
            *("heal", "seed", "storage", "allocation", "rank_multiple", "latency_target"),
            lessons=lessons_fingerprint(self.reference.lessons),
            monitor=self.reference.monitor.fingerprint,
            latencies=None if latencies is None else {name: times.tolist() for name, times in latencies.items()},
            format=FORMAT,
        )

    def apply(self, bases: Mapping[str, FactorBasis], ranks: Ranks) -> None:
        """Put `ranks` into the dense model and heal it, in one or several rounds.

        Round i of n prunes the model to the (i/n)-th power of the fraction that `ranks` keep and heals it. The products
        of the healed factors are the weights of the next round, which takes its moments on them. After an error the
        model is dense again.
        """
        run, rounds = self.run, self.config.rounds
        self.rounds = []
        kept = self._kept(ranks)
        try:
            for number in range(1, rounds + 1):
                target_ranks = ranks if rounds == 1 else allocate_ranks(run, bases, kept ** (number / rounds))
                # An early round may keep so much that no layer is factorized.
                if apply_ranks(run.model, bases, target_ranks, storage=run.config.storage):
                    self._heal()
                if number < rounds:
                    self._multiply_out()
                    bases = self._calibrate_again()
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Make the model dense again."""
        restore(self.run.model, self._dense)
        with torch.no_grad():
            for parameter, value in self._norms:
                parameter.copy_(value)

    @contextmanager
    def healed(self, bases: Mapping[str, FactorBasis], ranks: Ranks) -> Iterator[None]:
        """Hold `ranks`, healed, in the model inside the context; it is dense again afterwards."""
        self.apply(bases, ranks)
        try:
            yield
        finally:
            self.restore()

    def report(self) -> dict[str, Any]:
        """Return the figures of the last call of `apply` for the report."""
        rounds = [done.to_dict() for done in self.rounds]
        ends = {"before": rounds[0]["before"], "after": rounds[-1]["after"]} if rounds else {}
        return {
            "steps": sum(figures["steps"] for figures in rounds),
            "examples": sum(len(lesson.examples) for lesson in self.reference.lessons),
            "seconds": round(sum(figures["seconds"] for figures in rounds), 3),
            "monitored": self.reference.monitor.count,
            **ends,
            "rounds": rounds,
        }

    def _heal(self) -> None:
        self.rounds.append(self.reference.heal(self.run))

    def _kept(self, ranks: Ranks) -> float:
        """Return the fraction of the targets' parameters that `ranks` keep."""
        targets, storage = self.run.targets, self.run.config.storage
        kept = 0
        for target in targets:
            rank = ranks[target.name]
            shape = (target.out_features, target.in_features)
            kept += target.num_parameters if rank is None else rank_parameters(rank, *shape, storage)
        return kept / sum(target.num_parameters for target in targets)

    def _multiply_out(self) -> None:
        """Replace each factorized layer by a dense one with its weight and bias."""
        for name, dense in self._dense.items():
            layer = self.run.model.get_submodule(name)
            if isinstance(layer, FactorizedLinear):
                whole = copy.copy(dense)
                whole._parameters = dict(dense._parameters)
                weight = layer.weight.detach()
                whole.weight = nn.Parameter(weight.T.contiguous() if is_conv1d(whole) else weight)
                if layer.bias is not None:
                    whole.bias = nn.Parameter(layer.bias.detach())
                self.run.model.set_submodule(name, whole)

    def _calibrate_again(self) -> dict[str, FactorBasis]:
        """Take one round of moments on the model as it is now and factor its weights."""
        # The key only names files.
        healed = "" if self.run.work.path is None else model_fingerprint(self.run.model)
        key = content_key(model=self.run.model_key, healed=healed)
        config = dataclasses.replace(self.run.config, rounds=1)
        # Its time counts as healing.
        return calibrate(dataclasses.replace(self.run, model_key=key, config=config, seconds={}))
