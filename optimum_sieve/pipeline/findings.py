"""What a task's examples look like and what may be wrong with them, before any work. Never imports torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import cut, listed
from optimum_sieve.backbone.kinds import InputFormat
from optimum_sieve.evaluation.encoding import answer_lengths, encode_examples, encode_prompts, encode_texts
from optimum_sieve.metrics.examples import load_code
from optimum_sieve.metrics.identity import metric_name


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example, Task
    from optimum_sieve.tasks.example import Reference


_LONGEST_SHOWN = 2000
_MOST_CLASSES = 12


@dataclass(frozen=True, kw_only=True)
class TaskFindings:
    """What [`examine`] finds in a task.

    Args:
        title (`str`): Name, kind and metric of the task.
        splits (`Mapping[str, int]`): Number of examples of each split.
        prompt (`str`): Prompt of the first example, or its messages if there is no chat template.
        answer (`str`): Its gold answer, or empty.
        num_tokens (`int`, *optional*): Number of tokens of the prompt.
        balance (`Mapping[str, str]`): How often each label, position or answer is the gold one, by split.
        longest (`str`): The longest row.
        warnings (`tuple[str, ...]`): What may be wrong.
        errors (`tuple[str, ...]`): What will end a run.
    """

    title: str
    splits: Mapping[str, int]
    prompt: str
    answer: str
    num_tokens: int | None
    balance: Mapping[str, str]
    longest: str
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()

    def format(self) -> str:
        """Format the findings for a terminal."""
        prompt = cut(self.prompt, _LONGEST_SHOWN)
        tokens = "" if self.num_tokens is None else f", {self.num_tokens:,} tokens"
        lines = [
            f"task                   {self.title}",
            "examples               " + ", ".join(f"{count:,} {split}" for split, count in self.splits.items()),
            f"first prompt           {len(self.prompt):,} characters{tokens}:",
            *(f"    {line}" for line in prompt.split("\n")),
            *([f"its answer             {cut(repr(self.answer))}"] if self.answer else []),
            *(f"{'balance':<22} {split}: {shares}" for split, shares in self.balance.items()),
            f"longest row            {self.longest}",
        ]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"error: {error}" for error in self.errors]
        return "\n".join(lines)


def examine_all(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat) -> str:
    """Return the findings of every task for a terminal."""
    return "\n\n".join(examine(task, tokenizer, inputs).format() for task in tasks)


def examine(
    task: Task, tokenizer: PreTrainedTokenizerBase | None = None, inputs: InputFormat | None = None
) -> TaskFindings:
    """Look at every example of a task.

    Args:
        task (`Task`): The task.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Counts tokens and applies the chat template.
            Without one, lengths are in characters.
        inputs (`InputFormat`, *optional*): Format of the model's inputs. Default: a causal model of any context length.
    """
    split = next(iter(task.splits))
    texts, reference = task.items(split)[0]
    prompt = "\n".join(f"{role}: {text}" for role, text in zip(task.roles, texts, strict=False)) or texts[0]
    warnings, errors = list(_warnings(task)), list[str]()
    num_tokens, longest = None, _longest_text(task)
    if tokenizer is None:
        warnings += _space_warnings(task, prompt)
    else:
        try:
            first = task.examples(split, tokenizer)[0]
            prompt = first.prompt
            num_tokens = len(_prompt_ids(first, tokenizer))
            warnings += [*_option_warnings(task, tokenizer), *_space_warnings(task, prompt, tokenizer)]
            longest, found = _lengths(task, tokenizer, inputs or InputFormat())
            for kind, text in found:
                (errors if kind == "error" else warnings).append(text)
        except ValueError as error:
            errors.append(str(error))
    try:
        load_code(task.metric, written=task.kind == "generate")
    except (ValueError, OSError, ImportError) as error:
        errors.append(str(error))
    return TaskFindings(
        title=f"{task.name} ({task.kind}, {metric_name(task.metric)})",
        splits=task.splits,
        prompt=prompt,
        answer=reference.answer,
        num_tokens=num_tokens,
        balance=_balance(task) if task.labelled else {},
        longest=longest,
        warnings=tuple(warnings),
        errors=tuple(errors),
    )


def _balance(task: Task) -> dict[str, str]:
    """Describe for each split with answers how often each class is the gold one."""
    balance = {}
    for split, references in _references(task).items():
        counts = Counter(_class_name(task, reference) for reference in references)
        shares = [f"{name} {count:,} ({count / len(references):.0%})" for name, count in counts.most_common()]
        if task.kind == "generate":
            shares = [f"{len(counts):,} different answers, the most frequent one {shares[0]}"]
        balance[split] = listed(shares, _MOST_CLASSES)
    return balance


def _references(task: Task) -> dict[str, list[Reference]]:
    """Return the references of the splits that have gold answers."""
    return {split: [reference for _, reference in task.items(split)] for split in task.splits if split != "unlabelled"}


def _class_name(task: Task, reference: Reference) -> str:
    if reference.target is None:
        return cut(repr(reference.answer), 60)
    return list(task.labels)[reference.target] if task.labels else ascii_uppercase[reference.target % 26]


def _warnings(task: Task) -> Iterator[str]:
    """Yield what the rows and texts alone show."""
    for split, limit in (task.spec.get("limit") or {}).items():
        count = task.splits.get(split, limit)
        if count < limit:
            yield (
                f"`limit.{split}` asks for {limit:,} rows, but the data has only {count:,} for the {split} split, and "
                "all are used. Lower the limit, or add rows."
            )
    if not task.roles or task.roles[-1] == "assistant":
        ends = [texts[-1][-1:] for split in task.splits for texts, _ in task.items(split)]
        spaces = sum(end.isspace() and end not in "\r\n" for end in ends)
        if spaces:
            key = "the last message of `chat`" if task.roles else "`prompt`"
            yield (
                f"{key} ends in white space in {spaces:,} of {len(ends):,} rows. Most tokenizers join a space with the "
                "next word: end the prompt without it, and begin the answer's text with it."
            )
    if task.labels and task.labelled:
        for split, references in _references(task).items():
            seen = {reference.target for reference in references}
            missing = [name for number, name in enumerate(task.labels) if number not in seen]
            if missing:
                yield f"no example of the {split} split has the label {listed(missing)}."


def _space_warnings(task: Task, prompt: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
    """Yield a warning if labels lack the space that joins them to the prompt as a new word."""
    bare = [text for text in task.labels.values() if text[0].isalnum()]
    if (
        not bare
        or (task.roles and tokenizer is None)
        or not prompt
        or not (prompt[-1].isalnum() or prompt[-1] in ":?.!,")
    ):
        return
    if tokenizer is None:
        yield (
            f"the labels' texts {listed(map(repr, bare))} follow the prompt without a space, which most tokenizers "
            "need to begin a word; --model shows whether this one does."
        )
        return
    with_space = encode_texts([f"{prompt} {text}" for text in bare], tokenizer)
    without = encode_texts([f"{prompt}{text}" for text in bare], tokenizer)
    # A tokenizer that joins the space with the word needs no more tokens for it, and keeps those of the prompt.
    ids = _common_start(encode_texts([prompt], tokenizer)[0], with_space)
    joined = [
        text for text, a, b in zip(bare, with_space, without, strict=True) if len(a) <= len(b) or b[: len(ids)] != ids
    ]
    if joined:
        yield (
            f"the labels' texts {listed(map(repr, joined))} lack the space with which this tokenizer begins a word. "
            f"Write {' ' + joined[0]!r} in `labels`."
        )


def _common_start(ids: list[int], rows: Sequence[list[int]]) -> list[int]:
    """Return the longest start of `ids` that all `rows` begin with."""
    length = 0
    while length < len(ids) and all(len(row) > length and row[length] == ids[length] for row in rows):
        length += 1
    return ids[:length]


def _option_warnings(task: Task, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    template: Any = getattr(tokenizer, "chat_template", None)
    source = template if isinstance(template, str) else str(template)
    unused = [key for key in task.spec.get("chat_template_kwargs") or {} if key not in source]
    if unused:
        yield f"the tokenizer's chat template does not read {listed(unused)} of `chat_template_kwargs`."


def _longest_text(task: Task) -> str:
    lengths = [
        (sum(map(len, texts)), number, split)
        for split in task.splits
        for number, (texts, _) in enumerate(task.items(split), start=1)
    ]
    length, number, split = max(lengths)
    return f"{length:,} characters (example {number:,} of {split})"


def _prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return encode_prompts([example], tokenizer, InputFormat())[0]


def _lengths(task: Task, tokenizer: PreTrainedTokenizerBase, inputs: InputFormat) -> tuple[str, list[tuple[str, str]]]:
    """Return the longest row in tokens, and which rows a model refuses or cuts."""
    longest, found = (0, 0, ""), list[tuple[str, str]]()
    limit = inputs.max_length
    for split in task.splits:
        examples = task.examples(split, tokenizer)
        if task.kind == "generate":
            lengths, room = _generated_lengths(examples, tokenizer, inputs)
            found += _cut_answers(examples, tokenizer, split)
        else:
            lengths, room = [row.length for row in encode_examples(examples, tokenizer, True, inputs)], ""
        longest = max(longest, *((length, number, split) for number, length in enumerate(lengths, start=1)))
        refused = [number for number, length in enumerate(lengths, start=1) if limit is not None and length > limit]
        if refused:
            found.append(
                (
                    "error",
                    f"{len(refused):,} of {len(lengths):,} examples of the {split} split{room} exceed the {limit:,} "
                    f"tokens that the model takes, and are refused: example {listed(refused, 5)}. Shorten the prompt "
                    "(jinja2: `{{ text | truncate(2000) }}`), or drop these rows.",
                )
            )
    taken = "" if limit is None else f"; the model takes {limit:,}"
    return f"{longest[0]:,} tokens (example {longest[1]:,} of {longest[2]}){taken}", found


def _generated_lengths(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat
) -> tuple[list[int], str]:
    """Return the tokens of each prompt with room for its answer."""
    most = max(example.generation.max_new_tokens for example in examples if example.generation is not None)
    lengths = [len(ids) for ids in encode_prompts(examples, tokenizer, inputs)]
    if inputs.kind == "seq2seq":
        return [max(length, most) for length in lengths], ""
    return [length + most for length in lengths], f" with the {most:,} tokens of `max_new_tokens`"


def _cut_answers(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, split: str
) -> Iterator[tuple[str, str]]:
    limits = [example.generation.max_new_tokens for example in examples if example.generation is not None]
    lengths = answer_lengths(examples, tokenizer)
    longer = [length for length, limit in zip(lengths, limits, strict=True) if length > limit]
    if longer:
        yield (
            "warning",
            f"{len(longer):,} of {len(examples):,} gold answers of the {split} split are longer than the {limits[0]:,} "
            f"tokens of `max_new_tokens` and will be cut; the longest has {max(longer):,}. Increase it.",
        )
