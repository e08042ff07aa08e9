"""Score a model one block at a time, whose weights need not be in memory together."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from optimum_sieve.backbone.blockwise import BlockRun, Spool, find_blocks
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.surgery.apply import truncated

from .batches import input_device, log_likelihoods, make_batches
from .likelihoods import gather_scores
from .scores import check_scorable, evaluation_of


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.tasks import Example
    from optimum_sieve.tasks.text_metrics import Metric

    from .scores import Evaluation


@contextmanager
def block_held(
    model: nn.Module, block: str, bases: Mapping[str, FactorBasis], ranks: Mapping[str, int | None]
) -> Iterator[None]:
    """Hold the ranks of one block's layers inside the context."""
    own = {name: rank for name, rank in ranks.items() if name.startswith(f"{block}.")}
    with truncated(model, {name: bases[name] for name in own}, own, storage="factors"):
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
    """Do as [`evaluate`][optimum_sieve.evaluation.scores.evaluate] for examples with candidates, block by block.

    Args:
        model (`torch.nn.Module`): A model of transformers, whose blocks may be offloaded.
        examples (`Sequence[Example]`): At least two, each with candidates and the index of the gold one.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        metric (`str` or `Callable`): As of `evaluate`.
        batch_size (`int`): Most rows of one forward pass.
        bases (`Mapping[str, FactorBasis]`, *optional*): Bases of the layers that `ranks` names.
        ranks (`Mapping[str, int | None]`, *optional*): Ranks that the model is to have meanwhile; `None`: as it is.
        directory (`Path`, *optional*): Where the hidden states between the blocks are kept; they go afterwards.
        progress (`bool`): Show a progress bar.
        description (`str`): Text before the bar.

    Raises:
        ValueError: If an example cannot be scored, or the model returns values that are not finite.
    """
    check_scorable(examples, metric)
    batches = make_batches(examples, tokenizer, batch_size=batch_size, inputs=input_format(model))
    blocks = find_blocks(model)
    with TemporaryDirectory(prefix="states-", dir=directory) as spool, evaluating(model):
        run = BlockRun(model, blocks, batches, log_likelihoods, device=input_device(model), spool=Spool(Path(spool)))
        for place, block in enumerate(tqdm(blocks, desc=description or None, unit="block", disable=not progress)):
            with block_held(model, block, bases or {}, ranks or {}):
                run.forward(place, keep_inputs=False)
        return evaluation_of(gather_scores(batches, run.outputs(), examples), examples, metric)
