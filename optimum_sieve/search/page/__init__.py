"""The HTML page of a search.

In: the summary in a work directory. Out: `search.html` with its plots (`page.write_page`, `figures`). Torch-free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._lazy import lazy_names


if TYPE_CHECKING:
    from .page import write_page

__all__ = ["write_page"]

__getattr__ = lazy_names(__name__, {"page": ["write_page"]})
