r"""A jinja2 environment whose templates change nothing, end soon and give the same text in every run.

Every value that a template makes, reads in bulk or prints is charged to a budget by its expanded size, every pass of a
loop or macro too. An operation that can make much from little, such as `'a' * 10**10`, is charged before it runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial, wraps
from inspect import signature
from math import prod
from typing import Any

from jinja2 import StrictUndefined, Undefined, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer


# Characters that one rendering may compute with: a hundred times the longest prompts, and about a second of work.
BUDGET = 20_000_000
# An item of a list and a pass of a loop take as much time as this many characters.
_ITEM, _PASS = 20, 400
# Text at random would differ between runs; nobody writes prompts with HTML attributes and links.
_REMOVED_FILTERS = ("random", "urlize", "xmlattr")
# Filters and methods whose result grows by the integers that they are given, or by the product of all they are given.
_PADDING = frozenset(("batch", "center", "ljust", "rjust", "round", "slice", "to_bytes", "zfill"))
_MULTIPLYING = frozenset(("expandtabs", "indent", "tojson", "translate", "wordwrap"))
# Filters that make text of any value.
_MAKING_TEXT = frozenset(
    ("center", "escape", "format", "indent", "join", "lower", "replace", "string", "trim", "upper")
)
# Others may take time that grows with the square of the text.
_ENCODINGS = ("ascii", "latin-1", "utf-16", "utf-8")


class MissingValueError(Exception):
    """A template prints a missing value."""


class WorkError(Exception):
    """A template computes more than the budget."""


_left: ContextVar[list[int]] = ContextVar("left")


@contextmanager
def budget() -> Iterator[None]:
    """Give the templates rendered in this context one budget."""
    token = _left.set([BUDGET])
    try:
        yield
    finally:
        _left.reset(token)


def _spend(units: int) -> None:
    left = _left.get()
    left[0] -= units
    if left[0] < 0:
        raise WorkError(f"it computes more than {BUDGET:,} characters; shorten its loops and repetitions")


def _size(value: Any, weigh: bool = False) -> int:
    """Count characters and items up to the budget; an integer counts its digits or, if you `weigh`, its value."""
    total, waiting = 0, [value]
    while waiting and total <= BUDGET:
        item = waiting.pop()
        total += _ITEM
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, int):
            total += min(abs(item), BUDGET) if weigh else item.bit_length() // 3
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, range):
            total += _ITEM * len(item)
        elif isinstance(item, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            waiting.extend(item)
    return total


def _charged(value: Any) -> Any:
    _spend(_size(value))
    return value


def _charge_operation(name: str, values: list[Any]) -> None:
    """Charge a filter, test or method for its values and, where its result may be longer, for the result."""
    _spend(_size(values))
    if name in _MAKING_TEXT:
        _refuse_functions(*values)
    elif name in ("decode", "encode") and str(values[1] if len(values) > 1 else "utf-8").lower() not in _ENCODINGS:
        raise WorkError(f"it uses the encoding {values[1]!r}; use one of {', '.join(_ENCODINGS)}")
    numbers = [min(abs(value), BUDGET) for value in values[1:] if isinstance(value, int)]
    if name in _PADDING:
        _spend(sum(numbers) * (_ITEM if name in ("batch", "slice") else 1))
    elif name == "join" and len(values) > 1:
        _spend(_length(values[0]) * _length(values[1]))
    elif name == "replace" and len(values) > 2:
        # Every character of bytes counts as replaced.
        text, old, new = (str(value) for value in values[:3])
        _spend((len(text) if isinstance(values[0], bytes) else text.count(old)) * len(new))
    elif name == "sum" and not all(isinstance(value, int | float) for value in values[1:]):
        _spend(_length(values[0]) * _size(values[0]))
    elif name == "striptags":
        # Its time grows with the square of the number of tags.
        _spend(str(values[0]).count("<") ** 2 // 1000)
    elif name in _MULTIPLYING:
        if name == "wordwrap":
            # Long words are cut piece by piece, the rest copied each time. The width makes nothing longer.
            numbers = [max((len(word) ** 2 for word in str(values[0]).split()), default=0) // 10**6 + 1]
        texts = [len(value) or 1 for value in values[1:] if isinstance(value, str)]
        tables = [_size(value) for value in values[1:] if isinstance(value, dict | list | tuple)]
        _spend(prod([_size(values[0]), *numbers, *texts, *tables]))


def _counted(name: str, values: Iterable[Any]) -> list[Any]:
    """Return `values` with a list for each iterator whose number of items decides the work."""
    return [list(value) if name in ("join", "sum") and isinstance(value, Iterator) else value for value in values]


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1


def _charge_formatting(text: str, values: Any) -> None:
    """Charge `text % values` or `text.format(values)`: every placeholder as wide as any, and as all values."""
    widths = [int(digits) if len(digits) < 9 else BUDGET for digits in re.findall(r"\d+", text)]
    from_values = "*" in text or "{" in re.sub(r"\{[^{}]*\}", "", text)
    _spend((text.count("%") + text.count("{") + 1) * (max(widths, default=0) + _size(values, weigh=from_values)))


def _refuse_functions(*values: Any) -> None:
    """Refuse functions, which somebody forgot to call, where a text is made of values: they show their address."""
    for item in _with_items(*values):
        if callable(item) and not isinstance(item, Undefined):
            raise TypeError(f"it prints the function {getattr(item, '__name__', item)!r}; call it with brackets")


def _with_items(*values: Any) -> Iterator[Any]:
    for value in values:
        yield value
        yield from value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else ()


def _bounded(name: str, function: Any) -> Callable[..., Any]:
    """Charge a filter or test for its values and its result."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0
    inner = getattr(function, "__wrapped__", function)
    order = signature(partial(inner, None) if hasattr(inner, "jinja_pass_arg") else inner)

    @wraps(function)
    def bounded(*arguments: Any, **options: Any) -> Any:
        if name == "format":
            _refuse_functions(*arguments, *options.values())
            _charge_formatting(str(arguments[0]), [arguments[1:], options])
            return _charged(function(*arguments, **options))
        context, arguments = arguments[:first], arguments[first:]
        with suppress(TypeError):
            # Charges go by position, so arguments that are given by name are put where they belong.
            bound = order.bind(*arguments, **options)
            arguments, options = bound.args, bound.kwargs
        values = _counted(name, arguments)
        _charge_operation(name, [*values, *options.values()])
        return _charged(function(*context, *values, **options))

    return bounded


@pass_context
def _printed(context: Any, value: Any) -> Any:
    """Charge a printed value; refuse a missing one, and what prints as a name of Python instead of a text."""
    # NaN, a missing number, differs from itself.
    if value is None or (isinstance(value, float) and value != value):
        raise MissingValueError
    _refuse_functions(value)
    for item in _with_items(value):
        kind: Any = type(item)
        # The default text of an object is its address, another one in every run.
        if isinstance(item, Iterator) or kind.__repr__ is object.__repr__:
            raise TypeError(f"it prints a {kind.__name__} instead of its items; add `| join` or `| list`")
    return _charged(value)


class _Charges(NodeTransformer):
    """Insert the charges into a parsed template."""

    def _value(self, node: Any) -> nodes.Expr:
        return nodes.Filter(node, "charged", [], [], None, None, lineno=node.lineno)

    def _each_pass(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> None:
        texts = [data.data for part in node.body for data in part.find_all(nodes.TemplateData)]
        cost = nodes.Const(_PASS + sum(map(len, texts)), lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(nodes.Filter(cost, "spend", [], [], None, None), lineno=node.lineno))

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._each_pass(node)
        self.generic_visit(node)
        node.iter = self._value(node.iter)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self._each_pass(node)
        return self.generic_visit(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self._each_pass(node)
        return self.generic_visit(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._value(node.expr)
        for operand in node.ops:
            operand.expr = self._value(operand.expr)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._value(self.generic_visit(node))

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._value(self.generic_visit(node))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._value(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._value(node.node)
        elif not isinstance(node.arg, nodes.Const):
            node.arg = self._value(node.arg)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None, lineno=node.lineno)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of the templates in task files."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        # The optimizer would compute constants such as `'a' * 10**10` while it compiles.
        super().__init__(
            undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=_printed, optimized=False
        )
        del self.globals["lipsum"]
        kept = self.filters.keys() - _REMOVED_FILTERS
        self.filters = {name: _bounded(name, self.filters[name]) for name in kept}
        self.tests = {name: _bounded(name, function) for name, function in self.tests.items()}
        self.filters |= {"charged": _charged, "spend": _spend}

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        _Charges().visit(source)
        source.set_environment(self)
        return super()._generate(source, *arguments, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Charge an operation for its values before it runs, and for its result after."""
        _refuse_functions(left, right)
        if operator == "%" and isinstance(left, str):
            _charge_formatting(left, [right])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _spend(_size(left) * min(abs(right), BUDGET))
        elif operator in ("*", "/", "//", "%"):
            # An integer that repeats a text or list counts by its value, one of two numbers by its digits.
            repeats = not (isinstance(left, int | float) and isinstance(right, int | float))
            _spend(_size(left, weigh=repeats) * _size(right, weigh=repeats))
        else:
            _spend(_size([left, right]))
        return _charged(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **options: Any) -> Any:
        """Charge a call for its values before it runs, and for its result after."""
        name, owner = getattr(__obj, "__name__", None), getattr(__obj, "__self__", None)
        values = _counted(str(name), arguments)
        # A lookup in a mapping takes the same time whatever its size.
        _charge_operation(str(name), [None if isinstance(owner, dict) else owner, *values, *options.values()])
        return _charged(super().call(__context, __obj, *values, **options))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the sandboxed `str.format`, charged before it runs."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        @wraps(formatted)
        def bounded(*arguments: Any, **options: Any) -> str:
            _charge_formatting(value.__self__, [arguments, options])
            return formatted(*arguments, **options)

        return bounded
