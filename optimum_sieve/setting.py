"""What every stage of one run reads, and scores kept in its work directory."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .allocation import LossCurve
from .evaluation import Evaluation, evaluate
from .workdir import WorkDir, content_key


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import SieveConfig
    from .factorization import FactorBasis
    from .targets import Target
    from .tasks import Example
    from .tasks.text_metrics import Metric


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
