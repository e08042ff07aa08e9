"""Healing as a stage of a pruning run: what it holds to, on which examples, in how many rounds."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum_sieve.allocation.budget import rank_parameters
from optimum_sieve.allocation.stage import allocate_ranks
from optimum_sieve.backbone.fingerprint import model_fingerprint
from optimum_sieve.backbone.targets import is_conv1d
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.evaluation.stage import score_dense
from optimum_sieve.evaluation.teacher import Lesson, teach
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.run.context import timed
from optimum_sieve.run.workdir import content_key
from optimum_sieve.surgery.apply import apply_ranks, restore

from .loop import Healing, heal
from .monitor import Monitored, SelectionMonitor
from .optimizer import norm_parameters


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.config.heal import HealConfig
    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.tasks import Example


def make_healer(run: Run, seconds: dict[str, float]) -> Healer | None:
    """Make the healer of a run, whose model is dense still; `None` where the settings ask for none."""
    if run.config.heal is None:
        return None
    with timed(seconds, "healing"):
        return Healer(run)


def hold_ranks(
    run: Run,
    bases: Mapping[str, FactorBasis],
    ranks: Ranks,
    healer: Healer | None,
    seconds: dict[str, float],
) -> Callable[[], None]:
    """Put `ranks` into the dense model, healed where there is a healer; return what makes it dense again."""
    if healer is None:
        return partial(restore, run.model, apply_ranks(run.model, bases, ranks, storage=run.config.storage))
    with timed(seconds, "healing"):
        healer.apply(bases, ranks)
    return healer.restore


class Healer:
    """Prunes to given ranks and heals, as one step of a run whose model is dense when it is made.

    The factors are trained on the calibration examples of every task, in proportion to the tasks' weights. The first
    selection examples of each are monitored, the others are left to the choice of the size.

    Args:
        run (`Run`): The run, whose configuration has `heal`.
    """

    def __init__(self, run: Run) -> None:
        assert run.config.heal is not None
        self.run = run
        self.config: HealConfig = run.config.heal
        counts = [self.config.monitor_count(len(task.selection)) for task in run.tasks]
        pairs = list(zip(run.tasks, counts, strict=True))
        self.unseen: list[Sequence[Example]] = [task.selection[count:] for task, count in pairs]
        self.lessons = [self._lesson(task) for task in run.tasks]
        self.monitor = SelectionMonitor(
            parts=[self._monitored(task, count) for task, count in pairs],
            tokenizer=run.tokenizer,
            batch_size=run.config.batch_size,
        )
        self.rounds: list[Healing] = []
        self._dense = {target.name: run.model.get_submodule(target.name) for target in run.targets}
        norms = norm_parameters(run.model) if self.config.train_norms else {}
        self._norms = [(parameter, parameter.detach().clone()) for parameter in norms.values()]

    def _lesson(self, task: TaskRun) -> Lesson:
        run = self.run
        teacher = teach(
            run.model,
            task.calibration,
            run.tokenizer,
            loss=self.config.loss,
            batch_size=run.config.batch_size,
            work=run.work,
            progress=run.progress,
        )
        return Lesson(teacher=teacher, examples=task.calibration, weight=task.weight)

    def _monitored(self, task: TaskRun, count: int) -> Monitored:
        examples = task.selection[:count]
        dense = score_dense(self.run, task, examples, f"{count} monitored examples of selection")
        return Monitored(task=task.name, examples=examples, dense=dense)

    def apply(self, bases: Mapping[str, FactorBasis], ranks: Ranks) -> None:
        """Put `ranks` into the dense model and heal it; in several rounds where the settings ask for them.

        In round i of n the model is pruned to the (i/n)-th power of the part that `ranks` keep, and healed. Its healed
        matrices, multiplied out, are the weights of the next round, which takes its moments on them. After an error the
        model is dense again.
        """
        run, rounds = self.run, self.config.rounds
        self.rounds = []
        kept = self._kept(ranks)
        try:
            for number in range(1, rounds + 1):
                own = ranks if rounds == 1 else allocate_ranks(run, bases, kept ** (number / rounds))
                # An early round may be too large to factorize anything.
                if apply_ranks(run.model, bases, own, storage=run.config.storage):
                    self._heal()
                if number < rounds:
                    self._multiply_out()
                    bases = self._calibrate_again()
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Make the model the dense one again that it was when this was made."""
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
        """Return what the last call of `apply` did, for the report."""
        rounds = [one.to_dict() for one in self.rounds]
        ends = {"before": rounds[0]["before"], "after": rounds[-1]["after"]} if rounds else {}
        return {
            "steps": sum(one["steps"] for one in rounds),
            "examples": sum(len(lesson.examples) for lesson in self.lessons),
            "seconds": round(sum(one["seconds"] for one in rounds), 3),
            "monitored": self.monitor.count,
            **ends,
            "rounds": rounds,
        }

    def _heal(self) -> None:
        run = self.run
        done = heal(
            run.model,
            self.lessons,
            run.tokenizer,
            self.config,
            monitor=self.monitor,
            seed=run.config.seed,
            work=run.work,
            progress=run.progress,
        )
        self.rounds.append(done)

    def _kept(self, ranks: Ranks) -> float:
        """Part of the targets' parameters that `ranks` keep."""
        targets, storage = self.run.targets, self.run.config.storage
        kept = 0
        for target in targets:
            rank = ranks[target.name]
            shape = (target.out_features, target.in_features)
            kept += target.num_parameters if rank is None else rank_parameters(rank, *shape, storage)
        return kept / sum(target.num_parameters for target in targets)

    def _multiply_out(self) -> None:
        """Put a dense layer in place of each factorized one, with its weight and bias."""
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
        """Take moments on the model as it is now and factor its weights."""
        healed = model_fingerprint(self.run.model)
        tasks = tuple(
            dataclasses.replace(task, fingerprint=content_key(run=task.fingerprint, healed=healed))
            for task in self.run.tasks
        )
        config = dataclasses.replace(self.run.config, rounds=1)
        return calibrate(dataclasses.replace(self.run, tasks=tasks, config=config), {})
