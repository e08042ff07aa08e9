r"""`kind: generate`: every example is answered by a text that the model writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .example import Generation, Reference
from .prompts import Row, RowTemplate
from .text_metrics import LIST_METRICS, TEXT_METRICS, last_number


if TYPE_CHECKING:
    from .prompts import Prompt


@dataclass(frozen=True)
class Generate:
    """Read `answer`, `stop` and `max_new_tokens` of a task file."""

    keys: ClassVar[tuple[str, ...]] = ("answer", "stop", "max_new_tokens")
    metrics: ClassVar[tuple[str, ...]] = TEXT_METRICS

    answers: tuple[RowTemplate, ...]
    generation: Generation
    metric: str | None

    @classmethod
    def from_spec(cls, spec: dict[str, Any], prompt: Prompt, seed: int) -> Generate:
        """Check the keys; the prompt and the seed do not matter.

        Raises:
            ValueError: If a key is absent or out of its range.
            TypeError: If a value is of the wrong type.
        """
        answers, stop, most = _texts(spec, "answer"), _texts(spec, "stop"), spec.get("max_new_tokens")
        if "" in stop:
            raise ValueError(f"`stop` must hold texts that are not empty, got {stop}.")
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(
                f"`max_new_tokens` must be a whole number of at least 1, got {most!r}. Give it for this kind."
            )
        return cls(
            answers=tuple(RowTemplate("answer", answer) for answer in answers),
            generation=Generation(max_new_tokens=most, stop=tuple(stop)),
            metric=spec.get("metric", TEXT_METRICS[0]),
        )

    def shown(self, row: Row, *, shuffled: bool = True) -> Row:
        """Return `row`: there is nothing else to show in a prompt."""
        return row

    def reference(self, row: Row) -> Reference:
        """Return the accepted answers of `row`, without spaces around them; none where there is no `answer`.

        Raises:
            ValueError: If one is empty, would be cut by a stop text, or is not what the metric reads.
        """
        if not self.answers:
            return Reference("")
        accepted = [text.strip() for template in self.answers for text in template.texts(row)]
        if not accepted or not all(accepted):
            raise ValueError(
                f"`answer` must be one text or more, none of them empty, got {accepted} in {row.place}. Drop the row, "
                "or write what the model shall answer then: `{{ answer or 'none' }}`."
            )
        for text in accepted:
            cut = next((stop for stop in self.generation.stop if stop in text), None)
            if cut is not None:
                raise ValueError(
                    f"`stop` must not occur in an answer, got {cut!r} in {text!r} in {row.place}: what the model "
                    "writes would be cut there."
                )
            if self.metric == "numeric" and last_number(text) is None:
                raise ValueError(f"`answer` must hold a number for the metric 'numeric', got {text!r} in {row.place}.")
        if self.metric in LIST_METRICS and len(accepted) > 1:
            raise ValueError(
                f"`answer` must be one text that holds the whole list for the metric {self.metric!r}, got "
                f"{len(accepted)} texts in {row.place}. Join them: `{{{{ names | join('\\n') or 'none' }}}}`."
            )
        return Reference(accepted[0], accepted=tuple(accepted))


def _texts(spec: dict[str, Any], key: str) -> list[str]:
    """Return one text or a list of texts as a list."""
    value = spec.get(key)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`{key}` must be a text or a list of texts, got {value!r}. Put it in quotes.")
    return texts
