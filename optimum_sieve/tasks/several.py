"""Read one or several tasks."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import shown

from .task import Task


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def read_tasks(sources: Any, *, trust_remote_code: bool = False) -> tuple[Task, ...]:
    """Return the tasks of one source or several: paths of task files, their contents, or tasks.

    Args:
        sources (`Any`): The source, or a sequence of them.
        trust_remote_code (`bool`): Whether functions of an lm-evaluation-harness task may run. Modules of evaluate that
            a task names are run either way.

    Raises:
        FileNotFoundError: If a task file or its data does not exist.
        ValueError: If a task file is invalid; with several sources the message names the one.
    """
    sources = [sources] if isinstance(sources, str | Path | dict | Task) else list(sources)
    if len(sources) == 1:
        return (_read_task(sources[0], trust_remote_code),)
    tasks = []
    for number, source in enumerate(sources, start=1):
        try:
            tasks.append(_read_task(source, trust_remote_code))
        except (ValueError, TypeError) as error:
            name = source.get("name", number) if isinstance(source, dict) else source
            error_type = TypeError if isinstance(error, TypeError) else ValueError
            raise error_type(f"Task {shown(str(name))}: {error}") from error
    return tuple(tasks)


def _read_task(source: str | Path | dict[str, Any] | Task, trust_remote_code: bool) -> Task:
    if isinstance(source, Task):
        return source
    read: Any = Task.from_dict if isinstance(source, dict) else Task.from_file
    task: Task = read(source, trust_remote_code=trust_remote_code or None)
    return task


def check_tasks(tasks: Sequence[Task]) -> None:
    """Check that there is at least one task and that names, which identify tasks in reports, are unique.

    Raises:
        ValueError: If not; the message names the task.
    """
    names = [task.name for task in tasks]
    if not names:
        raise ValueError("`task` must name at least one task, got none.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"`task` must be tasks with unique names, got {names.count(twice[0])} called {shown(twice[0])}. Change "
            "`name` in one of the task files."
        )


def task_shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Normalize `weights` to shares that sum to 1; equal shares without weights.

    Raises:
        ValueError: If there are not `count` weights.
    """
    if weights is not None and len(weights) != count:
        raise ValueError(
            f"`task_weights` must have one number per task, got {len(weights)} for {count} tasks. Omit them for equal "
            "weights."
        )
    weights = weights or [1.0] * count
    return [weight / sum(weights) for weight in weights]


@contextmanager
def naming(task: Task, tasks: Sequence[Task]) -> Iterator[None]:
    """Prefix error messages with the name of `task` if there are several tasks."""
    try:
        yield
    except ValueError as error:
        if len(tasks) == 1:
            raise
        raise ValueError(f"Task {shown(task.name)}: {error}") from error
