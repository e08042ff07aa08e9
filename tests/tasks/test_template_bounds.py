"""Templates end, change nothing and give the same text in every run, whatever they compute."""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from toy import load_task, parity_rows, prompts, task_spec, write_rows

from optimum_sieve.tasks import Task
from optimum_sieve.tasks.prompts import Row, RowTemplate
from optimum_sieve.tasks.templates.sandbox import BUDGET


if TYPE_CHECKING:
    from pathlib import Path


FIELDS: dict[str, Any] = {
    "text": "one two",
    "count": 3,
    "names": ["Ann", "Bob"],
    "details": {"year": 1999},
    "long": "word " * 100_000,
}
LIST = "{% set ns = namespace(x=[1]) %}{% for i in range(100) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"
ENDLESS = {
    "wrapped text without spaces": "{{ ('a' * 300000) | wordwrap(1) | length }}",
    "text of tags": "{{ ('<!---->' * 300000) | striptags }}",
    "replacement given by name": "{% set s = 'a' * 100000 %}{{ s | replace(new=s, old='a') | length }}",
    "width given by name": "{{ 'a' | center(width=10**10) }}",
    "many slices": "{{ 'a' | slice(19000000) | list | length }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that keep nothing": "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
    "macros that call twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loops": "{% for n in [60] recursive %}{% if n %}{{ loop([n - 1, n - 1]) }}{% endif %}{% endfor %}",
    "literal text in a loop": "{% for i in range(9999) %}" + "text " * 9999 + "{% endfor %}",
    "repeated text": "{{ 'a' * 10**10 }}",
    "repeated list": "{{ ([0] * 10**10) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "doubled by ~": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by +": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled by a block": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set block %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = block %}{% endfor %}",
    "nested lists": LIST,
    "nested mappings": LIST.replace("[ns.x, ns.x]", "{0: ns.x, 1: ns.x}"),
    "nested by a call": LIST.replace("[ns.x, ns.x]", "dict(a=ns.x, b=ns.x)"),
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "indent": "{{ 'a' | indent(10**10, true) }}",
    "% width": "{{ '%99999999999d' % 1 }}",
    "% width of a value": "{{ '%*d' % (10**10, 1) }}",
    "format filter": "{{ '%99999999999d' | format(1) }}",
    "format width": "{{ '{:>99999999999}'.format(1) }}",
    "format width of a value": "{{ '{:>{width}}'.format(1, width=10**10) }}",
    "format_map": "{{ '{a:>99999999999}'.format_map({'a': 1}) }}",
    "many fields": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "join": "{{ range(99999) | join('a' * 99999) }}",
    "join of an iterator": "{{ range(99999) | map('string') | join('a' * 99999) }}",
    "join method": "{{ ('a' * 99999).join(range(99999) | map('string')) }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "replace method": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "to_bytes": "{{ (1).to_bytes(10**10) }}",
    "wordwrap": "{{ ('a ' * 99999) | wordwrap(1, true, 'b' * 99999) }}",
    "tojson": "{{ [1] | tojson(10**10) }}",
    "round": "{{ 1 | round(-10**10) }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "sum of lists": "{{ ([[1, 2, 3]] * 99999) | sum(start=[]) }}",
    "mapped filter": "{{ ['a'] | map('center', 10**10) | list }}",
    "select": "{{ range(99999) | select('in', range(99999) | list) | list }}",
    "comparisons": "{% set a = range(99999) | list %}{% set b = range(99999) | list %}{% for i in range(99999) %}"
    "{% if a == b %}{% endif %}{% endfor %}",
    "copies": "{% set a = range(99999) | list %}{% for i in range(99999) %}{% set b = a[:] %}{% endfor %}",
    "long fields": "{% for i in range(999) %}{{ long }}{% endfor %}",
}


def render(template: str, fields: dict[str, Any] = FIELDS) -> str:
    return RowTemplate("prompt", template).render(Row(fields, "rows.jsonl", 1))


@pytest.mark.parametrize("name", ENDLESS)
def test_what_computes_too_much_is_refused(name: str) -> None:
    message = rf"^`prompt` must render for every row, got WorkError in row 1 of rows.jsonl: .* more than {BUDGET:,}"
    with pytest.raises(ValueError, match=message) as raised:
        render(ENDLESS[name])
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("source", ["{{ 'a' * 10**10 }}", "{{ range(99999) | list * 99999 }}"])
def test_a_single_expression_has_a_budget_too(source: str) -> None:
    with pytest.raises(ValueError, match=r"`choices` must render for every row, got WorkError in row 1 of rows.jsonl"):
        RowTemplate("choices", source).value(Row(FIELDS, "rows.jsonl", 1))


def test_the_error_of_a_task_file_names_the_template(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`prompt` must name fields of the data, got 'lipsum' in row .* of rows.jsonl"
    ):
        load_task(tmp_path, prompt="{{ lipsum(n=10**7) }}")
    with pytest.raises(ValueError, match=r"`prompt` must render for every row, got WorkError in row .* of rows.jsonl"):
        load_task(tmp_path, prompt="{{ text }}{{ 'a' * 10**10 }}")
    with pytest.raises(ValueError, match=r"`answer` must render for every row, got WorkError in row .* of rows.jsonl"):
        load_task(tmp_path, answer="{{ label * 10**10 }}")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ text | upper }} {{ names | join(', ') }} {{ 'a' ~ count ~ text }}", "ONE TWO Ann, Bob a3one two"),
        ("{{ count * 2 }} {{ 'ab' * 3 }} {{ '%03d: %s' | format(count, text) }}", "6 ababab 003: one two"),
        ("{{ '{:>5}'.format(count) }} {{ '%d' % 1700000000 }} {{ 2 ** 10 }}", "    3 1700000000 1024"),
        ("{{ row['text'][:3] }} {{ row.get('text') }} {{ row.details.year }}", "one one two 1999"),
        ("{% for name in names %}{{ loop.index }}/{{ loop.length }} {{ name }};{% endfor %}", "1/2 Ann;2/2 Bob;"),
        ("{% for key, value in details.items() %}{{ key }}={{ value }}{% endfor %}", "year=1999"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}{{ f(text) }}", "<1><one two>"),
        ("{% set ns = namespace(x=0) %}{% for i in names %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}", "2"),
        ("{{ long | replace(' ', '\n') | trim | truncate(20) }}", "word\nword\nword\nwo..."),
        ("{{ long.split() | length }} {{ long | wordwrap(79) | length }}", "100000 499999"),
        ("{{ names | tojson }} {{ [1, 2] | sum }} {{ 3.14159 | round(2) }}", '["Ann", "Bob"] 3 3.14'),
        (
            "{{ nope is defined }} {{ nope | default('x') }} {{ count in [1, 3] }} {{ 'one' in text }}",
            "False x True True",
        ),
        ("{{ [1, 2, 3] | select('gt', 1) | list }} {{ [1, 2, 3] | batch(2) | list }}", "[2, 3] [[1, 2], [3]]"),
        ("{% set x %}a{{ count }}{% endset %}{{ x }} {% filter upper %}q{{ count }}{% endfilter %}", "a3 Q3"),
        ("{{ cycler('a', 'b').next() }}{% set a, b = 1, 2 %}{{ a }}{{ b }}", "a12"),
    ],
)
def test_what_prompts_are_made_of_is_unchanged(template: str, text: str) -> None:
    assert render(template) == text


CHANGES = [
    "row.update({'text': 'x'})",
    "row.update(text='x')",
    "row.pop('text')",
    "row.popitem()",
    "row.clear()",
    "row.setdefault('text2', 'x')",
    "row.__setitem__('text', 'x')",
    "(row | attr('update'))({'text': 'x'})",
    "row['update']({'text': 'x'})",
    "details.update(year=0)",
    "names.append('x')",
    "names.extend(['x'])",
    "names.insert(0, 'x')",
    "names.remove('Ann')",
    "names.reverse()",
    "names.sort(reverse=true)",
    "names.pop()",
    "names.clear()",
    "names.__iadd__(['x'])",
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["{{{{ {0} }}}}", "{{% set x = {0} %}}{{{{ text }}}}", "{{{{ [{0}] | length }}}}"])
def test_no_template_changes_a_row(change: str, form: str) -> None:
    fields = copy.deepcopy(FIELDS)
    for evaluate in (lambda template, row: template.render(row), lambda template, row: template.value(row)):
        with pytest.raises(ValueError, match=r"`prompt` must render for every row, got SecurityError in row 1 of rows"):
            evaluate(RowTemplate("prompt", form.format(change)), Row(fields, "rows.jsonl", 1))
    assert fields == FIELDS


def test_no_assignment_changes_a_row() -> None:
    fields = copy.deepcopy(FIELDS)
    with pytest.raises(
        ValueError, match=r"`prompt` must render for every row, got TemplateRuntimeError in row 1 of rows"
    ):
        render("{% set row.text = 'x' %}{{ text }}", fields)
    shadowed = (
        "{% set text = 'x' %}{% set ns = namespace(row) %}{% set ns.text = 'y' %}{{ text }}{{ ns.text }}{{ row.text }}"
    )
    assert render(shadowed, fields) == "xyone two"
    assert fields == FIELDS


def test_a_prompt_cannot_change_the_answer(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`prompt` must render for every row, got SecurityError in row .* of rows.jsonl"
    ):
        load_task(tmp_path, prompt="{% set x = row.update(label='odd') %}{{ text }}")


@pytest.mark.parametrize("template", ["{{ names | random }}", "{{ text | urlize }}", "{{ details | xmlattr }}"])
def test_filters_at_random_and_for_web_pages_are_unknown(template: str) -> None:
    name = template.split("|")[1].strip(" }")
    with pytest.raises(ValueError, match=f"`prompt` must be a valid jinja2 template, got .*: No filter named '{name}'"):
        RowTemplate("prompt", template)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ " + "(" * 5000 + "text" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% for i in text %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
        ("{{ " + "9" * 5000 + " }}", "4300 digits"),
    ],
)
def test_templates_that_python_cannot_compile(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"`prompt` must be a valid jinja2 template, got .*: .*{reason}") as raised:
        RowTemplate("prompt", template)
    assert len(str(raised.value)) < 500


def test_missing_numbers_are_missing_values(tmp_path: Path) -> None:
    rows = [{**row, "count": float("nan") if i == 3 else i} for i, row in enumerate(parity_rows(20))]
    with pytest.raises(
        ValueError, match=r"`prompt` must not print a missing value, got one for count in row 4 of rows"
    ):
        load_task(tmp_path, rows, prompt="{{ text }} {{ count }}")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{{ text.upper }}", "it prints the function 'upper'; call it with brackets"),
        ("{{ [text.upper] }}", "it prints the function 'upper'; call it with brackets"),
        ("{{ row.items }}", "it prints the function 'items'; call it with brackets"),
        ("{{ text }}{% macro twice() %}{% endmacro %}{{ twice }}", "it prints the function <Macro 'twice'>"),
        ("{{ text ~ text.upper }}", "it prints the function 'upper'"),
        ("{{ text.upper | string }}", "it prints the function 'upper'"),
        ("{{ '%s' % text.upper }}", "it prints the function 'upper'"),
        ("{{ '%s' | format(text.upper) }}", "it prints the function 'upper'"),
        ("{{ [text.upper] | join }}", "it prints the function 'upper'"),
        ("{{ ' '.join([text.upper]) }}", "it prints the function 'upper'"),
        ("{{ text.split() | map('upper') }}", "it prints a generator instead of its items; add `| join` or `| list`"),
        ("{{ text }}{{ cycler(1, 2) }}", "it prints a Cycler instead of its items"),
    ],
)
def test_what_has_no_text_of_its_own_is_not_printed(tmp_path: Path, prompt: str, message: str) -> None:
    pattern = r"`prompt` must render for every row, got TypeError in row \d+ of rows.jsonl: "
    with pytest.raises(ValueError, match=pattern + re.escape(message)):
        load_task(tmp_path, parity_rows(20), prompt=prompt)


@pytest.mark.parametrize("field", ["self", "range", "dict", "context", "environment", "loop", "row", "charged"])
def test_a_field_may_have_any_name(tmp_path: Path, field: str) -> None:
    rows = [{field: row["text"], "label": row["label"]} for row in parity_rows(20)]
    spec = {
        "kind": "choices",
        "labels": None,
        "choices": ["odd", "even"],
        "answer": "{{ label }}",
        "candidate": "{{ choice }}",
    }
    task = load_task(tmp_path, rows, prompt=f"{{{{ row['{field}'] if row is mapping else row }}}}", **spec)
    assert sorted(prompts(task, "test")) == sorted(
        set(prompts(task, "test")) & {row["text"] for row in parity_rows(20)}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": "Number: {text} Parity:"},
            "`prompt` must use a field of the data, got none in 'Number: {text} Parity:'",
        ),
        ({"prompt": "Parity:"}, r"`prompt` must use a field of the data, got none in 'Parity:'. Write .*`{{ field }}`"),
        (
            {"prompt": "{{ text }} {label}"},
            r"`prompt` must name fields in double braces, got {label} in .*Write {{ label }}, or {{ '{label}' }} for",
        ),
        ({"prompt": "{{ text }} { text }"}, "`prompt` must name fields in double braces, got {text} in"),
        ({"answer": "{label}"}, "`answer` must use a field of the data, got none in '{label}'"),
        (
            {
                "prompt": None,
                "chat": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "{text}"}],
            },
            "`chat` must use a field of the data, got none in 'Be short.'",
        ),
        (
            {
                "prompt": None,
                "chat": [{"role": "user", "content": "{{ text }}"}, {"role": "user", "content": "{text}"}],
            },
            r"`chat\[1\].content` must name fields in double braces, got {text} in '{text}'",
        ),
    ],
)
def test_single_braces_are_no_fields(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path, **changes)


def test_other_text_in_braces_is_text(tmp_path: Path) -> None:
    prompt = "{{ '{text}' }} {other} {{ text }} {% raw %}{{ text }}{% endraw %} {\"text\": 1}"
    task = load_task(tmp_path, prompt=prompt)
    assert all(
        shown.startswith("{text} {other} ") and shown.endswith('{{ text }} {"text": 1}')
        for shown in prompts(task, "test")
    )


@pytest.mark.parametrize("kind", ["choices", "generate"])
def test_other_kinds_need_fields_in_the_answer_too(tmp_path: Path, kind: str) -> None:
    extra = {"choices": {"choices": ["odd", "even"], "candidate": "{{ choice }}"}, "generate": {"max_new_tokens": 3}}[
        kind
    ]
    write_rows(tmp_path / "rows.jsonl", parity_rows(20))
    spec = task_spec(kind=kind, labels=None, answer="{label}", **extra)
    with pytest.raises(ValueError, match=r"`answer` must use a field of the data, got none in '{label}'\."):
        Task.from_dict(json.loads(json.dumps(spec)), tmp_path)


@pytest.mark.parametrize("call", ["encode('punycode')", "encode().decode('idna')", "encode(encoding='punycode')"])
def test_encodings_that_take_quadratic_time_are_refused(tmp_path: Path, call: str) -> None:
    with pytest.raises(
        ValueError, match=r"`prompt` must render for every row, got .*it uses the encoding '(puny|idna)"
    ):
        load_task(tmp_path, parity_rows(20), prompt=f"{{{{ text.{call} | length }}}} {{{{ text }}}}")
