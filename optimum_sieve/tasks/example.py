r"""`Example`: one row of a task, rendered to text; `Reference`: the part of it that says what is right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a task, as the texts a model is given and scored on.

    Args:
        prompt (`str`):
            Text the model is given, a chat template already applied.
        answer (`str`):
            Gold text that follows the prompt.
        candidates (`tuple[str, ...]`):
            Texts whose log-likelihoods are compared; empty where the answer is generated.
        target (`int`, *optional*):
            Index of the gold candidate.
        normalized (`bool`):
            Whether each candidate's log-likelihood is divided by its number of characters, without spaces around it.
        add_special_tokens (`bool`):
            Whether the tokenizer puts its BOS before the prompt; `False` where a chat template wrote it.
    """

    prompt: str
    answer: str
    candidates: tuple[str, ...] = ()
    target: int | None = None
    normalized: bool = False
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
    """

    answer: str
    candidates: tuple[str, ...] = ()
    target: int | None = None
    normalized: bool = False
