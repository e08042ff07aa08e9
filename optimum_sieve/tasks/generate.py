r"""`kind: generate`: the model answers each example with generated text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_sieve._messages import shown
from optimum_sieve.metrics.text_metrics import LIST_METRICS, TEXT_METRICS, last_number

from .example import Generation, Reference
from .prompts import Row, require_fields
from .templates.function import TEMPLATE, row_template


if TYPE_CHECKING:
    from .prompts import Prompt
    from .templates.function import Template


_MOST_TOKENS = 1_000_000


@dataclass(frozen=True)
class Generate:
    """Read `answer`, `stop` and `max_new_tokens` of a task file."""

    keys: ClassVar[tuple[str, ...]] = ("answer", "stop", "max_new_tokens")
    metrics: ClassVar[tuple[str, ...]] = TEXT_METRICS

    answers: tuple[Template, ...]
    generation: Generation
    metric: Any

    @classmethod
    def from_spec(cls, spec: dict[str, Any], prompt: Prompt, seed: int) -> Generate:
        """Check the keys; the prompt and the seed are not used.

        Raises:
            ValueError: If a key is missing or out of range.
            TypeError: If a value has the wrong type.
        """
        answers, stop = _strings(spec, "answer", TEMPLATE), _strings(spec, "stop", str)
        max_new_tokens = spec.get("max_new_tokens")
        if "" in stop:
            raise ValueError(f"`stop` must not hold empty strings, got {shown(stop)}.")
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(
                f"`max_new_tokens` must be a whole number of at least 1, got {shown(max_new_tokens)}. `kind: generate` "
                "requires it."
            )
        if max_new_tokens > _MOST_TOKENS:
            raise ValueError(f"`max_new_tokens` must be at most {_MOST_TOKENS:,}, got {max_new_tokens:,}.")
        templates = tuple(row_template("answer", answer) for answer in answers)
        if templates:
            require_fields("answer", templates)
        return cls(
            answers=templates,
            generation=Generation(max_new_tokens=max_new_tokens, stop=tuple(stop)),
            metric=spec.get("metric", TEXT_METRICS[0]),
        )

    def without_answer(self) -> Generate:
        """Return this without an `answer`."""
        return replace(self, answers=())

    def shown(self, row: Row, *, shuffled: bool = True) -> Row:
        """Return `row` unchanged: the prompt uses only its fields."""
        return row

    def reference(self, row: Row) -> Reference:
        """Return the accepted answers of `row`, stripped; none if the task has no `answer`.

        Raises:
            ValueError: If an answer is empty, contains a stop string, or does not fit the metric.
        """
        if not self.answers:
            return Reference("")
        accepted = [text.strip() for template in self.answers for text in template.texts(row)]
        if not accepted or not all(accepted):
            raise ValueError(
                f"`answer` must render to at least one text, none empty, got {shown(accepted)} in {row.place}. Drop "
                "the row, or give a default answer: `{{ answer or 'none' }}`."
            )
        for text in accepted:
            cut = next((stop for stop in self.generation.stop if stop in text), None)
            if cut is not None:
                raise ValueError(
                    f"`stop` must not occur in an answer, got {shown(cut)} in {shown(text)} in {row.place}. Generation "
                    "would stop there."
                )
            if self.metric == "numeric" and last_number(text) is None:
                raise ValueError(
                    f"`answer` must contain a number for the metric 'numeric', got {shown(text)} in {row.place}."
                )
        if self.metric in LIST_METRICS and len(accepted) > 1:
            raise ValueError(
                f"`answer` must render the whole list as one text for the metric {self.metric!r}, got "
                f"{len(accepted)} texts in {row.place}. Join them: `{{{{ names | join('\\n') or 'none' }}}}`."
            )
        return Reference(accepted[0], accepted=tuple(accepted))


def _strings(spec: dict[str, Any], key: str, kinds: Any) -> list[Any]:
    """Return a string or a list of strings as a list."""
    value = spec.get(key)
    strings = [] if value is None else [value] if isinstance(value, kinds) else value
    if not isinstance(strings, list) or not all(isinstance(string, kinds) for string in strings):
        raise TypeError(f"`{key}` must be a string or a list of strings, got {shown(value)}. Put it in quotes.")
    return strings
