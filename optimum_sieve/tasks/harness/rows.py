r"""Rows of an lm-evaluation-harness task: prompts and continuations that the package itself makes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve._messages import cut

from ..data import PREFIX
from ..example import Reference
from ..rows.memory import MemoryRows
from .source import FEWSHOT_SEED, UnmappedError, sandboxed


if TYPE_CHECKING:
    from .source import Source


logger = logging.getLogger(__name__)

# More rows than calibration and selection use.
_MOST_DOCUMENTS = 20_000
# The lengths by which the package divides the log-likelihoods.
_LENGTHS = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}


def make_rows(source: Source, num_fewshot: int | None, seed: int) -> MemoryRows:
    """Return the rows of each split of a task: `prompt`, `question` (the prompt without examples) and `reference`.

    Of a large split that is not scored, a part is drawn by `seed`.

    Raises:
        ValueError: If the few-shot examples come from the rows to score, or a row cannot be mapped.
    """
    task = source.task
    shots = num_fewshot if num_fewshot is not None else task.config.num_fewshot or 0
    documents = _documents(task)
    scored = "test" if "test" in documents else "validation" if "validation" in documents else None
    if scored is None:
        raise ValueError(f"`task` must have a test or a validation split, got neither in {PREFIX}{source.name}.")
    if shots and _fewshot_split(task) == _split_names(task)[scored]:
        raise ValueError(
            f"`num_fewshot` must not take examples from the split that is scored, got {shots} from "
            f"{_fewshot_split(task)!r} in {PREFIX}{source.name}: prompts for calibration would show its answers. Set "
            "`fewshot_split` in its YAML, or num_fewshot: 0."
        )
    # The split that is scored comes first, so that rows that occur in others too are left out there.
    order = [scored, *(name for name in documents if name != scored)]
    seen: set[str] = set()
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in order:
        used = documents[name] if name == scored else _part(documents[name], seed)
        made = _rows(source, name, used, shots, own_examples=name == scored)
        rows[name] = [row for row in made if row["question"] not in seen]
        if len(rows[name]) < len(made):
            logger.warning(
                "%d of %d rows of the %s split of %s%s occur in another split too and are left out there.",
                len(made) - len(rows[name]), len(made), name, PREFIX, source.name,
            )  # fmt: skip
        seen |= {row["question"] for row in made}
    return MemoryRows({name: rows[name] for name in documents if rows[name]})


def _documents(task: Any) -> dict[str, Any]:
    found = {}
    if task.has_training_docs():
        found["train"] = task.training_docs()
    if task.has_validation_docs():
        found["validation"] = task.validation_docs()
    if task.has_test_docs():
        found["test"] = task.test_docs()
    return found


def _part(documents: Any, seed: int) -> list[Any]:
    """Return at most so many documents that rendering takes a minute, drawn at random but in their order."""
    chosen = np.random.default_rng(seed).permutation(len(documents))[:_MOST_DOCUMENTS]
    return [documents[int(index)] for index in sorted(chosen)]


def _split_names(task: Any) -> dict[str, str | None]:
    config = task.config
    return {"train": config.training_split, "validation": config.validation_split, "test": config.test_split}


def _fewshot_split(task: Any) -> str | None:
    """Return the split that the package takes few-shot examples from; `None` if the YAML lists them."""
    if task.fewshot_cfg.split is not None:
        return str(task.fewshot_cfg.split)
    if task.fewshot_cfg.samples is not None:
        return None
    return next((name for name in _split_names(task).values() if name is not None), None)


class _WithoutRow:
    """A sampler of few-shot examples that never draws the row whose prompt is made."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.row: Any = None

    def sample(self, n: int, eval_doc: Any = None, **options: Any) -> Any:
        return self.sampler.sample(n=n, eval_doc=self.row if eval_doc is None else eval_doc, **options)


def _rows(source: Source, name: str, documents: Any, shots: int, *, own_examples: bool) -> list[dict[str, Any]]:
    """Render the rows of one split in their order, which decides on the few-shot examples drawn for each."""
    task = source.task
    task.set_fewshot_seed(FEWSHOT_SEED)
    sampler = getattr(task, "sampler", None)
    excluding = _WithoutRow(sampler)
    if shots and not own_examples:
        task.sampler = excluding
    made, refused = [], list[str]()
    try:
        with sandboxed(source.safe):
            for number, document in enumerate(documents, start=1):
                excluding.row = document
                try:
                    made.append(_row(source, document, shots))
                except UnusableError as error:
                    refused.append(f"row {number}: {error}")
    except UnmappedError:
        raise
    # Templates and functions of a task raise any error.
    except Exception as error:
        raise ValueError(
            f"`task` must render for every row, got {type(error).__name__} in {PREFIX}{source.name}, row "
            f"{len(made) + len(refused) + 1} of its {name} split: {cut(str(error), 400)}"
        ) from error
    finally:
        task.sampler = sampler
    if refused:
        logger.warning(
            "%d of %d rows of the %s split of %s%s cannot be scored and are left out; the first, %s.",
            len(refused), len(refused) + len(made), name, PREFIX, source.name, refused[0],
        )  # fmt: skip
    return made


class UnusableError(ValueError):
    """A row that has no right answer, or several."""


def _row(source: Source, document: Any, shots: int) -> dict[str, Any]:
    task, kind = source.task, source.task.OUTPUT_TYPE
    context = task.fewshot_context(doc=document, num_fewshot=shots, gen_prefix=task.doc_to_prefix(document))
    if not isinstance(context, str):
        raise UnmappedError(source.name, "each choice has a prompt of its own")
    question = str(task.doc_to_text(document))
    if not context.strip():
        raise UnmappedError(source.name, "its prompts are empty")
    requests = task.construct_requests(doc=document, ctx=context, metadata=(source.name, 0, 1))
    if kind == "generate_until":
        return {"prompt": context, "question": question, "reference": _written(task, document, context)}
    # The package scores white space at the end of a prompt together with what follows.
    prompt = context.rstrip()
    after = context[len(prompt) :]
    if kind == "loglikelihood":
        target = after + requests.args[1]
        return {"prompt": prompt, "question": question, "reference": Reference(target, accepted=(target,))}
    choices = task.doc_to_choice(document)
    candidates = tuple(after + request.args[1] for request in requests)
    gold = task.doc_to_target(document)
    if isinstance(gold, list):
        raise UnmappedError(source.name, "several choices of a row are right")
    target = _right(gold, choices)
    if len(set(candidates)) < len(candidates) or len(candidates) < 2:
        raise UnusableError(f"its choices are not distinct: {cut(str(choices))}")
    length: Any = _LENGTHS.get(source.metric)
    divisors = tuple(max(length(choice), 1) for choice in choices) if length is not None else False
    reference = Reference(candidates[target], candidates, target, normalized=divisors)
    return {"prompt": prompt, "question": "\n".join([question, *map(str, choices)]), "reference": reference}


def _right(gold: Any, choices: list[str]) -> int:
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise UnusableError(f"its right answer {cut(str(gold))} is none of the choices")
    return gold


def _written(task: Any, document: Any, context: str) -> Reference:
    gold = task.doc_to_target(document)
    if task.config.doc_to_choice is not None:
        gold = task.doc_to_choice(document)[gold]
    accepted = tuple(map(str, gold)) if isinstance(gold, list) else (str(gold),)
    if not accepted or not accepted[0]:
        raise UnusableError("it has no answer")
    # Calibration reads the answer after the prompt; the score does not depend on it.
    delimiter = "" if context[-1:].isspace() else task.config.target_delimiter
    return Reference(f"{delimiter}{accepted[0]}", accepted=accepted)
