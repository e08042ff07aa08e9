"""What every stage of one run reads, and scores kept in its work directory."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .allocation import LossCurve
from .evaluation import Evaluation, evaluate
from .vocabulary import task_vocabulary
from .workdir import WorkDir, content_key


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import SieveConfig
    from .factorization import FactorBasis
    from .targets import Target
    from .tasks import Example
    from .tasks.text_metrics import Metric
    from .vocabulary import TaskVocabulary


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every stage of one run reads.

    Args:
        model (`PreTrainedModel`): The dense model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        config (`SieveConfig`): The settings.
        metric (`str` or `Callable`): The task's metric.
        targets (`list[Target]`): The layers to prune.
        work (`WorkDir`): Where finished stages are kept.
        fingerprint (`str`): Hash of the model and the task.
        progress (`bool`): Whether progress bars are shown.
        study_storage (`str`, *optional*): URL of the Optuna storage a search keeps its candidates in. `None`: a file
            in the work directory or, without one, memory.
        vocabulary (`TaskVocabulary`, *optional*): The vocabulary that `model` and `tokenizer` have, where it is not
            the one they were given with.
        given (`Setting`, *optional*): The setting from before the vocabulary was reduced.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: SieveConfig
    metric: Metric
    targets: list[Target]
    work: WorkDir
    fingerprint: str
    progress: bool
    study_storage: str | None = None
    vocabulary: TaskVocabulary | None = None
    given: Setting | None = None

    def loss_curves(self, bases: Mapping[str, FactorBasis]) -> list[LossCurve]:
        """Return the predicted loss of every target against its rank."""
        return [
            LossCurve(target.name, target.out_features, target.in_features, bases[target.name].energy.cpu().numpy())
            for target in self.targets
        ]

    def key(self, *settings: str, **more: object) -> str:
        """Hash the named settings together with the model, the task and `more`."""
        values = self.config.to_dict()
        return content_key(run=self.fingerprint, **{name: values[name] for name in settings}, **more)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall-clock time spent inside to `seconds[stage]`."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


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


def score_dense(setting: Setting, examples: Sequence[Example], part: str) -> Evaluation:
    """Score the dense model, which `setting` must hold now, with the vocabulary that it was given with."""
    description = f"dense model on {part}"
    if setting.vocabulary is None or setting.given is None:
        return score(setting, examples, description)
    with setting.vocabulary.undone():
        return score(setting.given, examples, description)


def reduce_vocabulary(setting: Setting, calibration: Sequence[Example], selection: Sequence[Example]) -> Setting:
    """Leave out the tokens that the task does not need, where the settings ask for it; return the setting from then on.

    Where the selection split decides how far to prune, its tokens are not kept for its sake: its texts are cut as those
    will be that nobody has seen, and what that costs counts against the tolerance.
    """
    if setting.config.vocabulary == "whole":
        return setting
    examples = [*calibration, *(selection if setting.config.tolerance is None else ())]
    vocabulary = task_vocabulary(setting.model, setting.tokenizer, examples, size=setting.config.vocabulary_size)
    vocabulary.apply()
    return replace(
        setting,
        tokenizer=vocabulary.tokenizer,
        fingerprint=content_key(run=setting.fingerprint, vocabulary=vocabulary.fingerprint),
        vocabulary=vocabulary,
        given=setting,
    )


def restore_vocabulary(setting: Setting) -> None:
    """Give the model back what `reduce_vocabulary` left out."""
    if setting.vocabulary is not None:
        setting.vocabulary.undo()


@contextmanager
def reduced_vocabulary(
    setting: Setting, calibration: Sequence[Example], selection: Sequence[Example]
) -> Iterator[Setting]:
    """Do as `reduce_vocabulary` inside the context; the model has all its tokens again afterwards."""
    setting = reduce_vocabulary(setting, calibration, selection)
    try:
        yield setting
    finally:
        restore_vocabulary(setting)
