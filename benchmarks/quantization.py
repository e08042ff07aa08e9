"""Measure what quantization costs a pruned model, beside what it costs its dense original.

    python benchmarks/quantization.py                                  # the demo's model, task and result
    python benchmarks/quantization.py --pruned pruned --model org/base --task task.yaml --json rows.jsonl

Every variant is quantized while it loads, saved, and scored on the same examples of the task's test split. Linears
whose shapes a method cannot take stay as they are (see `optimum_sieve.quantization.compatible`), and so do embeddings.
Prints a table in Markdown:

- MB: of the saved safetensors files. torchao keeps a 4-bit weight in a byte on the CPU, so `MB packed` says what the
  same file would take with two of them in a byte;
- quantized: share of the weights of the linears, without the head, that are held in fewer bits;
- accuracy (or the task's metric), and its paired differences to the same model before quantization and to the pruned
  model, +- standard errors;
- KL from the model before quantization, +- standard error, and agreement with its answers.

In the mixed variants a pruned layer's two matrices are held in different precision; `first` is what the input meets
(`right` or `pivot`), `last` the other one (`left` or `rest`). Their 4 bits have groups where the group size divides the
rows, and one scale a row elsewhere.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from records import append_json
from source import choose_source
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
from optimum_sieve.backbone.kinds import auto_class_name
from optimum_sieve.backbone.loading import default_device, load_model
from optimum_sieve.backbone.targets import find_targets, is_linear
from optimum_sieve.evaluation.comparison import divergences
from optimum_sieve.modeling.conversion import forget_gguf
from optimum_sieve.quantization import compatible
from optimum_sieve.tasks.metrics import standard_error


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from optimum_sieve import Evaluation

PRUNED = Path(__file__).resolve().parents[1] / "demo-output"
PLAIN = (
    "int8", "int8 groups", "int8 activations", "int4 rows", "int4 groups", "bitsandbytes int8", "bitsandbytes nf4",
)  # fmt: skip
# Bits of the first and the last factor; dense layers have the fewer. `None` is the pruned model's own precision.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruned", default=str(PRUNED), help="pruned directory; default: the demo's result")
    parser.add_argument("--model", help="its dense original, Hub id or directory; default: the demo's model")
    parser.add_argument("--task", help="task file; default: the demo's movie reviews")
    parser.add_argument("--dtype", default="bfloat16", help="of what is not quantized")
    parser.add_argument("--examples", type=int, help="of the test split; default: all")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=32, help="weights of one scale, of the variants in groups")
    choices = (*PLAIN, *MIXED, SMALLER)
    parser.add_argument("--variants", nargs="+", choices=choices, default=choices, metavar="VARIANT",
                        help="quote each: " + ", ".join(f"'{choice}'" for choice in choices))  # fmt: skip
    parser.add_argument("--json", type=Path, help="where the rows go as JSON lines")
    chosen = parser.parse_args(arguments)
    for name, low in (("examples", 2), ("batch_size", 1), ("group_size", 2)):
        value = getattr(chosen, name)
        if value is not None and value < low:
            parser.error(f"`--{name.replace('_', '-')}` must be at least {low}, got {value}.")
    return chosen


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant's figures; differences are paired and in the metric's points, KL in nats."""

    model: str
    quantization: str
    num_bytes: int
    packed_bytes: int
    quantized: float
    metric: str
    count: int
    score: float
    score_standard_error: float
    to_before: float
    to_before_standard_error: float
    to_pruned: float
    to_pruned_standard_error: float
    kl: float
    kl_standard_error: float
    agreement: float

    def cells(self) -> list[str]:
        """Return the row of the table."""
        return [
            self.model,
            self.quantization,
            f"{self.num_bytes / 1e6:.2f}",
            f"{self.packed_bytes / 1e6:.2f}",
            f"{self.quantized:.1%}",
            f"{self.score:.4f} ± {self.score_standard_error:.4f}",
            f"{self.to_before:+.4f} ± {self.to_before_standard_error:.4f}",
            f"{self.to_pruned:+.4f} ± {self.to_pruned_standard_error:.4f}",
            f"{self.kl:.5f} ± {self.kl_standard_error:.5f}",
            f"{self.agreement:.4f}",
        ]


def intx(dtype: torch.dtype, granularity: Any) -> IntxWeightOnlyConfig:
    """Return the settings of weights of a few bits."""
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)


def plain_config(variant: str, group_size: int) -> Any:
    """Return the configuration that quantizes all linears alike."""
    makers = {
        "int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
        "int8 groups": lambda: TorchAoConfig(intx(torch.int8, PerGroup(group_size))),
        "int8 activations": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
        "int4 rows": lambda: TorchAoConfig(intx(torch.int4, PerAxis(0))),
        "int4 groups": lambda: TorchAoConfig(intx(torch.int4, PerGroup(group_size))),
        "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }
    return makers[variant]()


def mixed_config(variant: str, model: PreTrainedModel, group_size: int) -> TorchAoConfig:
    """Return the configuration that gives the two factors of a layer of `model` different precision."""
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
        else intx(torch.int4, PerGroup(group_size) if columns % group_size == 0 else PerAxis(0))
        for name, (count, columns) in bits.items()
        if count is not None
    }
    return TorchAoConfig(FqnToConfig(settings))


def linear_weights(model: PreTrainedModel) -> Iterator[tuple[int, bool, bool]]:
    """Yield of every linear but the head how many weights it has, whether they are quantized, and to 4 bits a byte."""
    for module in model.modules():
        if is_linear(module) and module is not model.get_output_embeddings():
            weight = module.weight
            # Of bitsandbytes' 4-bit weights two are one element.
            count = module.in_features * module.out_features if isinstance(module, nn.Linear) else weight.numel()
            quantized = type(weight) is not nn.Parameter or not weight.is_floating_point()
            yield count, quantized, getattr(weight, "target_dtype", None) == torch.int4


class Bench:
    """A dense and a pruned model on disk, and the examples they are scored on."""

    def __init__(self, directories: dict[str, Path], tokenizer: Any, task: Task, chosen: argparse.Namespace) -> None:
        self.directories, self.tokenizer, self.task = directories, tokenizer, task
        self.examples = task.examples("test", tokenizer)[: chosen.examples]
        self.batch_size, self.group_size = chosen.batch_size, chosen.group_size
        self.before: dict[str, Evaluation] = {}

    def load(self, side: str, variant: str) -> PreTrainedModel:
        """Load the dense or the pruned model in the given variant."""
        directory = self.directories[side]
        config = AutoConfig.from_pretrained(directory)
        auto_class = getattr(transformers, auto_class_name(config))
        options: dict[str, Any] = {"dtype": "auto", "device_map": str(default_device())}
        if variant in PLAIN:
            options["quantization_config"] = compatible(config, plain_config(variant, self.group_size))
        elif variant:
            with torch.device("meta"):
                skeleton = auto_class.from_config(AutoConfig.from_pretrained(directory))
            options["quantization_config"] = compatible(config, mixed_config(variant, skeleton, self.group_size))
        return auto_class.from_pretrained(directory, **options).eval()

    def measure(self, side: str, variant: str = "") -> Row:
        """Load, save and score one variant; without a name the model as it is, which must come first."""
        model = self.load(side, variant)
        with tempfile.TemporaryDirectory() as directory:
            # Before the first forward pass: bitsandbytes repacks 4-bit weights there, and then saves them wrongly.
            model.save_pretrained(directory)
            num_bytes = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
        weights = list(linear_weights(model))
        evaluation = evaluate(
            model,
            self.examples,
            self.tokenizer,
            metric=self.task.metric,
            batch_size=self.batch_size,
            description=f"{side} {variant}",
        )
        del model
        gc.collect()
        if not variant:
            self.before[side] = evaluation
        before = self.before[side]
        to_before, to_pruned = compare(before, evaluation), compare(self.before["pruned"], evaluation)
        return Row(
            model=side,
            quantization=variant or "none",
            num_bytes=num_bytes,
            packed_bytes=num_bytes - sum(count for count, _, is_spread in weights if is_spread) // 2,
            quantized=sum(count for count, is_quantized, _ in weights if is_quantized) / sum(w[0] for w in weights),
            metric=evaluation.metric,
            count=evaluation.count,
            score=evaluation.score,
            score_standard_error=evaluation.standard_error,
            to_before=to_before.mean,
            to_before_standard_error=to_before.standard_error,
            to_pruned=to_pruned.mean,
            to_pruned_standard_error=to_pruned.standard_error,
            kl=to_before.kl,
            kl_standard_error=standard_error(divergences(before, evaluation)),
            agreement=to_before.agreement,
        )


def save_originals(chosen: argparse.Namespace, root: Path) -> tuple[dict[str, Path], Any, Task]:
    """Save both models in one dtype below `root`, where quantizers can read them."""
    name, task_file, gguf_file = choose_source(chosen.model, chosen.task)
    directories = {}
    for side, source, gguf in (("pruned", chosen.pruned, None), ("dense", name, gguf_file)):
        model, tokenizer, _ = load_model(source, dtype=chosen.dtype, gguf_file=gguf)
        # transformers saves no model that remembers its GGUF file.
        forget_gguf(model)
        directories[side] = root / side
        model.save_pretrained(directories[side])
    # The dense model's tokenizer, the last one, reads the examples for both.
    return directories, tokenizer, Task.from_file(task_file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all variants and print the table; a row goes to the JSON file as soon as it is there."""
    chosen = parse_arguments(arguments)
    if chosen.json is not None:
        # Refused now where it cannot be written; rows of an earlier run would mix with these.
        chosen.json.write_text("", encoding="utf-8")
    rows = []
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(*save_originals(chosen, Path(root)), chosen)
        plain = [(side, variant) for side in ("dense", "pruned") for variant in chosen.variants if variant in PLAIN]
        mixed = [("pruned", variant) for variant in chosen.variants if variant not in PLAIN]
        for side, variant in (("pruned", ""), ("dense", ""), *plain, *mixed):
            rows.append(bench.measure(side, variant))
            if chosen.json is not None:
                append_json(chosen.json, asdict(rows[-1]))
    print_table(rows, chosen.dtype)


def print_table(rows: Sequence[Row], dtype: str) -> None:
    """Print the rows as a Markdown table."""
    print(f"{rows[0].count} examples, {dtype} where not quantized, {default_device().type}.\n")
    print(f"| {' | '.join(COLUMNS).format(metric=rows[0].metric)} |\n|{' --- |' * len(COLUMNS)}")
    for row in rows:
        print(f"| {' | '.join(row.cells())} |")


if __name__ == "__main__":
    main()
