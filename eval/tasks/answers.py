"""Answers to requests, kept from time to time so that a run that was interrupted can go on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dbrx_q.eval.resume import RunState

__all__ = ["Answers", "request_key"]

_SAVE_SECONDS = 30.0


class Answers:
    """What requests of one run were answered.

    Args:
        state: where answers are kept, and found again; None for nowhere.

    Attributes:
        done: requests that are answered, of `total`, which is 0 until all are known.
    """

    def __init__(self, state: RunState | None = None) -> None:
        self.done = self.total = 0
        self._state = state
        self._found: dict[str, Any] = _restored(state)
        self._saved = time.monotonic()

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def add(self, key: str, answer: Any) -> None:
        """Remember an answer, which JSON can hold, of the request that `request_key` names."""
        self._found[key] = answer

    def keep(self, *, now: bool = True) -> bool:
        """Write what is there, or, unless `now`, only when the last time is half a minute ago; whether the file is there."""
        if self._state is None:
            return False
        if self._found and (now or time.monotonic() - self._saved > _SAVE_SECONDS):
            self._state.save({"answers": np.frombuffer(json.dumps(self._found).encode(), dtype=np.uint8)})
            self._saved = time.monotonic()
        return self._state.path.exists()


def request_key(kind: str, index: int, *parts: Sequence[int] | str) -> str:
    """Names a request: its kind, its place among those of its kind, its tokens, its options."""
    return hashlib.sha256(json.dumps([kind, index, *parts]).encode()).hexdigest()[:32]


def _restored(state: RunState | None) -> dict[str, Any]:
    kept = None if state is None else state.load()
    try:
        found = {} if kept is None else json.loads(kept["answers"].tobytes())
    except (KeyError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
