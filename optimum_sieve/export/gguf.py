"""Export a pruned model as a GGUF file, by a dense export and llama.cpp's own converter."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoTokenizer

from optimum_sieve._messages import shown
from optimum_sieve.backbone.kinds import model_kind
from optimum_sieve.backbone.sizes import tensor_bytes
from optimum_sieve.backbone.sources import naming_model, source_options
from optimum_sieve.modeling.conversion import plain_layers
from optimum_sieve.modeling.label_offsets import KEY
from optimum_sieve.publish.card import build_export_card
from optimum_sieve.publish.directory import save_directory
from optimum_sieve.publish.origin.terms import NO_TERMS
from optimum_sieve.publish.task_file import inherited_files
from optimum_sieve.vocabulary.tokenizer import serialized

from . import whole_vocabulary
from .dense import added_bytes, save_dense


if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.publish.origin.terms import Terms

SCRIPT_NAME, FILE_NAME = "convert_hf_to_gguf.py", "model.gguf"
_DENSE, _WHOLE = "dense", "whole"
_LAST_LINES = 5


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    converter: str | Path | None = None,
    outtype: str = "f16",
    whole_tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    terms: Terms = NO_TERMS,
    progress: bool = False,
) -> Path:
    """Write a pruned model as `model.gguf`, with its tokenizer and a model card; all of it or nothing.

    The factors are multiplied out, as by [`save_dense`][optimum_sieve.export.dense.save_dense], and llama.cpp's
    converter runs on the result in a process of its own, with this Python.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model of type `sieve`. Becomes dense in place.
        tokenizer (`PreTrainedTokenizerBase`): Saved with the model.
        output_dir (`str | Path`): A new or empty directory.
        converter (`str | Path`, *optional*): A checkout of llama.cpp, or its `convert_hf_to_gguf.py`. Default: the one
            on the `PATH`.
        outtype (`str`): Type of the weights as the converter names it, such as `"bf16"` or `"q8_0"`.
        whole_tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer of the dense model, with all its tokens; for
            a model of reduced vocabulary, see [`check_vocabulary`].
        overwrite (`bool`): Whether to replace a directory that holds a model, once the new one is complete.
        terms (`Terms`): Licence and languages of the base model.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ImportError: If the gguf package is not installed.
        FileNotFoundError: If there is no converter.
        ValueError: If the model is not pruned, cannot be dense, or its reduced vocabulary cannot be converted.
        FileExistsError: If `output_dir` holds files and `overwrite` is false, or files that are not of a model.
        RuntimeError: If the converter fails, or writes a tokenizer that splits texts otherwise. Nothing is written.
        OSError: If the disk is full or the directory cannot be written.
    """
    script = find_converter(converter)
    num_bytes = tensor_bytes(model) + added_bytes(plain_layers(model))
    block, source = model.config.sieve, (model.name_or_path, getattr(model.config, "_commit_hash", None))
    is_reduced = "vocabulary" in block
    if is_reduced:
        check_vocabulary(tokenizer, whole_tokenizer)

    def write_model(directory: Path) -> None:
        save_dense(model, tokenizer, directory / _DENSE, terms=terms, progress=progress)
        if is_reduced and whole_tokenizer is not None:
            whole_tokenizer.save_pretrained(directory / _WHOLE)
        _convert(script, directory, outtype, Path(output_dir).absolute().name)
        _check_file(directory / FILE_NAME)
        for folder in (directory / _DENSE, directory / _WHOLE):
            if folder.is_dir():
                shutil.rmtree(folder)
        model.config.save_pretrained(directory)

    return save_directory(
        output_dir,
        write_model,
        tokenizer,
        lambda: build_export_card(
            block,
            kind=model_kind(model),
            form="GGUF",
            text=f"multiplied out and converted by llama.cpp: `{FILE_NAME}`, weights of type `{outtype}`. Its size and "
            "speed are those of the dense model in that type.",
            library_name="gguf",
            terms=terms,
        ),
        files=lambda: inherited_files(*source, with_results=True, label_offsets=block.get(KEY) or ()),
        terms=terms,
        overwrite=overwrite,
        inputs=[
            ("model", model.name_or_path),
            ("whole_tokenizer", whole_tokenizer.name_or_path if whole_tokenizer is not None else None),
        ],
        # Both are on the disk for a moment; no type takes more than float32.
        needed_bytes=num_bytes + num_bytes * 4 // model.dtype.itemsize,
    )


def find_converter(converter: str | Path | None) -> Path:
    """Return the path of llama.cpp's converter, after checking that the gguf package is there.

    Args:
        converter (`str | Path`, *optional*): A checkout of llama.cpp, or the script. Default: the script on the `PATH`.

    Raises:
        ImportError: If the gguf package is not installed.
        FileNotFoundError: If there is no script.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("Writing GGUF needs the gguf package. `pip install 'optimum-sieve[gguf]'`.")
    named = converter if converter is not None else shutil.which(SCRIPT_NAME)
    if named is None:
        raise FileNotFoundError(
            f"`converter` must be given where no {SCRIPT_NAME} is on the PATH, got None. Clone llama.cpp and pass its "
            "directory."
        )
    # The script imports files from its own directory, which a link does not lie in.
    path = Path(named).resolve()
    script = path / SCRIPT_NAME if path.is_dir() else path
    if not script.is_file():
        raise FileNotFoundError(
            f"`converter` must be a checkout of llama.cpp or its {SCRIPT_NAME}, got {shown(str(named))}, which holds "
            "none."
        )
    return script


def load_whole_tokenizer(
    block: Mapping[str, Any], reduced: PreTrainedTokenizerBase, name: str | Path | None
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the dense model for [`export_gguf`]; `None` unless the vocabulary was reduced.

    Args:
        block (`Mapping[str, Any]`): The `sieve` block of the pruned model's configuration.
        reduced (`PreTrainedTokenizerBase`): The pruned model's tokenizer.
        name (`str | Path`, *optional*): Directory or Hub id. Default: the dense model, as the pruned model names it.

    Raises:
        ValueError: As of [`check_vocabulary`].
        OSError: If there is no such tokenizer.
    """
    if "vocabulary" not in block:
        return None
    _check_kind(serialized(reduced))
    revision, base = None, block.get("base_model")
    # Of a directory only the name is published.
    if name is None and base and "/" in base:
        name, revision = base, block.get("base_revision")
    if name is None:
        raise _missing_error()
    with naming_model(name):
        whole: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(name), revision=revision or "main", **source_options(name, revision)
        )
    check_vocabulary(reduced, whole)
    return whole


def check_vocabulary(reduced: PreTrainedTokenizerBase, whole: PreTrainedTokenizerBase | None) -> None:
    """Check that a reduced vocabulary can be converted.

    The converter recognizes the pre-tokenizer by the ids of a text, which are others in a reduced vocabulary. The one
    of the whole vocabulary is the same, so it is asked for that; the tokens and merges are those of the reduced one.

    Args:
        reduced (`PreTrainedTokenizerBase`): The pruned model's tokenizer.
        whole (`PreTrainedTokenizerBase`, *optional*): The dense model's.

    Raises:
        ValueError: If the tokenizer is no byte-level BPE, or the whole one is missing or is not the one it was made of.
    """
    content = serialized(reduced)
    _check_kind(content)
    if whole is None:
        raise _missing_error()
    other = serialized(whole)
    parts = [name for name in ("normalizer", "pre_tokenizer") if content.get(name) != other.get(name)]
    missing = reduced.get_vocab().keys() - whole.get_vocab().keys()
    if parts or missing:
        problem = f"another {parts[0]}" if parts else f"no token {shown(min(missing))}"
        raise ValueError(
            f"`whole_tokenizer` must be the tokenizer that the pruned model's was made of, got one with {problem}. "
            "Pass that of the dense model."
        )


def _check_kind(content: Mapping[str, Any]) -> None:
    model, parts = content["model"], str((content.get("pre_tokenizer"), content.get("decoder")))
    if model["type"] != "BPE" or model.get("byte_fallback") or "ByteLevel" not in parts:
        raise ValueError(
            "`model` must have all tokens of the dense model to be converted to GGUF, unless they are of a byte-level "
            f"BPE, got a reduced vocabulary of type {model['type']}: llama.cpp reads such ones from files that no "
            "longer fit, or recognizes them by the ids of tokens. Prune with `vocabulary='whole'`."
        )


def _missing_error() -> ValueError:
    return ValueError(
        "`whole_tokenizer` must be given for a model of reduced vocabulary that names no model on the Hub, got None: "
        "llama.cpp recognizes the pre-tokenizer by the whole vocabulary. Pass that of the dense model."
    )


def _convert(script: Path, directory: Path, outtype: str, name: str) -> None:
    """Run the converter in a directory, on the dense model there."""
    words = [str(script)]
    if (directory / _WHOLE).is_dir():
        # Without its folder on the import path, whose modules have names of packages.
        words = ["-P", whole_vocabulary.__file__, str(script), _WHOLE]
    words += [_DENSE, "--outfile", FILE_NAME, "--outtype", outtype, "--model-name", name]
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if ended.returncode or not (directory / FILE_NAME).is_file():
        lines = "\n".join(ended.stdout.rstrip().splitlines()[-_LAST_LINES:])
        raise RuntimeError(
            f"`converter` must convert the dense model, got status {ended.returncode} of {script}. Nothing was "
            "written. `pip install 'optimum-sieve[gguf]'` installs the packages that it needs besides. It ended with:\n"
            f"{lines}"
        )


def _check_file(path: Path) -> None:
    """Check that a GGUF file has tensors, and scores if its tokenizer goes by them.

    Without tokenizer.model, the converter takes one score for all tokens of a SentencePiece vocabulary, by which
    llama.cpp splits texts otherwise.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        kind, scores = (reader.get_field(name) for name in (gguf.Keys.Tokenizer.MODEL, gguf.Keys.Tokenizer.SCORES))
        by_scores = scores is not None and kind is not None and kind.contents() == "llama"
        values = np.unique(scores.contents()) if scores is not None and by_scores else None
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise RuntimeError(f"`converter` must write a GGUF file, got one that cannot be read: {error}.") from error
    if not reader.tensors:
        raise RuntimeError("`converter` must write the weights, got a GGUF file without tensors.")
    if values is not None and len(values) == 1:
        raise RuntimeError(
            "`model` must have the SentencePiece file of its tokenizer to be converted, got a directory without "
            "tokenizer.model: llama.cpp would split texts otherwise. Nothing was written. Copy the file from the dense "
            "model's directory into that of the pruned model, and export again."
        )
