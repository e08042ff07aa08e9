"""`optimum-cli sieve heal`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.config.heal import HealConfig

from .base import SieveSubcommand, add_debug, add_task, add_with_examples, reserved_output
from .base.settings import add_heal_settings, heal_settings_from


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


# One size is trained longer than each of several.
_STEPS = 128


class HealCommand(SieveSubcommand):
    """Train the factors of a pruned model for a few steps to match the dense model."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve heal`."""
        parser.description = (
            "Recover accuracy of a pruned model: train its factors for a few steps to match the dense model on "
            "examples of one or more tasks, and save the result with its report and model card."
        )
        parser.add_argument("--model", metavar="MODEL", required=True, help="Hub id or directory of the pruned model.")
        parser.add_argument(
            "--dense",
            metavar="MODEL",
            help="Hub id or directory of the dense base model (default: the one that the pruned model names).",
        )
        add_task(parser)
        parser.add_argument(
            "--task-weights",
            type=float,
            nargs="+",
            metavar="X",
            help="Relative sampling weights of the tasks, in the order of --task (default: equal weights).",
        )
        parser.add_argument("--output", metavar="DIR", required=True, help="Directory for the healed model.")
        parser.add_argument("--overwrite", action="store_true", help="Replace an --output that holds a model.")
        add_with_examples(parser)
        parser.add_argument(
            "--work-dir",
            metavar="DIR",
            help="Directory for intermediate results; an interrupted run resumes from it.",
        )
        parser.add_argument(
            "--dtype", help="Floating-point type of the loaded model, such as bfloat16 (default: as saved)."
        )
        parser.add_argument("--device", help="Device (default: the accelerator if available, else cpu).")
        parser.add_argument("--gguf-file", metavar="FILE", help="GGUF file to load from the repository of --dense.")
        parser.add_argument(
            "--trust-remote-code", action="store_true", help="Run modeling code from the model's repository."
        )
        parser.add_argument(
            "--seed", type=int, metavar="N", default=0, help="Seed of the example order (default: %(default)s)."
        )
        add_heal_settings(parser, exclude=("shrink",), steps=_STEPS)
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Heal, save and print the report as a table."""
        config = HealConfig.from_dict({"steps": _STEPS, **heal_settings_from(arguments)})
        if arguments.dense is None:
            arguments.dense = _base_model(arguments.model, arguments.trust_remote_code)
        with reserved_output(arguments):
            self._heal(arguments, config)

    def _heal(self, arguments: Namespace, config: HealConfig) -> None:
        from optimum_sieve.pipeline.heal import heal_pruned
        from optimum_sieve.publish.result import save_result
        from optimum_sieve.tasks.several import read_tasks

        tasks = read_tasks(arguments.task, trust_remote_code=arguments.trust_remote_code)
        result, tokenizer = heal_pruned(
            arguments.model,
            arguments.dense,
            tasks,
            config,
            task_weights=arguments.task_weights,
            dtype=arguments.dtype,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
            gguf_file=arguments.gguf_file,
            seed=arguments.seed,
            work_dir=arguments.work_dir,
        )
        save_result(
            result,
            tokenizer,
            Path(arguments.output),
            overwrite=arguments.overwrite,
            base_model=_card_base(result.model.config.sieve, arguments.dense),
            base_revision=result.model.config.sieve.get("base_revision"),
            task_specs=[task.spec for task in tasks],
            tasks=tasks if arguments.with_examples else (),
        )
        print(result)
        print(f"\nsaved in {arguments.output}")


def _card_base(block: dict[str, Any], dense: str) -> str | None:
    """Return the model to name as the base: if the dense one is an adapter of it, or was merged with one, not that."""
    return block.get("base_model") if "adapter" in block else dense


def _base_model(model: str, trust_remote_code: bool) -> str:
    """Return the model that a pruned one was made from, as its configuration names it."""
    from optimum_sieve.backbone.sources import read_config
    from optimum_sieve.modeling.conversion import check_pruned

    config = read_config(model, trust_remote_code=trust_remote_code)
    check_pruned(config)
    name = config.sieve.get("base_model")
    if (adapter := config.sieve.get("adapter")) is not None:
        name = adapter.get("name")
    # Of a directory only the name is published.
    if not name or "/" not in name:
        raise ValueError(
            f"`--dense` must be given for a pruned model that names no model on the Hub, got {name!r} in {model}."
        )
    return str(name)
