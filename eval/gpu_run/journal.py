"""The results of a run, a line of JSON each, written when it comes and read again by the next run and by the report."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dbrx_q.errors import RequestError

__all__ = ["DONE", "FAILED", "FILE", "SCHEMA", "Journal", "Record", "read_records"]

SCHEMA = 1
"""Of a line; a file of another schema is refused."""
FILE = "results.jsonl"
"""Name of the file in the folder of a run."""
DONE, FAILED = "done", "failed"
"""The states of an item."""


@dataclass(frozen=True)
class Record:
    """The result of one item."""

    item: str
    """Stage and name, as "rows/Wqkv int8:64 T=1"."""
    status: str
    """DONE or FAILED."""
    code: str
    """`code_version` of what ran."""
    device: str
    """Product name of the GPU, or "meta"."""
    date: str
    """When it began, in ISO 8601, UTC."""
    seconds: float
    """How long it took."""
    value: dict[str, Any]
    """What the item found out; with FAILED its "error"."""


class Journal:
    """The file of a run's results, open for appending by one process.

    Args:
        folder: of the run; created if missing.

    Attributes:
        records: of this and of earlier runs, in order.

    Raises:
        RequestError: the folder cannot be written, another run has it open, or the file is not of this schema.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise RequestError(
                f"{folder}: results need a folder that you may write to; {error.strerror}. Name another with --out"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise RequestError(f"{folder}: one run at a time may write results; another is writing here. Wait for it") from None
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        try:
            self.records = _parsed(content[:whole], self._path)
        except RequestError:
            self.close()
            raise
        if whole < len(content):  # a run was killed while it wrote its last line
            os.ftruncate(self._file, whole)

    def append(self, record: Record) -> None:
        """Write a result; it is on the disk when this returns."""
        line = json.dumps({"schema": SCHEMA, **asdict(record)}) + "\n"
        os.write(self._file, line.encode())
        os.fsync(self._file)
        self.records.append(record)

    def close(self) -> None:
        """Let another run write."""
        os.close(self._file)


def read_records(folder: Path) -> list[Record]:
    """The results in a folder, without a half line at the end.

    Raises:
        RequestError: there are none, or they are not of this schema.
    """
    path = folder / FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(
            f"{path}: a run must have left its results there; {error.strerror}. Run `dbrx-q bench gpu --out {folder}`"
        ) from None
    return _parsed(content[: content.rfind(b"\n") + 1], path)


def _parsed(content: bytes, path: Path) -> list[Record]:
    names = {field.name for field in fields(Record)}
    records = []
    for number, line in enumerate(_lines(content), 1):
        try:
            data = json.loads(line)
            if data.pop("schema") != SCHEMA or data.keys() != names or not isinstance(data["value"], dict):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RequestError(
                f"{path}, line {number}: a line must be a result of schema {SCHEMA}; found {line[:60]!r}. Name another folder with --out"
            ) from None
        records.append(Record(**data))
    return records


def _lines(content: bytes) -> Sequence[str]:
    return content.decode("utf-8", "replace").splitlines()
