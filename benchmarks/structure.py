r"""Compare the removal of whole neurons and attention heads with low rank, alone and together, at equal parameters.

    python benchmarks/structure.py                    # the demo's model and task
    python benchmarks/structure.py --kept 0.45 --removed 0 0.1 0.2

A neuron of a feed-forward network is a row of `gate_proj` and `up_proj` and a column of `down_proj`; heads are removed
by group, the query heads together with the key-value head that they share. What removing one costs is predicted as it
is for low rank: half the second moment of the derivative by a gate on it, \(E[(\partial f / \partial c)^2] / 2\), where
\(f\) is the Fisher root of the task's candidates and \(c\) one gate for all tokens of an example (Kwon et al.
2022, *A fast post-training pruning framework for transformers*). The cheapest per parameter go first. Moments are then
taken on what is left (one round, for every row) and `energy` divides what the budget leaves over ranks, whose cost is
that of the smaller matrices. `--removed 1` removes structure alone, down to the kept fraction. For models with blocks
like Llama's.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from records import append_json
from source import choose_source

from optimum_sieve import Evaluation, SieveConfig, Task, compare, evaluate
from optimum_sieve.allocation import LossCurve, allocate
from optimum_sieve.inputs import input_format
from optimum_sieve.loading import load_model
from optimum_sieve.losses import fisher_root
from optimum_sieve.scoring import make_batches
from optimum_sieve.setting import Setting, TaskSetting
from optimum_sieve.stages import calibrate
from optimum_sieve.surgery import truncated
from optimum_sieve.targets import find_targets
from optimum_sieve.workdir import WorkDir, content_key, model_fingerprint


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

NETWORK_END, ATTENTION_END = "mlp.down_proj", "self_attn.o_proj"
# What is removed with a part of the input of the last projection: module and dimension of its weight.
NETWORK = {NETWORK_END: 1, "mlp.gate_proj": 0, "mlp.up_proj": 0}
ATTENTION = {ATTENTION_END: 1, "self_attn.q_proj": 0, "self_attn.k_proj": 0, "self_attn.v_proj": 0}


@dataclass(frozen=True)
class Unit:
    """A neuron or a group of heads: slices of weights that go together, and what their removal costs."""

    slices: dict[str, tuple[int, int, int]]
    parameters: int
    loss: float


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or directory; default: the demo's model")
    parser.add_argument("--task", help="task file; default: the demo's movie reviews")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.6, 0.45, 0.3])
    parser.add_argument(
        "--removed",
        type=float,
        nargs="+",
        default=[0.0, 0.1, 0.2, 0.3, 1.0],
        help="share of the parameters that goes with neurons and heads",
    )
    parser.add_argument("--limit", type=int, default=600, help="test examples scored")
    parser.add_argument("--work-dir", type=Path, help="keeps moments and bases")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    return parser.parse_args()


@contextmanager
def gates(layers: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Multiply each layer's inputs by gates of 1, one for each row and feature, which gradients reach."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def gate(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            found[name] = torch.ones_like(args[0][:, :1]).requires_grad_(True)
            return (args[0] * found[name],)

        return gate

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Bench:
    """One model and task."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        model, task, gguf_file = choose_source(arguments.model, arguments.task)
        self.arguments, self.task = arguments, Task.from_file(task)
        self.model, self.tokenizer, _ = load_model(model, dtype="float32", gguf_file=gguf_file)
        self.calibration = self.task.examples("calibration", self.tokenizer)
        self.test = self.task.examples("test", self.tokenizer)[: arguments.limit]
        self.targets = find_targets(self.model)
        self.total = sum(target.num_parameters for target in self.targets)
        self.dense = self.score()
        self.units = sorted(self.measure_units(), key=lambda unit: unit.loss / unit.parameters)

    def score(self) -> Evaluation:
        """Score the model as it is."""
        return evaluate(self.model, self.test, self.tokenizer, metric=self.task.metric, batch_size=32, progress=False)

    def measure_units(self) -> list[Unit]:
        """Return every neuron and group of heads with the predicted loss of removing it."""
        groups = self.model.config.num_key_value_heads
        modules = self.model.named_modules()
        ends = {name: layer for name, layer in modules if name.endswith((NETWORK_END, ATTENTION_END))}
        squares = {name: torch.zeros(()) for name in ends}
        batches = make_batches(
            self.calibration, self.tokenizer, batch_size=16, candidates=True, inputs=input_format(self.model)
        )
        self.model.requires_grad_(False)
        loss = fisher_root()
        with gates(ends) as found:
            for batch in batches:
                loss(self.model, batch).backward()
                for name, gate in found.items():
                    rows = gate.grad[:, 0]
                    if name.endswith(ATTENTION_END):
                        rows = rows.unflatten(-1, (groups, -1)).sum(-1)
                    squares[name] = squares[name] + rows.square().sum(0)
        halves = {name: values / (2 * len(self.calibration)) for name, values in squares.items()}
        return [unit for name, values in halves.items() for unit in self.units_of(name, values.tolist())]

    def units_of(self, end: str, losses: list[float]) -> list[Unit]:
        """Return the units that feed the projection `end`."""
        kind = NETWORK if end.endswith(NETWORK_END) else ATTENTION
        block = end.removesuffix(NETWORK_END).removesuffix(ATTENTION_END)
        weights = {block + name: (self.model.get_submodule(block + name).weight, dim) for name, dim in kind.items()}
        units = []
        for index, loss in enumerate(losses):
            slices, parameters = {}, 0
            for name, (weight, dim) in weights.items():
                size = weight.shape[dim] // len(losses)
                slices[name] = (dim, index * size, size)
                parameters += size * weight.shape[1 - dim]
            units.append(Unit(slices, parameters, loss))
        return units

    @contextmanager
    def without(self, share: float) -> Iterator[dict[str, tuple[int, int]]]:
        """Hold the model without its cheapest units, a `share` of the parameters; yields the smaller shapes."""
        shapes = {target.name: [target.out_features, target.in_features] for target in self.targets}
        before = {name: self.model.get_submodule(name).weight.detach().clone() for name in shapes}
        left = share * self.total
        for unit in self.units:
            if unit.parameters > left:
                break
            left -= unit.parameters
            for name, (dim, start, size) in unit.slices.items():
                self.model.get_submodule(name).weight.detach().narrow(dim, start, size).zero_()
                shapes[name][dim] -= size
        try:
            yield {name: (rows, columns) for name, (rows, columns) in shapes.items()}
        finally:
            for name, weight in before.items():
                self.model.get_submodule(name).weight.detach().copy_(weight)

    def run(self, share: float) -> None:
        """Remove a share as structure, the rest by rank, at each size."""
        if share == 1.0:
            for kept in self.arguments.kept:
                with self.without(1 - kept):
                    self.report(1.0, kept, self.score())
            return
        with self.without(share) as shapes:
            fingerprint = content_key(model=model_fingerprint(self.model), task=self.task.fingerprint(), share=share)
            task = TaskSetting(
                name=self.task.name, metric=self.task.metric, fingerprint=fingerprint, calibration=self.calibration
            )
            setting = Setting(
                model=self.model, tokenizer=self.tokenizer, config=SieveConfig(tolerance=0.0, rounds=1), tasks=(task,),
                targets=self.targets, work=WorkDir(self.arguments.work_dir), progress=False,
            )  # fmt: skip
            bases = calibrate(setting, {})
            curves = [
                LossCurve(name, *shape, bases[name].energy.cpu().numpy()[: min(shape)])
                for name, shape in shapes.items()
                if min(shape)
            ]
            gone = dict.fromkeys((name for name, shape in shapes.items() if not min(shape)), 0)
            for kept in self.arguments.kept:
                ranks = allocate(curves, int(kept * self.total)) | gone
                # The weights are still of full size, with zeros: the function is that of the smaller ones.
                with truncated(self.model, bases, ranks, storage="factors"):
                    self.report(share, kept, self.score())

    def report(self, share: float, kept: float, pruned: Evaluation) -> None:
        """Print one row, and append it to the JSON lines."""
        against = compare(self.dense, pruned)
        how = "by structure alone" if share == 1 else f"{share:.0%} removed as structure"
        print(
            f"kept {kept:.2f}, {how}: score "
            f"{pruned.score:.3f} +- {pruned.standard_error:.3f}, difference {against.mean:+.3f} +- "
            f"{against.standard_error:.3f}, agreement {against.agreement:.3f}, KL {against.kl:.4f}",
            flush=True,
        )
        if self.arguments.json is not None:
            row = {"kept": kept, "structure": share, "score": pruned.score, **against.to_dict()}
            append_json(self.arguments.json, row)


def main() -> None:
    """Run every share."""
    arguments = parse_arguments()
    bench = Bench(arguments)
    print(
        f"{bench.dense.count} test examples, majority {bench.dense.majority_score:.3f}, dense "
        f"{bench.dense.score:.3f} +- {bench.dense.standard_error:.3f}; {len(bench.units)} units",
        flush=True,
    )
    for share in arguments.removed:
        bench.run(share)


if __name__ == "__main__":
    main()
