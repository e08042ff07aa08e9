"""Render a page: one file with its style, which fetches nothing. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from optimum_sieve.run.contents import PAGE, PAGE_WITH_EXAMPLES

from .marks import clean
from .plot import percent


_HERE = Path(__file__).parent
# Pixels of a figure on wide and on narrow screens.
WIDE, NARROW = 860.0, 372.0


def style(name: str) -> str:
    """Return the content of a style file without line breaks at its end."""
    return (_HERE / name).read_text(encoding="utf-8").rstrip()


def render(template: str, *, with_examples: bool = False, **values: Any) -> str:
    """Render a template of this folder; texts are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clean": clean, "percent": percent}
    return environment.get_template(template).render(
        css=Markup(f"{style('figure.css')}\n{style('style.css')}"),
        generator=PAGE_WITH_EXAMPLES if with_examples else PAGE,
        **values,
    )


def blocks_text(text: str, most: int = 4000) -> str:
    """Return a text of someone else's with its line breaks, without what no page can show."""
    lines = text[:most].replace("\r\n", "\n").expandtabs(4).split("\n")
    return "\n".join(clean(line, most) for line in lines) + (" ..." if len(text) > most else "")
