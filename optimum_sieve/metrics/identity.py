"""What a metric is: its name in reports, and the source by which stored scores and processes tell metrics apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

from .module_metric import ModuleMetric


if TYPE_CHECKING:
    from collections.abc import Iterable


# Name of a metric, a module of evaluate, or a function of an answer and the accepted answers.
Metric = str | ModuleMetric | Callable[[str, Sequence[str]], float]


def metric_name(metric: Metric) -> str:
    """Return the metric's name for reports."""
    if isinstance(metric, ModuleMetric):
        return metric.name
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def metric_source(metric: Metric) -> list[str] | None:
    """Return the identity of a metric: its name and, if it is a function or a module of evaluate, its source.

    Returns:
        `list[str]`, *optional*: `None` if two metrics that compute different scores could have the same source: other
        callables than functions, lambdas, and functions with default values, closures or no source file. Nothing that
        depends on such a metric may be cached.
    """
    if isinstance(metric, str):
        return [metric]
    if isinstance(metric, ModuleMetric):
        return metric.source
    identity = getattr(metric, "identity", None)
    if isinstance(identity, list):
        # A metric of another library that says what it depends on.
        return identity
    if not isinstance(metric, FunctionType) or metric.__name__ == "<lambda>":
        return None
    if metric.__closure__ or metric.__defaults__ or metric.__kwdefaults__:
        return None
    code = source_code(metric)
    return None if code is None else [metric_name(metric), code]


def require_metric_sources(metrics: Iterable[Metric]) -> None:
    """Raise `ValueError` unless every metric has a source, by which processes that share a search agree on it."""
    for metric in metrics:
        if metric_source(metric) is None:
            raise ValueError(
                "`metric` must be a function from a file, without default values and closure, to share a search, got "
                f"{metric!r}. Write it as a plain function, or search in one process without `study_storage`."
            )


def source_code(function: Any) -> str | None:
    """Return the source code of a function, or `None` if it is none or was defined without a source file."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None
