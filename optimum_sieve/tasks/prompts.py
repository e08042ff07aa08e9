r"""Sandboxed jinja2 templates over the fields of a row, strict about missing values; prompts and chat messages."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import SandboxedEnvironment

from .spec import check_keys


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _NoValueError(Exception):
    """A template prints a missing value."""


def _refuse_none(value: Any) -> Any:
    if value is None:
        raise _NoValueError
    return value


_ENVIRONMENT = SandboxedEnvironment(
    undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=_refuse_none
)


@dataclass(frozen=True)
class Row:
    """One row of the data: its `fields`, the name of its `source` and its `number` there, from 1."""

    fields: dict[str, Any]
    source: str
    number: int

    @property
    def place(self) -> str:
        """Describe the row's position, for messages."""
        return f"row {self.number} of {self.source}"

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
            _ENVIRONMENT.parse(self.source)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"`{self.key}` must be a valid jinja2 template, got {self.source!r}: {error.message} "
                f"(line {error.lineno})."
            ) from error

    @cached_property
    def _compiled(self) -> Any:
        return _ENVIRONMENT.from_string(self.source)

    def render(self, row: Row) -> str:
        """Render the template with the fields of `row`."""
        try:
            return str(self._compiled.render({"row": row.fields, **row.fields}))
        # A template is a small program: any error it raises is an error in the task file or the row.
        except Exception as error:
            raise ValueError(self._explain(error, row)) from error

    def value(self, row: Row) -> Any:
        """Evaluate a template that is a single expression, `"{{ field }}"`; render any other to text.

        Only an integer or a list is returned as a value; anything else is rendered, so that strings stay unchanged.
        """
        if self._expression is not None:
            try:
                value = self._expression(**{"row": row.fields, **row.fields})
            except Exception as error:
                raise ValueError(self._explain(error, row)) from error
            if isinstance(value, list | tuple):
                return list(value)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return self.render(row)

    def texts(self, row: Row) -> list[str]:
        """Return the items of a list template as strings, or the one rendered text."""
        value = self.value(row)
        items = value if isinstance(value, list) else [value]
        if any(item is None for item in items):
            raise ValueError(f"`{self.key}` must not hold a missing value, got {items} in {row.place}. Drop the row.")
        return [str(item) for item in items]

    @property
    def names(self) -> set[str]:
        """Names of the fields used by the template."""
        return meta.find_undeclared_variables(_ENVIRONMENT.parse(self.source)) - {"row", *_ENVIRONMENT.globals}

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
            closest = difflib.get_close_matches(unknown[0], list(row.fields), n=1)
            hint = f"Did you mean {closest[0]!r}? " if closest else ""
            return (
                f"`{self.key}` must name fields of the data, got {unknown[0]!r} in {row.place}. {hint}"
                f"Its fields are: {', '.join(row.fields)}."
            )
        if isinstance(error, _NoValueError):
            missing = [name for name, value in row.fields.items() if value is None and name in (names or row.fields)]
            fields = ", ".join(missing or names)
            return (
                f"`{self.key}` must not print a missing value, got one for {fields} in {row.place}. "
                "Fill it in, drop the row, or give a default: `{{ field or '' }}`."
            )
        return f"`{self.key}` must render for every row, got {type(error).__name__} in {row.place}: {error}"


@dataclass(frozen=True)
class Prompt:
    """The model's prompt: one template, or chat messages with `roles`."""

    templates: tuple[RowTemplate, ...]
    roles: tuple[str, ...] = ()

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Prompt:
        """Read `prompt` or `chat`.

        Raises:
            ValueError: If both or neither are given, or a message has an unknown key.
            TypeError: If a value has the wrong type.
        """
        prompt, chat = spec.get("prompt"), spec.get("chat")
        if (prompt is None) == (chat is None):
            got = "neither" if prompt is None else "both"
            raise ValueError(f"Exactly one of `prompt` and `chat` must be given, got {got}.")
        if prompt is not None:
            if not isinstance(prompt, str):
                raise TypeError(f"`prompt` must be a string, got {prompt!r}. For messages use `chat`.")
            return cls((RowTemplate("prompt", prompt),))
        if not isinstance(chat, list) or not chat:
            raise TypeError(f"`chat` must be a list of messages with `role` and `content`, got {chat!r}.")
        return cls(
            tuple(RowTemplate(f"chat[{i}].content", _message(i, message)["content"]) for i, message in enumerate(chat)),
            tuple(message["role"] for message in chat),
        )

    def render(self, row: Row) -> tuple[str, ...]:
        """Render the templates with the fields of `row`: one text, or the content of each message."""
        texts = tuple(template.render(row) for template in self.templates)
        if not any(text.strip() for text in texts):
            raise ValueError(f"`{self.templates[0].key}` must not be empty, got {texts[0]!r} in {row.place}.")
        return texts

    def text(self, texts: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> str:
        """Join rendered `texts` into the prompt.

        Messages are formatted with the tokenizer's chat template and its generation prompt; if the last message has
        the role `assistant`, the answer continues it.

        Raises:
            ValueError: If the tokenizer has no chat template, or the template rejects the messages.
        """
        if not self.roles:
            return texts[0]
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "`chat` must be used with a tokenizer that has a chat template, got one without. Use `prompt`, or an "
                "instruction-tuned model."
            )
        messages = [{"role": role, "content": text} for role, text in zip(self.roles, texts, strict=True)]
        continued = self.roles[-1] == "assistant"
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
                )
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ValueError(
                f"`chat` must fit the tokenizer's chat template, got an error for the roles {', '.join(self.roles)}: "
                f"{error}"
            ) from error


def _message(index: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise TypeError(f"`chat[{index}]` must be a mapping with `role` and `content`, got {message!r}.")
    check_keys(message, ("role", "content"), f"chat[{index}]")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise TypeError(f"`chat[{index}].{key}` must be a string, got {message.get(key)!r}.")
    return message
