"""The journal of a run: a line for each finished tensor, from which a later run resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from dbrx_q.errors import RequestError

from .records import TensorRecord

__all__ = ["Entry", "Journal", "options_of"]

_FILES = "source_files"  # in the first line, beside the options


@dataclass(frozen=True)
class Entry:
    """A finished tensor."""

    record: TensorRecord
    """Of the tensor."""
    digest: str
    """SHA-256 of its shard up to the end of the tensor."""
    notes: Mapping[str, Any]
    """Figures of its layer that were known with this tensor: "stream_error", "expert_tokens" and, of several sources,
    "expert_tokens_by_source"; of held-out tokens "held_out_errors" and, with the head, "held_out_divergence"; each with the layer's
    number."""
    source: str = ""
    """SHA-256 of the matrix as it was read from the source; "" in journals of versions that did not note it."""


class Journal:
    """Lines of JSON: first the options of the run, then an entry for every tensor that is in its shard.

    An entry is written after the tensor's bytes. At a power failure it may still reach the disk before them; the digest shows that.

    Args:
        path: the file, perhaps of an earlier run; an incomplete last line is cut off.
        options: everything that decides the bytes of the result.
        files: of the source, as `source_digest.source_files` gives them; they may change between two runs.

    Attributes:
        entries: the tensors that earlier runs and this one have finished.
        files: of the source, as they were when the run began.

    Raises:
        RequestError: the file was written under other options.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], files: Mapping[str, Any] | None = None) -> None:
        self._path = path
        lines = _whole_lines(path)
        self.files: Mapping[str, Any] = files or {}
        if lines:
            before = json.loads(lines[0])
            self.files = before.pop(_FILES, {})
            _check_same(path, before, json.loads(json.dumps(options)))
        self.entries = [_entry(json.loads(line)) for line in lines[1:]]
        self._ends = list(accumulate(map(len, lines), initial=0))
        self._file = open(path, "r+b" if path.exists() else "xb", buffering=0)  # noqa: SIM115 # closed by close()
        self._cut_at(self._ends[-1])
        if not lines:
            self._put({**options, _FILES: self.files})

    def cut(self, count: int) -> None:
        """Remove all entries but the first `count`."""
        del self.entries[count:], self._ends[count + 2 :]
        self._cut_at(self._ends[-1])

    def add(self, entry: Entry) -> None:
        """Append the entry of a finished tensor."""
        self._put({"record": asdict(entry.record), "digest": entry.digest, "notes": dict(entry.notes), "source": entry.source})
        self.entries.append(entry)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cut_at(self, end: int) -> None:
        self._file.seek(end)
        self._file.truncate()

    def _put(self, data: Mapping[str, Any]) -> None:
        line = json.dumps(data).encode() + b"\n"
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))


def options_of(path: Path) -> dict[str, Any] | None:
    """The options in the first line of a journal; None if the file does not exist or has no complete line."""
    lines = _whole_lines(path)
    return dict(json.loads(lines[0])) if lines else None


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for n, line in enumerate(lines):
        try:
            json.loads(line)
        except ValueError:
            return lines[:n]
        if not line.endswith(b"\n"):
            return lines[:n]
    return lines


def _entry(data: Mapping[str, Any]) -> Entry:
    return Entry(TensorRecord(**data["record"]), data["digest"], data["notes"], data.get("source", ""))


def _check_same(path: Path, before: Any, now: Any, name: str = "options") -> None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *now]:
            _check_same(path, before.get(key), now.get(key), key)
    elif before != now:
        raise RequestError(
            f"{path.parent}: --resume continues with the options that the run began with; {name} was {before!r:.100}, found {now!r:.100}. "
            "Give the same options, or remove the folder and start again"
        )
