"""`optimum-cli sieve plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_debug, add_task
from .base.settings import add_settings, settings_from


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

# Calibration, selection and test examples as in README, and tokens of each.
_EXAMPLES, _TOKENS = (256, 400, 1000), 256
# The names in optimum_sieve.plan.hardware, which imports torch.
_HARDWARE = ("this", "a100", "h100", "h200")


class PlanCommand(SieveSubcommand):
    """Estimate the cost of pruning a model from its configuration alone."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve plan`."""
        parser.description = (
            "Estimate the memory, disk space and time of pruning a model from its config.json, without its weights: "
            "for a task, or for so many examples of so many tokens. `prune --dry-run` loads the model and also shows "
            "what may be wrong with the task."
        )
        parser.add_argument(
            "--model",
            required=True,
            metavar="MODEL",
            help="Hub id or directory of the model; without --task also its config.json.",
        )
        add_task(parser, required=False)
        parser.add_argument(
            "--examples",
            type=int,
            nargs="+",
            metavar="N",
            help="Without --task: numbers of calibration, selection and test examples (default: "
            f"{' '.join(map(str, _EXAMPLES))}).",
        )
        parser.add_argument(
            "--tokens", type=int, metavar="N", help=f"Without --task: tokens per example (default: {_TOKENS})."
        )
        parser.add_argument(
            "--dtype", default="bfloat16", help="Floating-point type of the loaded model (default: %(default)s)."
        )
        parser.add_argument(
            "--hardware",
            choices=_HARDWARE,
            default="this",
            help="Hardware of the run: this machine, which is measured, or a device by its data sheet "
            "(default: %(default)s).",
        )
        parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
        parser.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="Run configuration code from the model's repository, and functions that a task of "
            "lm-evaluation-harness names.",
        )
        parser.add_argument(
            "--config",
            metavar="FILE",
            help="YAML or JSON file of settings; options take precedence.",
        )
        add_settings(parser)
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Print the forecast."""
        if not any(hasattr(arguments, name) for name in ("tolerance", "pruning_ratio")) and arguments.config is None:
            arguments.pruning_ratio = 0.5
        config = settings_from(arguments)
        self.check_examples(arguments)
        options = {
            "hardware": arguments.hardware,
            "dtype": arguments.dtype,
            "revision": arguments.revision,
            "trust_remote_code": arguments.trust_remote_code,
        }
        if arguments.task:
            from optimum_sieve.pipeline.planning import forecast_tasks

            print(forecast_tasks(arguments.model, arguments.task, config, **options).format())
            return

        from optimum_sieve.plan.forecast import forecast

        estimate = forecast(
            arguments.model,
            config,
            examples=arguments.examples or _EXAMPLES,
            tokens=arguments.tokens or _TOKENS,
            **options,
        )
        print(estimate.format())

    def check_examples(self, arguments: Namespace) -> None:
        """End with an error unless there are a task, or numbers of examples and tokens above 0."""
        given = [name for name in ("examples", "tokens") if getattr(arguments, name) is not None]
        if arguments.task and given:
            self.parser.error(f"argument --{given[0]}: not allowed with argument --task, whose rows are counted")
        if len(arguments.examples or ()) > len(_EXAMPLES):
            self.parser.error(f"--examples takes at most {len(_EXAMPLES)} numbers, got {len(arguments.examples)}")
        for name in given:
            value = getattr(arguments, name)
            if min(value if isinstance(value, list) else [value]) < 1:
                self.parser.error(f"--{name} must be at least 1, got {value}")
