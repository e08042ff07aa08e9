"""Base of the subcommands: options for the model and the task, the output, and errors printed as one line."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from abc import abstractmethod
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from optimum.commands.base import BaseOptimumCLICommand

from optimum_sieve._messages import cut, shown
from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.run.signals import Terminated, raised_signals


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from optimum_sieve.pruner import SievePruner

_LONGEST_MESSAGE = 1500
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REPORTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)


class SieveSubcommand(BaseOptimumCLICommand):
    """A subcommand of `sieve`. Errors end it with one line and exit status 1."""

    @abstractmethod
    def execute(self, arguments: Namespace) -> None:
        """Run the subcommand."""

    def run(self) -> None:
        """Run the subcommand; print an error as one line, or with its traceback under `--debug`."""
        with one_line_errors(debug=self.args.debug):
            _check_words(self.args)
            with _hidden_bars() if self.args.quiet else nullcontext():
                self.execute(self.args)
                sys.stdout.flush()


def _hidden_bars() -> AbstractContextManager[None]:
    from optimum_sieve.run.bars import hidden_bars

    return hidden_bars()


def _check_words(arguments: Namespace) -> None:
    """Refuse words that no report or terminal can show: bytes that are no UTF-8, which Python keeps as surrogates."""
    for name, value in vars(arguments).items():
        for word in value if isinstance(value, list | tuple) else [value]:
            if isinstance(word, str) and not word.isascii() and cut(word, len(word)) != word:
                raise ValueError(f"`--{name.replace('_', '-')}` must be valid UTF-8, got {shown(word)}.")


def add_debug(parser: ArgumentParser) -> None:
    """Add the options that `SieveSubcommand.run` reads."""
    parser.add_argument("--quiet", action="store_true", help="Show no progress bars, and no line for each size tried.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks of errors.")


def add_task(parser: ArgumentParser, *, required: bool = True, several: bool = True, default: str = "") -> None:
    """Add the `--task` option; it can be repeated if the command accepts several tasks. `default` ends its help."""
    text = "Task file, YAML or JSON" + ("." if default else ", or lm_eval:NAME.")
    text += " Repeat for each additional task." * several + default
    action = "append" if several else "store"
    parser.add_argument("--task", required=required, action=action, metavar="FILE", help=text)


def add_source(parser: ArgumentParser, *, required: bool = True, several: bool = True, own_task: bool = False) -> None:
    """Add the options that name the model and the tasks, and those that control loading.

    Args:
        parser (`ArgumentParser`): The parser of a subcommand.
        required (`bool`): Whether the model and the task must be named.
        several (`bool`): Whether several tasks can be named.
        own_task (`bool`): Whether the task may be left out, for that of a pruned model.
    """
    text = "Hub id or directory of the model, or of a LoRA adapter of it."
    parser.add_argument("--model", required=required, metavar="MODEL", help=text)
    default = " Default: the task that the model was pruned for." if own_task else ""
    add_task(parser, required=required and not own_task, several=several, default=default)
    parser.add_argument(
        "--dtype", help="Floating-point type of the loaded model, such as bfloat16 (default: as saved)."
    )
    parser.add_argument(
        "--device",
        help="Device, such as cpu, cuda or cuda:1 (default: the accelerator if available, else cpu).",
    )
    parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
    parser.add_argument("--gguf-file", metavar="FILE", help="GGUF file to load from the model repository.")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Run modeling code from the model's repository, and functions that a task of lm-evaluation-harness names.",
    )
    add_debug(parser)


def add_batch_size(parser: ArgumentParser) -> None:
    """Add the `--batch-size` option of the commands that only score or predict."""
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        default=SieveConfig.batch_size,
        help="Rows per forward pass (default: %(default)s).",
    )


def add_with_examples(parser: ArgumentParser) -> None:
    """Add the option for texts of the data in the page of a model."""
    parser.add_argument(
        "--with-examples",
        action="store_true",
        help="Show the test examples that both models answer differently in report.html, which is then not pushed.",
    )


def load_pruner(arguments: Namespace, config: SieveConfig | None = None) -> SievePruner:
    """Load the model and the tasks that the options of `add_source` name.

    If the model does not fit the memory limit of the settings, its blocks stay on disk.
    """
    from optimum_sieve.plan.fits import must_offload
    from optimum_sieve.pruner import SievePruner

    options = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    offload = (
        config is not None
        and not arguments.gguf_file
        and must_offload(arguments.model, config, dtype=arguments.dtype, **options)
    )
    return SievePruner.from_pretrained(
        arguments.model,
        task=arguments.task,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        gguf_file=arguments.gguf_file,
        revision=arguments.revision,
        offload_dir=(arguments.work_dir or tempfile.gettempdir()) if offload else None,
    )


def print_plan(pruner: SievePruner, config: SieveConfig) -> None:
    """Print what the tasks' examples look like, what may be wrong with them, and the plan of a run.

    Raises:
        ValueError: If a run would end with an error; the findings are printed before.
    """
    from optimum_sieve.backbone.kinds import input_format
    from optimum_sieve.backbone.offloading import execution_device
    from optimum_sieve.pipeline.findings import examine_all
    from optimum_sieve.plan.forecast import Forecast

    print(examine_all(pruner.tasks, pruner.tokenizer, input_format(pruner.model)), end="\n\n", flush=True)
    plan, model = pruner.plan(config), pruner.model
    print(Forecast.of(plan, dtype=model.dtype, device=execution_device(model.get_input_embeddings())).format())


def reserved_output(arguments: Namespace) -> AbstractContextManager[None]:
    """Check `--output` and `--work-dir` before any work, and keep other runs from writing the output meanwhile.

    Raises:
        FileExistsError: If the output holds something that may not be replaced, or another run writes it.
        ValueError: If it is, contains or is inside an input or the work directory.
        OSError: If a directory cannot be written.
    """
    from optimum_sieve.run import distributed
    from optimum_sieve.run.outputs import check_directory, reserved

    if getattr(arguments, "work_dir", None) is not None:
        check_directory(Path(arguments.work_dir), "work_dir")
    if not distributed.is_first():
        return nullcontext()
    return reserved(Path(arguments.output), arguments.overwrite, inputs=input_paths(arguments))


def input_paths(arguments: Namespace) -> Iterator[tuple[str, str | Path]]:
    """Yield the files and directories that a command reads or keeps results in, with the names of the options."""
    from optimum_sieve.tasks.data import local_paths

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    files = given.get("task", [])
    tasks = [path for file in ([files] if isinstance(files, str) else files) for path in local_paths(Path(file))]
    read = ("model", "dense", "compare_to", "adapter", "config", "recipe", "whole_tokenizer")
    named = [(name, given.get(name)) for name in read]
    if "gguf_file" in given:
        named.append(("gguf_file", os.path.join(given.get("dense", given["model"]), given["gguf_file"])))
    # The `dense` of an export is a flag.
    yield from ((name, path) for name, path in named if isinstance(path, str))
    yield from (("task", path) for path in tasks)
    if "work_dir" in given:
        yield "work_dir", given["work_dir"]
    if given.get("study_storage", "").startswith("sqlite:///"):
        yield "study_storage", given["study_storage"].removeprefix("sqlite:///")


@contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """Print expected errors as one line and exit with status 1; let unexpected ones through.

    Ctrl-C ends with status 130 and SIGTERM with 143, after everything was cleaned up.
    """
    try:
        with raised_signals():
            yield
    except KeyboardInterrupt as end:
        if debug:
            raise
        if isinstance(end, Terminated):
            _end(f"terminated by {end}", end.status)
        _end("interrupted", 130)
    except Exception as error:
        if debug or not _is_reported(error):
            raise
        _end(_one_line(error), 1)


def _end(message: str, status: int) -> NoReturn:
    # The error has a line of its own: not that of an open progress bar.
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()
    print(f"error: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        # A full disk or a closed pipe. The interpreter would try again at its end, and print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(status) from None


def _one_line(error: Exception) -> str:
    """Return a message without line breaks and control characters; a long one keeps its start and its remedy."""
    text = str(error) or type(error).__name__
    full = _disk_error(error)
    if full is not None and (full is error or not _is_expected(error)):
        text = f"The disk must have room for what is written, got: {text}. Free some space and run again."
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return cut(" ".join(text.split()), _LONGEST_MESSAGE)


def _is_reported(error: Exception) -> bool:
    """Whether the user can act on `error`. Any other type is a bug of this package, whose traceback is needed."""
    return _is_expected(error) or _disk_error(error) is not None


def _is_expected(error: Exception) -> bool:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # The tokenizers library raises nothing more specific than `Exception`.
    return isinstance(error, (*_REPORTED, SafetensorError, StrictDataclassError)) or type(error) is Exception


def _disk_error(error: BaseException | None) -> BaseException | None:
    """Return the error of a full disk, or of a database, that an error was raised for; libraries wrap it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        if type(error).__module__ == "sqlite3" and "full" in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None
