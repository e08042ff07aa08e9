"""Run a graph in ONNX Runtime and compare its logits with the model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve.backbone.kinds import model_kind

from .graph import random_inputs


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

# Rows and tokens; all rows but the first are padded.
_SHAPES = ((1, 1), (1, 9), (3, 6))
_CACHED_SHAPES = ((1, 1), (1, 7), (3, 12))
# The last tokens are read in several passes: three at once after the first ones, then one by one.
_LAST_STARTS = (6, 3, 2, 1)


@torch.no_grad()
def logit_difference(model: PreTrainedModel, path: Path, *, cached: bool) -> float:
    """Return the largest difference between a logit of ONNX Runtime and the model's, relative to the largest logit.

    The model reads each text in one pass without a cache. A graph with a cache reads it in several: first tokens, three
    more, and the last three one by one, padded on the left.

    Args:
        model ([`~transformers.PreTrainedModel`]): In evaluation mode, on the CPU in float32.
        path (`Path`): The graph.
        cached (`bool`): Whether the graph has a cache.

    Returns:
        `float`: The difference, which may be NaN.

    Raises:
        RuntimeError: If ONNX Runtime lacks an operation of the graph.
    """
    import onnxruntime  # type: ignore[import-untyped]

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RuntimeError(
            f"`model` must be one whose graph ONNX Runtime loads, got {type(model).__name__}: {error} Export it with "
            "`--dense`."
        ) from error
    largest, difference = 0.0, 0.0
    for rows, length in _CACHED_SHAPES if cached else _SHAPES:
        inputs = random_inputs(model, rows, length, cached=cached)
        expected = model(**inputs).logits
        actual = (_cached_logits if cached else _logits)(session, inputs)
        if model_kind(model) == "causal":
            # Logits at padding are meaningless.
            real = inputs["attention_mask"].bool()
            expected, actual = expected[real], actual[real]
        largest = max(largest, float(expected.abs().max()))
        # Not Python's `max`, which may drop NaN.
        difference = float(torch.stack([torch.tensor(difference), (actual - expected).abs().max()]).max())
    return difference / max(largest, torch.finfo(torch.float32).tiny)


def _logits(session: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    names = {node.name for node in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in names}
    return torch.from_numpy(session.run(["logits"], feed)[0])


def _cached_logits(session: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Read the texts in several passes, each of which gets the cache of the one before."""
    rows, length = inputs["input_ids"].shape
    nodes = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
    past = {node.name: torch.zeros(rows, node.shape[1], 0, node.shape[3]).numpy() for node in nodes}
    starts = [0, *(length - count for count in _LAST_STARTS if count < length)]
    logits = []
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        feed = {name: tensor[:, start:end].numpy() for name, tensor in inputs.items()}
        feed["attention_mask"] = inputs["attention_mask"][:, :end].numpy()
        names = [node.name for node in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, {**feed, **past}), strict=True))
        past = {name: outputs[name.replace("past_key_values.", "present.")] for name in past}
        logits.append(torch.from_numpy(outputs["logits"]))
    return torch.cat(logits, dim=1)
