"""Load a module of the evaluate library and find what it takes. Imports evaluate, and with it torch, when called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import cut, shown

from .files import files_digest, find_script
from .module_metric import require_evaluate


if TYPE_CHECKING:
    from .module_metric import ModuleMetric


def load_module(metric: ModuleMetric) -> Any:
    """Run the code of a module; return its instance, which keeps its examples in memory.

    Returns:
        `evaluate.Metric`: The module. Its random numbers are always the same.

    Raises:
        FileNotFoundError: If there is no such module.
        ImportError: If evaluate or a package that the module imports is not installed.
        ValueError: If the code must not be run, has changed since the task was read, or holds no metric.
    """
    if not metric.trusted:
        raise ValueError(
            f"`metric` must not be code that came with a model, got the module {metric.module!r} of evaluate. Name it "
            "in a task file of your own to run it, or pass `--trust-remote-code` to `optimum-cli sieve run`."
        )
    require_evaluate()
    script = metric.script or find_script(metric.module, metric.revision)
    if metric.digest is not None and files_digest(script) != metric.digest:
        raise ValueError(
            f"`metric.evaluate` must not change while a task is in use, got other code in {str(script)!r} than when "
            "the task was read. Start again."
        )
    import evaluate

    try:
        return evaluate.load(str(script), metric.config, module_type="metric", keep_in_memory=True, seed=0)
    except ImportError as error:
        raise ImportError(f"`metric` must have the packages of {metric.module!r} installed: {error}") from error
    except Exception as error:
        reason = cut(f"{type(error).__name__}: {error}", 400)
        raise ValueError(
            f"`metric.evaluate` must be a module with an `evaluate.Metric`, got an error of {metric.module!r}: {reason}"
        ) from error


def takes_lists(metric: ModuleMetric, module: Any, texts: bool) -> bool:
    """Return whether the references of a module of texts are lists.

    Raises:
        ValueError: If it takes no texts, or no classes.
    """
    options = module.features if isinstance(module.features, list) else [module.features]
    found = {_has_lists(option, texts) for option in options} - {None}
    if not found:
        kind = "texts" if texts else "classes as numbers"
        raise ValueError(
            f"`metric.evaluate` must name a module whose `predictions` and `references`, and nothing else, are {kind}, "
            f"got {metric.module!r}, which takes {shown(module.features)}."
        )
    return True in found


def _has_lists(option: Any, texts: bool) -> bool | None:
    """Return whether references are lists; `None` if the features do not fit."""
    if set(option) != {"predictions", "references"} or not _is_plain(option["predictions"], texts):
        return None
    references = option["references"]
    if _is_plain(references, texts):
        return False
    element = references[0] if isinstance(references, list) else getattr(references, "feature", None)
    return True if texts and _is_plain(element, texts) else None


def _is_plain(feature: Any, texts: bool) -> bool:
    from datasets import Value

    kinds = ("string", "large_string") if texts else ("int", "uint", "float")
    return isinstance(feature, Value) and feature.dtype.startswith(kinds)
