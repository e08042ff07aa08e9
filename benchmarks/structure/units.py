r"""Measure the units of a model, its neurons and groups of heads, and remove the cheapest ones.

A neuron of a feed-forward network is a row of `gate_proj` and `up_proj` and a column of `down_proj`; heads are removed
by group, the query heads together with the key-value head that they share. Attentions and networks are named by their
last projection. For models with blocks like Llama's.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from bench import CalibrationExamples, calibration_batches, find_targets, visit_tokens
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Penalty on the change of the remaining columns, as a fraction of the mean second moment of the inputs.
RIDGE = 1e-3
# The last projection of an attention or a network, and those before it.
ENDS = {"o_proj": ("q_proj", "k_proj", "v_proj"), "down_proj": ("gate_proj", "up_proj")}


class Nothing(nn.Module):
    """An attention or a network without any unit; `layer` is the index of the attention's block."""

    def __init__(self, layer: int | None) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
        """Return zeros in the form of the module that was here."""
        zeros = torch.zeros_like(hidden_states)
        if past_key_values is not None:
            # A cache counts the positions in its first layer.
            states = hidden_states[:, None, :, :1]
            past_key_values.update(states, states, self.layer)
        return zeros if self.layer is None else (zeros, None)


def count_units(model: nn.Module) -> dict[str, int]:
    """Return the number of head groups or neurons of every attention and network."""
    counts = {}
    for name, module in model.named_modules():
        if hasattr(module, "o_proj"):
            counts[f"{name}.o_proj"] = module.k_proj.out_features // module.head_dim
        elif hasattr(module, "down_proj"):
            counts[f"{name}.down_proj"] = module.down_proj.in_features
    return counts


def count_parameters(model: nn.Module) -> int:
    """Return the parameters of the matrices of the blocks."""
    return sum(target.num_parameters for target in find_targets(model))


def circuit(model: Any) -> dict[str, list[int]]:
    """Return the query heads and the neurons of each block."""
    found = {}
    for kind, first, width in (("self_attn", "q_proj", model.config.head_dim), ("mlp", "gate_proj", 1)):
        layers = (getattr(getattr(block, kind), first, None) for block in model.model.layers)
        found["neurons" if width == 1 else "heads"] = [getattr(layer, "out_features", 0) // width for layer in layers]
    return found


def measure_units(run: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    r"""Return the predicted loss of removing each unit, and the second moment of the last projection's inputs.

    The loss is \(E[(\partial f / \partial c)^2] / 2\) as for low rank, where \(f\) is the Fisher root of the task's
    candidates and \(c\) a gate on the unit for all tokens of an example (Kwon et al. 2022, *A fast post-training
    pruning framework for transformers*).
    """
    counts, examples = count_units(run.model), run.tasks[0].calibration
    weights = {end: run.model.get_submodule(end).weight.detach() for end in counts}
    losses = {end: torch.zeros(count) for end, count in counts.items()}
    moments = {end: torch.zeros(weight.shape[1], weight.shape[1]) for end, weight in weights.items()}

    def visit(owners: torch.Tensor, end: str, x: torch.Tensor, g: torch.Tensor) -> None:
        moments[end].addmm_(x.T, x)
        gates = torch.zeros(int(owners[-1]) + 1, x.shape[1]).index_add_(0, owners, x * (g @ weights[end]))
        losses[end] += gates.unflatten(1, (counts[end], -1)).sum(dim=2).square().sum(dim=0) / (2 * len(examples))

    batches, loss = calibration_batches(run, CalibrationExamples(examples))
    for batch in batches:
        # The example of each token: a row holds one example.
        owners = batch.masks[0].nonzero()[:, 0]
        visit_tokens(run.model, list(counts), [batch], loss, partial(visit, owners))
    return losses, moments


def remove_units(
    model: nn.Module, budget: int, losses: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]
) -> None:
    """Remove the units that are cheapest per parameter, in place, until the blocks' matrices have `budget` parameters.

    The last projection of what is left is fitted to its former output by least squares.
    """
    layers = {end: projections(model, end) for end in losses}
    sizes = {
        end: sum(layer.weight.numel() for layer in layers[end].values()) // len(each) for end, each in losses.items()
    }
    units = [
        (loss / sizes[end], end, index) for end, each in losses.items() for index, loss in enumerate(each.tolist())
    ]
    surplus = count_parameters(model) - budget
    gone: dict[str, set[int]] = defaultdict(set)
    for _, end, index in sorted(units):
        if sizes[end] <= surplus:
            surplus -= sizes[end]
            gone[end].add(index)
    for end, indices in gone.items():
        left = [index for index in range(len(losses[end])) if index not in indices]
        set_weights(model, end, _smaller(layers[end], left, len(losses[end]), moments[end]))


def projections(model: nn.Module, end: str) -> dict[str, Any]:
    """Return the projections of an attention or a network by name, the last one last."""
    part, _, last = end.rpartition(".")
    return {name: model.get_submodule(name) for name in (f"{part}.{child}" for child in (*ENDS[last], last))}


def _smaller(
    layers: Mapping[str, Any], left: Sequence[int], count: int, moment: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the weights of the units `left` of `count`; none if no unit is left."""
    if not left:
        return {}
    *before, (end, last) = layers.items()
    weights = {}
    for name, layer in before:
        weights[name] = layer.weight.detach().unflatten(0, (count, -1))[list(left)].flatten(0, 1)
    kept = torch.arange(last.in_features).unflatten(0, (count, -1))[list(left)].flatten()
    rest = torch.ones(last.in_features, dtype=torch.bool).index_fill_(0, kept, False)
    weight = last.weight.detach()
    inner = moment[kept][:, kept].double()
    inner.diagonal().add_(RIDGE * float(moment.diagonal().mean()))
    change = torch.linalg.solve(inner, moment[kept][:, rest].double() @ weight[:, rest].double().T)
    return {**weights, end: weight[:, kept] + change.T.float()}


def set_weights(model: nn.Module, end: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Give an attention or a network smaller weights, in place; without any, nothing remains of it."""
    if not weights:
        part = end.rpartition(".")[0]
        model.set_submodule(part, Nothing(getattr(model.get_submodule(part), "layer_idx", None)))
    for name, weight in weights.items():
        layer: Any = model.get_submodule(name)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.out_features, layer.in_features = weight.shape
