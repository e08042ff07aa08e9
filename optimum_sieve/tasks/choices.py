r"""`kind: choices`: each example has its own choices, one of them right, scored by letter or by text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from optimum_sieve._messages import listed, shown

from .example import Reference
from .prompts import Row, RowTemplate, require_fields
from .spec import normal, optional
from .templates.function import TEMPLATE, row_template


if TYPE_CHECKING:
    from .prompts import Prompt
    from .templates.function import Template


# Names that `prompt` and `candidate` may use in addition to the fields of the data.
_SHOWN = ("choices", "lettered_choices")


@dataclass(frozen=True)
class Choices:
    """Read `choices`, `answer`, `candidate`, `shuffle` and `normalize` of a task file.

    In the prompt, `choices` is the list of texts in display order; `lettered_choices` has one line each, `A. first`.
    """

    keys: ClassVar[tuple[str, ...]] = ("choices", "answer", "candidate", "shuffle", "normalize")
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    choices: tuple[Template, ...]
    answer: Template | None
    candidate: RowTemplate
    shuffle: bool
    normalize: bool
    seed: int

    @classmethod
    def from_spec(cls, spec: dict[str, Any], prompt: Prompt, seed: int) -> Choices:
        """Check the keys.

        Raises:
            ValueError: If a key is missing, or letters are scored but the prompt does not show them.
            TypeError: If a value has the wrong type.
        """
        texts = spec.get("choices")
        meaning = 'a template of a list, such as "{{ choices }}", or a list of templates, one per choice'
        if isinstance(texts, TEMPLATE):
            texts = [texts]
        elif not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, TEMPLATE) for text in texts):
            raise TypeError(f"`choices` must be {meaning}, got {shown(texts)}.")
        answer = optional(
            spec, "answer", TEMPLATE, "a template of the right choice's index (from 0), letter or text", None
        )
        # After most chat templates, an answer begins without a space.
        default = "{{ letter }}" if prompt.roles else " {{ letter }}"
        candidate = RowTemplate("candidate", optional(spec, "candidate", str, "a template", default))
        unknown = candidate.names - {"letter", "choice"}
        if unknown or not candidate.names:
            raise ValueError(
                f"`candidate` must name `letter` or `choice`, and nothing else, got {shown(candidate.source)}. It "
                "renders the text scored for each choice."
            )
        if "letter" in candidate.names and not any(set(_SHOWN) & template.names for template in prompt.templates):
            raise ValueError(
                "`prompt` must show the choices when letters are scored, got neither `{{ lettered_choices }}` nor "
                '`{{ choices }}`. Add one, or score the texts: `candidate: " {{ choice }}"`.'
            )
        gold = None if answer is None else row_template("answer", answer)
        if gold is not None:
            require_fields("answer", (gold,))
        return cls(
            choices=tuple(row_template("choices", text) for text in texts),
            answer=gold,
            candidate=candidate,
            shuffle=optional(spec, "shuffle", bool, "true or false", False),
            normalize=optional(spec, "normalize", bool, "true or false", False),
            seed=seed,
        )

    def without_answer(self) -> Choices:
        """Return this without an `answer`."""
        return replace(self, answer=None)

    def shown(self, row: Row, *, shuffled: bool = True) -> Row:
        """Add the choices to the fields that the prompt may use; in the order of the data if not `shuffled`."""
        texts = self._texts(row)
        ordered = [texts[index] for index in self._order(row, len(texts))] if shuffled else texts
        lines = (f"{letter}. {text}" for letter, text in zip(ascii_uppercase, ordered, strict=False))
        return row.with_fields(choices=ordered, lettered_choices="\n".join(lines))

    def reference(self, row: Row) -> Reference:
        """Return the choices of `row` in display order and, if the task has an `answer`, which one is right.

        Raises:
            ValueError: If there are fewer than 2 or more than 26 choices, or the answer does not match exactly one.
        """
        texts = self._texts(row)
        order = self._order(row, len(texts))
        lettered_rows = [
            row.with_fields(letter=letter, choice=texts[index])
            for letter, index in zip(ascii_uppercase, order, strict=False)
        ]
        candidates = tuple(self.candidate.render(lettered) for lettered in lettered_rows)
        if len(set(map(normal, candidates))) < len(candidates) or not all(candidates):
            raise ValueError(
                f"`choices` must be distinct texts, none empty, got {listed(map(shown, texts))} in "
                f"{row.place}. Drop the row."
            )
        if self.answer is None:
            return Reference("", candidates, normalized=self.normalize)
        target = order.index(self._right(self.answer.value(row), row, texts))
        return Reference(candidates[target], candidates, target, normalized=self.normalize)

    def _texts(self, row: Row) -> list[str]:
        texts = [text for template in self.choices for text in template.texts(row)]
        if not 2 <= len(texts) <= len(ascii_uppercase):
            raise ValueError(
                f"`choices` must be 2 to {len(ascii_uppercase)} texts in every row, got {len(texts)} in {row.place}: "
                f"{shown(texts)}."
            )
        return texts

    def _order(self, row: Row, count: int) -> list[int]:
        """Return the indices of the choices in display order, which depends only on the seed and the row."""
        if not self.shuffle:
            return list(range(count))
        return [int(index) for index in np.random.default_rng((self.seed, row.number)).permutation(count)]

    def _right(self, value: Any, row: Row, texts: list[str]) -> int:
        """Return the index of the right choice: an int is the index; a string may be the letter, choice or index."""
        if isinstance(value, int):
            matches = {value} & set(range(len(texts)))
        else:
            names = {normal(str(value)), normal(str(value).strip())}
            letters = ascii_uppercase[: len(texts)]
            matches = {
                index
                for index, (text, letter) in enumerate(zip(texts, letters, strict=True))
                if names & {normal(text), letter, letter.lower(), str(index)}
            }
        if len(matches) != 1:
            raise ValueError(
                f"`answer` must be the index (from 0), the letter or the text of exactly one of the choices "
                f"{listed(map(shown, texts))}, got {shown(value)} in {row.place}, which matches "
                f"{len(matches) or 'none'} of them. "
                "An integer is always an index: `{{ answer | int }}`."
            )
        return matches.pop()
