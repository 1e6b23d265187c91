"""Formats figures, names and texts for a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["four_digits", "printable", "short_names", "visible"]

_SIGNS = {"\n": "↵\n", "\t": "⇥", "\r": "␍"}


def four_digits(value: float) -> str:
    """Four significant digits: "0.01200", "3.450e-06"; a zero is "0"."""
    return f"{value:#.4g}".rstrip(".") if value else "0"


def printable(text: str) -> str:
    """A name on one line: characters that are invisible, or that reverse the text around them, are escaped as in Python."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def visible(text: str) -> str:
    """Text of a model with signs before line ends and for tabs, and other invisible characters escaped; spaces stay."""
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else _escaped(c)) for c in text)


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole path where several have the same last part; printable."""
    names = [Path(path).name or path for path in paths]
    return [printable(name if names.count(name) == 1 else path) for name, path in zip(names, paths, strict=True)]


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
