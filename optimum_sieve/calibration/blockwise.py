"""One round of moments and factor bases, one block at a time: weights, moments and bases of one block in memory."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from optimum_sieve.backbone.blockwise import BlockRun, Spool, check_blocks, find_blocks
from optimum_sieve.backbone.hooks import Watch
from optimum_sieve.backbone.modes import frozen
from optimum_sieve.backbone.offloading import execution_device
from optimum_sieve.backbone.targets import linear_weight
from optimum_sieve.evaluation.batches import input_device
from optimum_sieve.evaluation.blockwise import block_held
from optimum_sieve.factorization.closed_form import FactorBasis, factorize
from optimum_sieve.factorization.moments import check_finite, empty_moments
from optimum_sieve.factorization.stored import StoredBasis
from optimum_sieve.run import distributed
from optimum_sieve.run.context import timed
from optimum_sieve.run.workdir import flatten

from .collect import accumulator
from .factors import factor_together, token_weights
from .losses import calibration_batches


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.evaluation.batches import Batch
    from optimum_sieve.factorization.moments import Moments
    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Example


def targets_by_block(run: Run) -> dict[str, list[str]]:
    """Return the names of the targets in each block, the blocks in order.

    Raises:
        ValueError: If the model has not one sequence of blocks, or a target lies outside.
    """
    blocks = find_blocks(run.model)
    owned: dict[str, list[str]] = {block: [] for block in blocks}
    for target in run.targets:
        block = next((block for block in blocks if target.name.startswith(f"{block}.")), None)
        if block is None:
            raise ValueError(
                f"`target_modules` must lie in the model's blocks where `memory_limit` is set, got {target.name!r}. "
                "Name it in `exclude_modules`, or prune without a limit."
            )
        owned[block].append(target.name)
    return owned


class BlockCalibration:
    """One round of moments and bases.

    Args:
        run (`Run`): The run, whose work directory has a path.
        gold (`Sequence[Sequence[Example]]`): The calibration examples of each task, with the answers that count.
        ranks (`Mapping[str, int | None]`): Ranks at which the moments are taken; none: of the dense model.
        bases (`Mapping[str, FactorBasis]`): Bases of the round before, where there was one.
    """

    def __init__(
        self,
        run: Run,
        gold: Sequence[Sequence[Example]],
        ranks: Ranks,
        bases: Mapping[str, FactorBasis],
    ) -> None:
        self.run, self.ranks, self.bases = run, ranks, bases
        self.owned = targets_by_block(run)
        self.blocks = list(self.owned)
        self.gold = gold

    def compute(self, key: str, seconds: dict[str, float]) -> dict[str, FactorBasis]:
        """Write the bases of every block to the work directory, and return them as they lie there."""
        model, joint = self.run.model, self.run.config.projection == "joint"
        order = list(enumerate(self.blocks))
        steps = len(order) * (2 if joint else 1)
        with ExitStack() as stack:
            directory = stack.enter_context(TemporaryDirectory(prefix="states-", dir=self.run.work.path))
            stack.enter_context(frozen(model))
            description = "moments" if joint else "moments and factors"
            bar = stack.enter_context(tqdm(total=steps, desc=description, unit="block", disable=not self.run.progress))
            with timed(seconds, "moments"):
                # `svd` looks at no example.
                gold = () if self.run.config.projection == "svd" else self.gold
                block_runs = [
                    self._start(examples, Path(directory) / str(place)) for place, examples in enumerate(gold)
                ]
            for place, block in order if joint else ():
                with timed(seconds, "moments"), block_held(model, block, self.bases, self.ranks):
                    for block_run in block_runs:
                        block_run.forward(place)
                bar.update()
            with timed(seconds, "moments"):
                for block_run in block_runs if joint else ():
                    block_run.start_backward()
            for place, block in reversed(order) if joint else order:
                with timed(seconds, "moments"):
                    weights, moments = self._moments(block_runs, place, block, joint=joint)
                with timed(seconds, "factors"):
                    self._factor(key, place, weights, moments)
                bar.update()
        found = stored_bases(self.run, key)
        assert found is not None
        return found

    def _start(self, examples: Sequence[Example], directory: Path) -> BlockRun[Batch]:
        """Begin the run over a task's examples, whose states go to a new directory."""
        model = self.run.model
        batches, loss = calibration_batches(self.run, examples)
        device = input_device(model)
        if not self.ranks:
            check_blocks(model, self.blocks, partial(loss, model, batches[-1].to(device)))
        directory.mkdir()
        return BlockRun(model, self.blocks, distributed.share(batches), loss, device=device, spool=Spool(directory))

    def _moments(
        self, block_runs: Sequence[BlockRun[Batch]], place: int, block: str, *, joint: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, Moments]]:
        """Return the dense weights and the moments of a block's targets, the weighted sum of the tasks'."""
        config, model, names = self.run.config, self.run.model, self.owned[block]
        # Read before the block is pruned.
        weights = {name: linear_weight(model.get_submodule(name)) for name in names}
        moments = {name: empty_moments(weight, projection=config.projection) for name, weight in weights.items()}
        before = {name: _in_memory(self.bases[name]) for name in names if name in self.bases}
        weigh = token_weights(config, before)
        with block_held(model, block, self.bases, self.ranks):
            for block_run, task, examples in zip(block_runs, self.run.tasks, self.gold, strict=False):
                scaling = task.weight / len(examples)
                visit = accumulator(moments, weights, config.projection, scaling=scaling, token_weights=weigh)
                if joint:
                    block_run.backward(place, Watch(model, names, visit, gradients=True))
                else:
                    block_run.forward(place, Watch(model, names, visit, gradients=False), keep_inputs=False)
        distributed.add_up(tensor for own in moments.values() for tensor in own.tensors().values())
        return weights, moments

    def _factor(
        self, key: str, place: int, weights: Mapping[str, torch.Tensor], moments: Mapping[str, Moments]
    ) -> None:
        config = self.run.config
        for name, own in moments.items():
            check_finite(name, own)

        def one(name: str, weight: torch.Tensor) -> FactorBasis:
            return factorize(weight, moments[name], projection=config.projection, damping=config.damping)

        bases = factor_together(weights, one, progress=False)
        self.run.work.save("bases", f"{key}-{place}", flatten(bases))


def _in_memory(basis: FactorBasis) -> FactorBasis:
    return basis.in_memory() if isinstance(basis, StoredBasis) else basis


def stored_bases(run: Run, key: str) -> dict[str, FactorBasis] | None:
    """Return the bases of a round as they lie in the work directory; `None` where it was not finished."""
    found: dict[str, FactorBasis] = {}
    for place, names in enumerate(targets_by_block(run).values()):
        path = run.work.find("bases", f"{key}-{place}")
        if path is None:
            return None
        for name in names:
            found[name] = StoredBasis(path, name, execution_device(run.model.get_submodule(name)))
    return found
