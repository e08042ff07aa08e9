r"""Python functions in place of templates: a function of a row's fields that returns the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import cut, shown

from .template import Row, RowTemplate, encodable, listed_texts


if TYPE_CHECKING:
    from collections.abc import Callable


# Functions stand in a list of messages, which are mappings. What is nested deeper is none of a task.
_DEEPEST = 3


@dataclass(frozen=True)
class RowFunction:
    """A function of a row, with the methods of [`RowTemplate`][optimum_sieve.tasks.templates.template.RowTemplate].

    Args:
        key (`str`):
            The task's key that it stands for, for messages.
        function (`Callable`):
            Maps a dictionary of a row's fields to a text. For answers and choices it may return an integer or a list.
    """

    key: str
    function: Callable[[dict[str, Any]], Any]
    # No template: it is not known which fields a function reads.
    uses_row = True

    @property
    def source(self) -> str:
        """Name of the function, for messages and for task files, which cannot hold it."""
        return function_name(self.function)

    @property
    def names(self) -> set[str]:
        """Fields that it may use: those that only prompts of multiple choice have."""
        return {"choices", "lettered_choices"}

    def render(self, row: Row) -> str:
        """Return the function's text for `row`; a number as text."""
        value = self._call(row)
        if isinstance(value, int | float) and value == value:
            value = str(value)
        if not isinstance(value, str):
            raise TypeError(
                f"`{self.key}` must return a text, got {shown(value)} from {self.source} for {row.place}. Return a str."
            )
        return encodable(value, self.key, row, verb="return")

    def value(self, row: Row) -> Any:
        """Return the function's integer or list as it is, any other value as text."""
        value = self._call(row)
        if isinstance(value, list | tuple):
            return list(value)
        return value if isinstance(value, int) and not isinstance(value, bool) else self.render(row)

    def texts(self, row: Row) -> list[str]:
        """Return the items of a list as texts, or the one text."""
        return listed_texts(self.value(row), self.key, row, verb="return")

    def _call(self, row: Row) -> Any:
        try:
            # A function that changes its argument must not change the data.
            return self.function(dict(row.fields))
        # It is the user's code: any error in it is an error in the task.
        except Exception as error:
            raise ValueError(
                f"`{self.key}` must return a text for every row, got {type(error).__name__} from {self.source} for "
                f"{row.place}: {cut(str(error))}"
            ) from error


Template = RowTemplate | RowFunction
# Types of a key that takes a template.
TEMPLATE = (str, RowFunction)


def row_template(key: str, source: str | RowFunction) -> Template:
    """Return the template of a task's key: a jinja2 template, or the function that was given in its place."""
    return RowTemplate(key, source) if isinstance(source, str) else RowFunction(key, source.function)


def wrapped(value: Any, depth: int = _DEEPEST) -> Any:
    """Return `value` with every function in it, also in lists and mappings, as a [`RowFunction`]."""
    if isinstance(value, dict) and depth:
        return {key: wrapped(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [wrapped(item, depth - 1) for item in value]
    return RowFunction("", value) if callable(value) else value


def described(value: Any, depth: int = _DEEPEST) -> Any:
    """Return `value` with a mapping that names it for every [`RowFunction`] in it, as no file can hold a function."""
    if isinstance(value, dict) and depth:
        return {key: described(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list) and depth:
        return [described(item, depth - 1) for item in value]
    return {"function": value.source} if isinstance(value, RowFunction) else value


def function_name(function: Any) -> str:
    """Return the name of a function or another callable."""
    return getattr(function, "__qualname__", None) or type(function).__qualname__
