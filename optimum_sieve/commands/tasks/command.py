"""`optimum-cli sieve tasks` and its subcommand `check`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from optimum.commands.base import CommandInfo

from ..base import SieveGroup, SieveSubcommand, add_debug


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.backbone.kinds import InputFormat


class CheckCommand(SieveSubcommand):
    """Check a task file and its data, alone or with a model's tokenizer."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve tasks check`."""
        parser.description = (
            "Check a task file and its data. Show the first prompt, the balance of the labels and the longest row, and "
            "warn of common mistakes. The exit status is 0 with warnings, 1 with errors."
        )
        parser.add_argument("task", metavar="FILE", help="Task file, YAML or JSON, or lm_eval:NAME.")
        parser.add_argument(
            "--model",
            metavar="MODEL",
            help="Hub id or directory of a model, to count tokens. Only its tokenizer and configuration are loaded.",
        )
        parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
        parser.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="Run the code of the model's tokenizer, and the functions of an lm-evaluation-harness task.",
        )
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Print what was found; end with status 1 if there are errors."""
        from optimum_sieve.pipeline.findings import examine
        from optimum_sieve.tasks.several import read_tasks

        (task,) = read_tasks(arguments.task, trust_remote_code=arguments.trust_remote_code)
        tokenizer, inputs = (None, None) if arguments.model is None else _read_tokenizer(arguments)
        findings = examine(task, tokenizer, inputs)
        print(findings.format())
        print(
            "no model was given: pass --model to count tokens"
            if tokenizer is None
            else f"tokens are those of the tokenizer of {arguments.model}; its weights were not loaded"
        )
        if findings.errors:
            raise SystemExit(1)


def _read_tokenizer(arguments: Namespace) -> tuple[PreTrainedTokenizerBase, InputFormat]:
    from optimum_sieve.backbone.kinds import InputFormat, config_kind, max_positions
    from optimum_sieve.backbone.sources import read_config, read_tokenizer

    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.revision is not None:
        options["revision"] = arguments.revision
    config = read_config(arguments.model, **options)
    tokenizer = read_tokenizer(arguments.model, **options)
    start = getattr(config, "decoder_start_token_id", None)
    return tokenizer, InputFormat(
        kind=config_kind(config),
        max_length=max_positions(SimpleNamespace(config=config)),
        start_token_id=0 if start is None else start,
        label_ids={str(name): int(index) for name, index in (getattr(config, "label2id", None) or {}).items()},
    )


class TasksCommand(SieveGroup):
    """Group the subcommands of `optimum-cli sieve tasks`."""

    COMMAND = CommandInfo(name="tasks", help="Check task files.")
    SUBCOMMANDS = (
        CommandInfo(
            name="check", help="Check a task file and its data before anything is run.", subcommand_class=CheckCommand
        ),
    )
