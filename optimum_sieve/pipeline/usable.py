"""The targets that a run can prune: say which layers stay dense, and leave out those that no example runs through."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve._messages import listed
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.backbone.targets import left_out
from optimum_sieve.evaluation.batches import input_device
from optimum_sieve.evaluation.encoding import encode_prompts
from optimum_sieve.evaluation.head import head_at


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.tasks import Task

logger = logging.getLogger(__name__)

# Prompts of each task that are tried; almost always the first calls all layers.
_PROMPTS = 2


def tell_left_out(model: PreTrainedModel) -> None:
    """Log the linear layers that are no targets by default, with the reason."""
    for reason, names in left_out(model).items():
        _tell(names, reason)


def called_targets(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], targets: list[Target]
) -> list[Target]:
    """Return the targets that are called when the model reads calibration prompts; log the others, which stay dense.

    Some layers only lend their weight to a kernel, such as `dt_proj` of Mamba: the module that holds them runs and they
    do not, so nothing is known of their inputs. Where the module does not run either, such as an expert without a token
    of these few prompts, its layers count as called.

    Raises:
        ValueError: If no target is called.
    """
    # Those of fused experts are no modules yet.
    present = {name for name, _ in model.named_modules()}
    waiting = {target.name for target in targets if target.name in present}
    owners: set[str] = set()
    for task in tasks:
        examples = task.examples("calibration", tokenizer)[:_PROMPTS]
        _run(model, encode_prompts(examples, tokenizer, input_format(model)), waiting, owners)
    waiting = {name for name in waiting if name.rpartition(".")[0] in owners}
    called = [target for target in targets if target.name not in waiting]
    if not called:
        raise ValueError(
            f"`target_modules` must be layers that the examples run through, got {len(targets)} that were never called "
            f"(e.g. {targets[0].name!r}). Name others."
        )
    _tell([target.name for target in targets if target.name in waiting], "are not called for the examples")
    return called


def _run(model: PreTrainedModel, rows: Iterable[list[int]], waiting: set[str], owners: set[str]) -> None:
    """Run the model on rows of token ids until all layers were called.

    Layers that were called leave `waiting`; the modules that hold them join `owners` when they run.
    """
    inputs, device = input_format(model), input_device(model)

    def on_call(act: Any, name: str) -> Any:
        return model.get_submodule(name).register_forward_pre_hook(lambda *unused: act(name))

    holders = {name.rpartition(".")[0] for name in waiting}
    handles = [on_call(waiting.discard, name) for name in list(waiting)]
    handles += [on_call(owners.add, name) for name in holders]
    try:
        with evaluating(model):
            for row in rows:
                if not waiting:
                    break
                ids = torch.tensor([row], device=device)
                arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                if inputs.kind == "seq2seq":
                    arguments["decoder_input_ids"] = torch.tensor([[inputs.start_token_id]], device=device)
                first = torch.zeros((1, 2), dtype=torch.long)
                with head_at(model, first, arguments.get("decoder_input_ids", ids).shape):
                    model(**arguments, **({} if inputs.kind == "classification" else {"use_cache": False}))
    finally:
        for handle in handles:
            handle.remove()


def _tell(names: Sequence[str], reason: str) -> None:
    """Log that layers stay dense; those that differ by numbers alone are written once."""
    if names:
        patterns = dict.fromkeys(re.sub(r"\d+", "*", name) for name in names)
        logger.warning("%d linear layers stay dense, as they %s: %s.", len(names), reason, listed(patterns))
