"""`optimum-cli sieve plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_debug
from .base.settings import add_settings, settings_from


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

# The names in optimum_sieve.plan.hardware, which imports torch.
_HARDWARE = ("this", "a100", "h100", "h200")


class PlanCommand(SieveSubcommand):
    """Estimate the cost of pruning a model from its configuration alone."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve plan`."""
        parser.description = (
            "Estimate the memory, disk space and time of pruning a model from its config.json, without weights and "
            "task. For a given task, use `prune --dry-run`."
        )
        parser.add_argument(
            "--model", required=True, metavar="MODEL", help="Hub id, directory or config.json of the model."
        )
        parser.add_argument(
            "--examples",
            type=int,
            default=256,
            metavar="N",
            help="Number of calibration examples (default: %(default)s).",
        )
        parser.add_argument(
            "--tokens", type=int, default=256, metavar="N", help="Tokens per example (default: %(default)s)."
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
            "--trust-remote-code", action="store_true", help="Run configuration code from the model's repository."
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
        for name in ("examples", "tokens"):
            if getattr(arguments, name) < 1:
                self.parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")

        from optimum_sieve.plan.forecast import forecast

        estimate = forecast(
            arguments.model,
            config,
            examples=arguments.examples,
            tokens=arguments.tokens,
            hardware=arguments.hardware,
            dtype=arguments.dtype,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        )
        print(estimate.format())
