r"""The model's prompt: one template over the fields of a row, or chat messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from optimum_sieve._messages import cut, listed, shown

from .spec import check_keys
from .templates.function import TEMPLATE, Template, row_template
from .templates.template import Row, RowTemplate


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "Row", "RowTemplate", "require_fields"]

# Arguments of `apply_chat_template` that are set here, or that would change what it returns.
_SET_HERE = (
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages"),
    *("padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens"),
    *("tokenize", "tokenizer_kwargs", "truncation"),
)


@dataclass(frozen=True)
class Prompt:
    """The model's prompt: one template, or chat messages with `roles`.

    Args:
        templates (`tuple[Template, ...]`):
            Template of the prompt, or of the content of each message.
        roles (`tuple[str, ...]`):
            Role of each message; empty without chat.
        options (`dict[str, Any]`):
            Values that the tokenizer's chat template reads, such as `{"enable_thinking": False}`.
    """

    templates: tuple[Template, ...]
    roles: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Prompt:
        """Read `prompt`, or `chat` and `chat_template_kwargs`.

        Raises:
            ValueError: If both prompt and chat or neither are given, or a message has an unknown key.
            TypeError: If a value has the wrong type.
        """
        prompt, chat = spec.get("prompt"), spec.get("chat")
        if (prompt is None) == (chat is None):
            got = "neither" if prompt is None else "both"
            raise ValueError(f"Exactly one of `prompt` and `chat` must be given, got {got}.")
        if prompt is not None:
            if not isinstance(prompt, TEMPLATE):
                raise TypeError(f"`prompt` must be a string, got {shown(prompt)}. For messages use `chat`.")
            if spec.get("chat_template_kwargs") is not None:
                raise ValueError(
                    "`chat_template_kwargs` must go with `chat`, got `prompt`, which no chat template reads."
                )
            template = row_template("prompt", prompt)
            require_fields("prompt", (template,))
            return cls((template,))
        if not isinstance(chat, list) or not chat:
            raise TypeError(f"`chat` must be a list of messages with `role` and `content`, got {shown(chat)}.")
        contents = [_message(i, message)["content"] for i, message in enumerate(chat)]
        templates = tuple(row_template(f"chat[{i}].content", content) for i, content in enumerate(contents))
        require_fields("chat", templates)
        return cls(templates, tuple(message["role"] for message in chat), _chat_options(spec))

    def render(self, row: Row) -> tuple[str, ...]:
        """Render the templates with the fields of `row`: one text, or the content of each message."""
        texts = tuple(template.render(row) for template in self.templates)
        if not any(text.strip() for text in texts):
            raise ValueError(f"`{self.templates[0].key}` must not be empty, got {shown(texts[0])} in {row.place}.")
        return texts

    def text(self, texts: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> str:
        """Join rendered `texts` into the prompt.

        Messages are formatted with the tokenizer's chat template, `options` and its generation prompt; if the last
        message has the role `assistant`, the answer continues it.

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
                    messages,
                    tokenize=False,
                    add_generation_prompt=not continued,
                    continue_final_message=continued,
                    **self.options,
                )
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ValueError(
                f"`chat` must fit the tokenizer's chat template, got an error for the roles {listed(self.roles)}: "
                f"{cut(str(error))}"
            ) from error


def require_fields(key: str, templates: tuple[Template, ...]) -> None:
    """Raise `ValueError` unless one of `templates` uses a field: all rows would get the same text."""
    if not any(template.uses_row for template in templates):
        raise ValueError(
            f"`{key}` must use a field of the data, got none in {shown(templates[0].source)}. Write a field in double "
            "braces: `{{ field }}`."
        )


def _chat_options(spec: dict[str, Any]) -> dict[str, Any]:
    options = spec.get("chat_template_kwargs")
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise TypeError(
            f"`chat_template_kwargs` must be a mapping of what the chat template reads, got {shown(options)}. Write "
            "for example `{enable_thinking: false}`."
        )
    for key in options:
        if key in _SET_HERE:
            raise ValueError(
                f"`chat_template_kwargs` must not set {key!r}, which optimum-sieve sets by itself. Remove it."
            )
    for key in ("tools", "documents"):
        items = options.get(key)
        if items is not None and not (isinstance(items, list) and all(isinstance(item, dict) for item in items)):
            raise TypeError(f"`chat_template_kwargs.{key}` must be a list of mappings, got {shown(items)}.")
    return options


def _message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise TypeError(f"`chat[{index}]` must be a mapping with `role` and `content`, got {shown(message)}.")
    check_keys(message, ("role", "content"), f"chat[{index}]")
    for key, kinds in (("role", str), ("content", TEMPLATE)):
        if not isinstance(message.get(key), kinds):
            raise TypeError(f"`chat[{index}].{key}` must be a string, got {shown(message.get(key))}.")
    return message
