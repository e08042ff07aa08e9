"""Time one stacked first factor for the linears that share an input, beside a first factor for each.

    python benchmarks/stacked.py
    python benchmarks/stacked.py --config benchmarks/configs/llama-3.1-8b --dtype bfloat16 --device cuda --compile

Queries, keys and values read the same input, gates and up-projections too. With their first factors stacked, a block of
a pruned Llama makes eleven products in place of fourteen. Both models are pruned, have the same random weights and are
laid out for generation; a ratio is the time with a first factor for each over that with stacked ones.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from inference import make_dense, make_parser, make_pruned, read_config, reload, time_pair
from records import append_json
from results.measure import machine_name
from torch import nn

from optimum_sieve import lay_out_for_generation


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.layers import FactorizedLinear


class Stacked(nn.Module):
    """Compute the first factors of several layers at once, for the first layer; the others fetch theirs.

    Args:
        firsts (`list[nn.Linear]`): The first factors, of one input, in the order in which the layers are called.
    """

    def __init__(self, firsts: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [first.out_features for first in firsts]
        weight = torch.cat([first.weight for first in firsts])
        self.product = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.product.weight = nn.Parameter(weight.detach())
        self.waiting: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first layer's part and keep the others'."""
        own, *self.waiting = self.product(x).split(self.sizes, dim=-1)
        return own


class Fetched(nn.Module):
    """Return what [`Stacked`] computed for this layer."""

    def __init__(self, stacked: Stacked, place: int) -> None:
        super().__init__()
        self.stacked, self.place = (stacked,), place  # A tuple: no child, so that its weights are counted once.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Leave the input, which is the first layer's, alone."""
        return self.stacked[0].waiting[self.place]


def main(words: Sequence[str] | None = None) -> None:
    """Print one row for each size, storage and kind of step."""
    options = make_parser(__doc__).parse_args(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    dense = make_dense(read_config(options.config), options.dtype, options.device)
    machine = machine_name(torch.device(options.device))
    print(f"{machine}, {options.dtype}, {'compiled' if options.compile else 'eager'}\n")
    print("| kept | storage | step | one each, ms | stacked, ms | ratio |\n| ---: | --- | --- | ---: | ---: | ---: |")
    for kept in options.kept:
        for storage in options.storages:
            pruned = make_pruned(dense, kept, storage)
            separate, stacked = reload(pruned)[0], stack(reload(pruned)[0])
            check(separate, stacked)
            for step, timing in time_pair(lay_out_for_generation(separate), lay_out_for_generation(stacked), options):
                times = f"{1e3 * timing.dense:.1f} | {1e3 * timing.pruned:.1f}"
                ratio = f"{timing.ratio:.2f} ({timing.spread:.2f})"
                print(f"| {kept:g} | {storage} | {step} | {times} | {ratio} |", flush=True)
                if options.json:
                    row = {"kept": kept, "storage": storage, "step": step, "each": timing.dense}
                    row |= {"stacked": timing.pruned, "ratio": timing.ratio, "spread": timing.spread}
                    append_json(options.json, row | {"machine": machine, "compiled": options.compile})
            torch.compiler.reset()


def stack(model: Any) -> Any:
    """Stack the first factors of every block, in place."""
    for block in model.model.layers:
        attention, network = block.self_attn, block.mlp
        _stack([attention.q_proj, attention.k_proj, attention.v_proj])
        _stack([network.gate_proj, network.up_proj])
    return model


def _stack(layers: list[FactorizedLinear]) -> None:
    """Stack the first factors of layers that are called one after the other with one input."""
    names = ["right" if layer.storage == "factors" else "pivot" for layer in layers]
    stacked = Stacked([layer.get_submodule(name) for layer, name in zip(layers, names, strict=True)])  # type: ignore[misc]
    setattr(layers[0], names[0], stacked)
    for place, (layer, name) in enumerate(zip(layers[1:], names[1:], strict=True)):
        setattr(layer, name, Fetched(stacked, place))


@torch.inference_mode()
def check(separate: Any, stacked: Any) -> None:
    """Refuse to time what does not compute the same.

    Raises:
        RuntimeError: If the logits differ by more than a hundredth of the largest.
    """
    ids = torch.arange(16, device=separate.device)[None]
    expected, found = (model(ids).logits.float() for model in (separate, stacked))
    if not torch.allclose(expected, found, rtol=0, atol=1e-2 * expected.abs().max().item()):
        raise RuntimeError("stacked first factors compute something else than separate ones")


if __name__ == "__main__":
    main(sys.argv[1:])
