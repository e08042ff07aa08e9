r"""`Example`: one row of a task as texts; `Reference`: what is right; `Generation`: how an answer is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How an answer is written: token by token, each the likeliest.

    Args:
        max_new_tokens (`int`):
            Most tokens that are written.
        stop (`tuple[str, ...]`):
            Texts that end an answer; it is cut where the first of them begins.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()

    def continuation(self, prompt: str, answer: str, end_of_text: str | None, *, ended: bool = True) -> str:
        """Return `answer` as it would be written after `prompt`, with what ends it if it is `ended`.

        A space comes first unless the prompt ends with one or with a line break. It ends with the first stop text or,
        where there is none, the tokenizer's end of text.
        """
        space = " " if answer and not prompt[-1:].isspace() else ""
        return space + answer + ((self.stop[0] if self.stop else end_of_text or "") if ended else "")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a task, as the texts a model is given and scored on.

    Args:
        prompt (`str`):
            Text the model is given, a chat template already applied.
        answer (`str`):
            Gold text that follows the prompt, with what ends it where it is written; no text where the data has none.
        candidates (`tuple[str, ...]`):
            Texts whose log-likelihoods are compared; empty where the answer is generated.
        target (`int`, *optional*):
            Index of the gold candidate.
        normalized (`bool`):
            Whether each candidate's log-likelihood is divided by its number of characters, without spaces around it.
        accepted (`tuple[str, ...]`):
            What a written answer is held against.
        generation ([`Generation`], *optional*):
            How the answer is written; `None` where candidates are scored.
        add_special_tokens (`bool`):
            Whether the tokenizer puts its BOS before the prompt; `False` where a chat template wrote it.
    """

    prompt: str
    answer: str
    candidates: tuple[str, ...] = ()
    target: int | None = None
    normalized: bool = False
    accepted: tuple[str, ...] = ()
    generation: Generation | None = None
    add_special_tokens: bool = True


@dataclass(frozen=True)
class Reference:
    """What an answer is held against.

    Args:
        answer (`str`):
            Gold text.
        candidates (`tuple[str, ...]`):
            Texts that are scored; empty where the answer is generated.
        target (`int`, *optional*):
            Index of the gold candidate.
        normalized (`bool`):
            Whether a candidate's log-likelihood counts per character.
        accepted (`tuple[str, ...]`):
            What a written answer is held against.
    """

    answer: str
    candidates: tuple[str, ...] = ()
    target: int | None = None
    normalized: bool = False
    accepted: tuple[str, ...] = ()
