"""`optimum-cli sieve evaluate`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_sieve.run.outputs import check_report_file, is_standard_output

from .base import SieveSubcommand, add_batch_size, add_source, input_paths


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from typing import Any

    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.tasks import Example, Task

_WHEN = {"dense": "before", "pruned": "after"}


class EvaluateCommand(SieveSubcommand):
    """Score a model on a task, alone or compared with another model."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve evaluate`."""
        parser.description = "Score a dense or pruned model on one split of a task."
        add_source(parser, several=False)
        parser.add_argument(
            "--split",
            choices=("calibration", "selection", "test"),
            default="test",
            help="Split of the task to score (default: test).",
        )
        parser.add_argument(
            "--compare-to", metavar="MODEL", help="Dense model for a paired comparison on the same examples."
        )
        parser.add_argument(
            "--json",
            metavar="FILE",
            help="Write the results to this file, in the format of sieve_report.json; may be /dev/stdout.",
        )
        add_batch_size(parser)

    def execute(self, arguments: Namespace) -> None:
        """Score one or two models, print a table and write the JSON file."""
        from optimum_sieve.evaluation.comparison import compare
        from optimum_sieve.metrics.examples import load_code
        from optimum_sieve.pipeline.reference import warn_of_the_majority
        from optimum_sieve.publish.report import build_report, task_block, write_report
        from optimum_sieve.publish.table import format_table
        from optimum_sieve.tasks.several import read_tasks

        if arguments.json:
            check_report_file(Path(arguments.json), "--json", inputs=input_paths(arguments))
        (task,) = read_tasks(arguments.task, trust_remote_code=arguments.trust_remote_code)
        task.require_splits(arguments.split)
        load_code(task.metric, written=task.kind == "generate")
        if not task.labelled and arguments.compare_to is None:
            raise ValueError(
                "`answer` must be given in the task file, or `--compare-to` on the command line, got neither. Without "
                "labels, a model is scored against the answers of another model."
            )
        if arguments.compare_to is None:
            model = _score(arguments.model, task, arguments)
            scored = {"pruned" if model.is_pruned else "dense": model}
        else:
            dense = _score(arguments.compare_to, task, arguments, is_reference=True)
            scored = {"dense": dense, "pruned": _score(arguments.model, task, arguments, dense.examples)}
        evaluations = {side: model.evaluation for side, model in scored.items()}
        if "dense" in evaluations:
            warn_of_the_majority(task.name, evaluations["dense"], arguments.split)
        block = task_block(
            task.name,
            evaluations.get("dense"),
            evaluations.get("pruned"),
            compare(**evaluations) if len(evaluations) == 2 else None,
            split=arguments.split,
            references=None if task.labelled else "dense model",
        )
        report = build_report(
            [block],
            parameters={f"model_{_WHEN[side]}": model.num_parameters for side, model in scored.items()},
            num_bytes={_WHEN[side]: model.num_bytes for side, model in scored.items() if model.num_bytes} or None,
            seconds={f"evaluate_{side}": model.seconds for side, model in scored.items()},
            vocabulary=scored["pruned"].vocabulary if "pruned" in scored else None,
        )
        if arguments.json:
            write_report(report, arguments.json)
        # A program that reads the standard output as JSON must find nothing else there.
        in_the_way = arguments.json and is_standard_output(Path(arguments.json))
        print(format_table(report), file=sys.stderr if in_the_way else sys.stdout)


@dataclass(frozen=True)
class _Scored:
    """Results kept after the scored model is freed, so that two models never need to fit in memory."""

    evaluation: Evaluation
    examples: list[Example] | None
    is_pruned: bool
    num_parameters: int
    num_bytes: int
    seconds: float
    vocabulary: dict[str, int] | None


def _score(
    model_name: str,
    task: Task,
    arguments: Namespace,
    labelled: list[Example] | None = None,
    *,
    is_reference: bool = False,
) -> _Scored:
    """Score a model on `labelled` if given. On a task without labels, the reference model labels the examples first."""
    from optimum_sieve.backbone.loading import load_model
    from optimum_sieve.evaluation.labelling import label_by_model
    from optimum_sieve.evaluation.scores import evaluate

    source: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    if not is_reference:
        source |= {"gguf_file": arguments.gguf_file, "revision": arguments.revision}
    model, tokenizer, _ = load_model(
        model_name, dtype=arguments.dtype, device=arguments.device, quantized=True, **source
    )
    examples = labelled or task.examples(arguments.split, tokenizer)
    if not task.labelled and is_reference:
        labelled = examples = label_by_model(model, examples, tokenizer, batch_size=arguments.batch_size)
    start = time.perf_counter()
    evaluation = evaluate(
        model, examples, tokenizer, metric=task.metric, batch_size=arguments.batch_size, description=model_name
    )
    return _Scored(
        evaluation=evaluation,
        examples=labelled,
        is_pruned=model.config.model_type == "sieve",
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        # Size of the files: 0 for an adapter, and for a model on the Hub or in another format.
        num_bytes=sum(path.stat().st_size for path in Path(model_name).glob("model*.safetensors")),
        seconds=time.perf_counter() - start,
        vocabulary=(getattr(model.config, "sieve", None) or {}).get("vocabulary"),
    )
