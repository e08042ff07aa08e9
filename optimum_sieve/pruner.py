"""`SievePruner`: prune a model for one or several tasks and save it so that plain transformers loads it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.adapters.merging import adapted_name, plain
from optimum_sieve.backbone.latency import with_latencies
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.backbone.sources import check_name
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.evaluation.stage import score_test_dense, score_test_pruned
from optimum_sieve.healing.stage import held_key, hold_ranks, make_healer
from optimum_sieve.pipeline.checks import check_model, check_search
from optimum_sieve.pipeline.prepare import check_and_plan, prepare, with_texts
from optimum_sieve.pipeline.ranks import choose_ranks
from optimum_sieve.pipeline.reference import prepare_reference
from optimum_sieve.pipeline.result import measured_dense, pruned_result
from optimum_sieve.publish.hub import push_folder
from optimum_sieve.publish.result import SieveResult, save_result
from optimum_sieve.run.events import check_trackers, observing
from optimum_sieve.search.stage import join_search, leading, run_search, wait_for_prompts, wait_for_search
from optimum_sieve.tasks.data import SPLITS
from optimum_sieve.tasks.several import check_tasks, read_tasks
from optimum_sieve.tuning.stage import restore_untuned
from optimum_sieve.vocabulary.stage import reduce_vocabulary, reduced_vocabulary, restore_vocabulary


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.plan.plan import PrunePlan
    from optimum_sieve.run.context import Run
    from optimum_sieve.run.events import Callback

    from .tasks import Task


class SievePruner:
    """Prune one model for one task or several.

    Args:
        model (`PreTrainedModel`): The dense model, which `prune` turns into the pruned one, in place. The adapter of a
            `PeftModel` is merged at once, in place.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer. With `vocabulary="task"`, `prune` replaces it by a smaller
            one.
        task (`Task | Sequence[Task]`): The task, or several with different names.
        base_model (`str`, *optional*): Name of the dense model for the card. Default: that of a `PeftModel`'s base.
        loading (`dict[str, str]`, *optional*): Options it was loaded with, for the command in the card.

    Raises:
        ValueError: If the model is pruned, neither writes nor classifies or has an adapter that cannot be merged.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task | Sequence[Task],
        *,
        base_model: str | None = None,
        loading: dict[str, str] | None = None,
    ) -> None:
        self.base_model = base_model or adapted_name(model)
        check_name(self.base_model or "", "base_model")
        self.model = plain(model)
        check_model(self.model)
        self.tokenizer = tokenizer
        self.tasks = read_tasks(task)
        check_tasks(self.tasks)
        self.loading = loading
        self.result: SieveResult | None = None
        self._work_dir: str | Path | None = None
        # Loads the dense model again, for a second run.
        self._load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]] | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        *,
        task: str | Path | dict[str, Any] | Task | Sequence[str | Path | dict[str, Any] | Task],
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        gguf_file: str | None = None,
        revision: str | None = None,
        offload_dir: str | Path | None = None,
    ) -> SievePruner:
        """Load a model and a task.

        Args:
            model (`str | Path | PreTrainedModel`): Hub id or directory of a model, or of an adapter of PEFT, which is
                merged into its base model; or one that is loaded (then pass `tokenizer` too).
            task (`str | Path | dict | Task`): Task file, its content, or a task; or a sequence of those.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Default: the model's.
            dtype (`str | torch.dtype`, *optional*): For example `"bfloat16"`. Default: as the checkpoint was saved.
            device (`str | torch.device`, *optional*): Device to compute on. Default: the GPU if there is one.
            trust_remote_code (`bool`): Whether to run code that is saved with the model or named by an `lm_eval` task.
            gguf_file (`str`, *optional*): Name of a GGUF file in the model's repository or directory.
            revision (`str`, *optional*): Revision on the Hub; for an adapter in a directory, that of its base model.
            offload_dir (`str | Path`, *optional*): Keep the weights of the model's blocks on disk until they are used:
                in the checkpoint or, if they need conversion, in a private directory inside this one, which is removed
                together with the model. For models larger than the memory, with a `memory_limit`.

        Raises:
            FileNotFoundError: If the task file or its data does not exist.
            ValueError: If the task file is invalid; the message names the error.
            OSError: If the model cannot be loaded.
        """
        tasks = read_tasks(task, trust_remote_code=trust_remote_code)
        check_tasks(tasks)
        load = partial(
            load_model, model, tokenizer=tokenizer, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
            gguf_file=gguf_file, revision=revision, offload_dir=offload_dir,
        )  # fmt: skip
        loaded, its_tokenizer, name = load()
        options = {"dtype": dtype and str(dtype).removeprefix("torch."), "gguf_file": gguf_file, "revision": revision}
        loading = {key: value for key, value in options.items() if value}
        pruner = cls(loaded, its_tokenizer, tasks, base_model=name, loading=loading)
        pruner._load = load if isinstance(model, str | Path) else None
        return pruner

    def plan(self, config: SieveConfig) -> PrunePlan:
        """Return what `prune` would do, mostly from shapes; a reduced vocabulary and trees of candidates are tried."""
        self._ensure_dense()
        return check_and_plan(self.model, self.tokenizer, self.tasks, config)

    def search(
        self,
        config: SieveConfig,
        *,
        work_dir: str | Path | None = None,
        study_storage: str | None = None,
        num_bottlenecks: int = 0,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Search ranks and leave the model dense; `prune` with the same settings and directory resumes from there.

        Args:
            config (`SieveConfig`): The settings, with `allocation="genetic"`.
            work_dir (`str | Path`, *optional*): Stores moments, bases, the study and the result.
            study_storage (`str`, *optional*): URL of an Optuna storage that workers can join.
            num_bottlenecks (`int`): Number of matrices of the result to lower one by one, to see which limit it.
            progress (`bool`): Whether to show progress bars.

        Returns:
            `dict[str, Any]`: The result, as in the work directory's `search-<key>.json`.

        Raises:
            ValueError: If the settings, the model or the data break a rule.
            RuntimeError: If no size is within the tolerance.
        """
        check_search(config)
        run = self._prepare(config, work_dir=work_dir, study_storage=study_storage, progress=progress)
        with leading(run), reduced_vocabulary(with_texts(run, "calibration", "selection")) as run, leading(run):
            return run_search(run, calibrate(run), num_bottlenecks=num_bottlenecks)

    def join_search(
        self, config: SieveConfig, *, work_dir: str | Path, study_storage: str | None = None, progress: bool = True
    ) -> int:
        """Score candidates of a search that another process leads until it ends; return their number.

        Raises:
            ValueError: If the bases in `work_dir` are not those of the study.
            RuntimeError: If the process that leads the search is dead and is not started again.
        """
        check_search(config)
        run = self._prepare(config, work_dir=work_dir, study_storage=study_storage, progress=progress)
        wait_for_prompts(run)
        with reduced_vocabulary(with_texts(run, "calibration", "selection")) as run:
            wait_for_search(run)
            return join_search(run, calibrate(run, must_exist=True))

    def _prepare(self, config: SieveConfig, **options: Any) -> Run:
        self._ensure_dense()
        return prepare(self.model, self.tokenizer, self.tasks, config, **options)

    def prune(
        self,
        config: SieveConfig,
        *,
        work_dir: str | Path | None = None,
        study_storage: str | None = None,
        report_to: str | Sequence[str] | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> SieveResult:
        """Prune the model in place and score it and the dense model on the test split.

        The stages: tuning if the settings ask for it, moments on the calibration split, factor bases, ranks (searched
        on the selection split), pruning, healing if the settings ask for it, and scores on the test split, which
        influence nothing. With several tasks the moments are summed and the tolerance holds on each task. A second call
        loads the dense model again and, with a work directory, goes on from what the first one stored.

        Args:
            config (`SieveConfig`): The settings.
            work_dir (`str | Path`, *optional*): Stores finished stages, so that a killed run, or one with other
                settings, does not repeat them. Default: nothing is stored.
            study_storage (`str`, *optional*): URL of the Optuna storage of a genetic search, which workers can join.
            report_to (`str` or `Sequence[str]`, *optional*): Trackers of accelerate that log losses, sizes and
                candidates, such as `"tensorboard"` or `"wandb"`.
            callbacks (`Sequence[Callable]`): Called with the stage, the step and the figures by name, as they arise.
            progress (`bool`): Whether to show progress bars.

        Returns:
            [`SieveResult`]: The pruned model and its report.

        Raises:
            ValueError: If the settings, the model or the data break a rule; before any long work if possible.
            RuntimeError: If a model that was passed loaded was pruned before.
            ToleranceError: If no size is within the tolerance; a `RuntimeError`. The model is dense then.
        """
        self._work_dir = work_dir
        check_trackers(report_to, callbacks)
        run = self._prepare(config, work_dir=work_dir, study_storage=study_storage, progress=progress)
        observed = observing(report_to, callbacks, name=self.base_model, settings=config, directory=work_dir)
        with observed, ExitStack() as undo:
            with leading(run):
                run = prepare_reference(with_texts(run, *SPLITS))
                undo.callback(restore_untuned, run)
                run = reduce_vocabulary(run)
                undo.callback(restore_vocabulary, run)
            with leading(run):
                bases = calibrate(run)
                run = with_latencies(run)
                healer = make_healer(run)
                ranks, trials = choose_ranks(run, bases, healer)
            dense, sizes = score_test_dense(run), measured_dense(run, bases)
            undo.callback(hold_ranks(run, bases, ranks, healer))
            del bases
            pruned, offsets = score_test_pruned(run, held_key(healer))
            self.result = pruned_result(
                run, dense, pruned, offsets, sizes=sizes, ranks=ranks, trials=trials, healer=healer,
                loading=self.loading, base_model=self.base_model, base_revision=self._base_revision(),
            )  # fmt: skip
            self.model, self.tokenizer = self.result.model, run.tokenizer
            # Success: keep the pruned model.
            undo.pop_all()
        return self.result

    def save_pretrained(self, output_dir: str | Path, *, overwrite: bool = False, with_examples: bool = False) -> Path:
        """Write model, tokenizer, model card, report and its page; all or, after an error, nothing. Return the path.

        Args:
            output_dir (`str | Path`): A new or empty directory.
            overwrite (`bool`): Whether to replace a directory that holds a model, once the new one is complete.
            with_examples (`bool`): Whether `report.html` shows the test examples that both models answer differently.

        Raises:
            RuntimeError: If nothing was pruned yet.
            FileExistsError: If `output_dir` contains files and `overwrite` is false, or files that are not of a model.
            ValueError: If `output_dir` is, contains or is inside the dense model or the work directory.
            OSError: If the disk is full or the directory cannot be written.
        """
        if self.result is None:
            raise RuntimeError("`save_pretrained` must follow `prune`, got a model that is not pruned. Call `prune`.")
        return save_result(
            self.result, self.tokenizer, Path(output_dir), overwrite=overwrite, base_model=self.base_model,
            base_revision=self._base_revision(), task_specs=[task.spec for task in self.tasks],
            work_dir=self._work_dir, tasks=self.tasks if with_examples else (),
        )  # fmt: skip

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Push what `save_pretrained` writes to the Hub, in one commit; raise `RuntimeError` if nothing was pruned yet.

        Args:
            repo_id (`str`): Such as `"user/name"`.
            options: Of [`push_folder`][optimum_sieve.publish.hub.push_folder], which names the errors: `private`,
                `revision`, `commit_message`, `create_pr` and `token`.
        """
        if self.result is None:
            raise RuntimeError("`push_to_hub` must follow `prune`, got a model that is not pruned. Call `prune`.")
        with TemporaryDirectory(prefix="optimum-sieve-") as directory:
            return push_folder(self.save_pretrained(Path(directory) / "model"), repo_id, **options)

    def _base_revision(self) -> str | None:
        return getattr(self.model.config, "_commit_hash", None)

    def _ensure_dense(self) -> None:
        """Load the dense model again if it was pruned, so that other settings can be tried with the same pruner."""
        if self.result is None:
            return
        if self._load is None:
            raise RuntimeError(
                "`prune` must be called once per pruner of a loaded model, got a second call. Make the pruner with "
                "`SievePruner.from_pretrained(name)`, which loads the dense model again."
            )
        self.model, self.tokenizer, _ = self._load()
        self.result = None
