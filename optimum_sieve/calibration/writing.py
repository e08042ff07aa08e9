"""Prompts that the dense model writes in the style of a task's own, where there are few of them.

The model reads some calibration prompts one below the other and goes on with more. They serve calibration and healing
as unlabelled examples; tuning, selection and test never see them.

Related: Wang et al. (2023), *Self-Instruct*, and Zhao et al. (2024), *SELF-GUIDE*, whose models write their own
training data from a few examples.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.evaluation.encoding import encode_prompts, encode_texts
from optimum_sieve.evaluation.generation import write_answers
from optimum_sieve.evaluation.stage import examples_fingerprint
from optimum_sieve.modeling.label_offsets import shared_candidates
from optimum_sieve.run import distributed
from optimum_sieve.run.bars import progress_bar
from optimum_sieve.tasks.data import INPUTS, NAMES
from optimum_sieve.tasks.example import Example, Generation
from optimum_sieve.tasks.parts import template_marks

from .style import PromptStyle


if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.run.context import Run, TaskRun


logger = logging.getLogger(__name__)

# A task with fewer prompts than the first number gets as many as make the second one.
FEW_PROMPTS, ENOUGH_PROMPTS = 200, 512
_STAGE = "prompts"
# Increment when the same model and examples give other prompts, so that older files are ignored.
_FORMAT = 2
# Most prompts that a row shows, and that the model then writes; most tokens of either. Long rows drift away.
_SHOWN, _WRITTEN, _MOST_TOKENS = 8, 8, 512
# Rows that are written before it looks whether enough prompts are new; `batch_size` must not decide what is written.
_ROWS = 16
# Nucleus sampling: small models write nonsense if unlikely tokens are sampled.
_TOP_P = 0.95
# Gives up after so many times the rows that suffice if every text is a new prompt.
_PATIENCE = 4
_NO_EFFECT = (
    "`written_prompts=%d` has no effect on %r: only a decoder that is in memory as a whole writes prompts, none for "
    "rows with choices of their own, with the same text or with texts in several messages of a chat, and nothing reads "
    "them with projection='svd' and heal=None."
)


def prompts_to_write(config: SieveConfig, count: int) -> int:
    """Return how many prompts the dense model writes for a task with `count` of its own."""
    if config.projection == "svd" and config.heal is None:
        # Nothing reads them.
        return 0
    if config.written_prompts is not None:
        return config.written_prompts
    return max(ENOUGH_PROMPTS - count, 0) if count < FEW_PROMPTS else 0


def with_written_prompts(run: Run) -> Run:
    """Return the run with prompts that the dense model, which it must hold now, writes for tasks with few of them.

    They are stored in the work directory, and are the same for all processes.
    """
    with run.timed("examples"):
        return replace(run, tasks=tuple(_with_written(run, task) for task in run.tasks))


def _with_written(run: Run, task: TaskRun) -> TaskRun:
    own, key = _own(task), prompts_key(run, task)
    if key is None:
        if run.config.written_prompts:
            logger.warning(_NO_EFFECT, run.config.written_prompts, task.name)
        return task
    count = prompts_to_write(run.config, len(own))
    stored = run.work.load_with_record(_STAGE, key)
    if stored is None:
        prompts = write_prompts(
            run.model, own, run.tokenizer, count, taken=task.prompts, seed=run.config.seed,
            batch_size=run.config.batch_size, progress=run.progress,
        )  # fmt: skip
        # Processes round differently, and all must read the same texts.
        prompts = distributed.agree(prompts)
        run.work.save(_STAGE, key, {}, record={"prompts": prompts})
    else:
        prompts = stored[1]["prompts"]
    if len(prompts) < count:
        logger.warning(
            "The dense model wrote only %d of %d prompts in the style of those of %r. Add rows to `unlabelled` of the "
            "task if there are some.",
            len(prompts), count, task.name,
        )  # fmt: skip
    if not prompts:
        return task
    written = [replace(own[0], prompt=prompt, answer="", target=None, accepted=()) for prompt in prompts]
    unlabelled = [*task.unlabelled, *written]
    fingerprint = examples_fingerprint(run.model, run.tokenizer, unlabelled)
    return replace(
        task, unlabelled=unlabelled, fingerprints={**task.fingerprints, "unlabelled": fingerprint}, given=task
    )


def prompts_key(run: Run, task: TaskRun) -> str | None:
    """Return the hash under which the prompts that the dense model writes for a task are stored; `None` if none are.

    Args:
        run (`Run`): The run.
        task (`TaskRun`): The task as the data gives it.
    """
    count = 0 if run.by_block else count_prompts(run.model, _own(task), run.tokenizer, run.config)
    if not count:
        return None
    fingerprints = [task.fingerprint(split) for split in NAMES if task.examples(split)]
    return run.key("seed", examples=fingerprints, count=count, format=_FORMAT)


def are_stored(run: Run, keys: Sequence[str | None]) -> bool:
    """Tell whether the work directory holds the prompts of all tasks, given the [`prompts_key`] of each."""
    return all(key is None or run.work.find(_STAGE, key, verify=False) is not None for key in keys)


def _own(task: TaskRun) -> list[Example]:
    return [example for split in INPUTS for example in task.examples(split)]


def count_prompts(
    model: PreTrainedModel, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: SieveConfig
) -> int:
    """Return how many prompts a model writes at most for a task of these examples.

    None if the settings want none, the model is not causal, rows have choices of their own, or the prompts have no
    style in common.
    """
    count = prompts_to_write(config, len(examples))
    if not count or input_format(model).kind != "causal":
        return 0
    if examples[0].generation is None and not shared_candidates(examples):
        return 0
    return 0 if PromptStyle.of([example.prompt for example in examples], template_marks(tokenizer)) is None else count


def write_prompts(
    model: PreTrainedModel,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    taken: Collection[str] = (),
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """Let a model write up to `count` prompts in the style of those of `examples`, with the same instruction.

    What all prompts begin and end with stays as it is, with the tokens of a chat template. A prompt is left out if it
    is empty, was there before (but for case and white space), has fewer or more lines or tokens than any of the given
    ones, or if a line lacks the beginning that this line has in all of them. There are fewer than `count` if the model
    writes too few others, and none if the given ones do not differ or have tokens of a template in their middle.

    Args:
        model (`PreTrainedModel`): A causal model.
        examples (`Sequence[Example]`): At least one.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        count (`int`): Number of prompts.
        taken (`Collection[str]`): Prompts that are left out, besides those of `examples`.
        seed (`int`): Seed of the prompts shown and the texts sampled.
        batch_size (`int`): Rows per batch, for which the prompts are the same.
        progress (`bool`): Show a progress bar.
    """
    inputs = input_format(model)
    prompts = [example.prompt for example in examples]
    style = PromptStyle.of(prompts, template_marks(tokenizer))
    if style is None:
        return []
    given = list(map(len, encode_prompts(examples, tokenizer, inputs)))
    allowed = range(min(given), max(given) + 1)
    most = _MOST_TOKENS if inputs.max_length is None else min(_MOST_TOKENS, inputs.max_length // 2)
    sizes = [len(ids) + 1 for ids in encode_texts([body + style.separator for body in style.bodies], tokenizer)]
    shown = [number for number, size in enumerate(sizes) if size < most]
    if not shown:
        return []
    generation = Generation(max_new_tokens=min(most, round(_WRITTEN * float(np.mean(sizes)))), scored="text as written")
    form = replace(examples[0], answer="", candidates=(), generation=generation)
    known = {_folded(prompt) for prompt in (*prompts, *taken)}
    generator = np.random.default_rng(seed)
    found: list[str] = []
    with progress_bar(total=count, desc="prompts by the model", unit="prompt", progress=progress) as bar:
        for _ in range(_PATIENCE * -(-count // (_WRITTEN * _ROWS))):
            rows = [
                # A template adds BOS itself, and these rows have none.
                replace(form, prompt=_document(style, sizes, shown, most, generator), add_special_tokens=True)
                for _ in range(_ROWS)
            ]
            written = write_answers(
                model,
                rows,
                tokenizer,
                batch_size=batch_size,
                seed=int(generator.integers(2**31)),
                top_p=_TOP_P,
                to_score=False,
            )
            asked = [replace(examples[0], prompt=prompt) for text in written for prompt in style.read(text)]
            lengths = map(len, encode_prompts(asked, tokenizer, inputs) if asked else [])
            for example, length in zip(asked, lengths, strict=True):
                folded = _folded(example.prompt)
                if folded in known or length not in allowed:
                    continue
                known.add(folded)
                found.append(example.prompt)
                bar.update(1)
                if len(found) == count:
                    return found
    return found


def _document(
    style: PromptStyle, sizes: Sequence[int], shown: Sequence[int], most: int, generator: np.random.Generator
) -> str:
    """Return some of the given bodies one below the other, `most` tokens at most, as a beginning to go on with."""
    chosen: list[str] = []
    room = most
    for number in generator.permutation(shown)[:_SHOWN]:
        if sizes[number] > room:
            break
        room -= sizes[number]
        chosen.append(style.bodies[number])
    return "".join(body + style.separator for body in chosen)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
