"""Import modules of another project from a folder, and run its code on the CPU, without changing any of its files."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

import torch


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def import_from(folder: Path, names: Sequence[str], absent: Sequence[str] = ()) -> list[ModuleType]:
    """Import modules from a folder and leave `sys.path` and `sys.modules` as they were.

    Args:
        folder (`Path`): The checkout.
        names (`Sequence[str]`): Full names of the modules.
        absent (`Sequence[str]`): Modules that the code imports but does not need here. Stand-ins take their place,
            whose functions raise an error when they are called.

    Raises:
        SystemExit: If the folder does not hold the modules, or a package that they need is missing.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder} must be a checkout with {', '.join(names)}, got no such folder.")
    own = {path.stem for path in folder.iterdir()} | {name.partition(".")[0] for name in absent}
    with _modules_restored(own), mock.patch.object(sys, "path", [str(folder), *sys.path]):
        sys.modules.update({name: _stand_in(name) for name in absent})
        importlib.invalidate_caches()
        try:
            return [importlib.import_module(name) for name in names]
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"{folder} must be a checkout with {', '.join(names)}, whose packages are installed: {error}."
            ) from error


@contextlib.contextmanager
def _modules_restored(own: set[str]) -> Iterator[None]:
    """Set modules of these top-level names aside, and bring them back at the end."""

    def taken() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in own]

    before = {name: sys.modules.pop(name) for name in taken()}
    try:
        yield
    finally:
        for name in taken():
            del sys.modules[name]
        sys.modules.update(before)


def _stand_in(module: str) -> ModuleType:
    stand_in: Any = ModuleType(module)
    # `from module import *` imports nothing.
    stand_in.__all__ = []

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def fail(*_: Any, **__: Any) -> NoReturn:
            raise RuntimeError(f"{module}.{name} was called, but only a stand-in for {module} was imported.")

        return fail

    stand_in.__getattr__ = missing
    return stand_in


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Let code that asks for the current CUDA device get the CPU; its output goes to the error stream.

    The code collects garbage after every step: the many objects of this process are left out, or it would take longer
    than the steps.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "current_device", lambda: torch.device("cpu")),
            (torch.cuda, "device", lambda _: contextlib.nullcontext()),
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.Tensor, "pin_memory", lambda tensor, *_: tensor),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        gc.freeze()
        stack.callback(gc.unfreeze)
        yield


def cpu_seconds() -> float:
    """Return the processor time of this process, all its threads, and of finished child processes such as solvers."""
    return sum(os.times()[:4])
