"""What every stage of one run reads, and scores kept in its work directory."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_sieve.allocation.allocators import LossCurve

from .workdir import WorkDir, content_key


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.tasks import Example
    from optimum_sieve.tasks.text_metrics import Metric
    from optimum_sieve.vocabulary import TaskVocabulary

# Settings that moments and factor bases depend on, beside the model, the tasks and the rounds before.
MOMENT_SETTINGS = ("projection", "loss", "label_source", "seed")
# See `FactorBasis.token_weights`; 0: tokens count by their norms.
WEIGHTING_POWERS = {"norms": 0.0, "balanced": 0.5, "likelihood": 1.0}
BASIS_SETTINGS = (*MOMENT_SETTINGS, "damping", "weighting")


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """What the stages read of one task.

    Args:
        name (`str`): Name of the task.
        metric (`str` or `Callable`): Its metric.
        fingerprint (`str`): Hash of the model and the task. Nothing of the run's other tasks is in it, so that what
            lies in a work directory under it serves runs with other ones too.
        calibration (`Sequence[Example]`): The calibration examples.
        selection (`Sequence[Example]`): The selection examples.
        test (`Sequence[Example]`): The test examples.
        weight (`float`): Its share of the run; those of all tasks add up to 1.
        labelled (`bool`): Whether the data says what is right.
    """

    name: str
    metric: Metric
    fingerprint: str
    calibration: Sequence[Example] = ()
    selection: Sequence[Example] = ()
    test: Sequence[Example] = ()
    weight: float = 1.0
    labelled: bool = True


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every stage of one run reads.

    Args:
        model (`PreTrainedModel`): The dense model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        config (`SieveConfig`): The settings.
        tasks (`tuple[TaskSetting, ...]`): The tasks, mostly one.
        targets (`list[Target]`): The layers to prune.
        work (`WorkDir`): Where finished stages are kept.
        progress (`bool`): Whether progress bars are shown.
        study_storage (`str`, *optional*): URL of the Optuna storage a search keeps its candidates in. `None`: a file
            in the work directory or, without one, memory.
        vocabulary (`TaskVocabulary`, *optional*): The vocabulary that `model` and `tokenizer` have, where it is not
            the one they were given with.
        given (`Run`, *optional*): The setting from before the vocabulary was reduced.
        by_block (`bool`): Whether one block of the model is held at a time; the work directory has a path then.
        latencies (`dict[str, numpy.ndarray]`, *optional*): What targets take against their rank, once measured, where
            there is a `latency_target`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: SieveConfig
    tasks: tuple[TaskRun, ...]
    targets: list[Target]
    work: WorkDir
    progress: bool
    study_storage: str | None = None
    vocabulary: TaskVocabulary | None = None
    given: Run | None = None
    by_block: bool = False
    latencies: Mapping[str, np.ndarray] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the model, the tasks and their weights; of one task its own."""
        if len(self.tasks) == 1:
            return self.tasks[0].fingerprint
        return content_key(tasks=[(task.fingerprint, task.weight) for task in self.tasks])

    def loss_curves(self, bases: Mapping[str, FactorBasis]) -> list[LossCurve]:
        """Return the predicted loss of every target against its rank."""
        return [
            LossCurve(target.name, target.out_features, target.in_features, bases[target.name].energy.cpu().numpy())
            for target in self.targets
        ]

    def key(self, *settings: str, task: TaskRun | None = None, **more: object) -> str:
        """Hash the named settings together with the model, one task or (`None`) all of the run, and `more`."""
        values = self.config.to_dict()
        owner = self if task is None else task
        return content_key(run=owner.fingerprint, **{name: values[name] for name in settings}, **more)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall-clock time spent inside to `seconds[stage]`."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
