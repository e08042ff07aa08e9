"""Measure what quantization costs a pruned model, compared with its dense original.

    python benchmarks/quantization.py                                  # the demo's model, task and result
    python benchmarks/quantization.py --pruned pruned --model org/base --task task.yaml --json rows.jsonl

Every variant is quantized while it loads, saved, and scored on the same examples of the task's test split. Embeddings
stay as they are, and so do linears whose shapes a method does not support (see
`optimum_sieve.quantization.compatible`). Prints a table in Markdown:

- MB: size of the saved safetensors files. torchao stores a 4-bit weight in a byte on the CPU, so `MB packed` is the
  size with two of them in a byte;
- quantized: share of the weights of the linears, without the head, in fewer bits;
- accuracy (or the task's metric), and its paired differences to the same model before quantization and to the pruned
  model, +- standard errors;
- KL from the model before quantization, +- standard error, and agreement with its answers.

In the mixed variants the two matrices of a pruned layer have different precision; `first` multiplies the input
(`right` or `pivot`), `last` its result (`left` or `rest`). Their 4 bits use groups where the group size divides the
rows, and one scale per row elsewhere.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from bench import (
    append_json,
    auto_class_name,
    choose_source,
    divergences,
    find_targets,
    load_model,
    make_parser,
    save_model,
    standard_error,
)
from torch import nn
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import AutoConfig, BitsAndBytesConfig, TorchAoConfig

from optimum_sieve import FactorizedLinear, Task, compare, evaluate
from optimum_sieve.quantization import compatible


if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from optimum_sieve import Evaluation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRUNED = Path(__file__).resolve().parents[1] / "demo-output"
PLAIN = (
    "int8", "int8 groups", "int8 activations", "int4 rows", "int4 groups", "bitsandbytes int8", "bitsandbytes nf4",
)  # fmt: skip
# Bits of the first and the last factor; dense layers have the smaller number. `None`: the pruned model's precision.
MIXED: dict[str, tuple[int | None, int | None]] = {
    "first int8, last unquantized": (8, None),
    "first unquantized, last int8": (None, 8),
    "int4 groups or rows": (4, 4),
    "first int4, last int8": (4, 8),
    "first int8, last int4": (8, 4),
    "first int4, last unquantized": (4, None),
    "first unquantized, last int4": (None, 4),
}
SMALLER = "larger int4, smaller int8"
COLUMNS = ("model", "quantization", "MB", "MB packed", "quantized", "{metric}", "to before", "to pruned", "KL", "agree")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, dtype="bfloat16")
    parser.add_argument("--pruned", default=str(PRUNED), help="pruned directory; default: the demo's result")
    parser.add_argument("--examples", type=int, help="test examples; default: all")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=32, help="weights per scale, in the variants with groups")
    choices = (*PLAIN, *MIXED, SMALLER)
    parser.add_argument("--variants", nargs="+", choices=choices, default=choices, metavar="VARIANT",
                        help="quote each: " + ", ".join(f"'{choice}'" for choice in choices))  # fmt: skip
    chosen = parser.parse_args(arguments)
    for name, low in (("examples", 2), ("batch_size", 1), ("group_size", 2)):
        value = getattr(chosen, name)
        if value is not None and value < low:
            parser.error(f"`--{name.replace('_', '-')}` must be at least {low}, got {value}.")
    return chosen


def plain_config(variant: str, group_size: int) -> Any:
    """Return the configuration that quantizes all linears in the same way."""
    if variant == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if variant == "bitsandbytes nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    settings = {
        "int8": Int8WeightOnlyConfig(),
        "int8 groups": IntxWeightOnlyConfig(torch.int8, PerGroup(group_size)),
        "int8 activations": Int8DynamicActivationInt8WeightConfig(),
        "int4 rows": IntxWeightOnlyConfig(torch.int4, PerAxis(0)),
        "int4 groups": IntxWeightOnlyConfig(torch.int4, PerGroup(group_size)),
    }
    return TorchAoConfig(settings[variant])


def mixed_config(variant: str, model: PreTrainedModel, group_size: int) -> TorchAoConfig:
    """Return the configuration that gives the two factors of each layer of `model` different precision."""
    fewest = 4 if variant == SMALLER else min(count for count in MIXED[variant] if count is not None)
    bits = {f"{target.name}.weight": (fewest, target.in_features) for target in find_targets(model, ["*"])}
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear):
            children = list(layer.named_children())
            sizes = [child.weight.numel() for _, child in children]
            smaller_first = (8, 4) if sizes[0] <= sizes[1] else (4, 8)
            chosen = smaller_first if variant == SMALLER else MIXED[variant]
            for (child_name, child), count in zip(children, chosen, strict=True):
                bits[f"{name}.{child_name}.weight"] = (count, child.in_features)
    settings = {
        name: Int8WeightOnlyConfig()
        if count == 8
        else IntxWeightOnlyConfig(torch.int4, PerGroup(group_size) if columns % group_size == 0 else PerAxis(0))
        for name, (count, columns) in bits.items()
        if count is not None
    }
    return TorchAoConfig(FqnToConfig(settings))


def linear_weights(model: PreTrainedModel) -> Iterator[tuple[int, bool, bool]]:
    """Yield the number of weights of every linear but the head, whether they are quantized, and to 4 bits per byte."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            weight = module.weight
            quantized = type(weight) is not nn.Parameter or not weight.is_floating_point()
            packable = getattr(weight, "target_dtype", None) == torch.int4
            # An element of bitsandbytes' 4-bit weights is two weights.
            yield module.in_features * module.out_features, quantized, packable


class Bench:
    """A dense and a pruned model on disk, and the examples they are scored on."""

    def __init__(self, chosen: argparse.Namespace, root: Path) -> None:
        name, file, gguf_file = choose_source(chosen.model, chosen.task)
        self.chosen, self.task, self.directories = chosen, Task.from_file(file), {}
        for side, source, gguf in (("pruned", chosen.pruned, None), ("dense", name, gguf_file)):
            # The dense model's tokenizer, the last one, reads the examples for both.
            model, self.tokenizer, _ = load_model(source, dtype=chosen.dtype, gguf_file=gguf)
            self.directories[side] = root / side
            save_model(model, self.tokenizer, root / side)
        self.examples = self.task.examples("test", self.tokenizer)[: chosen.examples]
        self.before: dict[str, Evaluation] = {}

    def load(self, side: str, variant: str) -> PreTrainedModel:
        """Load the dense or the pruned model in the given variant."""
        directory = self.directories[side]
        config = AutoConfig.from_pretrained(directory)
        auto_class = getattr(transformers, auto_class_name(config))
        options: dict[str, Any] = {"dtype": "auto", "device_map": DEVICE}
        if variant in PLAIN:
            options["quantization_config"] = compatible(config, plain_config(variant, self.chosen.group_size))
        elif variant:
            with torch.device("meta"):
                skeleton = auto_class.from_config(AutoConfig.from_pretrained(directory))
            mixed = mixed_config(variant, skeleton, self.chosen.group_size)
            options["quantization_config"] = compatible(config, mixed)
        return auto_class.from_pretrained(directory, **options).eval()

    def measure(self, side: str, variant: str = "") -> dict[str, Any]:
        """Load, save and score one variant; without a name the model as it is, which must come first.

        Returns:
            `dict[str, Any]`: The figures; differences are paired and in the metric's points, KL in nats.
        """
        model = self.load(side, variant)
        with tempfile.TemporaryDirectory() as directory:
            # Before the first forward pass: bitsandbytes repacks 4-bit weights there, and then saves them wrongly.
            model.save_pretrained(directory)
            num_bytes = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
        weights = list(linear_weights(model))
        options = {"metric": self.task.metric, "batch_size": self.chosen.batch_size}
        found = evaluate(model, self.examples, self.tokenizer, description=f"{side} {variant}", **options)
        del model
        gc.collect()
        before = self.before.setdefault(side, found)
        to_before, to_pruned = compare(before, found), compare(self.before["pruned"], found)
        return {
            "model": side,
            "quantization": variant or "none",
            "num_bytes": num_bytes,
            "packed_bytes": num_bytes - sum(count for count, _, packable in weights if packable) // 2,
            "quantized": sum(count for count, quantized, _ in weights if quantized) / sum(w[0] for w in weights),
            "metric": found.metric,
            "count": found.count,
            "score": found.score,
            "score_standard_error": found.standard_error,
            **{"to_before": to_before.mean, "to_before_standard_error": to_before.standard_error},
            **{"to_pruned": to_pruned.mean, "to_pruned_standard_error": to_pruned.standard_error},
            "kl": to_before.kl,
            "kl_standard_error": standard_error(divergences(before, found)),
            "agreement": to_before.agreement,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all variants and print the table; a row is written to the JSON file as soon as it is measured."""
    chosen = parse_arguments(arguments)
    if chosen.json is not None:
        # Fails now if it cannot be written; rows of an earlier run would mix with these.
        chosen.json.write_text("", encoding="utf-8")
    rows = []
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(chosen, Path(root))
        plain = [(side, variant) for side in ("dense", "pruned") for variant in chosen.variants if variant in PLAIN]
        mixed = [("pruned", variant) for variant in chosen.variants if variant not in PLAIN]
        for side, variant in (("pruned", ""), ("dense", ""), *plain, *mixed):
            rows.append(bench.measure(side, variant))
            append_json(chosen.json, rows[-1])
    print(f"{rows[0]['count']} examples, {chosen.dtype} where not quantized, {DEVICE}.\n")
    print(f"| {' | '.join(COLUMNS).format(metric=rows[0]['metric'])} |\n|{' --- |' * len(COLUMNS)}")
    for row in rows:
        print(f"| {' | '.join(cells(row))} |")


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    return [
        row["model"],
        row["quantization"],
        *(f"{row[name] / 1e6:.2f}" for name in ("num_bytes", "packed_bytes")),
        f"{row['quantized']:.1%}",
        f"{row['score']:.4f} ± {row['score_standard_error']:.4f}",
        *(f"{row[name]:+.4f} ± {row[f'{name}_standard_error']:.4f}" for name in ("to_before", "to_pruned")),
        f"{row['kl']:.5f} ± {row['kl_standard_error']:.5f}",
        f"{row['agreement']:.4f}",
    ]


if __name__ == "__main__":
    main()
