r"""Find the YAML of an lm-evaluation-harness task, refuse what cannot be mapped, and make the package's task of it."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from optimum_sieve._messages import cut, listed, shown

from ..data import PREFIX


if TYPE_CHECKING:
    from collections.abc import Iterator


# Their metrics that can be mapped, by their type of output.
METRICS = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "generate_until": ("exact_match",),
    "loglikelihood": ("acc",),
}
# Filters whose result depends on the text alone.
_FILTERS = ("lowercase", "map", "regex", "remove_whitespace", "take_first", "uppercase")
_REFUSED = {
    "class": "it is written in Python",
    "group": "it is a group of tasks; name one of them",
    "custom_dataset": "its data is made by a function",
    "process_results": "a function scores its answers",
    "use_prompt": "its prompt is promptsource's",
    "doc_to_image": "it has images",
    "doc_to_audio": "it has sounds",
    "unsafe_code": "it runs what the model writes",
}
_GREEDY = ("until", "do_sample", "temperature", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# As in the package's command line.
FEWSHOT_SEED = 1234


class UnmappedError(ValueError):
    """A task of the package that has no counterpart here."""

    def __init__(self, named: str, reason: str) -> None:
        super().__init__(f"`task` must be a task that can be mapped, got {PREFIX}{cut(named)}: {reason}.")


@dataclass(frozen=True)
class Source:
    """A task of the package.

    Args:
        name (`str`): Its name.
        task (`Any`): The package's `ConfigurableTask`.
        metric (`str`): Its metric in use.
        filters (`tuple[dict, ...]`): Its filters in use, for written answers.
        safe (`bool`): Whether its templates must not run code.
    """

    name: str
    task: Any
    metric: str
    filters: tuple[dict[str, Any], ...]
    safe: bool


def load_source(
    named: str, root: Path, *, metric: str | None, filter_name: str | None, trust_remote_code: bool
) -> Source:
    """Load a task by its name or the path of its YAML.

    Args:
        named (`str`): Name or path.
        root (`Path`): Directory that a path is relative to.
        metric (`str`, *optional*): One of its metrics. Default: the first that can be mapped.
        filter_name (`str`, *optional*): One of its lists of filters. Default: the first.
        trust_remote_code (`bool`): Whether its functions, and code in its templates, may run.

    Raises:
        ImportError: If the package is not installed.
        FileNotFoundError: If there is no such task.
        ValueError: If it cannot be mapped; the message names why.
    """
    try:
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise ImportError(
            f"`task` {PREFIX}{named} needs lm-evaluation-harness: `pip install 'optimum-sieve[lm-eval]'` ({error})."
        ) from error
    path = _yaml_path(named, root)
    functions = _functions(path)
    if functions and not trust_remote_code:
        raise UnmappedError(
            named,
            f"{listed(f'`{key}: !function {name}`' for key, name in functions.items())} is code. Pass "
            "`trust_remote_code` to run it",
        )
    try:
        config = load_yaml(path, resolve_func=trust_remote_code)
    # It raises the errors of the file system, of YAML and of the imports that a function needs.
    except Exception as error:
        raise ValueError(
            f"`task` must be a task of lm-evaluation-harness, got {named}: {cut(str(error), 400)}"
        ) from error
    kind = _check_config(named, config, functions)
    chosen = _metric(named, config, kind, metric)
    filters = _filters(named, config, filter_name) if kind == "generate_until" else []
    config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list", "filter_list")}
    config["metric_list"] = [chosen]
    try:
        with sandboxed(not trust_remote_code):
            task = ConfigurableTask(config=config)
    except Exception as error:
        raise ValueError(
            f"`task` must be a task that lm-evaluation-harness can load, got {named}: {type(error).__name__}: "
            f"{cut(str(error), 400)}"
        ) from error
    return Source(str(config["task"]), task, chosen["metric"], tuple(filters), not trust_remote_code)


@contextmanager
def sandboxed(safe: bool) -> Iterator[None]:
    """Let the package render templates in a sandbox inside the context: its own environment lets them run any code."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    original = utils.env
    if safe:
        environment = ImmutableSandboxedEnvironment(undefined=original.undefined, keep_trailing_newline=True)
        environment.filters = original.filters
        utils.env = environment
    try:
        yield
    finally:
        utils.env = original


def _yaml_path(named: str, root: Path) -> Path:
    if named.endswith((".yaml", ".yml")) or os.sep in named:
        path = root / named
        if not os.path.isfile(path):
            raise FileNotFoundError(f"`task` must be an existing YAML of lm-evaluation-harness, got {cut(str(path))}.")
        return path
    import lm_eval.tasks

    # The package's own index reads every file, which takes half a minute.
    for path in sorted(Path(lm_eval.tasks.__file__).parent.glob(f"**/{named}.yaml")):
        if _node_values(path).get("task") == named:
            return path
    entry = lm_eval.tasks.TaskManager().task_index.get(named)
    if entry is None:
        raise FileNotFoundError(
            f"`task` must be the name of a task of lm-evaluation-harness or the path of its YAML, got {shown(named)}. "
            "`lm-eval ls tasks` lists the names."
        )
    if entry.yaml_path is None:
        raise UnmappedError(named, _REFUSED["group"])
    return Path(entry.yaml_path)


def _nodes(path: Path) -> dict[str, yaml.Node]:
    """Return the nodes of a YAML file's mapping by key, without making anything of them."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"`task` must be a valid YAML file, got an error in {path}: {cut(str(error), 400)}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"`task` must hold a mapping of keys, got none in {path}.")
    return {str(key.value): value for key, value in node.value}


def _node_values(path: Path) -> dict[str, Any]:
    return {key: node.value for key, node in _nodes(path).items() if isinstance(node, yaml.ScalarNode)}


def _functions(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, str]:
    """Return the `!function` values of a YAML file and of those it includes, by their key."""
    path = path.resolve()
    if path in seen or not path.is_file():
        return {}
    nodes, found = _nodes(path), dict[str, str]()
    include = nodes.pop("include", None)
    if include is not None:
        for each in include.value if isinstance(include, yaml.SequenceNode) else [include]:
            found |= _functions(path.parent / str(each.value), (*seen, path))
    for key, node in nodes.items():
        found.pop(key, None)
        name = next(_tagged(node), None)
        if name is not None:
            found[key] = name
    return found


def _tagged(node: yaml.Node) -> Iterator[str]:
    if node.tag == "!function":
        yield str(node.value)
    elif isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                yield from _tagged(part)


def _check_config(named: str, config: dict[str, Any], functions: dict[str, str]) -> str:
    """Check a task's configuration; return its type of output."""
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise UnmappedError(named, f"{reason} (`{key}`)")
    for key in ("metric_list", "filter_list"):
        if key in functions:
            raise UnmappedError(named, f"a function scores its answers (`{key}: !function {functions[key]}`)")
    kind = config.get("output_type", "generate_until")
    if kind not in METRICS:
        raise UnmappedError(named, f"`output_type: {cut(str(kind))}` is none of {', '.join(METRICS)}")
    if config.get("repeats", 1) != 1:
        raise UnmappedError(named, f"`repeats: {config['repeats']}` samples several answers")
    options = config.get("generation_kwargs") or {}
    others = [key for key in options if key not in _GREEDY]
    if others or options.get("do_sample") or float(options.get("temperature") or 0.0) > 0:
        raise UnmappedError(named, f"`generation_kwargs: {options}` is no greedy decoding")
    return str(kind)


def _metric(named: str, config: dict[str, Any], kind: str, metric: str | None) -> dict[str, Any]:
    """Return the entry of the metric in use."""
    known = METRICS[kind]
    listed_ = config.get("metric_list")
    entries = [{"metric": name} for name in known[:2]] if listed_ is None else listed_
    usable = {
        str(entry.get("metric")): entry
        for entry in entries
        if entry.get("metric") in known and not entry.get("hf_evaluate") and entry.get("aggregation", "mean") == "mean"
    }
    if not usable:
        names = listed(str(entry.get("metric")) for entry in entries)
        raise UnmappedError(named, f"`metric_list` has {names}, and none of {', '.join(known)}, averaged")
    if metric is not None and metric not in usable:
        raise ValueError(f"`metric` must be one of {', '.join(usable)} for {PREFIX}{named}, got {shown(metric)}.")
    chosen: dict[str, Any] = usable[metric or next(iter(usable))]
    return {"aggregation": "mean", "higher_is_better": True, **chosen}


def _filters(named: str, config: dict[str, Any], filter_name: str | None) -> list[dict[str, Any]]:
    """Return the filters in use, which end in one text."""
    pipelines = {str(each["name"]): each["filter"] for each in config.get("filter_list") or []}
    if not pipelines:
        pipelines = {"none": [{"function": "take_first"}]}
    if filter_name is not None and filter_name not in pipelines:
        raise ValueError(f"`filter` must be one of {listed(pipelines)} for {PREFIX}{named}, got {shown(filter_name)}.")
    filters: list[dict[str, Any]] = pipelines[filter_name or next(iter(pipelines))]
    unknown = [each["function"] for each in filters if each["function"] not in _FILTERS]
    if unknown:
        raise UnmappedError(named, f"the filter `{unknown[0]}` is none of {', '.join(_FILTERS)}")
    if not any(each["function"] == "take_first" for each in filters):
        raise UnmappedError(named, "its filters return several answers, without `take_first`")
    return filters
