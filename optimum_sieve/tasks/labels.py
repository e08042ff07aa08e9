r"""`kind: labels`: the answer is the label with the highest log-likelihood, out of one fixed set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_sieve._messages import listed, shown
from optimum_sieve.metrics.class_metrics import CLASS_METRICS

from .example import Reference
from .prompts import Row, require_fields
from .spec import normal, optional, require
from .templates.function import TEMPLATE, row_template


if TYPE_CHECKING:
    from .prompts import Prompt
    from .templates.function import Template


@dataclass(frozen=True)
class LabelScoring:
    """Read `answer` and `labels` of a task file; `labels` maps a label of the data to the text to score."""

    keys: ClassVar[tuple[str, ...]] = ("answer", "labels")
    metrics: ClassVar[tuple[str, ...]] = CLASS_METRICS

    answer: Template | None
    labels: dict[str, str]

    @classmethod
    def from_spec(cls, spec: dict[str, Any], prompt: Prompt, seed: int) -> LabelScoring:
        """Check the two keys; the prompt and the seed are not used.

        Raises:
            ValueError: If a key is missing, there are fewer than two labels, or two have the same text.
            TypeError: If a value has the wrong type.
        """
        labels = require(spec, "labels", dict, "a mapping from each label of the data to the text to score")
        answer = optional(spec, "answer", TEMPLATE, "a template that renders to one of the labels", None)
        if len(labels) < 2:
            raise ValueError(f"`labels` must name at least two labels, got {shown(list(labels))}.")
        for label, text in labels.items():
            if not isinstance(text, str):
                raise TypeError(f"`labels.{label}` must be a string, got {shown(text)}. Put it in quotes.")
            if not text:
                raise ValueError(f"`labels.{label}` must not be empty, got ''. Its text is scored.")
        for what, texts in (("texts", labels.values()), ("names", labels)):
            if len({normal(text) for text in texts}) < len(labels):
                raise ValueError(f"`labels` must have distinct {what}, got {shown(list(texts))}.")
        template = None if answer is None else row_template("answer", answer)
        if template is not None:
            require_fields("answer", (template,))
        return cls(template, labels)

    def without_answer(self) -> LabelScoring:
        """Return this without an `answer`."""
        return replace(self, answer=None)

    def shown(self, row: Row, *, shuffled: bool = True) -> Row:
        """Return `row` unchanged: the prompt uses only its fields."""
        return row

    def reference(self, row: Row) -> Reference:
        """Return the texts of all labels and, if the task has an `answer`, the gold one.

        Raises:
            ValueError: If the rendered answer is not a label.
        """
        if self.answer is None:
            return Reference("", tuple(self.labels.values()))
        value = self.answer.render(row)
        target = self._positions.get(normal(value))
        if target is None:
            known = listed(map(shown, self.labels))
            raise ValueError(f"`answer` must be one of the labels {known}, got {shown(value)} in {row.place}.")
        texts = tuple(self.labels.values())
        return Reference(texts[target], texts, target)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {normal(name): index for index, name in enumerate(self.labels)}
