"""Score a model block by block, with only one block's weights in memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from optimum_sieve.backbone.blockwise import BlockRun, find_blocks
from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.run.bars import progress_bar
from optimum_sieve.run.scratch import Scratch
from optimum_sieve.run.spool import Spool
from optimum_sieve.surgery.apply import truncated

from .batches import input_device, log_likelihoods, make_batches
from .likelihoods import gather_scores
from .scores import check_scorable, evaluation_of


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.metrics.identity import Metric
    from optimum_sieve.tasks import Example

    from .scores import Evaluation


@contextmanager
def block_held(
    model: nn.Module, block: str, bases: Mapping[str, FactorBasis], ranks: Mapping[str, int | None]
) -> Iterator[None]:
    """Truncate the layers of one block to `ranks` inside the context."""
    block_ranks = {name: rank for name, rank in ranks.items() if name.startswith(f"{block}.")}
    with truncated(model, {name: bases[name] for name in block_ranks}, block_ranks, storage="factors"):
        yield


def evaluate_by_block(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    metric: Metric,
    batch_size: int,
    bases: Mapping[str, FactorBasis] | None = None,
    ranks: Mapping[str, int | None] | None = None,
    directory: Path | None = None,
    progress: bool = True,
    description: str = "",
) -> Evaluation:
    """Evaluate examples with candidates block by block; see [`evaluate`][optimum_sieve.evaluation.scores.evaluate].

    Args:
        model (`torch.nn.Module`): A model of transformers; its blocks may be offloaded.
        examples (`Sequence[Example]`): At least two, each with candidates and the index of the gold one.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        metric (`str` or `Callable`): See `evaluate`.
        batch_size (`int`): Maximum rows per forward pass.
        bases (`Mapping[str, FactorBasis]`, *optional*): Bases of the layers in `ranks`.
        ranks (`Mapping[str, int | None]`, *optional*): Temporary ranks of the layers. Default: the model as it is.
        directory (`Path`, *optional*): Parent of the temporary directory for hidden states between blocks.
        progress (`bool`): Show a progress bar.
        description (`str`): Label of the progress bar.

    Raises:
        ValueError: If an example cannot be scored, or the model returns values that are not finite.
    """
    check_scorable(examples, metric)
    batches = make_batches(examples, tokenizer, batch_size=batch_size, model=model, divide=True)
    blocks = find_blocks(model)
    with Scratch(directory, "states") as spool, evaluating(model):
        run = BlockRun(model, blocks, batches, log_likelihoods, device=input_device(model), spool=Spool(spool))
        for index, block in enumerate(progress_bar(blocks, desc=description or None, unit="block", progress=progress)):
            with block_held(model, block, bases or {}, ranks or {}):
                run.forward(index, keep_inputs=False)
        return evaluation_of(gather_scores(batches, run.outputs(), examples), examples, metric)
