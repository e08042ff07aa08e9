"""Figures of a run as they arise: callbacks in Python, and trackers of accelerate. Imports no torch at import."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    # Stage, step, figures by name.
    Callback = Callable[[str, int, dict[str, float]], object]

_LISTENERS: ContextVar[tuple[Callback, ...]] = ContextVar("listeners", default=())


def emit(stage: str, step: int, **figures: float) -> None:
    """Hand figures to the callbacks of the run.

    Args:
        stage (`str`): What they are of: `"tuning"`, `"healing"`, `"sizes"` or `"search"`.
        step (`int`): Step of the training in all, number of the size, or number of scored candidates.
        figures (`float`): By name.
    """
    for callback in _LISTENERS.get():
        callback(stage, step, dict(figures))


@contextmanager
def listening(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Call each callback with the figures that arise inside the context."""
    token = _LISTENERS.set((*_LISTENERS.get(), *callbacks))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


@contextmanager
def observing(
    report_to: str | Sequence[str] | None,
    callbacks: Sequence[Callback] = (),
    *,
    name: str | None,
    settings: Any,
    directory: str | Path | None,
) -> Iterator[None]:
    """Call callbacks, and log to trackers of accelerate, with the figures that arise inside the context.

    Args:
        report_to (`str` or `Sequence[str]`, *optional*): Names of trackers: `"tensorboard"`, `"wandb"`, `"trackio"` ...
        callbacks (`Sequence[Callable]`): See [`emit`].
        name (`str`, *optional*): Name of the model; the last part names the run.
        settings (`SieveConfig`): What the trackers show as its configuration.
        directory (`str | Path`, *optional*): For trackers that write files. Default: the current directory.

    Raises:
        ValueError: If a name is unknown.
        ImportError: If a tracker's package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    title = f"sieve-{(name or 'model').rstrip('/').rpartition('/')[2]}"
    trackers = [_tracker(each, title, directory) for each in names]
    flat = dict(_flat(settings.to_dict()))
    for tracker in trackers:
        tracker.store_init_configuration(flat)

    def log(stage: str, step: int, figures: dict[str, float]) -> None:
        for tracker in trackers:
            tracker.log({f"{stage}/{key}": value for key, value in figures.items()}, step=step)

    with ExitStack() as ending:
        for tracker in trackers:
            ending.callback(tracker.finish)
        with listening([*callbacks, *([log] if trackers else [])]):
            yield


def check_trackers(report_to: str | Sequence[str] | None, callbacks: Sequence[Callback] = ()) -> None:
    """Check the names and packages of trackers, and callbacks, before any work; see [`observing`] for the errors."""
    names = [report_to] if isinstance(report_to, str) else report_to or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`report_to` must be the name of a tracker or a list of names, got {report_to!r}.")
    for name in names:
        _tracker_class(name)
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"`callbacks` must be functions of stage, step and figures, got {callback!r}.")


def _tracker_class(name: str) -> Any:
    from accelerate import tracking as trackers

    known = {str(getattr(key, "value", key)): kind for key, kind in trackers.LOGGER_TYPE_TO_CLASS.items()}
    if name not in known:
        raise ValueError(f"`report_to` must name trackers among {', '.join(known)}, got {name!r}.")
    # Deprecated packages stand for each other there, so it asks by function.
    is_there = getattr(trackers, f"is_{name}_available", None)
    if is_there is not None and not is_there():
        raise ImportError(f"`report_to` must name installed trackers, got {name!r}. `pip install {name}`.")
    return known[name]


def _tracker(name: str, run_name: str, directory: str | Path | None) -> Any:
    # Its methods ask which process they run in.
    from accelerate import PartialState

    PartialState()
    kind = _tracker_class(name)
    if kind.requires_logging_directory:
        return kind(run_name, logging_dir=str(directory or "."))
    return kind(run_name)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield values that every tracker takes, with the names of nested settings joined."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, int | float | str | bool) else str(value)
