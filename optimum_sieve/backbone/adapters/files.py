"""Find an adapter of PEFT in a directory or on the Hub, and read what it says of its base model. Without PEFT."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils.hub import cached_file, extract_commit_hash

from optimum_sieve._messages import cut, shown


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Files of a whole model. Some trainers write the base model's config.json beside an adapter.
_WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# PEFT puts it before the names of the base model's tensors.
_PREFIX = "base_model.model."
# PEFT's names of what an adapter is for, as far as a task can be scored on it.
_CLASSIFIER = "SEQ_CLS"
_TASK_TYPES = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", _CLASSIFIER)
_HEAD = re.compile(r"(^|\.)(score|classifier|classification_head)(\.out_proj)?\.weight$")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter in files.

    Args:
        name (`str`): Directory or Hub id.
        kind (`str`): PEFT's name of the method, such as `"LORA"`.
        task_type (`str`, *optional*): PEFT's name of the kind of model, such as `"CAUSAL_LM"`.
        base_model (`str`): Directory or Hub id of the model that it was trained on.
        base_revision (`str`, *optional*): Revision of the base model.
        revision (`str`, *optional*): Commit of the adapter on the Hub.
        options (`dict[str, Any]`): Options of transformers that reach its files.
    """

    name: str
    kind: str
    task_type: str | None
    base_model: str
    base_revision: str | None
    revision: str | None
    options: dict[str, Any]

    def has_tokenizer(self) -> bool:
        """Return whether a tokenizer is saved with the adapter."""
        return find_file(self.name, "tokenizer_config.json", self.options) is not None

    def weights(self) -> Path:
        """Return the file of the weights, after downloading it if needed; its directory holds the settings too.

        Raises:
            ValueError: If there is none in safetensors.
        """
        path = find_file(self.name, _WEIGHTS, self.options)
        if path is None:
            raise ValueError(
                f"`model` must be an adapter with its weights in {_WEIGHTS}, got {cut(self.name)} without. Load it "
                "with PEFT and save it again with `save_pretrained`."
            )
        return path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its tensors, by the names that they have in the base model.

        Raises:
            ValueError: If the file of the weights is missing or damaged.
        """
        try:
            with safe_open(self.weights(), "pt") as tensors:
                names = tensors.keys()
                return {name.removeprefix(_PREFIX): tuple(tensors.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"`model` must be an adapter with a whole {_WEIGHTS}, got {cut(self.name)}: {cut(str(error))}. "
                "Download or save it again."
            ) from error

    def configure(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Turn the configuration of its base model into that of a classifier, in place, if it was trained to be one.

        The number of labels is that of the head, which is saved with the adapter.
        """
        if self.task_type != _CLASSIFIER:
            return config
        rows = [shape[0] for name, shape in self.shapes().items() if _HEAD.search(name)]
        name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
        if rows and name is not None:
            config.architectures = [name]
            if config.num_labels != rows[0]:
                config.num_labels = rows[0]
        return config


def find_adapter(model: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Adapter | None:
    """Return the adapter that a directory or Hub id holds in place of a model, or `None` if it holds none.

    Args:
        model (`str | Path`): Directory or Hub id.
        revision (`str`, *optional*): Revision on the Hub; for an adapter in a directory, that of its base model.
        local_files_only (`bool`): Whether to use the cache alone.

    Raises:
        ValueError: If its settings are not those of an adapter that can be merged into a named base model.
    """
    name = str(model)
    options = {"revision": revision, "local_files_only": local_files_only}
    path = find_file(name, _SETTINGS, options)
    if path is None or any(find_file(name, whole, options) for whole in _WHOLE):
        return None
    settings = _read(path, name)
    base = settings["base_model_name_or_path"]
    is_local = Path(name).is_dir()
    adapter = Adapter(
        name=name,
        kind=settings["peft_type"],
        task_type=settings.get("task_type"),
        base_model=base,
        base_revision=(revision if is_local else None) or settings.get("revision"),
        revision=None if is_local else extract_commit_hash(str(path), None),
        options=options,
    )
    if adapter.task_type not in _TASK_TYPES:
        raise ValueError(
            f"`model` must be an adapter of a model that writes or classifies, got {cut(name)} with the task_type "
            f"{shown(adapter.task_type)}. Train one with 'CAUSAL_LM', 'SEQ_2_SEQ_LM' or {_CLASSIFIER!r}."
        )
    if (
        find_file(base, _SETTINGS, {"revision": adapter.base_revision, "local_files_only": local_files_only})
        is not None
    ):
        raise ValueError(
            f"`model` must be an adapter of a plain model, got {cut(name)}, whose base {shown(base)} holds an adapter "
            "itself. Merge that one with `merge_and_unload()` and save the result."
        )
    return adapter


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`model` must be an adapter with a readable {_SETTINGS}, got {cut(name)}: {cut(str(error))}. Download or "
            "save it again."
        ) from error
    settings = settings if isinstance(settings, dict) else {}
    for key in ("peft_type", "base_model_name_or_path"):
        value = settings.get(key)
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"`model` must be an adapter whose {_SETTINGS} has a `{key}`, got {shown(value)} in {cut(name)}. "
                "Save it again with PEFT, or write it there."
            )
    return settings


def find_file(model: str, name: str, options: dict[str, Any]) -> Path | None:
    """Return the path of a file of a model, downloaded if needed, or `None` if there is none."""
    if Path(model).is_file():
        return None
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    try:
        found = cached_file(
            model,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **options,
        )
    except (OSError, ValueError):
        # Whatever loads the model next reports it.
        return None
    return None if found is None else Path(found)
