"""A directory of tiny models and tasks, and `optimum-cli sieve` in this process, for generated inputs.

Every check before long work is the real one. What trains, searches, times or talks to the Hub is replaced by `stop`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

import toy
from hypothesis import event
from tiny_models import make_pruned_model


if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

# An option, or a name in backquotes: `tolerance`, `data.files`, `chat[0].content`, `config.json`, `--output`.
_NAMED = re.compile(
    r"`-{0,2}[a-z_]+[\w.\[\]/-]*|--[a-z][a-z-]+|argument [a-zA-Z-]+|`.*` is not a setting of |unrecognized arguments: "
)
# Where long work begins.
_STOPS = frozenset(
    (
        "optimum_sieve.pruner.with_texts",
        "optimum_sieve.pipeline.heal._Dense.of",
        "optimum_sieve.evaluation.scores.evaluate",
        "optimum_sieve.evaluation.labelling.label_by_model",
        "optimum_sieve.plan.forecast.rates_of",
        "optimum_sieve.export.dense.save_dense",
        "optimum_sieve.export.onnx.export_onnx",
        "optimum_sieve.lora.merge.merge_adapter",
        "huggingface_hub.HfApi",
    )
)


INPUTS = ("model", "pruned", "task.json", "rows.jsonl", "settings.json", "thesis")


class LongWorkError(Exception):
    """Every check is passed."""


def stop(*unused: Any, **options: Any) -> NoReturn:
    raise LongWorkError


@dataclass(frozen=True)
class Outcome:
    """How a command ended: `status` is `None` where it came to long work."""

    status: int | None
    error: str

    def check(self) -> None:
        """Assert that the command came to long work, succeeded, or ended in one line that names the argument."""
        event("long work" if self.status is None else f"status {self.status}")
        if self.status in (0, None):
            return
        assert self.status in (1, 2), (self.status, self.error)
        lines = [line for line in self.error.splitlines() if re.match(r"(?:.*: )?error: ", line)]
        assert len(lines) == 1, self.error
        assert "Traceback" not in self.error
        assert len(lines[0]) < 2500, lines[0]
        assert _NAMED.search(lines[0]), lines[0]


class World:
    """The directory, in which commands run, and the parser of `optimum-cli`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._parser = _parser()

    def run(self, *words: str) -> Outcome:
        """Run `optimum-cli sieve` with these words."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), _in(self.directory):
            try:
                arguments = self._parser.parse_args(["sieve", *words])
                arguments.func(arguments).run()
            except SystemExit as end:
                return Outcome(int(end.code or 0), err.getvalue())
            except LongWorkError:
                return Outcome(None, err.getvalue())
        return Outcome(0, err.getvalue())

    def options(self, command: str) -> dict[str, argparse.Action]:
        """Return the options of a subcommand."""
        sieve = _subparsers(self._parser)["sieve"]
        actions = _subparsers(sieve)[command]._actions
        named = (action for action in actions if action.option_strings and action.dest not in ("help", "help_all"))
        return {action.option_strings[0]: action for action in named}

    def inputs(self) -> dict[str, bytes]:
        """Return the contents of all files that a user would miss."""
        paths = [path for name in INPUTS for path in (self.directory / name, *(self.directory / name).rglob("*"))]
        return {str(path): path.read_bytes() for path in paths if path.is_file()}


@contextlib.contextmanager
def stopped(*, but: Collection[str] = ()) -> Iterator[None]:
    """Replace the beginning of long work by `stop`, `but` for what is fast on a tiny model."""
    with contextlib.ExitStack() as stack:
        for target in _STOPS.difference(but):
            stack.enter_context(mock.patch(target, stop))
        yield


@contextlib.contextmanager
def _in(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def _parser() -> argparse.ArgumentParser:
    """Return the parser that `optimum-cli` makes; making it takes much longer than most commands."""
    from optimum.commands import optimum_cli

    found: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser) -> NoReturn:
        found.append(self)
        raise LongWorkError

    with mock.patch("argparse.ArgumentParser.parse_args", parse_args), contextlib.suppress(LongWorkError):
        optimum_cli.main()
    return found[0]


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def make_world(directory: Path) -> World:
    """Write a dense and a pruned model, a task, files that are no task, and links and pipes."""
    toy.make_model().save_pretrained(directory / "model")
    toy.make_tokenizer().save_pretrained(directory / "model")
    make_pruned_model("llama", vocab_size=len(toy.VOCABULARY)).save_pretrained(directory / "pruned")
    toy.make_tokenizer().save_pretrained(directory / "pruned")
    toy.write_task(directory, toy.parity_rows(40))
    (directory / "settings.json").write_text('{"tolerance": 0.1}')
    (directory / "thesis").mkdir()
    (directory / "thesis" / "thesis.txt").write_text("the only copy")
    (directory / "loop").symlink_to("loop")
    os.mkfifo(directory / "pipe")
    return World(directory)
