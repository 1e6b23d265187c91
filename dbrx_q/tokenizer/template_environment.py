"""Jinja for chat templates: the sandbox, functions and filters of transformers, and bounds on output and time.

A template is code of whoever wrote the checkpoint. It runs at most two seconds and makes no string of more than a megabyte. Every turn of
a loop and every call looks at the clock; whatever can make a long string in one step (operators, joins, padding, formats) is measured
before it runs.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2

__all__ = ["GENERATION_MARKS", "LONGEST_OUTPUT", "MOST_SECONDS", "compiled_template", "time_limit"]

LONGEST_OUTPUT = 1_000_000
"""Characters of the longest text that a template may make beyond the messages' own characters."""
MOST_SECONDS = 2.0
"""Seconds that one rendering may take."""
GENERATION_MARKS = ("\udc01", "\udc02")
"""Characters around the text of a `{% generation %}` block where `generation_marks` is true: lone surrogates, which messages have lost."""
_WIDTH = re.compile(r"\d{7,}")
_MOST_BITS = 100_000

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))
_longest: ContextVar[int] = ContextVar("longest", default=LONGEST_OUTPUT)
_marks: ContextVar[tuple[str, str]] = ContextVar("marks", default=("", ""))


class TemplateLimitError(Exception):
    """A template that runs too long or makes too long a text."""


@contextmanager
def time_limit(input_characters: int, *, generation_marks: bool = False) -> Iterator[None]:
    """A with block in which templates render within their bounds.

    Args:
        input_characters: of the messages and of whatever else the template reads; its text may be longer by as much.
        generation_marks: whether `GENERATION_MARKS` stand around the text of every `{% generation %}` block.
    """
    variables: list[tuple[ContextVar[Any], Any]] = [
        (_deadline, time.thread_time() + MOST_SECONDS),
        (_longest, LONGEST_OUTPUT + 4 * input_characters),
        (_marks, GENERATION_MARKS if generation_marks else ("", "")),
    ]
    tokens = [variable.set(value) for variable, value in variables]
    try:
        yield
    finally:
        for (variable, _), token in zip(variables, tokens, strict=True):
            variable.reset(token)


@functools.lru_cache(maxsize=8)
def compiled_template(template: str) -> jinja2.Template:
    """The compiled template; rendered within `time_limit` only."""
    return _environment().from_string(template)


def _tick() -> None:
    if time.thread_time() > _deadline.get():
        raise TemplateLimitError(f"the template runs longer than {MOST_SECONDS:g} seconds of processor time")


def _check_length(characters: float) -> None:
    if characters > _longest.get():
        raise TemplateLimitError(f"the template makes a text of more than {_longest.get():,} characters")


def _bounded_concat(pieces: Iterable[str]) -> str:
    pieces = list(pieces)
    _check_length(sum(map(len, pieces)))
    return "".join(pieces)


def _length(value: object) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


def _total_length(value: object, depth: int = 0) -> int:
    """Characters of `value` as text, roughly."""
    if isinstance(value, str):
        return len(value)
    if depth < 50 and isinstance(value, dict):
        return sum(_total_length(part, depth + 1) for item in value.items() for part in item)
    if depth < 50 and isinstance(value, (list, tuple)):
        return sum(_total_length(part, depth + 1) + 2 for part in value)
    return 20


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too long, before it runs."""
    if operator == "+" and isinstance(left, (str, list, tuple)):
        _check_length(_total_length(left) + _total_length(right))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                _check_length(_total_length(value) * times)
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,), {})


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise TemplateLimitError(f"the template makes a number of more than {_MOST_BITS:,} bits")


def _check_format(form: str, arguments: Iterable[Any], keywords: dict[str, Any]) -> None:
    if _WIDTH.search(form):
        raise TemplateLimitError("the template asks for a field of more than 999,999 characters")
    values = [*arguments, *keywords.values()]
    _check_numbers(values)
    fields = form.count("{") + form.count("%") or 1
    _check_length(len(form) + fields * max(map(_total_length, values), default=0))


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, (int, float)) and abs(value) > LONGEST_OUTPUT:
            raise TemplateLimitError(f"the template passes a number above {LONGEST_OUTPUT:,} to a function or filter")


def _check_call(name: str, owner: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Refuse a method or filter `name` on `owner` whose text would be too long, before it runs."""
    values = [*arguments, *keywords.values()]
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "wordwrap", "tojson", "round", "truncate"):
        _check_numbers(values)
    if name in ("expandtabs", "indent", "wordwrap", "tojson"):
        widest = max((value if isinstance(value, int) else _length(value) for value in values), default=0)
        lines = _total_length(owner) if name in ("expandtabs", "tojson") else str(owner).count("\n") + 1
        _check_length(lines * max(widest, 1))
    elif name in ("center", "ljust", "rjust", "zfill"):
        _check_length(max((value for value in values if isinstance(value, int)), default=0))
    elif name == "replace" and isinstance(owner, str) and len(arguments) > 1:
        count = owner.count(str(arguments[0])) if arguments[0] != "" else len(owner) + 1
        _check_length(len(owner) + count * len(str(arguments[1])))
    elif name == "join":
        separator, parts = (owner, arguments[0]) if isinstance(owner, str) and arguments else (arguments[0] if arguments else "", owner)
        if isinstance(parts, (str, list, tuple, dict)):
            _check_length(_total_length(parts) + len(parts) * _length(separator))
    elif name in ("format", "format_map") and isinstance(owner, str):
        mapping = arguments[0] if name == "format_map" and arguments and isinstance(arguments[0], dict) else keywords
        _check_format(owner, arguments, mapping)


def _collected(values: Iterator[Any]) -> list[Any]:
    """The values of an iterator, measured one by one."""
    collected: list[Any] = []
    characters = 0
    for value in values:
        _tick()
        characters += _total_length(value)
        _check_length(characters)
        collected.append(value)
    return collected


def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})
        concat = staticmethod(_bounded_concat)  # of set blocks, macros and the whole text

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            blocks: list[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
            for node in blocks:
                tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
                node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
            for parent in tree.find_all(nodes.Node):
                bound_concatenations(parent)
            return tree

        def tick(self) -> None:
            _tick()

        def joined(self, *parts: Any) -> str:
            return _bounded_concat(map(str, parts))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is None:
                return None

            def bounded(*arguments: Any, **keywords: Any) -> str:
                _check_call(value.__name__, value.__self__, arguments, keywords)
                return str(wrapped(*arguments, **keywords))

            return bounded

        def call(self, context: Any, function: Any, /, *arguments: Any, **keywords: Any) -> Any:
            _tick()
            _check_call(getattr(function, "__name__", ""), getattr(function, "__self__", None), arguments, keywords)
            result = super().call(context, function, *arguments, **keywords)
            if isinstance(result, (str, list, dict)):
                _check_length(_total_length(result))
            return result

    def bound_concatenations(parent: nodes.Node) -> None:
        """Replace every `a ~ b` below `parent` by a call that measures the result first."""
        for name, value in parent.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(parent, name, bounded_concatenation(value))
            elif isinstance(value, list):
                value[:] = [bounded_concatenation(item) if isinstance(item, nodes.Concat) else item for item in value]

    def bounded_concatenation(node: nodes.Concat) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None, lineno=node.lineno)

    class Generation(Extension):
        """`{% generation %}` ... `{% endgeneration %}`: the text of the block; for training, where the assistant's tokens are."""

        tags = {"generation"}  # noqa: RUF012 # as Jinja declares it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

        def marked(self, caller: Callable[[], str]) -> str:
            first, last = _marks.get()
            return first + caller() + last

    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    _add_functions(environment, jinja2)
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _bounded_filter(name, function)
    return environment


def _add_functions(environment: jinja2.Environment, jinja2: Any) -> None:
    """The functions and filters that templates of transformers use."""

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc] # the module is an argument
        """Jinja's `namespace` without names that begin with an underscore, which lead out of the sandbox."""

        def __init__(*arguments: Any, **keywords: Any) -> None:
            own, arguments = arguments[0], arguments[1:]
            values = dict(*arguments, **keywords)
            for name in values:
                _check_name(name)
            jinja2.utils.Namespace.__init__(own, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a name in a namespace must not begin with an underscore; found {name!r}")

    class Dictionaries:
        """The `dict` of templates, without the attributes of the class."""

        def __call__(self, *arguments: Any, **keywords: Any) -> dict[Any, Any]:
            return dict(*arguments, **keywords)

        def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
            return dict.fromkeys(*arguments)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which templates written for transformers do not expect.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals |= {"dict": Dictionaries(), "namespace": Namespace}
    environment.globals.pop("lipsum", None)  # text of any length


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, whose result is measured before it is made."""
    # Jinja passes a context, evaluation context or environment first where a filter asks for it by this attribute.
    position = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def bounded(*arguments: Any, **keywords: Any) -> Any:
        _tick()
        if len(arguments) > position:
            values = list(arguments)
            if isinstance(values[position], Iterator):
                values[position] = _collected(values[position])
            _check_call(name, values[position], tuple(values[position + 1 :]), keywords)
            return function(*values, **keywords)
        return function(*arguments, **keywords)

    return bounded
