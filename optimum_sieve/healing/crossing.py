"""More prompts for healing: the beginning of one calibration prompt and the end of another.

A model that was tuned on few examples answers them with near certainty, so they say little about how sure it is
elsewhere. It is less sure of crossed prompts, which have the words and the form of the task.

Related: Yun et al. (2019), *CutMix*, which crosses images, and Jiao et al. (2020), *TinyBERT*, which distils small
tasks on altered texts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.modeling.label_offsets import shared_candidates
from optimum_sieve.tasks.parts import shared_parts


if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from optimum_sieve.tasks import Example

# Draws for each prompt that is asked for; few short prompts have few crossings.
_DRAWS = 20


def crossed_examples(
    examples: Sequence[Example], count: int, *, seed: int, taken: Collection[str] = (), marks: Collection[str] = ()
) -> list[Example]:
    """Return up to `count` examples without answers, whose prompts cross two prompts of `examples` between words.

    What all prompts begin and end with, such as an instruction, stays as it is. No prompt is longer than the longest
    one given, and none has more or fewer line breaks than both of its parents, so that fields on lines of their own
    stay apart. There are none if the examples have no candidates in common, since two of their prompts then ask for
    different things, or if most texts have no spaces to cross them at.

    Args:
        examples (`Sequence[Example]`): At least one.
        count (`int`): Number of examples.
        seed (`int`): Seed of the draws.
        taken (`Collection[str]`): Prompts that are not made, besides those of `examples`.
        marks (`Collection[str]`): Tokens of a chat template, which belong to the instruction.
    """
    if not count or not shared_candidates(examples):
        return []
    prompts = [example.prompt for example in examples]
    begin, bodies, end = shared_parts(prompts, marks)
    marks = [mark for mark in marks if any(mark in body for body in bodies)]
    longest, known = max(map(len, prompts)), {*prompts, *taken}
    if sum(" " in body for body in bodies) <= len(bodies) / 2:
        return []
    generator = np.random.default_rng(seed)
    found: list[Example] = []
    for _ in range(_DRAWS * count):
        if len(found) == count:
            break
        parents = [bodies[generator.integers(len(bodies))] for _ in range(2)]
        first, second = (parent.split(" ") for parent in parents)
        words = first[: generator.integers(len(first) + 1)] + second[generator.integers(len(second) + 1) :]
        body = " ".join(words)
        prompt = f"{begin}{body}{end}"
        if len(words) > 1 and len(prompt) <= longest and prompt not in known and _has_form(body, parents, marks):
            known.add(prompt)
            found.append(replace(examples[0], prompt=prompt, answer="", target=None))
    return found


def _has_form(body: str, parents: Sequence[str], marks: Sequence[str]) -> bool:
    """Tell whether a body has as many line breaks and `marks` as one of its parents, or a number between theirs."""

    def is_between(text: str) -> bool:
        counts = [parent.count(text) for parent in parents]
        return min(counts) <= body.count(text) <= max(counts)

    return all(map(is_between, ["\n", *marks]))
