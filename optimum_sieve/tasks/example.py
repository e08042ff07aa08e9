r"""`Example`: one row of a task as text; `Reference`: its gold answer; `Generation`: how answers are generated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal


if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Settings of greedy generation.

    Args:
        max_new_tokens (`int`):
            Maximum number of tokens to generate.
        stop (`tuple[str, ...]`):
            Stop strings; the answer ends before the first one that occurs.
        scored (`str`):
            What the metric receives: `"text"`, without surrounding white space; `"text as written"`, with it; or
            `"tokens"`, the gold answer if each of its tokens is the most likely one after those before, else another
            text. In the latter two, gold answers are continuations of the prompt as they are.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    scored: Literal["text", "text as written", "tokens"] = "text"

    def continuation(self, prompt: str, answer: str, end_of_text: str | None, *, ended: bool = True) -> str:
        """Return `answer` as the model would generate it after `prompt`.

        A space comes first unless the prompt ends with whitespace. If `ended`, the first stop string follows; without
        stop strings, `end_of_text` follows. Where tokens are scored, nothing is added.
        """
        if self.scored == "tokens":
            return answer or end_of_text or ""
        space = " " if self.scored == "text" and answer and not prompt[-1:].isspace() else ""
        return space + answer + ((self.stop[0] if self.stop else end_of_text or "") if ended else "")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a task as a prompt and the texts scored after it.

    Args:
        prompt (`str`):
            Prompt, with the chat template applied.
        answer (`str`):
            Gold continuation of the prompt; includes the stop string or EOS if generated, empty without a gold answer.
        candidates (`tuple[str, ...]`):
            Texts whose log-likelihoods are compared; empty for generation.
        target (`int`, *optional*):
            Index of the gold candidate.
        normalized (`bool` or `tuple[int, ...]`):
            Whether to divide each candidate's log-likelihood by its number of characters, stripped; or the divisors.
        accepted (`tuple[str, ...]`):
            Accepted answers for generation.
        generation ([`Generation`], *optional*):
            Generation settings; `None` if candidates are scored.
        add_special_tokens (`bool`):
            Whether the tokenizer adds BOS before the prompt; `False` if the chat template did.
    """

    prompt: str
    answer: str
    candidates: tuple[str, ...] = ()
    target: int | None = None
    normalized: bool | tuple[int, ...] = False
    accepted: tuple[str, ...] = ()
    generation: Generation | None = None
    add_special_tokens: bool = True

    @property
    def divisors(self) -> tuple[int, ...]:
        """Divisors of the candidates' log-likelihoods; empty if they are compared as they are."""
        if isinstance(self.normalized, tuple):
            return self.normalized
        return tuple(max(len(text.strip()), 1) for text in self.candidates) if self.normalized else ()

    def with_candidates(self, chosen: Sequence[int]) -> Example:
        """Return the example with some of its candidates, by index; without a target if that is not among them."""
        divisors, target = self.normalized, self.target
        return replace(
            self,
            candidates=tuple(self.candidates[number] for number in chosen),
            normalized=tuple(divisors[number] for number in chosen) if isinstance(divisors, tuple) else divisors,
            target=None if target is None or target not in chosen else list(chosen).index(target),
        )


@dataclass(frozen=True)
class Reference:
    """Gold answer of one row.

    Args:
        answer (`str`):
            Gold text.
        candidates (`tuple[str, ...]`):
            Texts to score; empty for generation.
        target (`int`, *optional*):
            Index of the gold candidate.
        normalized (`bool` or `tuple[int, ...]`):
            Whether to divide a candidate's log-likelihood by its number of characters; or the divisors.
        accepted (`tuple[str, ...]`):
            Accepted answers for generation.
    """

    answer: str
    candidates: tuple[str, ...] = ()
    target: int | None = None
    normalized: bool | tuple[int, ...] = False
    accepted: tuple[str, ...] = ()
