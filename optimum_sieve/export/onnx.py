"""Export a pruned model as an ONNX graph that keeps the factors, and check it in ONNX Runtime."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

from optimum_sieve.backbone.kinds import max_positions, model_kind
from optimum_sieve.backbone.sizes import tensor_bytes
from optimum_sieve.modeling.conversion import plain_layers
from optimum_sieve.modeling.experts import SeparateExperts
from optimum_sieve.modeling.label_offsets import KEY
from optimum_sieve.publish.card import build_export_card
from optimum_sieve.publish.directory import save_directory
from optimum_sieve.publish.origin.terms import NO_TERMS
from optimum_sieve.publish.task_file import inherited_files

from .dense import base_config


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.publish.origin.terms import Terms

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Rows and tokens of the inputs for the check; the last ones are padded.
_SHAPES = ((1, 1), (1, 9), (3, 6))
_TRACED = (2, 5)
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

    The graph is `model.onnx` with its weights in `model.onnx.data`. Its inputs are `input_ids` and `attention_mask`,
    and `decoder_input_ids` for an encoder-decoder, with any number of rows and tokens, padded on the right; its output
    is `logits`. It has no cache: to generate, run it again on the longer text. It is kept only if ONNX Runtime computes
    the logits of the model with it, on random inputs of several shapes.

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
    difference = math.nan

    def write_model(directory: Path) -> None:
        nonlocal difference
        difference = _write_graph(model, directory, tolerance)

    save_directory(
        output_dir,
        write_model,
        tokenizer,
        lambda: build_export_card(
            model.config.sieve,
            kind=model_kind(model),
            form="ONNX",
            text="as an ONNX graph, `model.onnx` with its weights in `model.onnx.data`. In ONNX Runtime its logits "
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


def _write_graph(model: PreTrainedModel, directory: Path, tolerance: float) -> float:
    """Write the graph of a model in evaluation mode, check it, and return its largest relative difference.

    Raises:
        RuntimeError: If the exporter fails, or the difference exceeds `tolerance`.
    """
    was_training = model.training
    model.train(False)
    try:
        _trace(model).save_pretrained(directory)
        difference = _difference(model, directory / "model.onnx")
    finally:
        model.train(was_training)
    # Not `>`: it may be NaN.
    if not difference <= tolerance:
        raise RuntimeError(
            f"`tolerance` must cover the difference of ONNX Runtime's logits, got {tolerance:g} and a difference "
            f"of {difference:.3g} of the largest logit. Nothing was written; allow it with a higher tolerance."
        )
    return difference


def _trace(model: PreTrainedModel) -> Any:
    """Trace the model into a graph with any number of rows and tokens."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    inputs = _inputs(model, *_TRACED)
    # Named axes must be valid for any length, which fails if positions come from a table.
    axes = {name: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for name in inputs}
    exporter: Any = OnnxExporter
    # torch prints progress to stdout, where only the result of the command belongs.
    with _traceable(model), contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            exported = exporter().export(model, inputs, OnnxConfig(dynamic_shapes=axes))
        except Exception as error:
            raise RuntimeError(
                f"transformers could not export {type(model).__name__} to ONNX: {type(error).__name__}: {error} Export "
                "it with `--dense` and try another exporter."
            ) from error
    # The graph needs no remote code, so its configuration must not refer to any.
    exported.config = base_config(model)
    exported.generation_config = getattr(model, "generation_config", None)
    return exported


def _inputs(model: PreTrainedModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Make random inputs without padding tokens in the text; all rows but the first are padded on the right."""
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
    inputs = {"input_ids": torch.where(mask.bool(), draw(length), pad), "attention_mask": mask}
    return {**inputs, "decoder_input_ids": draw(length + 1)} if model_kind(model) == "seq2seq" else inputs


@torch.no_grad()
def _difference(model: PreTrainedModel, path: Path) -> float:
    """Return the largest difference between a logit of ONNX Runtime and the model's, relative to the largest logit."""
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    largest, difference = 0.0, 0.0
    for rows, length in _SHAPES:
        inputs = _inputs(model, rows, length)
        expected = model(**inputs).logits
        feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in names}
        actual = torch.from_numpy(session.run(["logits"], feed)[0])
        if model_kind(model) == "causal":
            # Logits at padding are meaningless.
            real = inputs["attention_mask"].bool()
            expected, actual = expected[real], actual[real]
        largest = max(largest, float(expected.abs().max()))
        # Not Python's `max`, which may drop NaN.
        difference = float(torch.stack([torch.tensor(difference), (actual - expected).abs().max()]).max())
    return difference / max(largest, torch.finfo(torch.float32).tiny)


@contextlib.contextmanager
def _traceable(model: PreTrainedModel) -> Iterator[None]:
    """Disable the cache, and let every expert read every token, as a graph cannot select tokens."""
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
