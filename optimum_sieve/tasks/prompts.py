r"""Sandboxed jinja2 templates over the fields of a row, strict about missing values; prompts and chat messages."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes

from optimum_sieve._messages import closest, cut, listed, shown

from .sandbox import BoundedEnvironment, MissingValueError, budget
from .spec import check_keys


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        return self._encodable(text, row)

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

    def _encodable(self, text: str, row: Row) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            surrogate = ascii(text[error.start])
            raise ValueError(
                f"`{self.key}` must render to valid Unicode, got the lone surrogate {surrogate} in {row.place}. Repair "
                "the text."
            ) from error
        return text

    def texts(self, row: Row) -> list[str]:
        """Return the items of a list template as strings, or the one rendered text."""
        value = self.value(row)
        items = value if isinstance(value, list) else [value]
        if any(item is None for item in items):
            raise ValueError(
                f"`{self.key}` must not hold a missing value, got {shown(items)} in {row.place}. Drop the row."
            )
        return [self._encodable(str(item), row) for item in items]

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


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


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
                raise TypeError(f"`prompt` must be a string, got {shown(prompt)}. For messages use `chat`.")
            template = RowTemplate("prompt", prompt)
            require_fields("prompt", (template,))
            return cls((template,))
        if not isinstance(chat, list) or not chat:
            raise TypeError(f"`chat` must be a list of messages with `role` and `content`, got {shown(chat)}.")
        contents = [_message(i, message)["content"] for i, message in enumerate(chat)]
        templates = tuple(RowTemplate(f"chat[{i}].content", content) for i, content in enumerate(contents))
        require_fields("chat", templates)
        return cls(templates, tuple(message["role"] for message in chat))

    def render(self, row: Row) -> tuple[str, ...]:
        """Render the templates with the fields of `row`: one text, or the content of each message."""
        texts = tuple(template.render(row) for template in self.templates)
        if not any(text.strip() for text in texts):
            raise ValueError(f"`{self.templates[0].key}` must not be empty, got {shown(texts[0])} in {row.place}.")
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
                f"`chat` must fit the tokenizer's chat template, got an error for the roles {listed(self.roles)}: "
                f"{cut(str(error))}"
            ) from error


def require_fields(key: str, templates: tuple[RowTemplate, ...]) -> None:
    """Raise `ValueError` unless one of `templates` uses a field: all rows would get the same text."""
    if not any(template.uses_row for template in templates):
        raise ValueError(
            f"`{key}` must use a field of the data, got none in {shown(templates[0].source)}. Write a field in double "
            "braces: `{{ field }}`."
        )


def _message(index: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise TypeError(f"`chat[{index}]` must be a mapping with `role` and `content`, got {shown(message)}.")
    check_keys(message, ("role", "content"), f"chat[{index}]")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise TypeError(f"`chat[{index}].{key}` must be a string, got {shown(message.get(key))}.")
    return message
