"""What the subcommands share: options, the settings of a run, the file with which a search is joined, errors.

`group.SieveGroup` is the base of commands with subcommands, `subcommand.SieveSubcommand` that of all others.
"""

from __future__ import annotations

from .group import SieveGroup
from .subcommand import (
    SieveSubcommand,
    add_batch_size,
    add_debug,
    add_source,
    add_task,
    add_with_examples,
    input_paths,
    load_pruner,
    one_line_errors,
    print_plan,
    reserved_output,
)


__all__ = [
    "SieveGroup",
    "SieveSubcommand",
    "add_batch_size",
    "add_debug",
    "add_source",
    "add_task",
    "add_with_examples",
    "input_paths",
    "load_pruner",
    "one_line_errors",
    "print_plan",
    "reserved_output",
]
