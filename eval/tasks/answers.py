"""Answers to the requests of a task run, saved periodically so that an interrupted run can be resumed."""

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
    """The answers of one run.

    Args:
        state: where answers are saved, and read from when the run is resumed; None to save none.

    Attributes:
        done: requests answered so far.
        total: requests in all; 0 until all have been created.
    """

    def __init__(self, state: RunState | None = None) -> None:
        self.done = self.total = 0
        self._state = state
        self._answers: dict[str, Any] = _restored(state)
        self._last_save = time.monotonic()

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def add(self, key: str, answer: Any) -> None:
        """Record the answer, which must be JSON-serializable, to the request with this `request_key`."""
        self._answers[key] = answer

    def save(self, *, now: bool = True) -> bool:
        """Write all answers; with `now` False only if the last write was half a minute ago. Returns whether the file exists."""
        if self._state is None:
            return False
        if self._answers and (now or time.monotonic() - self._last_save > _SAVE_SECONDS):
            self._state.save({"answers": np.frombuffer(json.dumps(self._answers).encode(), dtype=np.uint8)})
            self._last_save = time.monotonic()
        return self._state.path.exists()


def request_key(kind: str, index: int, *parts: Sequence[int] | str) -> str:
    """A key for a request: a hash of its kind, its index among those of its kind, its tokens and its options."""
    return hashlib.sha256(json.dumps([kind, index, *parts]).encode()).hexdigest()[:32]


def _restored(state: RunState | None) -> dict[str, Any]:
    saved = None if state is None else state.load()
    try:
        answers = {} if saved is None else json.loads(saved["answers"].tobytes())
    except (KeyError, ValueError):
        return {}
    return answers if isinstance(answers, dict) else {}
