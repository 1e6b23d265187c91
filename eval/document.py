"""Writes tables into documents: a command replaces the text between two marker lines and leaves all other text unchanged."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dbrx_q.errors import RequestError

__all__ = ["check_section", "check_writable", "replace_section"]


def check_section(path: Path, begin: str, end: str) -> None:
    """Refuse a document without a place for a table. A document that does not exist is accepted: it will be created.

    Raises:
        RequestError: the file lacks the marker lines, or cannot be read.
    """
    _parts(path, begin, end)


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written after a measurement; folders that are missing will be created.

    Raises:
        RequestError: `path` is a folder, or the nearest folder that exists cannot be written to.
    """
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        problem = "it is a folder" if path.is_dir() else f"{nearest} is no folder that you may write to"
        raise RequestError(f"{path}: a result must be a file that can be written; {problem}. Name another file")


def replace_section(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between the marker lines `begin` and `end` of `path`, atomically; errors as for `check_section`."""
    before, after = _parts(path, begin, end)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RequestError(f"{path}: a document must be writable; {error.strerror}. Name another file") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _parts(path: Path, begin: str, end: str) -> tuple[str, str]:
    """The text before and after the marker lines."""
    if not path.exists():
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise RequestError(f"{path}: a document must be in a folder that exists and is writable; {path.parent} is not. Name another")
        return "", "\n"
    try:
        old = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{path}: a document must be UTF-8 text; this file is not. Name another file") from None
    except OSError as error:
        raise RequestError(f"{path}: a document must be a readable file; {error.strerror}. Name another file") from None
    before, begin_line, rest = old.partition(begin)
    _, end_line, after = rest.partition(end)
    if not begin_line or not end_line:
        raise RequestError(
            f"{path}: a document must hold the lines {begin!r} and {end!r}, between which the table is written; found neither or only one. "
            "Add both lines"
        )
    return before, after
