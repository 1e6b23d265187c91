"""How names, texts of models and figures are spelled in a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["four_digits", "printable", "short_names", "visible"]

_SIGNS = {"\n": "↵\n", "\t": "⇥", "\r": "␍"}


def four_digits(value: float) -> str:
    """Four significant digits: "0.01200", "3.450e-06"; a zero is "0"."""
    return f"{value:#.4g}".rstrip(".") if value else "0"


def printable(text: str) -> str:
    """A name on one line that any encoding holds: what cannot be seen, or turns the text beside it around, is escaped as in Python."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def visible(text: str) -> str:
    """Text of a model with signs for line ends (before the line end itself), tabs and what else cannot be seen; spaces stay."""
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else _escaped(c)) for c in text)


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path where these differ, else the whole; printable."""
    last = [Path(path).name or path for path in paths]
    return [printable(name if last.count(name) == 1 else path) for name, path in zip(last, paths, strict=True)]


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
