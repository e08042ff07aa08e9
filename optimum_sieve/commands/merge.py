"""`optimum-cli sieve merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import SieveSubcommand, add_debug


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


class MergeCommand(SieveSubcommand):
    """Merge a LoRA adapter into a pruned model."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve merge`."""
        parser.description = "Merge a LoRA adapter into a pruned model, which stays factorized, and write the result."
        parser.add_argument("--model", metavar="MODEL", required=True, help="Hub id or directory of the pruned model.")
        parser.add_argument(
            "--adapter", metavar="DIR", required=True, help="Directory of the adapter, as PEFT saves it."
        )
        parser.add_argument("--output", metavar="DIR", required=True, help="Directory of the merged model.")
        parser.add_argument(
            "--rank",
            choices=("widen", "keep"),
            default="widen",
            help="What an adapter of whole matrices does to the ranks: they grow by its own, exactly, or "
            "each layer is brought back to its old rank by the best approximation (default: widen).",
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace what --output holds.")
        parser.add_argument(
            "--dtype", help="Floating-point type to merge and save in (default: as the model is saved)."
        )
        parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Merge, save and say what became of the size."""
        from transformers import AutoConfig

        from optimum_sieve.backbone.loading import load_model
        from optimum_sieve.lora.layer import require_peft
        from optimum_sieve.lora.merge import check_adapter, merge_adapter, save_merged
        from optimum_sieve.publish.card import base_license
        from optimum_sieve.run.files import check_output

        check_output(Path(arguments.output), arguments.overwrite)
        require_peft()
        check_adapter(arguments.adapter, AutoConfig.from_pretrained(arguments.model, revision=arguments.revision))
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
            license_id=base_license(arguments.model),
        )
        for name, count in _sizes(merged).items():
            print(f"{name}: {before[name]:,} before, {count:,} after")
        print(f"saved in {arguments.output}")


def _sizes(model: Any) -> dict[str, int]:
    """Count parameters, biases included, and add up ranks."""
    from optimum_sieve.modeling.layers import FactorizedLinear

    layers = [module for module in model.modules() if isinstance(module, FactorizedLinear)]
    return {
        "parameters of the model": sum(parameter.numel() for parameter in model.parameters()),
        "parameters of its factorized layers": sum(p.numel() for layer in layers for p in layer.parameters()),
        "sum of their ranks": sum(layer.rank for layer in layers),
    }
