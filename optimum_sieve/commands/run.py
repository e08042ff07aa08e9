"""`optimum-cli sieve run`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_sieve.publish.recipe import RECIPE_NAME, Recipe, located

from .base import add_debug, reserved_output
from .prune import PruneCommand, add_run


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


class RunCommand(PruneCommand):
    """Prune as a recipe says."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve run`."""
        parser.description = (
            "Prune a model as a recipe says: a YAML file with `model`, `tasks` and `settings`, such as the "
            f"{RECIPE_NAME} beside every pruned model."
        )
        parser.add_argument("recipe", metavar="RECIPE", help=f"The recipe, such as {RECIPE_NAME}.")
        parser.add_argument(
            "--model", metavar="MODEL", help="Hub id or directory of the model, instead of the recipe's."
        )
        parser.add_argument(
            "--data-dir",
            metavar="DIR",
            help="Directory of the rows of tasks whose content is in the recipe (default: that of the recipe).",
        )
        parser.add_argument("--device", help="Device (default: the accelerator if available, else cpu).")
        parser.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="Run code that the recipe names: modeling code of the model's repository, metrics of evaluate.",
        )
        add_run(parser)
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Read the recipe, prune, save and print the report as a table."""
        self.check_output(arguments)
        path = Path(arguments.recipe)
        recipe = Recipe.from_file(path)
        config = recipe.config()
        data_dir = None if arguments.data_dir is None else Path(arguments.data_dir)
        if (arguments.model or recipe.model) is None:
            raise ValueError(f"`--model` must be given for a recipe without a `model`, got {path}.")
        # The revision and the file are those of the recipe's model.
        kept = ("dtype",) if arguments.model else ("revision", "dtype", "gguf_file")
        for name in ("revision", "dtype", "gguf_file"):
            setattr(arguments, name, recipe.loading.get(name) if name in kept else None)
        beside = path.parent / (recipe.model or "")
        arguments.model = arguments.model or (str(beside) if beside.is_dir() else recipe.model)
        # The rows are read once, but the output must be apart from all files.
        arguments.task = [located(task, path.parent) for task in recipe.tasks if isinstance(task, str)]
        with nullcontext() if arguments.output is None else reserved_output(arguments):
            arguments.task = recipe.read_tasks(path.parent, data_dir, trust_remote_code=arguments.trust_remote_code)
            self.prune(arguments, config)
