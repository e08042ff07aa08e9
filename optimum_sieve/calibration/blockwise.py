"""A round of calibration one block at a time, for models larger than the memory."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property, partial
from typing import TYPE_CHECKING

from optimum_sieve.backbone.blockwise import BlockRun, check_blocks, find_blocks
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
from optimum_sieve.run.bars import progress_bar
from optimum_sieve.run.scratch import Scratch
from optimum_sieve.run.spool import Spool
from optimum_sieve.run.workdir import flatten

from .collect import accumulator
from .factors import factor_together, token_weights
from .losses import calibration_batches
from .rounds import Bases, Round


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from tqdm.auto import tqdm

    from optimum_sieve.evaluation.batches import Batch
    from optimum_sieve.factorization.moments import Moments
    from optimum_sieve.run.context import Run

    from .sampled import CalibrationExamples


def targets_by_block(run: Run) -> dict[str, list[str]]:
    """Return the names of the targets in each block, the blocks in order.

    Raises:
        ValueError: If the model is not one sequence of blocks, or a target is outside of them.
    """
    blocks = find_blocks(run.model)
    owned: dict[str, list[str]] = {block: [] for block in blocks}
    for target in run.targets:
        block = next((block for block in blocks if target.name.startswith(f"{block}.")), None)
        if block is None:
            raise ValueError(
                f"`target_modules` must be in the model's blocks where `memory_limit` is set, got {target.name!r}. "
                "Name it in `exclude_modules`, or prune without a limit."
            )
        owned[block].append(target.name)
    return owned


class BlockRound(Round):
    """A round with the weights, moments and bases of one block in memory at a time; the work directory has a path."""

    @cached_property
    def owned(self) -> dict[str, list[str]]:
        """Names of the targets in each block, the blocks in order."""
        return targets_by_block(self.run)

    def load(self, *, verify: bool = True) -> Bases | None:
        """Return the bases, each read from the work directory when it is used; `None` if some are not there."""
        bases: dict[str, FactorBasis] = {}
        for number, names in enumerate(self.owned.values()):
            path = self.run.work.find("bases", f"{self.key}-{number}", verify=verify)
            if path is None:
                return None
            for name in names:
                bases[name] = StoredBasis(path, name, execution_device(self.run.model.get_submodule(name)))
        return Bases(bases, self.key)

    def compute(self, taken: Sequence[CalibrationExamples]) -> Bases:
        """Take the moments and factor the weights, block by block; return the bases as they were saved.

        The joint projection needs gradients: a forward pass through all blocks keeps their inputs on disk, and a
        backward pass takes the moments. The other projections take them in the forward pass.
        """
        run, joint = self.run, self.run.config.projection == "joint"
        order = list(enumerate(self.owned))
        with ExitStack() as stack:
            directory = stack.enter_context(Scratch(run.work.path, "states"))
            stack.enter_context(frozen(run.model))
            bar = stack.enter_context(self._bar(len(order) * (2 if joint else 1)))
            with run.timed("moments"):
                passes = self._start_all(taken, directory)
            if joint:
                with run.timed("moments"):
                    self._forward(passes, bar)
            for number, block in reversed(order) if joint else order:
                with run.timed("moments"):
                    weights, moments = self._moments(passes, taken, number, block)
                with run.timed("factors"):
                    self._factor(number, weights, moments)
                bar.update()
        # Their checksums were computed a moment ago, from the same files.
        saved = self.load(verify=False)
        assert saved is not None
        return saved

    def _bar(self, steps: int) -> tqdm:
        description = "moments" if self.run.config.projection == "joint" else "moments and factors"
        return progress_bar(total=steps, desc=description, unit="block", progress=self.run.progress)

    def _start_all(self, taken: Sequence[CalibrationExamples], directory: Path) -> list[BlockRun[Batch]]:
        """Begin a pass over the examples of every task; `svd` looks at no example."""
        taken = () if self.run.config.projection == "svd" else taken
        return [self._start(each, directory / str(number)) for number, each in enumerate(taken)]

    def _start(self, taken: CalibrationExamples, directory: Path) -> BlockRun[Batch]:
        """Begin a pass over a task's examples, whose hidden states go to a new directory."""
        model, blocks = self.run.model, list(self.owned)
        batches, loss = calibration_batches(self.run, taken)
        device = input_device(model)
        if not self.ranks:
            check_blocks(model, blocks, partial(loss, model, batches[-1].to(device)))
        directory.mkdir()
        return BlockRun(model, blocks, distributed.share(batches), loss, device=device, spool=Spool(directory))

    def _forward(self, passes: Sequence[BlockRun[Batch]], bar: tqdm) -> None:
        """Run all blocks, keep their inputs and start the backward pass."""
        for number, block in enumerate(self.owned):
            with block_held(self.run.model, block, self.before, self.ranks):
                for each in passes:
                    each.forward(number)
            bar.update()
        for each in passes:
            each.start_backward()

    def _moments(
        self, passes: Sequence[BlockRun[Batch]], taken: Sequence[CalibrationExamples], number: int, block: str
    ) -> tuple[dict[str, torch.Tensor], dict[str, Moments]]:
        """Return the dense weights and the moments of a block's targets, the weighted sum of the tasks' moments."""
        config, model, names = self.run.config, self.run.model, self.owned[block]
        joint = config.projection == "joint"
        # Read before the block is pruned.
        weights = {name: linear_weight(model.get_submodule(name)) for name in names}
        moments = {name: empty_moments(weight, projection=config.projection) for name, weight in weights.items()}
        weigh = token_weights(config, {name: _in_memory(self.before[name]) for name in names if name in self.before})
        with block_held(model, block, self.before, self.ranks):
            for each, task, of_task in zip(passes, self.run.tasks, taken, strict=False):
                scaling = task.weight / len(of_task.examples)
                visit = accumulator(moments, weights, config.projection, scaling=scaling, token_weights=weigh)
                watch = Watch(model, names, visit, gradients=joint)
                if joint:
                    each.backward(number, watch)
                else:
                    each.forward(number, watch, keep_inputs=False)
        distributed.sum_over_processes(tensor for each in moments.values() for tensor in each.tensors().values())
        return weights, moments

    def _factor(self, number: int, weights: Mapping[str, torch.Tensor], moments: Mapping[str, Moments]) -> None:
        """Factor the weights of a block and save its bases."""
        config = self.run.config
        for name, moment in moments.items():
            check_finite(name, moment)

        def one(name: str, weight: torch.Tensor) -> FactorBasis:
            return factorize(weight, moments[name], projection=config.projection, damping=config.damping)

        bases = factor_together(weights, one, progress=False)
        self.run.work.save("bases", f"{self.key}-{number}", flatten(bases))


def _in_memory(basis: FactorBasis) -> FactorBasis:
    return basis.in_memory() if isinstance(basis, StoredBasis) else basis
