"""Export a pruned model as an ONNX graph that keeps the factors, and check it in ONNX Runtime."""

from __future__ import annotations

import importlib.util
import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve.backbone.kinds import model_kind
from optimum_sieve.backbone.sizes import tensor_bytes
from optimum_sieve.modeling.conversion import plain_layers
from optimum_sieve.modeling.label_offsets import KEY
from optimum_sieve.publish.card import build_export_card
from optimum_sieve.publish.directory import save_directory
from optimum_sieve.publish.origin.terms import NO_TERMS
from optimum_sieve.publish.task_file import inherited_files

from .dense import base_config
from .graph import cache_layers, trace
from .graph_check import logit_difference
from .older import make_readable


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.publish.origin.terms import Terms

logger = logging.getLogger(__name__)

_GRAPH = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# ONNX Runtime sums in another order. The difference of a wrong graph is near 1.
TOLERANCE = 1e-3


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    terms: Terms = NO_TERMS,
    tolerance: float = TOLERANCE,
) -> float:
    """Write a pruned model as an ONNX graph that keeps the factors, with the exporter of transformers.

    The graph is `model.onnx` with its weights in `model.onnx.data`. A decoder's is one with which
    `optimum.onnxruntime.ORTModelForCausalLM` generates: it takes `input_ids`, `attention_mask`, `position_ids` and
    `past_key_values.0.key` and so on, with a past of any length, and returns `logits` and `present.0.key` and so on.
    Other models take `input_ids` and `attention_mask`, and `decoder_input_ids` for an encoder-decoder, and return
    `logits`; so does a decoder with more state than keys and values, such as LFM2, after a warning. All take any
    number of rows and tokens. The graph is kept only if ONNX Runtime computes the logits of the model with it, on
    random inputs of several shapes. Transformers 4 reads the configuration and the tokenizer too.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model of type `sieve`, on the CPU in float32; not changed.
        tokenizer (`PreTrainedTokenizerBase`): Saved with the graph.
        output_dir (`str | Path`): A new or empty directory.
        overwrite (`bool`): Whether to replace a directory that holds a model, once the new one is complete.
        terms (`Terms`): Licence and languages of the base model.
        tolerance (`float`): Maximum logit difference, relative to the largest logit.

    Returns:
        `float`: The measured logit difference.

    Raises:
        ImportError: If onnx, onnxscript or onnxruntime is not installed.
        ValueError: If the model is not pruned, not plain float32 on the CPU, or `tolerance` is not positive.
        FileExistsError: If `output_dir` holds files and `overwrite` is false, or files that are not of a model.
        RuntimeError: If the exporter fails, or the difference exceeds `tolerance`. Nothing is written then.
    """
    check_onnx_packages()
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive, got {tolerance}. 1e-3 is the default.")
    _check_model(model)
    difference, form = math.nan, ""

    def write_model(directory: Path) -> None:
        nonlocal difference, form
        cached, difference = _write_graph(model, directory, tolerance)
        form = "an ONNX graph with a cache" if cached else "an ONNX graph"

    save_directory(
        output_dir,
        write_model,
        tokenizer,
        lambda: build_export_card(
            model.config.sieve,
            kind=model_kind(model),
            form="ONNX",
            text=f"as {form}, `model.onnx` with its weights in `model.onnx.data`. In ONNX Runtime its logits "
            f"differ from those of the model by at most {difference:.1g} of the largest, on random inputs.",
            library_name="onnx",
            terms=terms,
        ),
        files=lambda: inherited_files(
            model.name_or_path,
            getattr(model.config, "_commit_hash", None),
            with_results=True,
            label_offsets=model.config.sieve.get(KEY) or (),
        ),
        terms=terms,
        finish=lambda directory: None if model_kind(model) == "seq2seq" else make_readable(directory, tokenizer),
        overwrite=overwrite,
        inputs=[("model", model.name_or_path)],
        needed_bytes=tensor_bytes(model),
    )
    return difference


def check_onnx_packages() -> None:
    """Check that the packages for ONNX are installed, before any work.

    Raises:
        ImportError: If not; the message has the command that installs them.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"An export to ONNX must find {', '.join(_PACKAGES)}, got none of {', '.join(missing)}. "
            f"`pip install {' '.join(_PACKAGES)}`."
        )


def _check_model(model: PreTrainedModel) -> None:
    """Check that a model can be traced and compared."""
    plain_layers(model)
    kinds = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    if kinds != {("cpu", torch.float32)}:
        device, dtype = next(kind for kind in kinds if kind != ("cpu", torch.float32))
        raise ValueError(
            f"`model` must be in float32 on the CPU, got {dtype} on {device}. Load it with `dtype=torch.float32`."
        )
    # Classifiers that read the last token locate it by the padding.
    if model_kind(model) == "classification" and model.config.get_text_config().pad_token_id is None:
        raise ValueError(
            "`model` must have a `pad_token_id` in its configuration to classify several rows, got None. Set it."
        )


def _write_graph(model: PreTrainedModel, directory: Path, tolerance: float) -> tuple[bool, float]:
    """Write the graph of a model in evaluation mode, check it, and return whether it has a cache and its difference.

    Raises:
        RuntimeError: If the exporter fails, or the difference exceeds `tolerance`.
    """
    was_training = model.training
    model.train(False)
    try:
        layers = cache_layers(model)
        _save(model, trace(model, layers), directory)
        difference = logit_difference(model, directory / _GRAPH, cached=layers is not None)
    finally:
        model.train(was_training)
    # Not `>`: it may be NaN.
    if not difference <= tolerance:
        raise RuntimeError(
            f"`tolerance` must cover the difference of ONNX Runtime's logits, got {tolerance:g} and a difference "
            f"of {difference:.3g} of the largest logit. Nothing was written; allow it with a higher tolerance."
        )
    if layers is None and model_kind(model) == "causal":
        logger.warning(
            "The graph of %s has no cache, as the model keeps more than keys and values: to generate, it reads the "
            "whole text again for each token.",
            base_config(model).model_type,
        )
    return layers is not None, difference


def _save(model: PreTrainedModel, exported: Any, directory: Path) -> None:
    """Save a graph with the configuration of the base architecture: the graph needs no code, so none is named."""
    config, generation_config = base_config(model), getattr(model, "generation_config", None)
    if hasattr(exported, "save_pretrained"):
        exported.config, exported.generation_config = config, generation_config
        exported.save_pretrained(directory)
        return
    # Earlier versions of transformers return the program of torch.
    import onnx_ir

    directory.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(exported.model, directory / _GRAPH, external_data=f"{_GRAPH}.data")
    for part in (config, generation_config):
        if part is not None:
            part.save_pretrained(directory)
