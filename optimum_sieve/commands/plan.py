"""`optimum-cli sieve plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import SieveSubcommand, add_debug
from .options import add_settings, settings_from


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

# Of optimum_sieve.plan.hardware, which imports torch.
_HARDWARE = ("this", "a100", "h100", "h200")


class PlanCommand(SieveSubcommand):
    """Say what pruning a model would take, from its configuration alone."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve plan`."""
        parser.description = (
            "Say what memory, disk and time pruning a model would take, from its config.json alone: no weights and no "
            "task are read. `prune --dry-run` does so for a task."
        )
        parser.add_argument(
            "--model", required=True, metavar="MODEL", help="Hub id, directory or config.json of the model."
        )
        parser.add_argument("--examples", type=int, default=256, metavar="N", help="Calibration examples (256).")
        parser.add_argument("--tokens", type=int, default=256, metavar="N", help="Tokens of each (256).")
        parser.add_argument("--dtype", default="bfloat16", help="What the model is loaded in (default: bfloat16).")
        parser.add_argument(
            "--hardware",
            choices=_HARDWARE,
            default="this",
            help="What it runs on: this machine, which is measured, or a device by its data sheet (default: this).",
        )
        parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
        parser.add_argument("--trust-remote-code", action="store_true", help="Run configuration code that lies there.")
        parser.add_argument(
            "--config", metavar="FILE", help="JSON file of settings; an option given beside it takes precedence."
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

        found = forecast(
            arguments.model,
            config,
            examples=arguments.examples,
            tokens=arguments.tokens,
            hardware=arguments.hardware,
            dtype=arguments.dtype,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        )
        print(found.format())
