"""`optimum-cli sieve merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import SieveSubcommand, add_debug, reserved_output


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


class MergeCommand(SieveSubcommand):
    """Merge a LoRA adapter into a pruned model."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve merge`."""
        parser.description = "Merge a LoRA adapter into a pruned model and save the result, which stays factorized."
        parser.add_argument("--model", metavar="MODEL", required=True, help="Hub id or directory of the pruned model.")
        parser.add_argument(
            "--adapter", metavar="DIR", required=True, help="Directory of the adapter, as saved by PEFT."
        )
        parser.add_argument("--output", metavar="DIR", required=True, help="Directory for the merged model.")
        parser.add_argument(
            "--rank",
            choices=("widen", "keep"),
            default="widen",
            help="Ranks after merging an adapter of whole matrices: widen (adds the adapter's rank; exact) or keep "
            "(truncates each layer to its previous rank; approximate) (default: %(default)s).",
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace an --output that holds a model.")
        parser.add_argument("--dtype", help="Floating-point type of the merged model (default: as saved).")
        parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Merge, save and print the sizes before and after."""
        with reserved_output(arguments):
            self._merge(arguments)

    def _merge(self, arguments: Namespace) -> None:
        from optimum_sieve.backbone.loading import load_model
        from optimum_sieve.backbone.sources import read_config
        from optimum_sieve.lora.layer import require_peft
        from optimum_sieve.lora.merge import check_adapter, merge_adapter, save_merged
        from optimum_sieve.publish.origin.terms import read_terms

        require_peft()
        check_adapter(arguments.adapter, read_config(arguments.model, revision=arguments.revision))
        model, tokenizer, _ = load_model(
            arguments.model, dtype=arguments.dtype, device="cpu", revision=arguments.revision
        )
        before = _sizes(model)
        merged = merge_adapter(model, arguments.adapter, rank=arguments.rank)
        save_merged(
            merged,
            tokenizer,
            arguments.output,
            overwrite=arguments.overwrite,
            terms=read_terms(arguments.model, arguments.revision),
        )
        for name, count in _sizes(merged).items():
            print(f"{name}: {before[name]:,} before, {count:,} after")
        print(f"saved in {arguments.output}")


def _sizes(model: Any) -> dict[str, int]:
    """Count parameters, including biases, and sum the ranks."""
    from optimum_sieve.modeling.layers import FactorizedLinear

    layers = [module for module in model.modules() if isinstance(module, FactorizedLinear)]
    return {
        "parameters of the model": sum(parameter.numel() for parameter in model.parameters()),
        "parameters of its factorized layers": sum(p.numel() for layer in layers for p in layer.parameters()),
        "sum of their ranks": sum(layer.rank for layer in layers),
    }
