"""Strategies for everything that a person writes: settings, task files, data files, command lines, `sieve` blocks.

Each draws from what works and breaks it in a few places, so that most inputs come far.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from typing import TYPE_CHECKING, Any

import toy
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from optimum_sieve.config.heal import HealConfig
from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.config.tune import TuneConfig


if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_EXAMPLES = os.environ.get("SIEVE_SOAK_EXAMPLES")

# In CI the same 200 inputs each time; in a soak many others.
generated = settings(
    max_examples=int(_EXAMPLES or 200),
    derandomize=_EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\n", "\x00", "\ud800", "x\udcff", "caf\u00e9", "cafe\u0301", "\u202e", "x" * 5000, "%s", "{0}"]
    ),
    st.sampled_from(["text", "label", "{text}", "{{ text }}", "rows.jsonl", "1", "-1", "nan", "true", "null", "auto"]),
)
numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([10**9, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e-320, 1e308]),
    st.floats(),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def broken(values: dict[str, Any], most: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """Delete, replace or misspell up to `most` keys of a mapping; add unknown ones."""

    @st.composite
    def break_it(draw: Callable[..., Any]) -> dict[str, Any]:
        changed = dict(values)
        # Mostly one: the first fault hides the others.
        for _ in range(draw(st.sampled_from([0, 1, 1, 1, most]))):
            key = draw(st.sampled_from(sorted(values) or [""]))
            how = draw(st.sampled_from(["replace", "replace", "replace", "inside", "delete", "misspell", "add"]))
            value = changed.get(key)
            if how == "inside" and isinstance(value, dict) and value:
                changed[key] = draw(broken(value, 1))
            elif how == "inside" and isinstance(value, list) and value:
                changed[key] = [*value, draw(junk)]
            elif how == "delete":
                changed.pop(key, None)
            elif how == "misspell":
                changed[f"{key[:2]}{key[3:]}"] = changed.pop(key, None)
            elif how == "add":
                changed[draw(texts)] = draw(junk)
            else:
                changed[key] = draw(junk)
        return changed

    return break_it()


# --- settings -------------------------------------------------------------------------------------------------------

_HEAL = {field.name: field.default for field in dataclasses.fields(HealConfig)}
_TUNE = {field.name: field.default for field in dataclasses.fields(TuneConfig)}
_SETTINGS = {field.name: field.default for field in dataclasses.fields(SieveConfig)}
_VALID: dict[str, list[Any]] = {
    "tolerance": [0, 0.02, 0.5],
    "pruning_ratio": [0.1, 0.9],
    "latency_target": [0.5],
    "allocation": ["energy", "uniform", "genetic"],
    "projection": ["svd", "activation", "joint", "learned"],
    "memory_limit": ["24GB", "1 GiB", 10**9],
    "vocabulary": ["whole", "task"],
    "vocabulary_size": [9],
    "task_weights": [[1], [1, 2.5]],
    "target_modules": [["*.q_proj"], ["*"]],
    "exclude_modules": [["*.mlp.*"]],
    "heal": [{"steps": 3}, _HEAL],
    "tune": [{"steps": 3}, _TUNE],
}


@st.composite
def setting_values(draw: Callable[..., Any]) -> dict[str, Any]:
    """Settings as a JSON file may hold them."""
    names = draw(st.lists(st.sampled_from(sorted(_SETTINGS)), max_size=4, unique=True))
    values = {name: draw(st.sampled_from(_VALID.get(name, [_SETTINGS[name]]))) for name in names}
    values.setdefault(draw(st.sampled_from(["tolerance", "pruning_ratio"])), 0.25)
    return draw(broken(values))


def encoded(value: Any, *, yaml_too: bool = False) -> st.SearchStrategy[bytes]:
    """Write a value as JSON or YAML; sometimes damage the text."""
    plain = json.dumps(value).encode()
    forms = [st.just(plain), st.just(json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass"))]
    if yaml_too:
        forms.append(st.builds(lambda: yaml.safe_dump(value, allow_unicode=False).encode()))
    return st.one_of(*forms * 3, damaged(plain))


@st.composite
def damaged(draw: Callable[..., Any], content: bytes) -> bytes:
    """Cut a file, or put other bytes into it."""
    at = draw(st.integers(0, len(content)))
    piece = draw(
        st.one_of(
            st.binary(max_size=8),
            st.sampled_from(
                [b"\xef\xbb\xbf", b"\x00", b"\r\n", b"&a [*a]", b"<<: *a", b'"\\ud800"', b"[" * 2000, b"9" * 5000]
            ),
        )
    )
    return content[:at] + piece + (b"" if draw(st.booleans()) else content[at:])


# --- task files -----------------------------------------------------------------------------------------------------

_PIECES = [
    *(
        "{{ text }}",
        "{{ label }}",
        "{{ row['text'] }}",
        "{{ text | upper }}",
        "{{ text[:9] }}",
        "{{ names | join(', ') }}",
    ),
    *(
        "{% for n in names %}{{ n }}{% endfor %}",
        "{% if text %}x{% endif %}",
        "{{ number + 1 }}",
        "{{ text ~ number }}",
    ),
    *("{{ txt }}", "{text}", "{{ 'a' * 10**10 }}", "{{ text.x }}", "{{ text.__class__ }}", "{{ row.update(text='') }}"),
    *(
        "{{ range(99999) | list }}",
        "{% for i in range(9**9) %}x{% endfor %}",
        "{{ nothing }}",
        "{{ 1 / 0 }}",
        "{{ none }}",
    ),
    *(
        "{{ '\\ud800' }}",
        "{{ text | nope }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ lipsum(9) }}",
        "{#",
    ),
    *(
        "{{",
        "}}",
        "{%",
        "%}",
        "{% endfor %}",
        "{{ choices }}",
        "{{ letter }}",
        "{{ choice }}",
        "{{ lettered_choices }}",
    ),
]
templates = st.lists(st.one_of(st.sampled_from(_PIECES), st.text("{}%#'\"|()[]ab1 .", max_size=6)), max_size=3).map(
    "".join
)
_CHAT = [{"role": "system", "content": "Short."}, {"role": "user", "content": "{{ text }}"}]
KINDS: dict[str, dict[str, Any]] = {
    "labels": {"answer": "{{ label }}", "labels": {"odd": " odd", "even": " even"}, "metric": "macro_f1"},
    "choices": {
        **{"choices": ["odd", "even"], "answer": "{{ label }}", "candidate": " {{ choice }}", "shuffle": True},
        **{"normalize": False, "metric": "accuracy"},
    },
    "generate": {"answer": ["{{ label }}"], "stop": ["\n"], "max_new_tokens": 3, "metric": "f1"},
}
_TEMPLATE_KEYS = ("prompt", "answer", "candidate")


@st.composite
def task_values(draw: Callable[..., Any]) -> dict[str, Any]:
    """The contents of a task file."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    spec = toy.task_spec(kind=kind, labels=None, answer=None, seed=3, group="text", limit={"test": 5}, **{})
    spec |= KINDS[kind]
    if draw(st.booleans()):
        spec["data"] = {"files": "rows.jsonl", "fractions": {"calibration": 1, "selection": 1, "test": 2}}
    if kind != "choices" and draw(st.booleans()):
        del spec["prompt"]
        spec["chat"] = _CHAT
    key = draw(st.sampled_from(["", *_TEMPLATE_KEYS]))
    return {**spec, key: draw(templates)} if key in spec else draw(broken(spec, 2))


# --- data files -----------------------------------------------------------------------------------------------------


@st.composite
def data_files(draw: Callable[..., Any]) -> tuple[str, bytes]:
    """The ending and the contents of a data file."""
    rows: list[Any] = toy.parity_rows(draw(st.sampled_from([0, 1, 2, 9, 9, 9])))
    for _ in range(draw(st.integers(0, 2))):
        if rows:
            at = draw(st.integers(0, len(rows) - 1))
            rows[at] = draw(st.one_of(broken(rows[at]), junk)) if isinstance(rows[at], dict) else rows[at]
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]))
    if suffix in (".csv", ".tsv"):
        content = _table(rows, draw(st.sampled_from(["\t" if suffix == ".tsv" else ","] * 4 + [",", "\t", ";", "|"])))
    else:
        columns = (
            {key: {str(i): row.get(key) for i, row in enumerate(rows)} for key in ("text", "label")}
            if _all_rows(rows)
            else {}
        )
        forms = [rows, columns, {"data": rows}, *[None] * 5]
        form = draw(st.sampled_from(forms))
        content = json.dumps(form) if form is not None else "".join(json.dumps(row) + "\n" for row in rows)
    written = content.encode("utf-8", "surrogatepass")
    return suffix, draw(st.one_of(*[st.just(written)] * 4, damaged(written)))


def _all_rows(rows: list[Any]) -> bool:
    return all(isinstance(row, dict) for row in rows)


def _table(rows: list[Any], delimiter: str) -> str:
    file = io.StringIO()
    table = csv.writer(file, delimiter=delimiter)
    table.writerow(["text", "label"])
    for row in rows:
        table.writerow([row.get("text"), row.get("label")] if isinstance(row, dict) else [row])
    return file.getvalue()


# --- command lines --------------------------------------------------------------------------------------------------

# All inside the directory of the test: a name that a command writes to must never be the machine's own.
_PLACES = [
    *(
        "out",
        "model",
        "pruned",
        "task.json",
        "rows.jsonl",
        "settings.json",
        "thesis",
        "loop",
        "pipe",
        "absent/x",
        "",
        ".",
    ),
    *("model/out", "x" * 300, "a\udcffb", "caf\u00e9", "work", "thesis/thesis.txt", "task.json/x", "out\n2", "\x00"),
]
_WORDS = [
    "cpu",
    "cuda",
    "cuda:99",
    "evil",
    "float32",
    "bfloat16",
    "int8",
    "main",
    "0",
    "1",
    "-1",
    "0.5",
    "nan",
    "1e999",
    "9" * 400,
]
_NEEDED: dict[str, list[tuple[str, str]]] = {
    "prune": [("--model", "model"), ("--task", "task.json"), ("--output", "out"), ("--pruning-ratio", "0.5")],
    "plan": [("--model", "model")],
    "evaluate": [("--model", "model"), ("--task", "task.json")],
    "search": [("--model", "model"), ("--task", "task.json"), ("--work-dir", "work"), ("--pruning-ratio", "0.5")],
    "heal": [("--model", "pruned"), ("--dense", "model"), ("--task", "task.json"), ("--output", "out")],
    "report": [("--work-dir", "work"), ("--output", "out")],
    "push": [("--model", "pruned"), ("--repo-id", "user/name")],
    "export": [("--model", "pruned"), ("--output", "out"), ("--dense", "")],
    "merge": [("--model", "pruned"), ("--adapter", "thesis"), ("--output", "out")],
}
# A tensor type or device of the machine that runs the test decides, and not the words.
_LEFT_OUT = {"--debug", "--trust-remote-code", "--study-storage", "--gguf-file"}


def command_lines(options: Callable[[str], dict[str, argparse.Action]]) -> st.SearchStrategy[list[str]]:
    """Words after `optimum-cli sieve`: a command that could work, with up to three more or other options."""

    @st.composite
    def words(draw: Callable[..., Any]) -> list[str]:
        command = draw(st.sampled_from(sorted(_NEEDED)))
        given = dict(_NEEDED[command])
        known = options(command)
        names = sorted(known.keys() - _LEFT_OUT)
        for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
            given[name] = "" if known[name].nargs == 0 else draw(_value(known[name]))
        if draw(st.integers(0, 9)) == 0:
            del given[draw(st.sampled_from(sorted(given)))]
        line = [command]
        for name, value in given.items():
            # `--name=value` also passes what begins with a dash.
            line += [name] if value == "" and name in known and known[name].nargs == 0 else [f"{name}={value}"]
        if draw(st.integers(0, 19)) == 0:
            line.append(draw(st.sampled_from(["--nope", "extra", "--rounds", "--=", "-"])))
        return line

    return words()


def _value(option: argparse.Action) -> st.SearchStrategy[str]:
    if option.choices:
        return st.sampled_from([*map(str, option.choices), "other"])
    if option.type in (int, float):
        return st.one_of(st.sampled_from(["1", "0.5", "2", "8"]), numbers.map(repr), st.sampled_from(_WORDS))
    return st.one_of(
        st.sampled_from(_PLACES), st.sampled_from(_WORDS), st.text(st.characters(codec="ascii"), max_size=5)
    )


# --- `sieve` blocks -------------------------------------------------------------------------------------------------


def sieve_blocks(block: dict[str, Any]) -> st.SearchStrategy[Any]:
    """The `sieve` block of a saved model, broken outside or inside its rank pattern, or another value."""

    @st.composite
    def layers(draw: Callable[..., Any]) -> dict[str, Any]:
        pattern = dict(block["rank_pattern"])
        name = draw(st.sampled_from(sorted(pattern)))
        pattern[name] = draw(st.one_of(broken(pattern[name], 1), junk))
        return {**block, "rank_pattern": draw(st.one_of(st.just(pattern), broken(pattern, 1)))}

    return st.one_of(layers(), broken(block), broken(block), junk)
