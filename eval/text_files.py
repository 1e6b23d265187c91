"""Reads files of text: UTF-8, possibly gzipped, and the items of JSON files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from dbrx_q.errors import RequestError

__all__ = ["is_json", "json_items", "read_utf8"]


def read_utf8(path: Path) -> str:
    """The text of a file, unchanged; of a file named .gz, after decompression.

    Raises:
        RequestError: a folder, or a file that cannot be read, is damaged or is not UTF-8.
    """
    if path.is_dir():
        raise RequestError(f"{path}: a text must be a file; found a folder. Name the file in it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: a text must be a readable file; {error.strerror}. Check its permissions") from None
    return _decoded(path, _decompressed(path, content) if path.name.lower().endswith(".gz") else content)


def is_json(path: Path) -> bool:
    """Whether the name is that of a JSON file, possibly gzipped."""
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".json"))


def json_items(path: Path, text: str, expected: str) -> Iterator[tuple[str, object]]:
    """The items of an array, or of lines of JSON; each with words that say where it stands.

    Args:
        path: of the file, for errors.
        text: its text.
        expected: what an item must be, for errors.

    Raises:
        RequestError: not JSON.
    """
    text = text.removeprefix("\ufeff")
    if text.lstrip().startswith("["):
        items = _parsed(text, f"{path}", expected)
        assert isinstance(items, list)
        for number, item in enumerate(items, 1):
            yield f"{path}: element {number}", item
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut where a string holds a Unicode line separator
        if line.strip():
            where = f"{path}: line {number}"
            yield where, _parsed(line, where, expected)


def _decompressed(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except EOFError:
        raise RequestError(f"{path}: a gzip file must be complete; this one is truncated. Download it again") from None
    except (zlib.error, OSError) as error:
        raise RequestError(f"{path}: a file named .gz must be an undamaged gzip file; {error}. Download it again, or rename it") from None


def _decoded(path: Path, content: bytes) -> str:
    zero = content.find(0)
    if zero >= 0:
        raise RequestError(
            f"{path}: a text must be UTF-8 text; this file is binary, or text in UTF-16: byte {zero} is NUL. Unpack or convert it"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: a text must be UTF-8; byte {error.start} ({content[error.start]:#04x}) is not. Convert it") from None


def _parsed(text: str, where: str, expected: str) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        raise RequestError(f"{where}: must be {expected}; found JSON that is nested too deeply. Name another file") from None
    except ValueError as error:
        problem = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        one = expected.replace("an object", "one object", 1)
        raise RequestError(f"{where}: must be JSON, {one}; {problem}. Correct it, or name plain text without .json or .jsonl") from None
