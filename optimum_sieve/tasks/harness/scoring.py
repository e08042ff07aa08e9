r"""Read a task of lm-evaluation-harness as the parts of a [`Task`][optimum_sieve.tasks.task.Task]."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import shown

from ..example import Generation, Reference
from ..prompts import Prompt, RowTemplate
from ..reading import Parts, read_name, read_seed
from ..rows.memory import splits_of
from ..spec import check_keys, optional, require
from .rows import make_rows
from .source import load_source


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..templates.template import Row
    from .source import Source

_KEYS = ("lm_eval", "name", "num_fewshot", "filter", "data", "limit", "metric", "seed")
_DATA_KEYS = ("splits", "fractions")
# The package's own limit of generated tokens.
_MAX_NEW_TOKENS = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessMetric:
    """The package's `exact_match` after its filters, or `acc` of a text that must be the most likely one.

    Args:
        name (`str`): `"exact_match"` or `"acc"`.
        options (`dict[str, Any]`): Options of the metric, such as `ignore_case`.
        filters (`Sequence[dict]`): Filters in the form of the YAML.
    """

    def __init__(self, name: str, options: dict[str, Any], filters: Sequence[dict[str, Any]]) -> None:
        self.__name__ = name
        self._options, self._filters = options, filters

    @property
    def identity(self) -> list[str]:
        """Name, version of the package, and all options: results may be stored under it."""
        from importlib.metadata import version

        settings = json.dumps([self._options, list(self._filters)], sort_keys=True)
        return [f"lm_eval {version('lm_eval')} {self.__name__}", settings]

    def __call__(self, text: str, accepted: Sequence[str]) -> float:
        """Return 1 if the filtered text is an accepted answer, else 0."""
        if self.__name__ == "acc":
            return float(text == accepted[0])

        from lm_eval.api.registry import get_metric
        from lm_eval.filters import build_filter_ensemble

        responses: Any = [[text]]
        steps = [(each["function"], {k: v for k, v in each.items() if k != "function"}) for each in self._filters]
        for step in build_filter_ensemble("filters", steps).filters:
            responses = list(step().apply(responses, [{}]))
        predictions = [responses[0]] * len(accepted)
        result = get_metric("exact_match")(references=list(accepted), predictions=predictions, **self._options)
        return float(result["exact_match"] > 0)


class HarnessScoring:
    """Gold answers that were made with the rows."""

    def shown(self, row: Row, *, shuffled: bool = True) -> Row:
        """Return the row whose prompt is rendered; not `shuffled`, that by which rows are told apart."""
        return row if shuffled else row.with_fields(prompt=row.fields["question"])

    def reference(self, row: Row) -> Reference:
        """Return the gold answer of `row`."""
        reference: Reference = row.fields["reference"]
        return reference

    def without_answer(self) -> HarnessScoring:
        """Return this: such tasks have no rows without answers."""
        return self


def read_harness(spec: dict[str, Any], root: Path, *, trust_remote_code: bool) -> Parts:
    """Read the contents of a task file with the key `lm_eval`.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
        FileNotFoundError: If there is no such task.
        ValueError: If a key is unknown, or the task cannot be mapped; the message names why.
    """
    check_keys(spec, _KEYS, "task")
    named = require(spec, "lm_eval", str, "the name of a task of lm-evaluation-harness, or the path of its YAML")
    shots = optional(spec, "num_fewshot", int, "a whole number", None)
    if shots is not None and (isinstance(shots, bool) or shots < 0):
        raise ValueError(f"`num_fewshot` must be a whole number of at least 0, got {shown(shots)}.")
    data = optional(spec, "data", dict, "a mapping with `splits` and `fractions`", {})
    check_keys(data, _DATA_KEYS, "data")
    source = load_source(
        named,
        root,
        metric=optional(spec, "metric", str, "the name of a metric", None),
        filter_name=optional(spec, "filter", str, "the name of a list of filters", None),
        trust_remote_code=trust_remote_code,
    )
    rows = make_rows(source, shots, read_seed(spec))
    kind = source.task.OUTPUT_TYPE
    written = kind != "multiple_choice"
    return Parts(
        name=read_name({"name": source.name, **spec}),
        kind="generate" if written else "choices",
        metric=_written_metric(source) if written else "accuracy",
        prompt=Prompt((RowTemplate("prompt", "{{ prompt }}"),)),
        scoring=HarnessScoring(),
        spec={**spec, "data": {"splits": splits_of(rows), **data, "rows": rows}},
        generation=_generation(source, rows) if written else None,
    )


def _written_metric(source: Source) -> HarnessMetric:
    (entry,) = source.task.config.metric_list
    options = {k: v for k, v in entry.items() if k not in ("metric", "aggregation", "higher_is_better", "hf_evaluate")}
    return HarnessMetric(source.metric, options, source.filters)


def _generation(source: Source, rows: dict[str, list[dict[str, Any]]]) -> Generation:
    if source.task.OUTPUT_TYPE == "loglikelihood":
        # No tokenizer makes more tokens of a text than it has bytes.
        longest = max(len(row["reference"].answer.encode()) for each in rows.values() for row in each)
        return Generation(max_new_tokens=longest, scored="tokens")
    options = source.task.config.generation_kwargs or {}
    stop = options.get("until") or []
    limit = next((options[key] for key in _LIMITS if options.get(key) is not None), _MAX_NEW_TOKENS)
    stops = [stop] if isinstance(stop, str) else stop
    return Generation(max_new_tokens=int(limit), stop=tuple(text for text in stops if text), scored="text as written")
