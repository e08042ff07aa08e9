"""Shared context of one run: model, tasks, settings, work directory and times."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optimum_sieve.tasks.data import NAMES

from .workdir import WorkDir, content_key


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.metrics.identity import Metric
    from optimum_sieve.tasks import Example
    from optimum_sieve.tuning.stage import Tuning
    from optimum_sieve.vocabulary import TaskVocabulary

# All examples of a split.
WHOLE = slice(None)


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task of a run.

    Args:
        name (`str`): Name of the task. Reports show it; no cache key contains it.
        metric (`str` or `Callable`): Metric of the task.
        calibration (`Sequence[Example]`): Calibration examples.
        selection (`Sequence[Example]`): Selection examples.
        test (`Sequence[Example]`): Test examples.
        unlabelled (`Sequence[Example]`): More examples for calibration and healing, without gold answers.
        fingerprints (`Mapping[str, str]`): Hash of the examples of each split: their texts and their token ids.
        weight (`float`): Share of the task in the run. The shares of all tasks add up to 1.
        labelled (`bool`): Whether the data has gold answers.
        kind (`str`): Kind of the task: `"labels"`, `"choices"` or `"generate"`.
        draws (`bool`): Whether the moments see random candidates of each example, in place of all.
        given (`TaskRun`, *optional*): The task before the dense model wrote prompts, which are now the last of the
            unlabelled examples. `None` if it wrote none.
    """

    name: str
    metric: Metric
    calibration: Sequence[Example] = ()
    selection: Sequence[Example] = ()
    test: Sequence[Example] = ()
    unlabelled: Sequence[Example] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    labelled: bool = True
    kind: str = "labels"
    draws: bool = False
    given: TaskRun | None = None

    @property
    def written(self) -> int:
        """How many of the unlabelled examples have prompts that the dense model wrote."""
        return 0 if self.given is None else len(self.unlabelled) - len(self.given.unlabelled)

    def examples(self, split: str, part: slice = WHOLE) -> Sequence[Example]:
        """Return the examples of a split, or a part of them."""
        examples: Sequence[Example] = getattr(self, split)
        return examples[part]

    @property
    def prompts(self) -> set[str]:
        """The prompts of all splits."""
        return {example.prompt for split in NAMES for example in self.examples(split)}

    def fingerprint(self, split: str, part: slice = WHOLE) -> str:
        """Hash the examples that `examples` returns."""
        start, stop, _ = part.indices(len(getattr(self, split)))
        return content_key(examples=self.fingerprints[split], part=[start, stop])


@dataclass(frozen=True, kw_only=True)
class Run:
    """Context that every stage of one run reads.

    Args:
        model (`PreTrainedModel`): The dense model, tuned or as it came.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        config (`SieveConfig`): The settings.
        tasks (`tuple[TaskRun, ...]`): The tasks, usually one.
        targets (`list[Target]`): Layers to prune.
        work (`WorkDir`): Cache of finished stages.
        progress (`bool`): Whether to show progress bars.
        model_key (`str`): Hash of the dense model, of its tuning and, if it was reduced, its vocabulary. Empty if
            nothing is stored.
        study_storage (`str`, *optional*): URL of the Optuna storage of a search. Default: a file in the work directory
            or, without one, memory.
        tuning (`Tuning`, *optional*): How `model` was tuned, and its test scores before.
        reference (`tuple[Evaluation, ...]`): Evaluation of the model that the tolerance is measured from, on the
            selection split of every task; empty until it is scored.
        vocabulary (`TaskVocabulary`, *optional*): The reduced vocabulary of `model` and `tokenizer`.
        before_reduction (`Run`, *optional*): The run before the vocabulary was reduced.
        vocabulary_trials (`tuple[dict, ...]`): Vocabularies that were scored before any pruning, the last one in use.
        by_block (`bool`): Whether only one block of the model is in memory at a time. The work directory has a path
            then.
        latencies (`dict[str, numpy.ndarray]`, *optional*): Measured seconds of each target against its rank, if there
            is a `latency_target`.
        seconds (`dict[str, float]`): Wall-clock time of each stage. Copies of a run made by `dataclasses.replace` share
            it.
        started (`float`): Time of the monotonic clock at which the run started.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: SieveConfig
    tasks: tuple[TaskRun, ...]
    targets: list[Target]
    work: WorkDir
    progress: bool
    model_key: str
    study_storage: str | None = None
    tuning: Tuning | None = None
    reference: tuple[Evaluation, ...] = ()
    vocabulary: TaskVocabulary | None = None
    before_reduction: Run | None = None
    vocabulary_trials: tuple[Mapping[str, Any], ...] = ()
    by_block: bool = False
    latencies: Mapping[str, np.ndarray] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """Seconds until the `time_limit`; infinite without one."""
        limit = self.config.seconds
        return math.inf if limit is None else self.started + limit - time.monotonic()

    def key(self, *settings: str, **inputs: object) -> str:
        """Return the cache key of a result: a hash of the dense model, the named settings and further inputs.

        Args:
            settings (`str`): Names of the settings that the result depends on.
            inputs (`object`): All else that it depends on, as JSON types. Labels of progress bars are no inputs.
        """
        values = self.config.to_dict()
        return content_key(model=self.model_key, settings={name: values[name] for name in settings}, inputs=inputs)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall-clock time inside the context to `seconds[stage]`, also after an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
