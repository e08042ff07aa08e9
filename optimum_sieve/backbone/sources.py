"""Where a model comes from: a directory or the Hub. Wrong names and a missing connection are errors at once."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from optimum_sieve._messages import cut, shown

from .adapters.files import find_adapter, find_file
from .kinds import MULTIMODAL, loaded_kind


if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .adapters.files import Adapter


# What transformers raises for files with other values than it expects; out of memory is none of them.
_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, SafetensorError),
    StrictDataclassError,
)
_PROCESSOR = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "chat_template.json"),
)
# transformers makes an object for each.
_MOST = {"num_labels": 1_000_000, "num_hidden_layers": 10_000}


def read_config(model: str | Path, **options: Any) -> PreTrainedConfig:
    """Return the configuration of a model in a directory or on the Hub; that of an adapter's base model.

    Args:
        model (`str | Path`): Hub id, directory or file.
        options (`Any`): Options of transformers' `AutoConfig.from_pretrained`.

    Raises:
        OSError: If there is no such model, or the Hub cannot be reached.
        ValueError: If the configuration is invalid.
    """
    options |= source_options(model, options.get("revision"))
    adapter = adapter_of(model, options)
    if adapter is not None:
        with naming_base(adapter):
            return adapter.configure(read_config(adapter.base_model, **base_options(adapter, options)))
    with naming_model(model):
        described, _ = PreTrainedConfig.get_config_dict(str(model), **options)
        _check_counts(described)
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(model), **options)
    return config


def read_tokenizer(model: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model in a directory or on the Hub; for an adapter without one, its base model's.

    Args:
        model (`str | Path`): Hub id or directory.
        options (`Any`): Options of transformers' `AutoTokenizer.from_pretrained`.

    Raises:
        OSError: If there is none, or the Hub cannot be reached.
        ValueError: If its files are damaged.
    """
    options |= source_options(model, options.get("revision"))
    adapter = None if "gguf_file" in options else adapter_of(model, options)
    if adapter is not None:
        if not adapter.has_tokenizer():
            with naming_base(adapter):
                return read_tokenizer(adapter.base_model, **base_options(adapter, options))
        # The class of a tokenizer may follow from the configuration, which an adapter lacks.
        options["config"] = read_config(model, **options)
    with naming_model(model):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(model), **options)
    return tokenizer


def adapter_of(model: str | Path, options: dict[str, Any]) -> Adapter | None:
    """Return the adapter that `model` names, or `None` if it is a model itself; `options` are of transformers."""
    known = {name: options[name] for name in ("revision", "local_files_only") if name in options}
    return find_adapter(model, **known)


def base_options(adapter: Adapter, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that load the base model of an adapter, from those that load the adapter."""
    others = {name: value for name, value in options.items() if name not in ("revision", "local_files_only")}
    return others if adapter.base_revision is None else {**others, "revision": adapter.base_revision}


@contextmanager
def naming_base(adapter: Adapter) -> Iterator[None]:
    """Let errors about the base model of an adapter say that it is one.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If its files do not hold what they should.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{error} It is the base model of the adapter {cut(adapter.name)}: if there is another copy, write its "
            "place into `base_model_name_or_path` of adapter_config.json."
        ) from error


def _check_counts(described: dict[str, Any]) -> None:
    for name, most in _MOST.items():
        count = described.get(name)
        if isinstance(count, int | float) and not count <= most:
            raise ValueError(f"`model` must have a `{name}` of {most:,} at most in config.json, got {shown(count)}.")
    if described.get("hidden_size") == 0:
        raise ValueError("`model` must have a `hidden_size` of at least 1 in config.json, got 0.")


@contextmanager
def naming_model(model: str | Path) -> Iterator[None]:
    """Let errors of transformers name the argument and the model.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If a file does not hold what it should.
    """
    try:
        yield
    except RecursionError:
        raise ValueError(
            f"`model` must have files of few levels, got one nested too deep in {shown(str(model))}."
        ) from None
    except _ERRORS as error:
        # Errors of this package name an argument or the checkpoint.
        if str(error).startswith(("`", "The checkpoint ")):
            raise
        raise _not_loadable(model, error) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
            raise
        if "ignore_mismatched_sizes" in str(error):
            raise ValueError(
                "`model` must have weights of the shapes that its config.json gives, got others in "
                f"{shown(str(model))}; transformers lists them above. Download or save the model again."
            ) from error
        raise _not_loadable(model, error) from error


def _not_loadable(model: str | Path, error: Exception) -> Exception:
    kind = OSError if isinstance(error, OSError | SafetensorError) else ValueError
    reason = cut(str(error) or type(error).__name__, 1000)
    return kind(f"`model` must be one that transformers can load, got an error for {shown(str(model))}: {reason}")


def processor_files(model: PreTrainedModel, *first: str | None) -> dict[str, str]:
    """Return the files of the processor of a model that takes images or sounds, as the directory it came from has them.

    Args:
        model ([`~transformers.PreTrainedModel`]): Models of text alone have none.
        first (`str`, *optional*): Directories or Hub ids that are looked at first, such as that of an adapter.

    Returns:
        `dict[str, str]`: Their contents by name. `chat_template.jinja` is the tokenizer's, which saves it.
    """
    found: dict[str, str] = {}
    if loaded_kind(model.config) not in MULTIMODAL:
        return found
    own = (model.name_or_path, getattr(model.config, "_commit_hash", None))
    for source, revision in (*((name, None) for name in first), own):
        for name in _PROCESSOR:
            path = find_file(source, name, {"revision": revision}) if source and name not in found else None
            if path is not None:
                found[name] = path.read_text(encoding="utf-8")
    return found


def source_options(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Check that a model is there; return the option for transformers to use the cache if the Hub cannot be reached.

    Otherwise each missing file of each part (configuration, tokenizer, weights) costs many seconds of retries.

    Raises:
        TypeError: If `model` is no name.
        ValueError: If the name is no valid Unicode.
        FileNotFoundError: If the name is that of a path and there is none, or is not a Hub id.
        ConnectionError: If a model that is not in the cache would have to be loaded from a Hub that cannot be reached;
            an `OSError`.
    """
    if not isinstance(model, str | Path):
        raise TypeError(f"`model` must be the name of a directory or the id of a model, got {type(model).__name__}.")
    name = str(model)
    if _exists(name):
        check_name(name)
        return {}
    if not _can_be_hub_id(name):
        raise FileNotFoundError(
            f"`model` must be a directory that exists or the id of a model on the Hub, got {shown(name)}."
        )
    problem = _unreachable(name, revision)
    if problem is None:
        return {}
    if not (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots").is_dir():
        raise ConnectionError(
            f"`model` must be a directory that exists or the id of a model on the Hub, got {shown(name)}: it is no "
            f"directory here, is not in the cache, and the Hub cannot be reached ({problem}). Check the name, or the "
            "connection."
        )
    return {"local_files_only": True}


def check_name(name: str, argument: str = "model") -> None:
    """Check that card and configuration can hold the name of a model; that of a directory can have any bytes.

    Raises:
        ValueError: If it is no valid Unicode.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"`{argument}` must have a name of valid Unicode, which the model card shows, got {shown(name)}. Rename it."
        ) from None


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):
        # A name too long for a path, with a null character or with lone surrogates.
        return False


def _can_be_hub_id(name: str) -> bool:
    """Tell whether a name is of the form `name` or `user/name`; others can only be paths."""
    try:
        hf_hub_url(name, "config.json")
    except HFValidationError:
        return False
    return True


def _unreachable(name: str, revision: str | None) -> str | None:
    """Ask the Hub once, without retries; return why that was impossible, or `None` if there was any answer."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except HfHubHTTPError:
        # Also without this file, or without permission: transformers reports it.
        return None
    except Exception as error:  # The HTTP library and its errors depend on the version of huggingface_hub.
        return shown(str(error) or type(error).__name__).strip("'\"")
    return None
