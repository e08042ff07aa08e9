"""Base of the subcommands: options for the model and the task, and errors printed as one line."""

from __future__ import annotations

import sys
import tempfile
from abc import abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import BaseOptimumCLICommand


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator

    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.pruner import SievePruner

_REPORTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)


class SieveSubcommand(BaseOptimumCLICommand):
    """A subcommand of `sieve`. Errors end it with one line and exit status 1."""

    @abstractmethod
    def execute(self, arguments: Namespace) -> None:
        """Run the subcommand."""

    def run(self) -> None:
        """Run the subcommand; print an error as one line, or with its traceback under `--debug`."""
        with one_line_errors(debug=self.args.debug):
            self.execute(self.args)


def add_debug(parser: ArgumentParser) -> None:
    """Add the option that `SieveSubcommand.run` reads."""
    parser.add_argument("--debug", action="store_true", help="Show tracebacks of errors.")


def add_task(parser: ArgumentParser, *, required: bool = True, several: bool = True) -> None:
    """Add the `--task` option; it can be repeated if the command accepts several tasks."""
    text = "Task file, YAML or JSON." + (" Repeat for each additional task." * several)
    action = "append" if several else "store"
    parser.add_argument("--task", required=required, action=action, metavar="FILE", help=text)


def add_source(parser: ArgumentParser, *, required: bool = True, several: bool = True) -> None:
    """Add the options that name the model and the tasks, and those that control loading."""
    parser.add_argument("--model", required=required, metavar="MODEL", help="Hub id or directory of the model.")
    add_task(parser, required=required, several=several)
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
        "--trust-remote-code", action="store_true", help="Run modeling code from the model's repository."
    )
    add_debug(parser)


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
        offload_dir=Path(arguments.work_dir or tempfile.gettempdir()) / "offloaded" if offload else None,
    )


@contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """Print expected errors as one line and exit with status 1; let unexpected ones through."""
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if debug or not _is_reported(error):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None


def _is_reported(error: Exception) -> bool:
    """Whether the user can act on `error`. Any other type is a bug of this package, whose traceback is needed."""
    from safetensors import SafetensorError

    return isinstance(error, (*_REPORTED, SafetensorError))
