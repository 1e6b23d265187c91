"""The results of a run, a line of JSON each, written when it comes and read again by the next run and by the report."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
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
_BEGINNING = f'{{"schema": {SCHEMA}, "item": "'.encode()  # of every line


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
            The file is unchanged then.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_plain(self._path)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise RequestError(
                f"{folder}: results need a folder that you may write to; {error.strerror}. Name another with --out"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise RequestError(f"{folder}: one run at a time may write results; another is writing here. Wait for it") from None
        except OSError as error:
            os.close(self._file)
            raise RequestError(
                f"{folder}: results need a file system that locks files; {error.strerror}. Name a folder on another with --out"
            ) from None
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        try:
            self.records = _parsed(content, self._path)
        except RequestError:
            self.close()
            raise
        if whole < len(content):  # a run was killed while it wrote its last line
            os.ftruncate(self._file, whole)

    def append(self, record: Record) -> None:
        """Write a result; it is on the disk when this returns.

        Raises:
            RequestError: it cannot be written; the file has the results before it.
        """
        line = (json.dumps({"schema": SCHEMA, **asdict(record)}) + "\n").encode()
        before = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):  # a disk that gets full takes a part
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, before)
            raise RequestError(
                f"{self._path}: results must be written when they come; {error.strerror}. Free space and run the same command again"
            ) from None
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
        _check_plain(path)
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(
            f"{path}: a run must have left its results there; {error.strerror}. Run `dbrx-q bench gpu --out {folder}`"
        ) from None
    return _parsed(content, path)


def _check_plain(path: Path) -> None:
    """Refuse what is no ordinary file, such as a pipe, which to open or to read may wait for ever."""
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, f"{path.name} there is not an ordinary file")


def _parsed(content: bytes, path: Path) -> list[Record]:
    """The results in whole lines; half of one may follow, if it is one of ours."""
    *lines, half = content.split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_record(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _foreign(path, number, line) from None
    if half and not (half.startswith(_BEGINNING) or _BEGINNING.startswith(half)):
        raise _foreign(path, len(lines) + 1, half)
    return records


def _record(data: Any) -> Record:
    """Raises errors of many kinds for what `Journal.append` does not write."""
    if data.pop("schema") != SCHEMA:
        raise ValueError
    record = Record(**data)
    texts = record.item, record.status, record.code, record.device, record.date
    if not all(isinstance(text, str) for text in texts) or record.status not in (DONE, FAILED):
        raise ValueError
    if isinstance(record.seconds, bool) or not isinstance(record.seconds, (int, float)) or not isinstance(record.value, dict):
        raise ValueError
    return record


def _foreign(path: Path, number: int, line: bytes) -> RequestError:
    shown = line[:60].decode("utf-8", "replace")
    return RequestError(
        f"{path}, line {number}: a line must be a result of schema {SCHEMA}; found {shown!r}. Name another folder with --out"
    )
