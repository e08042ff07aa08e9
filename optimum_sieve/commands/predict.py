"""`optimum-cli sieve predict`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.run.outputs import check_predictions_file

from .base import SieveSubcommand, add_batch_size, add_source, input_paths


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterable

# Batches that are predicted and written at a time; rows of similar length share a batch.
_BATCHES = 16
# Formats that are read and not written.
_OTHERS = (".csv", ".tsv", ".parquet")


class PredictCommand(SieveSubcommand):
    """Apply a pruned model to the rows of a file."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve predict`."""
        parser.description = (
            "Answer every row of a file with a pruned model, or with any model and a task file. Each output line is "
            "the row with its `prediction` and the `probabilities` of all labels or choices."
        )
        add_source(parser, several=False, own_task=True)
        parser.add_argument(
            "--task-name", metavar="NAME", help="The task to apply, if the model was pruned for several."
        )
        parser.add_argument(
            "--input",
            metavar="FILE",
            required=True,
            help="Rows: .jsonl, .json, .csv, .tsv or .parquet; - reads JSON lines from the standard input.",
        )
        parser.add_argument(
            "--output",
            metavar="FILE",
            required=True,
            help="JSON lines; - writes them to the standard output. A stopped command goes on where it was.",
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace an --output that holds predictions.")
        add_batch_size(parser)

    def execute(self, arguments: Namespace) -> None:
        """Read the rows, load the model, predict and write."""
        from optimum_sieve.prediction.files import (
            STANDARD,
            print_predictions,
            read_rows,
            summary,
            unanswered,
            write_predictions,
        )  # fmt: skip

        if arguments.batch_size < 1:
            raise ValueError(f"`--batch-size` must be at least 1, got {arguments.batch_size}.")
        output = None
        if Path(arguments.output).suffix.lower() in (*_OTHERS, ".json"):
            raise ValueError(f"`--output` must be a file of JSON lines, such as answers.jsonl, got {arguments.output}.")
        if arguments.output != STANDARD:
            inputs = [*input_paths(arguments), ("input", arguments.input)]
            output = check_predictions_file(Path(arguments.output), "--output", arguments.overwrite, inputs=inputs)
        rows = read_rows(arguments.input)
        pipeline = _load_pipeline(arguments)
        checked = unanswered(rows, pipeline.spec["kind"])
        if isinstance(rows, list):
            rows = list(checked)
            rendered = pipeline.check(rows)
        else:
            rows, rendered = checked, None
        start, chunk = time.monotonic(), _BATCHES * arguments.batch_size
        if output is None:
            print_predictions(rows, pipeline, chunk, rendered)
            return
        counts = write_predictions(
            rows, pipeline, output, key=_key(pipeline, rows, rendered), chunk=chunk, rendered=rendered,
            overwrite=arguments.overwrite,
        )  # fmt: skip
        # Not on the standard output, which scripts read.
        print(f"{summary(counts)}; {time.monotonic() - start:.1f} s; saved in {arguments.output}", file=sys.stderr)


def _load_pipeline(arguments: Namespace) -> Any:
    from optimum_sieve.backbone.loading import load_model
    from optimum_sieve.prediction.pipeline import SievePipeline

    model, tokenizer, _ = load_model(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        gguf_file=arguments.gguf_file,
        revision=arguments.revision,
        quantized=True,
    )
    device = None if hasattr(model, "hf_device_map") else model.device
    named = {"task_file": arguments.task, "task_name": arguments.task_name, "batch_size": arguments.batch_size}
    try:
        return SievePipeline(model=model, tokenizer=tokenizer, task="sieve", device=device, **named)
    except ValueError as error:
        # Python's names of the options.
        message = str(error).replace("`task_file`", "`--task`").replace("`task_name`", "`--task-name`")
        raise ValueError(message) from error


def _key(pipeline: Any, rows: Iterable[dict[str, Any]], rendered: Any) -> str:
    """Hash what the predictions depend on; rows that come from a stream are not known."""
    from optimum_sieve.backbone.fingerprint import model_key, tokenizer_fingerprint
    from optimum_sieve.run.workdir import content_key

    return content_key(
        model=model_key(pipeline.model),
        tokenizer=tokenizer_fingerprint(pipeline.tokenizer),
        task=pipeline.spec,
        # A chat template is no part of the tokenizer's fingerprint, but of every prompt.
        rows=None if rendered is None else [[repr(row), made.prompt] for row, made in zip(rows, rendered, strict=True)],
    )
