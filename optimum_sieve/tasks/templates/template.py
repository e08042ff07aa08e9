r"""Sandboxed jinja2 templates over the fields of a row, strict about missing values."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes

from optimum_sieve._messages import closest, cut, listed, shown

from .sandbox import BoundedEnvironment, MissingValueError, budget


_ENVIRONMENT = BoundedEnvironment()
# `{text}`, and neither `{{ text }}` nor a part of other brackets.
_SINGLE_BRACES = re.compile(r"(?<!\{)\{\s*([^\W\d]\w*)\s*\}(?!\})")


@dataclass(frozen=True)
class Row:
    """One row of the data: its `fields`, the name of its `source` and its `number` there, from 1."""

    fields: dict[str, Any]
    source: str
    number: int

    @property
    def place(self) -> str:
        """Describe the row's position, for messages."""
        return f"row {self.number} of {cut(self.source)}"

    def with_fields(self, **fields: Any) -> Row:
        """Return the row with `fields` added; they replace fields of the same name."""
        return replace(self, fields={**self.fields, **fields})


@dataclass(frozen=True)
class RowTemplate:
    """A jinja2 template that uses the fields of a row by name or as `row["name"]`.

    Args:
        key (`str`):
            Its key in the task file, for messages.
        source (`str`):
            Source of the template.

    Raises:
        ValueError: If the syntax is invalid. Rendering raises it if the template uses an unknown field, prints a
            missing value, or fails.
    """

    key: str
    source: str

    def __post_init__(self) -> None:
        try:
            _ENVIRONMENT.from_string(self.source)
        except TemplateSyntaxError as error:
            raise self._invalid(f"{cut(str(error.message))} (line {error.lineno})") from error
        except RecursionError as error:
            raise self._invalid("nested too deeply") from error
        # Python compiles the template: it refuses, for example, more than twenty nested loops.
        except (SyntaxError, ValueError, OverflowError, MemoryError, TypeError) as error:
            raise self._invalid(cut(str(error))) from error

    def _invalid(self, reason: str) -> ValueError:
        return ValueError(f"`{self.key}` must be a valid jinja2 template, got {shown(self.source)}: {reason}.")

    @cached_property
    def _compiled(self) -> Any:
        return _ENVIRONMENT.from_string(self.source)

    def render(self, row: Row) -> str:
        """Render the template with the fields of `row`."""
        wrong = self._in_single_braces & row.fields.keys()
        if wrong:
            name = min(wrong)
            raise ValueError(
                f"`{self.key}` must name fields in double braces, got {{{name}}} in {shown(self.source)}. Write "
                f"{{{{ {name} }}}}, or {{{{ '{{{name}}}' }}}} for the text itself."
            )
        try:
            with budget():
                text = str(self._compiled.render({"row": row.fields, **row.fields}))
        # A template is a small program: any error it raises is an error in the task file or the row.
        except Exception as error:
            raise ValueError(self._explain(error, row)) from error
        return encodable(text, self.key, row, verb="render to")

    def value(self, row: Row) -> Any:
        """Evaluate a template that is a single expression, `"{{ field }}"`; render any other to text.

        Only an integer or a list is returned as a value; anything else is rendered, so that strings stay unchanged.
        """
        if self._expression is not None:
            try:
                with budget():
                    value = self._expression({"row": row.fields, **row.fields})
            except Exception as error:
                raise ValueError(self._explain(error, row)) from error
            if isinstance(value, list | tuple):
                return list(value)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return self.render(row)

    def texts(self, row: Row) -> list[str]:
        """Return the items of a list template as strings, or the one rendered text."""
        return listed_texts(self.value(row), self.key, row, verb="render to")

    @property
    def names(self) -> set[str]:
        """Names of the fields used by the template."""
        return self._variables - {"row", *_ENVIRONMENT.globals}

    @property
    def uses_row(self) -> bool:
        """Whether the template uses a field, by name or through `row`."""
        return bool(self._variables - _ENVIRONMENT.globals.keys())

    @cached_property
    def _variables(self) -> set[str]:
        return meta.find_undeclared_variables(_ENVIRONMENT.parse(self.source))

    @cached_property
    def _in_single_braces(self) -> set[str]:
        texts = _ENVIRONMENT.parse(self.source).find_all(nodes.TemplateData)
        return {name for text in texts for name in _SINGLE_BRACES.findall(text.data)}

    @cached_property
    def _expression(self) -> Any:
        body = _ENVIRONMENT.parse(self.source).body
        match = re.fullmatch(r"\s*\{\{[-+]?(.*?)[-+]?\}\}\s*", self.source, re.DOTALL)
        single = len(body) == 1 and isinstance(body[0], nodes.Output) and len(body[0].nodes) == 1
        return _ENVIRONMENT.compile_expression(match[1], undefined_to_none=False) if match and single else None

    def _explain(self, error: Exception, row: Row) -> str:
        names = self.names
        unknown = sorted(names - set(row.fields))
        if unknown:
            return (
                f"`{self.key}` must name fields of the data, got {shown(unknown[0])} in {row.place}. "
                f"{self._suggestion(unknown[0], row)}Its fields are: {listed(row.fields)}."
            )
        if isinstance(error, MissingValueError):
            missing = [
                name for name, value in row.fields.items() if _is_missing(value) and name in (names or row.fields)
            ]
            return (
                f"`{self.key}` must not print a missing value, got one for {listed(missing or names)} in {row.place}. "
                "Fill it in, drop the row, or give a default: `{{ field or '' }}`."
            )
        return f"`{self.key}` must render for every row, got {type(error).__name__} in {row.place}: {cut(str(error))}"

    def _suggestion(self, unknown: str, row: Row) -> str:
        """Name the field that is probably meant; a field that the template uses already is another one."""
        field = closest(unknown, [name for name in row.fields if name not in self.names])
        if field is None:
            return ""
        if unicodedata.normalize("NFC", field) == unicodedata.normalize("NFC", unknown):
            return f"The field {field!a} has other Unicode code points than {unknown!a}; copy its name from the data. "
        return f"Did you mean {shown(field)}? "


def listed_texts(value: Any, key: str, row: Row, *, verb: str) -> list[str]:
    """Return the items of a list as texts, or the one text; `verb` says in messages how `key` came to `value`."""
    items = value if isinstance(value, list) else [value]
    if any(item is None for item in items):
        raise ValueError(f"`{key}` must not hold a missing value, got {shown(items)} in {row.place}. Drop the row.")
    return [encodable(str(item), key, row, verb=verb) for item in items]


def encodable(text: str, key: str, row: Row, *, verb: str) -> str:
    """Return `text`, or raise a `ValueError` if it holds a lone surrogate, which no file can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{key}` must {verb} valid Unicode, got the lone surrogate {text[error.start]!a} in {row.place}. "
            "Repair the text."
        ) from error
    return text


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
