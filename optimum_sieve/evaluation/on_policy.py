r"""Let the model that is healed write answers, which the dense model then judges token by token.

Gold answers show the model only texts that it may never write. On its own answers it meets its own mistakes, and learns
what the dense model would do after them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.run import distributed
from optimum_sieve.run.workdir import WorkDir, content_key

from .encoding import answer_lengths, encode_examples
from .labelling import label_by_model, label_examples
from .stage import examples_fingerprint
from .teacher import Lesson, check_distillation, teach


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.backbone.kinds import InputFormat
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.tasks import Example


_STAGE = "written"
# Increment when the same model and examples give other answers, so that older files are ignored.
_FORMAT = 1


def lessons_of(
    gold: Lesson,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    as_dense: Callable[[], AbstractContextManager[object]],
    written_share: float = 0.5,
    max_examples: int | None = None,
    sampled: bool = False,
    beta: float = 0.5,
    prompt_sites: int = 0,
    prompt_weight: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    work: WorkDir | None = None,
    model_key: str | None = None,
    pruned_key: str | None = None,
    progress: bool = True,
) -> list[Lesson]:
    """Return the lessons for the next steps of healing: the gold one, and one of answers that the model writes now.

    Call it again once the model has changed much, with another `seed`; the gold lesson stays the same. Together the
    lessons have the weight of `gold`, so the shares of several tasks stay as they are. For tasks without written
    answers, with `written_share=0`, or if no written answer can be scored, `gold` is the only lesson.

    Args:
        gold ([`Lesson`][optimum_sieve.evaluation.teacher.Lesson]): The task's calibration examples with the dense
            model's predictions.
        model (`PreTrainedModel`): The model that is healed, pruned now. It is the same when the function returns.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        as_dense (`Callable`): Returns a context in which `model` is the dense model.
        written_share (`float`): Share of the lesson of written answers, from 0 to 1.
        max_examples (`int`, *optional*): Answer at most this many of the prompts, chosen at random. Default: all.
        sampled (`bool`): Sample the answers from the model's distribution. Default: greedy decoding.
        beta (`float`): Direction of the divergence on written answers, from 0 (the model must cover what the dense one
            may write) to 1 (it must write nothing else).
        prompt_sites (`int`): Positions in each prompt on the written lesson, see
            [`teach`][optimum_sieve.evaluation.teacher.teach].
        prompt_weight (`float`): Their weight.
        seed (`int`): Seed of the prompts, the positions in them and, if `sampled`, the answers.
        batch_size (`int`): Maximum rows per forward pass.
        work (`WorkDir`, *optional*): Stores answers and predictions, so that a stopped run resumes with the same ones.
        model_key (`str`, *optional*): Hash of the dense model. Default: computed from all of its weights.
        pruned_key (`str`, *optional*): Hash of `model` as it is now. Default: the answers are not stored.
        progress (`bool`): Show progress bars.

    Raises:
        ValueError: If a setting is out of range, or the model returns values that are not finite.
    """
    if not 0 <= written_share <= 1:
        raise ValueError(
            f"`written_share` must be between 0 and 1, got {written_share}. 0 trains on gold answers alone."
        )
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"`max_examples` must be at least 1, got {max_examples}. `written_share=0` writes no answers.")
    check_distillation(prompt_sites, prompt_weight, beta)
    if written_share == 0 or gold.examples[0].generation is None:
        return [gold]
    options: dict[str, Any] = {"batch_size": batch_size, "work": work, "progress": progress}
    examples = _chosen(gold.examples, max_examples, seed)
    written = write_examples(
        model, examples, tokenizer, seed=seed if sampled else None, pruned_key=pruned_key, **options
    )
    if not written:
        return [gold]
    with as_dense():
        teacher = teach(
            model,
            written,
            tokenizer,
            loss="vocabulary",
            prompt_sites=prompt_sites,
            prompt_weight=prompt_weight,
            beta=beta,
            seed=seed,
            model_key=model_key,
            **options,
        )
    lesson = Lesson(teacher=teacher, examples=written, weight=written_share * gold.weight, gold=False)
    return [*([replace(gold, weight=(1 - written_share) * gold.weight)] if written_share < 1 else []), lesson]


def write_examples(
    model: PreTrainedModel,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int | None = None,
    batch_size: int = 16,
    work: WorkDir | None = None,
    pruned_key: str | None = None,
    progress: bool = True,
) -> list[Example]:
    """Return the examples with the answers that `model` writes instead of the gold ones.

    An answer that reached `max_new_tokens` has no end; an empty one consists of its end. Examples are left out if
    nothing of their answer can be scored, or if prompt and answer exceed the model's context length.

    Args:
        model (`PreTrainedModel`): A generative model.
        examples (`Sequence[Example]`): At least one, all with the same `generation`.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        seed (`int`, *optional*): Sample the answers, seeded by this and the example's index. Default: greedy decoding.
        batch_size (`int`): Rows per batch.
        work (`WorkDir`, *optional*): Stores the answers under `pruned_key`.
        pruned_key (`str`, *optional*): Hash of the model. Default: the answers are not stored.
        progress (`bool`): Show a progress bar.
    """
    work = WorkDir(None) if work is None or pruned_key is None else work
    key = content_key(
        model=pruned_key, examples=examples_fingerprint(model, tokenizer, examples), seed=seed, format=_FORMAT
    )
    stored = work.load_with_record(_STAGE, key)
    if stored is None:
        labelled = label_by_model(model, examples, tokenizer, batch_size=batch_size, seed=seed, progress=progress)
        # Processes round differently, and all must train on the same texts.
        answers = distributed.agree([(example.answer, example.accepted[0]) for example in labelled])
        work.save(_STAGE, key, {}, record={"answers": answers})
    else:
        answers = stored[1]["answers"]
    written = [
        replace(example, answer=answer, accepted=(text,))
        for example, (answer, text) in zip(examples, answers, strict=True)
    ]
    return _scorable(written, tokenizer, input_format(model))


def answer_unlabelled(run: Run, task: TaskRun) -> list[Example]:
    """Return a task's unlabelled examples with the dense model's most likely answers, which the run must hold now.

    Written answers are stored, the same for all processes, and left out where nothing can be scored.
    """
    if not task.unlabelled:
        return []
    if task.unlabelled[0].generation is None:
        return label_examples(run, task.unlabelled)
    return write_examples(
        run.model, task.unlabelled, run.tokenizer, batch_size=run.config.batch_size, work=run.work,
        pruned_key=run.model_key, progress=run.progress,
    )  # fmt: skip


def _scorable(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, inputs: InputFormat) -> list[Example]:
    """Return the examples whose answer has tokens and fits in the context length together with its prompt."""
    lengths = answer_lengths(examples, tokenizer)
    kept = [example for example, length in zip(examples, lengths, strict=True) if length]
    if not kept or inputs.max_length is None:
        return kept
    rows = encode_examples(kept, tokenizer, False, inputs)
    return [example for example, row in zip(kept, rows, strict=True) if row.length <= inputs.max_length]


def _chosen(examples: Sequence[Example], count: int | None, seed: int) -> list[Example]:
    """Return `count` of the examples at random, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(examples))[:count]
    return [examples[index] for index in sorted(chosen)]
