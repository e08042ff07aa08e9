"""The part of a task that applies to rows without answers: prompt, candidates and generation. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .choices import Choices
from .labels import LabelScoring
from .prompts import Prompt
from .reading import KINDS, read_kind
from .spec import plain
from .templates.template import Row


if TYPE_CHECKING:
    from collections.abc import Mapping

    from .reading import Answering

# What a prompt may use of the choices of a row.
_MADE = {"choices", "lettered_choices"}


@dataclass(frozen=True)
class TaskTemplate:
    """Prompt and answers of a task, without its data.

    Args:
        prompt (`Prompt`): The prompt.
        scoring (`LabelScoring`, `Choices` or `Generate`): How answers are found, without gold ones.
        fields (`tuple[str, ...]`): Names of the fields that its templates use, in alphabetical order.
    """

    prompt: Prompt
    scoring: Answering
    fields: tuple[str, ...]

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> TaskTemplate:
        """Read a task as a task file or `sieve_task.json` holds it; `data` is not read, choices are not shuffled.

        Raises:
            ValueError: If a key is missing or invalid.
            TypeError: If a value has the wrong type.
        """
        spec = {key: value for key, value in plain(dict(spec)).items() if key != "shuffle"}
        kind = read_kind(spec)
        prompt = Prompt.from_spec(spec)
        scoring = KINDS[kind].from_spec(spec, prompt, 0).without_answer()
        names = set().union(*(template.names for template in prompt.templates))
        if isinstance(scoring, Choices):
            names = names - _MADE | set().union(*(template.names for template in scoring.choices))
        return cls(prompt, scoring, tuple(sorted(names)))

    def render(
        self, fields: Mapping[str, Any], number: int
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Render one row.

        Args:
            fields (`Mapping[str, Any]`): The row.
            number (`int`): Its number, from 1, for messages.

        Returns:
            `tuple[tuple[str, ...], ...]`: Texts of the prompt (messages not yet joined), the candidates, and what each
                candidate stands for.

        Raises:
            ValueError: If the row lacks a field, or a template fails.
        """
        row = Row(dict(fields), "inputs", number)
        prompted = self.scoring.shown(row)
        names: tuple[str, ...] = ()
        if isinstance(self.scoring, LabelScoring):
            names = tuple(self.scoring.labels)
        elif isinstance(self.scoring, Choices):
            names = tuple(prompted.fields["choices"])
        return self.prompt.render(prompted), self.scoring.reference(row).candidates, names
