"""Tables that commands write into documents: what stands between two marker lines is theirs, everything else is left alone."""

from __future__ import annotations

import os
from contextlib import suppress
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
    try:
        partial.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RequestError(f"{path}: a document must be writable; {error.strerror}. Give another") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _parts(path: Path, begin: str, end: str) -> tuple[str, str]:
    """What stands before and after the marker lines."""
    if not path.exists():
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise RequestError(f"{path}: a document must lie in a folder that exists and can be written to; {path.parent} is none")
        return "", "\n"
    try:
        old = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{path}: a document must be UTF-8 text; this file is not. Give another") from None
    except OSError as error:
        raise RequestError(f"{path}: a document must be a readable file; {error.strerror}. Give another") from None
    before, found, rest = old.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise RequestError(f"{path}: the file must hold the lines {begin!r} and {end!r}, between which the table goes; they are not there")
    return before, after
