"""Time training steps and moments with products rounded to bfloat16 against float32, and compare what they give.

    python benchmarks/rounding.py                              # the demo's model and movie reviews, two threads
    python benchmarks/rounding.py --threads 1 --rounds 10

Needs a CPU that multiplies bfloat16 matrices several times as fast as float32 ones. A training step is the gradient of
every LoRA adapter by `--examples` calibration examples, as in tuning; moments are one round of the joint projection on
the same examples. Both ways run in turn, `--rounds` times; the ratio is the mean over the rounds, with its standard
error. Differences are relative, in the norm over all layers: of the adapters' gradients, and of the predicted losses
(squared singular values) of the bases that the moments give.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from bench import append_json, find_targets, machine_name, make_parser, make_pruner

from optimum_sieve import SieveConfig
from optimum_sieve.backbone import modes
from optimum_sieve.backbone.training import training_only
from optimum_sieve.calibration.collect import collect_moments
from optimum_sieve.calibration.losses import fisher_root, label_loss
from optimum_sieve.evaluation.batches import make_batches
from optimum_sieve.factorization.closed_form import factorize
from optimum_sieve.training.adapters import Adapters


if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from optimum_sieve.factorization.moments import Moments
    from optimum_sieve.tasks import Example


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, dtype="float32")
    parser.add_argument("--examples", type=int, default=32, help="calibration examples; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(words)


class Works:
    """A training step and a round of moments of one model on the same examples.

    Args:
        model (`PreTrainedModel`): The model, whose weights are copied: those that are mapped from a file are slower.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        examples (`Sequence[Example]`): The examples.
        batch_size (`int`): Rows of a pass.
    """

    def __init__(self, model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        self.model, self.count = model, len(examples)
        self.batches = make_batches(examples, tokenizer, batch_size=batch_size, model=model)
        self.targets = find_targets(model)
        self.adapters = Adapters(model, [target.name for target in self.targets], 8, 0)
        for parameter in self.adapters.parameters.values():
            torch.nn.init.normal_(parameter, std=0.02)
        self.gold = label_loss([example.target or 0 for example in examples])

    def step(self) -> dict[str, torch.Tensor]:
        """Return the gradients of the adapters."""
        parameters = self.adapters.parameters
        for parameter in parameters.values():
            parameter.grad = None
        with training_only(self.model, parameters, checkpointing=False), self.adapters.attached():
            for batch in self.batches:
                self.gold(self.model, batch).sum().backward()
            return {name: parameter.grad.clone() for name, parameter in parameters.items()}

    def moments(self) -> dict[str, Moments]:
        """Return the moments of the targets by the default loss."""
        loss = fisher_root(temperature=SieveConfig(tolerance=0.02).fisher_temperature)
        return collect_moments(self.model, self.targets, self.batches, loss, num_examples=self.count)

    def energies(self, moments: Mapping[str, Moments]) -> dict[str, torch.Tensor]:
        """Return the predicted losses of the bases that moments give."""
        weights = {name: self.model.get_submodule(name).weight.detach() for name in moments}
        bases = {
            name: factorize(weights[name], each, projection="joint", damping=1e-4) for name, each in moments.items()
        }
        return {name: basis.energy for name, basis in bases.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Print time and difference of both kinds of work."""
    options = parse_arguments(words)
    if not modes.multiplies_bfloat16_fast():
        raise SystemExit("This CPU has no fast bfloat16 products, so the package does not round.")
    torch.set_num_threads(options.threads)
    pruner = make_pruner(options, calibration=options.examples)
    examples = pruner.tasks[0].examples("calibration", pruner.tokenizer)
    works = Works(pruner.model, pruner.tokenizer, examples, options.batch_size)
    print(f"{machine_name()}, {len(examples)} examples, batches of {options.batch_size}, {options.rounds} rounds\n")
    kinds: dict[str, tuple[Any, Any]] = {
        "training step": (works.step, dict),
        "moments": (works.moments, works.energies),
    }
    for name, (work, compared) in kinds.items():
        row = {"work": name, **measure(work, compared, options.rounds)}
        print(
            f"{name}: {row['exact']:.2f} s in float32, {row['rounded']:.2f} s rounded, {row['ratio']:.2f} +- "
            f"{row['ratio_error']:.2f} times as fast, difference {row['difference']:.1e}"
        )
        append_json(options.json, row)


def measure(
    work: Callable[[], Any], compared: Callable[[Any], Mapping[str, torch.Tensor]], rounds: int
) -> dict[str, float]:
    """Return median seconds of both ways, the ratio of the times, and the relative difference of what is compared."""
    times: dict[bool, list[float]] = {False: [], True: []}
    results: dict[bool, Any] = {}
    # The first round is slower.
    for _ in range(rounds + 1):
        for rounded in (False, True):
            with mock.patch.object(modes, "multiplies_bfloat16_fast", return_value=rounded):
                start = time.perf_counter()
                results[rounded] = work()
                times[rounded].append(time.perf_counter() - start)
    exact, fast = times[False][1:], times[True][1:]
    ratios = [one / other for one, other in zip(exact, fast, strict=True)]
    right, found = compared(results[False]), compared(results[True])
    squares = sum(float((found[name] - value).square().sum()) for name, value in right.items())
    norm = sum(float(value.square().sum()) for value in right.values())
    return {
        "exact": statistics.median(exact),
        "rounded": statistics.median(fast),
        "ratio": statistics.mean(ratios),
        "ratio_error": statistics.stdev(ratios) / len(ratios) ** 0.5,
        "difference": (squares / norm) ** 0.5,
    }


if __name__ == "__main__":
    main()
