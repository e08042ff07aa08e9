"""Progress bars that obey `TQDM_DISABLE` and transformers' `disable_progress_bar()`."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm


if TYPE_CHECKING:
    from collections.abc import Iterator

_OFF = ("", "0", "false", "no", "off")


def progress_bar(*arguments: Any, progress: bool, **options: Any) -> tqdm:
    """Make a bar of tqdm, which is hidden unless `progress` is set and no library-wide switch hides it.

    Args:
        arguments: Of tqdm.
        progress (`bool`): Whether to show it.
        options: Of tqdm.
    """
    return tqdm(*arguments, disable=not (progress and bars_are_shown()), **options)


def bars_are_shown() -> bool:
    """Return whether neither the environment nor transformers hides progress bars."""
    if os.environ.get("TQDM_DISABLE", "").strip().lower() not in _OFF:
        return False
    logging = sys.modules.get("transformers.utils.logging")
    return logging is None or bool(logging.is_progress_bar_enabled())


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Hide the bars of this process and of the libraries that it uses, as `--quiet` does, until the block ends."""
    from transformers.utils import logging

    before, were_shown = os.environ.get("TQDM_DISABLE"), logging.is_progress_bar_enabled()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = before
        if were_shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
