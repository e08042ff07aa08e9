"""All methods on one task, each pruning the same dense model to the same sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench import Calibrated, allocate_ranks, choose_source, find_targets, kept_fraction, truncated

from optimum_sieve import SieveConfig, SievePruner

from .checkout import cpu_seconds
from .lems import Lems
from .packs import encode_texts
from .scoring import compare_scores, kept_parameters, multiplied_out, score_model
from .svd_llm import SvdLlm


if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from optimum_sieve import Task

STORAGES = {"joint": "pivoted", "joint-factors": "factors"}
# Loss of the gradients, and whether the ranks are searched.
KFAC = {
    "kfac": ("text", False),
    "kfac-lems": ("text", True),
    "kfac-answer": ("answer", False),
    "kfac-answer-lems": ("answer", True),
}
METHODS = (*STORAGES, "svd-llm", *KFAC)

# Prunes the model to a kept fraction until the stack closes; returns the kept fraction and the CPU seconds by stage.
Prune = Callable[[ExitStack, float], tuple[float, dict[str, float]]]


class Contest:
    """The methods on one task.

    Args:
        arguments (`argparse.Namespace`): The command line of `benchmarks/peers.py`.
        task (`Task`): The task.
    """

    def __init__(self, arguments: argparse.Namespace, task: Task) -> None:
        model, gguf_file = arguments.model, arguments.gguf_file
        if model is None:
            model, _, gguf_file = choose_source(None, None)
        self.arguments, self.task = arguments, task
        self.pruner = SievePruner.from_pretrained(model, task=task, dtype="float32", gguf_file=gguf_file)
        self.model, self.tokenizer = self.pruner.model, self.pruner.tokenizer
        self.targets = find_targets(self.model)
        examples = task.examples("calibration", self.tokenizer)
        self.texts = encode_texts(examples, self.tokenizer, self.model)
        self.calibrated: tuple[Any, Any, float] | None = None
        self.lems: Lems | None = None
        self.dense = self.score()

    def score(self) -> Any:
        """Score the model as it is now."""
        return score_model(self.model, self.tokenizer, self.task, generate=not self.arguments.no_generate)

    def rows(self, method: str) -> Iterator[dict[str, Any]]:
        """Prune to every size by a method; yield the rows."""
        prune = self.own(method) if method in STORAGES else self.other(method)
        for asked in self.arguments.kept:
            with ExitStack() as stack:
                kept, seconds = prune(stack, asked)
                row = compare_scores(self.dense, self.score())
            yield {
                "method": method,
                "asked": asked,
                "kept": kept,
                **row,
                "cpu_seconds": seconds,
                "calibration_rows": len(self.texts),
                "calibration_tokens": sum(len(text.ids) for text in self.texts),
                "sensitivity_tokens": self.arguments.sensitivity_tokens if method.endswith("lems") else None,
            }

    def own(self, method: str) -> Prune:
        """Return the pruning of this package. The bases serve both storages."""
        if self.calibrated is None:
            start = cpu_seconds()
            # All methods see the same examples, and one calibration serves all sizes.
            settings = {"heal": None, "tune": None, "label_offsets": "none", "written_prompts": 0, "tolerance": 0.0}
            config = SieveConfig(**settings, seed=self.arguments.seed)
            calibrated = Calibrated(self.pruner, config, None)
            self.calibrated = calibrated.run, calibrated.bases, cpu_seconds() - start
        run, bases, calibration = self.calibrated
        run = replace(run, config=replace(run.config, storage=STORAGES[method]))

        def prune(stack: ExitStack, asked: float) -> tuple[float, dict[str, float]]:
            start = cpu_seconds()
            ranks = allocate_ranks(run, bases, asked)
            stack.enter_context(truncated(run.model, bases, ranks, storage=run.config.storage))
            return kept_fraction(run, ranks), {"calibration": calibration, "factors": cpu_seconds() - start}

        return prune

    def other(self, method: str) -> Prune:
        """Return the pruning of another project."""
        names = [target.name for target in self.targets]
        given = (self.model, self.texts, self.arguments.pack_length, names)
        peer: Any
        if method == "svd-llm":
            peer, options = SvdLlm(self.arguments.svd_llm, *given), {}
        else:
            self.lems = self.lems or Lems(self.arguments.lems, *given, self.arguments.sensitivity_tokens)
            loss, searched = KFAC[method]
            peer, options = self.lems, {"loss": loss, "searched": searched}

        def prune(stack: ExitStack, asked: float) -> tuple[float, dict[str, float]]:
            factors, seconds = peer.factors(asked, **options)
            stack.enter_context(multiplied_out(self.model, factors))
            return kept_parameters(self.targets, factors), seconds

        return prune
