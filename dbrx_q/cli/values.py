"""Plain values of options without pydantic, which typer imports for a tenth of a second to convert any value.

A number, a text or a name that needs no more than its type is converted here. Everything else, and every value that is refused, goes
through typer, which words the error.
"""

from __future__ import annotations

import re
from typing import Any, get_args, get_origin

__all__ = ["convert_plainly"]

_INTEGER = re.compile(r"-?\d{1,15}")
_DECIMAL = re.compile(r"-?\d{1,15}(\.\d{1,15})?")
_UNCONVERTED = object()


def convert_plainly(parameters: list[Any]) -> list[Any]:
    """The parameters of a typer command, which convert plain values here; unchanged for versions of typer that convert in another way."""
    for parameter in parameters:
        if getattr(parameter, "_runtime_param", parameter) is None and hasattr(parameter, "get_runtime_param"):
            parameter._runtime_param = _Values(parameter)
    return parameters


class _Values:
    """Converts the values of one parameter; stands where typer keeps its own conversion."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value that the command gets; as typer's method of this name."""
        try:
            converted = self._converted(value)
        except Exception:  # typer repeats the conversion and words the error
            converted = _UNCONVERTED
        if converted is not _UNCONVERTED:
            return converted
        self._parameter._runtime_param = None
        return self._parameter.get_runtime_param().coerce(value, param=param, ctx=ctx)

    def _converted(self, value: Any) -> Any:
        parameter = self._parameter
        several = parameter.multiple or parameter.nargs == -1
        if value is None:
            return () if several else None
        kind, info = parameter.type_descriptor.annotation, parameter.type_descriptor.parameter_info
        if info.parser is not None and not several:
            return info.parser(value)
        if info.parser is not None or info.max is not None or info.clamp:
            return _UNCONVERTED
        if get_origin(kind) is list and get_args(kind) == (str,) and not isinstance(value, str):
            return list(value) if all(isinstance(item, str) for item in value) else _UNCONVERTED
        number: Any = _UNCONVERTED
        if kind is int and (type(value) is int or (isinstance(value, str) and _INTEGER.fullmatch(value))):
            number = int(value)
        elif kind is float and (type(value) is float or (isinstance(value, str) and _DECIMAL.fullmatch(value))):
            number = float(value)
        elif kind is str and isinstance(value, str):
            return value
        return _UNCONVERTED if number is _UNCONVERTED or (info.min is not None and number < info.min) else number
