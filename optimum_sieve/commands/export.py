"""`optimum-cli sieve export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import SieveSubcommand, add_debug, reserved_output


if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Options with the forms that they are for.
_REQUIRED = {
    "max_difference": ("onnx",),
    "max_shard_size": ("dense", "factors"),
    **dict.fromkeys(("converter", "outtype", "whole_tokenizer"), ("gguf",)),
}


class ExportCommand(SieveSubcommand):
    """Write a pruned model in another format."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options of `optimum-cli sieve export`."""
        parser.description = (
            "Convert a pruned model to one of plain factors, to a dense model of its base architecture, to an ONNX "
            "graph, or to a GGUF file."
        )
        parser.add_argument("--model", metavar="MODEL", required=True, help="Hub id or directory of the pruned model.")
        parser.add_argument("--output", metavar="DIR", required=True, help="Directory for the exported model.")
        form = parser.add_mutually_exclusive_group(required=True)
        form.add_argument(
            "--dense",
            action="store_true",
            help="Multiply the factors out: dense size and speed, loads with plain transformers.",
        )
        form.add_argument(
            "--factors",
            action="store_true",
            help="Stay pruned, with every layer stored as two plain factors of rank 1 or more: for tensor parallelism "
            "and vLLM.",
        )
        form.add_argument(
            "--onnx",
            action="store_true",
            help="Write an ONNX graph that keeps the factors, and verify it in ONNX Runtime.",
        )
        form.add_argument(
            "--gguf",
            action="store_true",
            help="Multiply the factors out and run llama.cpp's converter: a file model.gguf of the dense size.",
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace an --output that holds a model.")
        parser.add_argument(
            "--dtype",
            help="Floating-point type of the exported model, such as bfloat16 (default: as saved; float32 for --onnx).",
        )
        parser.add_argument(
            "--max-difference",
            type=float,
            metavar="X",
            help="With --onnx: maximum logit difference, relative to the largest logit (default: 0.001).",
        )
        parser.add_argument(
            "--max-shard-size",
            metavar="SIZE",
            help="With --dense or --factors: maximum size of a weight file, such as 2GB.",
        )
        parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
        _add_gguf_options(parser)
        add_debug(parser)

    def execute(self, arguments: Namespace) -> None:
        """Load the model, export it and print the directory."""
        for option, forms in _REQUIRED.items():
            if getattr(arguments, option) is not None and not any(getattr(arguments, form) for form in forms):
                required = " or ".join(f"--{form}" for form in forms)
                self.parser.error(f"--{option.replace('_', '-')} requires {required}")
        with reserved_output(arguments):
            self._export(arguments)

    def _export(self, arguments: Namespace) -> None:
        from optimum_sieve.export.dense import save_dense
        from optimum_sieve.export.factors import save_factors
        from optimum_sieve.export.gguf import export_gguf
        from optimum_sieve.export.onnx import TOLERANCE, check_onnx_packages, export_onnx
        from optimum_sieve.publish.origin.terms import read_terms

        if arguments.onnx:
            check_onnx_packages()
        gguf_options = _check_gguf(arguments) if arguments.gguf else {}
        model, tokenizer = _load(arguments)
        common: dict[str, Any] = {
            "overwrite": arguments.overwrite,
            "terms": read_terms(arguments.model, arguments.revision),
        }
        if arguments.onnx:
            tolerance = TOLERANCE if arguments.max_difference is None else arguments.max_difference
            difference = export_onnx(model, tokenizer, arguments.output, tolerance=tolerance, **common)
            print(f"largest difference in ONNX Runtime: {difference:.2g} of the largest logit")
        elif arguments.gguf:
            export_gguf(model, tokenizer, arguments.output, progress=True, **gguf_options, **common)
        else:
            if arguments.max_shard_size is not None:
                common["max_shard_size"] = arguments.max_shard_size
            save = save_dense if arguments.dense else save_factors
            save(model, tokenizer, arguments.output, progress=True, **common)
        print(f"saved in {arguments.output}")


def _add_gguf_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--converter",
        metavar="PATH",
        help="With --gguf: a checkout of llama.cpp, or its convert_hf_to_gguf.py (default: the one on the PATH).",
    )
    parser.add_argument(
        "--outtype",
        metavar="TYPE",
        help="With --gguf: type of the weights as the converter names it, such as bf16 or q8_0 (default: f16).",
    )
    parser.add_argument(
        "--whole-tokenizer",
        metavar="MODEL",
        help="With --gguf and a reduced vocabulary: Hub id or directory with the tokenizer of the dense model "
        "(default: the model that the pruned one names).",
    )


def _check_gguf(arguments: Namespace) -> dict[str, Any]:
    """Check what the converter needs, and return its options."""
    from transformers import AutoTokenizer

    from optimum_sieve.backbone.sources import naming_model, read_config, source_options
    from optimum_sieve.export.gguf import find_converter, load_whole_tokenizer
    from optimum_sieve.modeling.conversion import check_pruned

    options: dict[str, Any] = {"converter": find_converter(arguments.converter), "outtype": arguments.outtype or "f16"}
    config = read_config(arguments.model, revision=arguments.revision)
    check_pruned(config)
    if "vocabulary" in config.sieve:
        with naming_model(arguments.model):
            where = {"revision": arguments.revision or "main", **source_options(arguments.model, arguments.revision)}
            reduced = AutoTokenizer.from_pretrained(arguments.model, **where)
        options["whole_tokenizer"] = load_whole_tokenizer(config.sieve, reduced, arguments.whole_tokenizer)
    return options


def _load(arguments: Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the pruned model on the CPU, after its configuration was checked."""
    from optimum_sieve.backbone.loading import load_model
    from optimum_sieve.backbone.sources import read_config
    from optimum_sieve.modeling.conversion import check_pruned

    check_pruned(read_config(arguments.model, revision=arguments.revision))
    dtype = arguments.dtype or ("float32" if arguments.onnx else None)
    model, tokenizer, _ = load_model(arguments.model, dtype=dtype, device="cpu", revision=arguments.revision)
    return model, tokenizer
