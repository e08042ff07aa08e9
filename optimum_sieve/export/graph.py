"""Trace a model into an ONNX graph: a decoder with its cache as inputs and outputs, any other model in one pass."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from optimum_sieve.backbone.kinds import max_positions, model_kind
from optimum_sieve.modeling.experts import SeparateExperts


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    Past = dict[str, dict[str, torch.Tensor]]

# Rows, and tokens of the cache and after it.
_ROWS, _PAST, _NEW = 2, 3, 5
# The names of optimum, which ORTModelForCausalLM knows.
_BATCH_AXIS, _NEW_AXIS, _PAST_AXIS = "batch_size", "sequence_length", "past_sequence_length"
_TOTAL_AXIS = f"{_PAST_AXIS} + {_NEW_AXIS}"


class CachedDecoder(nn.Module):
    """A decoder that takes and returns its cache as dictionaries, from whose keys the exporter makes names.

    The names are those of optimum: `past_key_values.0.key`, `present.0.value`. Sliding layers keep the whole text too,
    and their masks hide what has left the window, because a graph of a cut cache holds for one length alone.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model for which [`cache_layers`] returns layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.cache_name = _cache_name(model) or ""

    def forward(self, past_key_values: Past, **inputs: torch.Tensor) -> dict[str, Any]:
        """Return the logits of the new tokens, and the cache with them."""
        cache = DynamicCache()
        cache.layers = [_filled_layer(**layer) for layer in past_key_values.values()]
        outputs = self.model(**inputs, **{self.cache_name: cache}, use_cache=True)
        layers = enumerate(outputs[self.cache_name].layers)
        present = {str(index): {"key": layer.keys, "value": layer.values} for index, layer in layers}
        return {"logits": outputs.logits, "present": present}


def _filled_layer(key: torch.Tensor, value: torch.Tensor) -> DynamicLayer:
    layer_class: Any = DynamicLayer
    layer: DynamicLayer = layer_class()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


def _cache_name(model: PreTrainedModel) -> str | None:
    """Return the name of the cache among a model's inputs and outputs, which transformers 5.24 changed."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


@torch.no_grad()
def cache_layers(model: PreTrainedModel) -> list[DynamicLayer] | None:
    """Return the layers of the cache of two tokens, or `None` if it holds more than the keys and values of a decoder.

    Args:
        model ([`~transformers.PreTrainedModel`]): In evaluation mode.

    Returns:
        `list[DynamicLayer]`, *optional*: Layers with `keys` and `values` of shape `(1, heads, 2, size)`.
    """
    name = _cache_name(model)
    if model_kind(model) != "causal" or name is None:
        return None
    cache = model(**random_inputs(model, 1, 2), use_cache=True).get(name)
    if type(cache) is not DynamicCache:
        return None
    layers: Any = cache.layers
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    # Layers that share the keys of others have none.
    is_plain = all(type(layer) in known and layer.is_initialized for layer in layers)
    return list(layers) if is_plain else None


def random_inputs(model: PreTrainedModel, rows: int, length: int, *, cached: bool = False) -> dict[str, torch.Tensor]:
    """Make random inputs without padding tokens in the text; all rows but the first are padded.

    Args:
        model ([`~transformers.PreTrainedModel`]): Tells the tokens, the greatest length and the inputs.
        rows (`int`): Number of texts.
        length (`int`): Number of tokens of the longest text.
        cached (`bool`): Whether for a graph with a cache: padded on the left, and with the positions of the tokens.

    Returns:
        `dict[str, torch.Tensor]`: Inputs of the model, int64 of shape `(rows, length)`.
    """
    config: Any = model.config.get_text_config()
    generator = torch.Generator().manual_seed(length)
    length = min(length, max_positions(model) or length)
    pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0

    def draw(tokens: int) -> torch.Tensor:
        ids = torch.randint(config.vocab_size, (rows, tokens), generator=generator)
        # The embedding of padding may be zero, from which a router picks arbitrary experts.
        return torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)

    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        mask[row, max(1, length - row) :] = 0
    mask = mask.flip(1) if cached else mask
    inputs = {"input_ids": torch.where(mask.bool(), draw(length), pad), "attention_mask": mask}
    if model_kind(model) == "seq2seq":
        inputs["decoder_input_ids"] = draw(length + 1)
    # Some decoders count the positions themselves.
    if cached and "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    return inputs


def trace(model: PreTrainedModel, layers: Sequence[DynamicLayer] | None) -> Any:
    """Trace a model in evaluation mode into a graph for any number of rows and tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): On the CPU in float32.
        layers (`Sequence[DynamicLayer]`, *optional*): From [`cache_layers`]: the graph then takes and returns a cache,
            with the names that optimum gives its inputs, outputs and axes.

    Returns:
        `ExportedModel | ONNXProgram`: What the exporter of transformers returns; the latter before 5.23.

    Raises:
        RuntimeError: If the exporter fails, or makes a graph for one length alone, as of a recurrence.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    inputs: dict[str, Any] = random_inputs(model, _ROWS, _NEW if layers is None else _PAST + _NEW, cached=bool(layers))
    # Named axes must be valid for any length, which fails if positions come from a table.
    axes: dict[str, Any] = {name: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for name in inputs}
    traced: nn.Module = model
    if layers is not None:
        traced = CachedDecoder(model)
        inputs.update({name: inputs[name][:, -_NEW:] for name in inputs if name != "attention_mask"})
        inputs["past_key_values"] = _random_past(layers)
        layer_axes = dict.fromkeys(("key", "value"), dict.fromkeys((0, 2), torch.export.Dim.AUTO))
        axes["past_key_values"] = dict.fromkeys(inputs["past_key_values"], layer_axes)
    exporter: Any = OnnxExporter
    # torch prints progress to stdout, where only the result of the command belongs.
    with traceable(model), contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            exported = exporter().export(traced, inputs, OnnxConfig(dynamic_shapes=axes))
        except Exception as error:
            raise RuntimeError(
                f"transformers could not export {type(model).__name__} to ONNX: {type(error).__name__}: {error} Update "
                "transformers, or export it with `--dense` and try another exporter."
            ) from error
    graph = (exported.program if hasattr(exported, "program") else exported.model).graph
    _check_axes(graph, type(model).__name__)
    if layers is not None:
        _name_axes(graph)
    return exported


def _random_past(layers: Sequence[DynamicLayer]) -> Past:
    def draw(tensor: Any) -> torch.Tensor:
        return torch.randn(_ROWS, tensor.shape[1], _PAST, tensor.shape[3])

    return {str(i): {"key": draw(layer.keys), "value": draw(layer.values)} for i, layer in enumerate(layers)}


def _check_axes(graph: Any, name: str) -> None:
    """Check that no number of rows or tokens was traced as a constant."""
    for value in graph.inputs:
        length = value.shape[2 if value.name.startswith("past_key_values.") else 1]
        if isinstance(value.shape[0], int) or isinstance(length, int):
            raise RuntimeError(
                f"`model` must be one that ONNX computes for any number of rows and tokens, got {name}, whose graph "
                f"fixes `{value.name}` at {value.shape}. Export it with `--dense`."
            )


def _name_axes(graph: Any) -> None:
    """Name the free axes of inputs and outputs; those in between keep no names, as torch's would not fit them."""
    import onnx_ir

    for value in (*graph.inputs, *graph.outputs):
        shape = [_BATCH_AXIS, *value.shape[1:]]
        if value.name.startswith("past_key_values."):
            shape[2] = _PAST_AXIS
        elif value.name.startswith("present."):
            shape[2] = _TOTAL_AXIS
        else:
            shape[1] = _TOTAL_AXIS if value.name == "attention_mask" else _NEW_AXIS
        value.shape = onnx_ir.Shape(shape)
    named = {id(value) for value in graph.outputs}
    for node in graph.all_nodes():
        for value in node.outputs:
            if id(value) not in named and value.shape is not None and not value.shape.is_static():
                value.shape = None


@contextlib.contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Disable the cache unless asked for, and let every expert read every token, as a graph cannot select tokens."""
    modules = list(model.modules())
    owned: list[Any] = [getattr(module, "config", None) for module in modules]
    configs = [config for config in {id(config): config for config in owned}.values() if hasattr(config, "use_cache")]
    cached = [config.use_cache for config in configs]
    experts: list[Any] = [module for module in modules if isinstance(module, SeparateExperts)]
    for config in configs:
        config.use_cache = False
    for module in experts:
        module.forward = functools.partial(_mixture, module)
    try:
        yield
    finally:
        for config, value in zip(configs, cached, strict=True):
            config.use_cache = value
        for module in experts:
            del module.forward


def _mixture(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the output of [`SeparateExperts`] without selecting tokens."""
    output = torch.zeros_like(hidden_states)
    for index, expert in enumerate(experts):
        weight = (top_k_weights * (top_k_index == index)).sum(-1, keepdim=True)
        output = output + expert(hidden_states) * weight.to(output.dtype)
    return output
