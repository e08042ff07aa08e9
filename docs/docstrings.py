r"""Let mkdocstrings read our docstrings: Hugging Face's cross-references and types, and formulas between `\(` and `\)`.

The site loads no script from elsewhere, so formulas are set as text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe


_API_PAGE = Path(__file__).with_name("api.md")
_SYMBOLS = {
    r"\lVert": "‖",
    r"\rVert": "‖",
    r"\Vert": "‖",
    r"\top": "ᵀ",
    r"\theta": "θ",
    r"\times": "\u00d7",
    r"\min": "min",
    r"\log": "log ",
    r"\mid": "|",
    r"\bar x": "x̄",
    r"\sqrt": "√",
    r"\,": " ",
    "^2": "²",
    "^ᵀ": "ᵀ",
}


class DocstringMarkup(griffe.Extension):
    """Rewrite each docstring before it is parsed."""

    def __init__(self) -> None:
        documented = re.findall(r"^::: (\S+)$", _API_PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
        self._paths = {path.rpartition(".")[2]: path for path in documented}

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of `obj`, if it has one."""
        if obj.docstring is not None:
            text = re.sub(r"\\\((.*?)\\\)", lambda match: f"`{_plain_formula(match[1])}`", obj.docstring.value)
            text = re.sub(r"^( +\w+) \((.*?)\):", _plain_types, text, flags=re.MULTILINE)
            # The signature has the type of what is returned.
            text = re.sub(r"(\nReturns:\n +)\[?`[^`]*`\]?( of shape `.*?`)?(, \*optional\*)?: ", r"\1", text)
            obj.docstring.value = re.sub(r"\[`~?([\w.]+)`\](?!\[)", self._reference, text)

    def _reference(self, match: re.Match[str]) -> str:
        """Link a name that the API page documents; set any other as code."""
        name, _, member = match[1].rpartition(".")
        for path, tail in ((match[1], ""), (name, f".{member}")):
            target = self._paths.get(path.rpartition(".")[2])
            if target is not None:
                return f"[`{path.rpartition('.')[2]}{tail}`][{target}{tail}]"
        return f"`{member}`"


def _plain_formula(formula: str) -> str:
    formula = re.sub(r"\\(?:mathrm|mathbb|text)\{(.*?)\}", r"\1", formula)
    for symbol, plain in _SYMBOLS.items():
        formula = formula.replace(symbol, plain)
    return " ".join(formula.replace("{", "").replace("}", "").split())


def _plain_types(match: re.Match[str]) -> str:
    """Take the markup out of a parameter's type, and put its shape in front of the description."""
    shape = re.search(r" of shape (`.*?`)|, (0-d)", match[2])
    kind = re.sub(r" of shape `.*?`|, 0-d|[`*]", "", match[2])
    return f"{match[1]} ({kind}):" + (f" Shape {shape[1] or '`()`'}." if shape else "")
