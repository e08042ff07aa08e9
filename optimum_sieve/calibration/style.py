"""The style of a task's prompts: what they share, and which texts that a model wrote have their form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_sieve.tasks.parts import line_beginnings, shared_parts


if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from optimum_sieve.evaluation.generation import Written


@dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """What the prompts of a task look like.

    Args:
        begin (`str`): What all begin with.
        bodies (`tuple[str, ...]`): The rest of each, but for empty ones.
        end (`str`): What all end with.
        separator (`str`): A text that no body has.
        line_counts (`range`): Numbers of lines that a body may have.
        line_beginnings (`tuple[str, ...]`): What each line of all bodies begins with.
        marks (`tuple[str, ...]`): Tokens of a chat template, which no body has.
    """

    begin: str
    bodies: tuple[str, ...]
    end: str
    separator: str
    line_counts: range
    line_beginnings: tuple[str, ...]
    marks: tuple[str, ...]

    @classmethod
    def of(cls, prompts: Sequence[str], marks: Collection[str]) -> PromptStyle | None:
        """Return the style of prompts; `None` if they do not differ, or only in texts with `marks` of a template."""
        begin, bodies, end = shared_parts(prompts, marks)
        # A model writes such tokens only to end a text.
        bodies = [body.strip() for body in bodies if body.strip() and not any(mark in body for mark in marks)]
        if len(set(bodies)) < 2:
            return None
        separator = "\n\n" if not any("\n\n" in body for body in bodies) else "\n\n###\n\n"
        counts = [body.count("\n") + 1 for body in bodies]
        return cls(
            begin=begin,
            bodies=tuple(bodies),
            end=end,
            separator=separator,
            line_counts=range(min(counts), max(counts) + 1),
            line_beginnings=tuple(line_beginnings(bodies)),
            marks=tuple(marks),
        )

    def read(self, written: Written) -> Iterator[str]:
        """Yield the prompts in a text that the model wrote."""
        items = written.text.split(self.separator)
        for item in map(str.strip, items if written.ended else items[:-1]):
            if self._has_form(item):
                yield f"{self.begin}{item}{self.end}"

    def _has_form(self, item: str) -> bool:
        lines = item.split("\n")
        return (
            bool(item)
            and len(lines) in self.line_counts
            and all(line.startswith(start) for line, start in zip(lines, self.line_beginnings, strict=False))
            and not any(text in item for text in (self.end.strip(), *self.marks) if text)
        )
