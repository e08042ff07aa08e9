"""`pipeline("sieve", model=...)` where this package is installed: rows are scored as `evaluate` scores them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.evaluation.batches import check_examples, make_batches
from optimum_sieve.evaluation.generation import check_generation, write_answers
from optimum_sieve.evaluation.likelihoods import candidate_scores
from optimum_sieve.modeling import pipeline_sieve
from optimum_sieve.modeling.pipeline_scores import RenderedRow, label_offsets
from optimum_sieve.tasks.example import Example
from optimum_sieve.tasks.generate import Generate
from optimum_sieve.tasks.spec import read_spec
from optimum_sieve.tasks.template import TaskTemplate


if TYPE_CHECKING:
    from collections.abc import Sequence


# What `sieve_task.json` has besides the keys of a task file.
_ADDED = ("results", "label_offsets")


class SievePipeline(pipeline_sieve.SievePipeline):
    """The same pipeline with the package's own code: sandboxed templates with bounds, `evaluate`'s batches.

    `task_file` may also be a task file in YAML, whose `data` is not read: then any model of transformers answers.
    """

    def _read_tasks(self, task_file: Any) -> list[dict[str, Any]]:
        """Return the tasks of a task file (YAML or JSON), of a `sieve_task.json`, or of the model's own."""
        content = read_spec(Path(task_file)) if isinstance(task_file, str | Path) else task_file
        if isinstance(content, dict) and "format_version" not in content:
            return [content]
        return pipeline_sieve.read_tasks(self.model, content)

    def _prepare(self) -> None:
        self.fields = list(self.template.fields)

    @cached_property
    def template(self) -> TaskTemplate:
        """The task's prompt and answers."""
        return TaskTemplate.from_spec({key: value for key, value in self.spec.items() if key not in _ADDED})

    def render(self, row: dict[str, Any], number: int) -> RenderedRow:
        """Render one row with the rules of task files."""
        texts, candidates, names = self.template.render(row, number)
        prompt = self.template.prompt.text(texts, self.tokenizer)
        return RenderedRow(prompt, candidates, names, special=not self.template.prompt.roles)

    def preprocess(  # type: ignore[override]
        self, input_: Any, first: int = 1, **parameters: Any
    ) -> dict[str, Any]:
        """Render a list of rows, but not those that [`check`] rendered; `first` is the number of the first one."""
        return {
            "rows": [
                row if isinstance(row, RenderedRow) else self.render(self._fields(row, number), number)
                for number, row in enumerate(input_, first)
            ]
        }

    def check(self, rows: Sequence[Any]) -> list[RenderedRow]:
        """Check that all rows can be answered, before any is; return them rendered, which the pipeline answers too.

        Raises:
            TypeError: If a row is neither a mapping nor a text that the task accepts.
            ValueError: If a row lacks a field, or its text does not fit in the model's context.
        """
        rendered: list[RenderedRow] = self.preprocess(rows)["rows"]
        examples, inputs = self._examples(rendered), input_format(self.model)
        if examples[0].generation is not None:
            check_generation(examples, self.tokenizer, inputs)
        else:
            check_examples(examples, self.tokenizer, inputs=inputs)
        return rendered

    def scores(self, rows: Sequence[RenderedRow], batch_size: int) -> list[Any]:
        """Return the log-likelihoods (candidates,) of each row, with label offsets, as `evaluate` computes them."""
        examples = self._examples(rows)
        batches = make_batches(examples, self.tokenizer, batch_size=batch_size, model=self.model, divide=True)
        scores = candidate_scores(self.model, batches, examples)
        offsets = [label_offsets(self.model, self.spec, row.candidates) for row in rows]
        return [each[: len(added)] + added for each, added in zip(scores, offsets, strict=True)]

    def written(self, rows: Sequence[RenderedRow], batch_size: int) -> list[str]:
        """Return the text that the model writes after each prompt, cut at the stops."""
        answers = write_answers(self.model, self._examples(rows), self.tokenizer, batch_size=batch_size)
        return [answer.text for answer in answers]

    def _examples(self, rows: Sequence[RenderedRow]) -> list[Example]:
        scoring = self.template.scoring
        return [
            Example(
                prompt=row.prompt,
                answer="",
                candidates=row.candidates,
                normalized=bool(self.spec.get("normalize")),
                generation=scoring.generation if isinstance(scoring, Generate) else None,
                add_special_tokens=row.special,
            )
            for row in rows
        ]


# Also without a pruned model, whose configuration does the same.
pipeline_sieve.register_pipeline("sieve")
