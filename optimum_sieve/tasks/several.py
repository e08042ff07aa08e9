"""Read one or several tasks."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.tasks import Task


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def read_tasks(given: Any) -> tuple[Task, ...]:
    """Return the tasks of one or several task files, their contents or tasks.

    Raises:
        FileNotFoundError: If a task file or its data is not there.
        ValueError: If a task file is wrong; the message names what and, of several, the file.
    """
    given = [given] if isinstance(given, str | Path | dict | Task) else list(given)
    if len(given) == 1:
        return (_read_task(given[0]),)
    tasks = []
    for place, one in enumerate(given, start=1):
        try:
            tasks.append(_read_task(one))
        except (ValueError, TypeError) as error:
            name = one.get("name", place) if isinstance(one, dict) else one
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"Task {str(name)!r}: {error}") from error
    return tuple(tasks)


def _read_task(given: str | Path | dict[str, Any] | Task) -> Task:
    if isinstance(given, dict):
        return Task.from_dict(given)
    return given if isinstance(given, Task) else Task.from_file(given)


def check_tasks(tasks: Sequence[Task]) -> None:
    """Refuse no tasks, and tasks of the same name, by which reports tell them apart.

    Raises:
        ValueError: The message names the task.
    """
    names = [task.name for task in tasks]
    if not names:
        raise ValueError("`task` must name at least one task, got none.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"`task` must be tasks of different names, got {names.count(twice[0])} called {twice[0]!r}. Change `name` "
            "in one of the task files."
        )


def task_shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the share of each of `count` tasks, which add up to 1; equal ones without weights.

    Raises:
        ValueError: If there is another number of weights than of tasks.
    """
    if weights is not None and len(weights) != count:
        raise ValueError(
            f"`task_weights` must be one number for each task, got {len(weights)} for {count} tasks. Leave them out "
            "for equal ones."
        )
    weights = weights or [1.0] * count
    return [weight / sum(weights) for weight in weights]


@contextmanager
def naming(task: Task, tasks: Sequence[Task]) -> Iterator[None]:
    """Put the name of `task` before what is wrong with it, where it is one of several."""
    try:
        yield
    except ValueError as error:
        if len(tasks) == 1:
            raise
        raise ValueError(f"Task {task.name!r}: {error}") from error
