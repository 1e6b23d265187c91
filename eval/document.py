"""Tables that commands write into documents: what stands between two marker lines is theirs, everything else is left alone."""

from __future__ import annotations

import os
from pathlib import Path

from dbrx_q.errors import RequestError

__all__ = ["check_section", "replace_section"]


def check_section(path: Path, begin: str, end: str) -> None:
    """Refuse a document in which there is no place for a table; one that does not exist will be made.

    Raises:
        RequestError: the file lacks the marker lines, or cannot be read.
    """
    _parts(path, begin, end)


def replace_section(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between the marker lines `begin` and `end` of `path`, in one step; errors as for `check_section`."""
    before, after = _parts(path, begin, end)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
    os.replace(partial, path)


def _parts(path: Path, begin: str, end: str) -> tuple[str, str]:
    """What stands before and after the marker lines."""
    if not path.exists():
        return "", "\n"
    old = path.read_text(encoding="utf-8")
    before, found, rest = old.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise RequestError(f"{path}: the file must hold the lines {begin!r} and {end!r}, between which the table goes; they are not there")
    return before, after
