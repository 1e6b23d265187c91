"""Figures of a run that was interrupted, kept so that the same command can go on.

A run is named by everything that decides its figures, so that what is taken up again is always the same run.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dbrx_q.checkpoint.user_cache import user_cache
from dbrx_q.experts.stats import CacheStats, ExpertStats

__all__ = ["RunState", "kept_requests", "restored_requests"]


class RunState:
    """The place of one run's figures: a file in the user's cache, named by a hash of `key`.

    Args:
        key: what decides the figures: hashes of checkpoints and text, protocol, dtype, device, versions.
        folder: for the file; None for `eval` in the user's cache.
    """

    def __init__(self, key: Mapping[str, Any], folder: Path | None = None) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.path = (folder or user_cache() / "eval") / f"{digest[:32]}.npz"

    def load(self) -> dict[str, np.ndarray] | None:
        """What was kept, None where nothing was or the file cannot be read."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Keep `arrays` in place of what was kept; whether that could be written."""
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type] # its annotation takes the first array for a flag
            os.replace(partial, self.path)
        except OSError:
            return False
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return True

    def clear(self) -> None:
        """Forget what was kept."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def kept_requests(served: ExpertStats) -> dict[str, np.ndarray]:
    """What is kept of an expert store's counters: requests, and those that a fallback copy answered."""
    return {"requests": np.array([served.cache.requests, served.fallback_hits])}


def restored_requests(kept: Mapping[str, np.ndarray]) -> ExpertStats:
    """Counters with what `kept_requests` kept."""
    requests, fallback_hits = (int(count) for count in kept["requests"])
    return ExpertStats(cache=CacheStats(hits=requests - fallback_hits, misses=fallback_hits), fallback_hits=fallback_hits)
