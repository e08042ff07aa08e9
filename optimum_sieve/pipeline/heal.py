"""Heal a model that was pruned and saved before, against the dense model it was pruned from."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from optimum_sieve._messages import shown
from optimum_sieve.backbone.fingerprint import model_key
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.sizes import matrix_sizes, measure_sizes
from optimum_sieve.backbone.sources import naming_model, read_config, source_options
from optimum_sieve.calibration.writing import with_written_prompts
from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.evaluation.stage import score_test_dense, score_test_pruned
from optimum_sieve.healing.lessons import heal_config, make_lessons, training_examples
from optimum_sieve.healing.loop import heal
from optimum_sieve.modeling.conversion import check_pruned
from optimum_sieve.modeling.label_offsets import KEY
from optimum_sieve.publish.result import TaskScores, make_result
from optimum_sieve.publish.sections import rank_section
from optimum_sieve.run.context import Run
from optimum_sieve.run.workdir import WorkDir
from optimum_sieve.tasks.several import check_tasks, naming, task_shares
from optimum_sieve.vocabulary.stage import use_vocabulary
from optimum_sieve.vocabulary.vocabulary import matching_vocabulary

from .checks import calibration_fingerprints, check_base, check_model, check_task, linear_shapes
from .prepare import prepare, task_runs


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.config.heal import HealConfig
    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.evaluation.teacher import Lesson
    from optimum_sieve.publish.result import SieveResult
    from optimum_sieve.tasks import Task
    from optimum_sieve.training.steps import Training


def heal_pruned(
    model: str | Path,
    dense: str | Path,
    tasks: Sequence[Task],
    config: HealConfig,
    *,
    task_weights: Sequence[float] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    seed: int = 0,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> tuple[SieveResult, PreTrainedTokenizerBase]:
    """Load a pruned model, heal it on the calibration split, and score it and the dense model on the test split.

    The two models are in memory one after the other.

    Args:
        model (`str | Path`): Directory or Hub id of the pruned model.
        dense (`str | Path`): Directory or Hub id of the model it was pruned from.
        tasks (`Sequence[Task]`): The tasks, usually one.
        config ([`HealConfig`][optimum_sieve.config.heal.HealConfig]): The settings; the size stays as it is.
        task_weights (`Sequence[float]`, *optional*): Relative task weights. Default: equal ones.
        dtype (`str | torch.dtype`, *optional*): For example `"bfloat16"`. Default: as the checkpoints were saved.
        device (`str | torch.device`, *optional*): Device to compute on. Default: the GPU if there is one.
        trust_remote_code (`bool`): Whether to run code that is saved with the models.
        gguf_file (`str`, *optional*): Name of a GGUF file in the dense model's repository or directory.
        seed (`int`): Seed of the examples' order.
        work_dir (`str | Path`, *optional*): Stores the state, so that a stopped run resumes.
        progress (`bool`): Whether to show progress bars.

    Returns:
        `tuple[SieveResult, PreTrainedTokenizerBase]`: The healed model with its report, and its tokenizer.

    Raises:
        ValueError: If `model` is not pruned, `dense` is not the model it was pruned from or was tuned first, or a task
            does not fit or has no answers.
        OSError: If a model cannot be loaded.
    """
    saved = read_config(model, trust_remote_code=trust_remote_code)
    check_pruned(saved)
    block: dict[str, Any] = copy.deepcopy(saved.sieve)
    _check_untuned(block.get("settings") or {})
    settings = _settings(block.get("settings") or {}, config, task_weights, seed)
    _check_tasks(tasks, settings)
    work_dir = WorkDir(work_dir).path
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}

    reduced = None
    if "vocabulary" in block:
        with naming_model(model):
            reduced = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, **source_options(model))
    base, tokenizer, _ = load_model(dense, gguf_file=gguf_file, **loading)
    before = _Dense.of(_dense_run(base, tokenizer, tasks, settings, reduced, work_dir=work_dir, progress=progress))
    del base
    pruned, tokenizer, _ = load_model(model, **loading)
    # Those of the weights before healing.
    pruned.config.sieve.pop(KEY, None)
    runs = task_runs(pruned, tokenizer, tasks, settings)
    # Nothing is stored without a work directory.
    key = "" if work_dir is None else model_key(pruned)
    run = Run(model=pruned, tokenizer=tokenizer, tasks=runs, model_key=key, **before.shared)
    check_base(run, before.shapes, before.fingerprints)
    with run.timed("healing"):
        healing = heal(
            run.model, before.lessons, tokenizer, heal_config(run), seed=seed, work=run.work, pruned_key=key or None,
            progress=run.progress,
        )  # fmt: skip
    return _make_result(run, before, healing, block, task_weights), tokenizer


def _settings(
    pruned: dict[str, Any], config: HealConfig, task_weights: Sequence[float] | None, seed: int
) -> SieveConfig:
    """Return the settings of the run. The ranks are given, so nothing uses its `pruning_ratio`."""
    return SieveConfig(
        pruning_ratio=0.5,
        target_modules=pruned.get("target_modules"),
        exclude_modules=pruned.get("exclude_modules") or (),
        task_weights=None if task_weights is None else tuple(task_weights),
        batch_size=config.rows_per_pass,
        seed=seed,
        heal=config,
        tune=None,
        # As they were; earlier versions had none.
        label_offsets=pruned.get("label_offsets", "none"),
        written_prompts=pruned.get("written_prompts", 0),
    )


def _check_untuned(pruned: dict[str, Any]) -> None:
    """Check that the model was pruned from the dense model as it came, the only one that is saved anywhere."""
    if pruned.get("tune") is not None:
        raise ValueError(
            "`model` must be pruned from `dense` as it is, got one that was tuned first (tune="
            f"{shown(pruned['tune'])}): `dense` would undo the tuning. Heal while you prune: `optimum-cli sieve prune "
            "--tune`."
        )


def _check_tasks(tasks: Sequence[Task], settings: SieveConfig) -> None:
    """Check the tasks and their weights before a model is loaded."""
    check_tasks(tasks)
    task_shares(settings.task_weights, len(tasks))
    for task in tasks:
        # The loss and the test compare with them.
        if not task.labelled:
            raise ValueError(
                f"`task` must have an `answer` to heal a pruned directory, got none in {task.name!r}. Add it to the "
                "task file, or heal while you prune."
            )


def _dense_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    settings: SieveConfig,
    reduced: PreTrainedTokenizerBase | None,
    *,
    work_dir: Path | None,
    progress: bool,
) -> Run:
    """Make the run of the dense model, with the prompts that it writes and the pruned model's vocabulary."""
    with _naming_dense():
        check_model(model)
        run = prepare(model, tokenizer, tasks, settings, work_dir=work_dir, study_storage=None, progress=progress)
    run = with_written_prompts(run)
    if reduced is None:
        return run
    for task in tasks:
        with naming(task, tasks):
            check_task(task, model, reduced)
    return use_vocabulary(run, matching_vocabulary(model, tokenizer, reduced))


@contextmanager
def _naming_dense() -> Iterator[None]:
    """Let errors of the checks that pruning shares name `dense`, the argument at fault here."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("`model`", "`dense`")) from error


@dataclass(frozen=True, kw_only=True)
class _Dense:
    """Data kept from the dense model and its run, which are freed; `shared` holds fields of the pruned model's run."""

    lessons: list[Lesson]
    scores: list[Evaluation]
    sizes: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    fingerprints: list[str]
    written: int
    shared: dict[str, Any]

    @classmethod
    def of(cls, run: Run) -> _Dense:
        with run.timed("healing"):
            lessons = make_lessons(run)
        return cls(
            lessons=lessons,
            scores=score_test_dense(run),
            sizes=measure_sizes(run.model, run.targets, run.vocabulary),
            shapes=linear_shapes(run.model),
            fingerprints=calibration_fingerprints(run),
            written=sum(task.written for task in run.tasks),
            shared={name: getattr(run, name) for name in ("config", "targets", "work", "progress", "seconds")},
        )


def _make_result(
    run: Run, dense: _Dense, healing: Training, block: dict[str, Any], task_weights: Sequence[float] | None
) -> SieveResult:
    """Score the healed model and make its result; `block` is what its pruning wrote to the configuration."""
    after, offsets = score_test_pruned(run)
    settings = {**heal_config(run).to_dict(), "seed": run.config.seed}
    if task_weights is not None:
        settings["task_weights"] = list(task_weights)
    return make_result(
        run.model,
        scores=[TaskScores.of(*each) for each in zip(run.tasks, dense.scores, after, strict=True)],
        sizes=(dense.sizes, measure_sizes(run.model, run.targets)),
        sections={
            "ranks": rank_section(matrix_sizes(run.model, run.targets)),
            "written_prompts": dense.written or None,
        },
        trials=[],
        settings=block.get("settings") or {},
        seconds=run.seconds,
        loading=None,
        base_model=block.get("base_model"),
        base_revision=block.get("base_revision"),
        vocabulary=block.get("vocabulary"),
        adapter=block.get("adapter"),
        label_offsets=offsets,
        healing={**healing.to_dict(), **training_examples(dense.lessons), "settings": settings},
    )
