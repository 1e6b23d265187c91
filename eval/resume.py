"""Partial results of an interrupted run, saved so that the same command can resume it.

The file's name is a hash of everything that determines the results, so that only the same run is resumed.
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

from dbrx_q.experts.stats import CacheStats, ExpertStats
from dbrx_q.kernels.formats.user_cache import user_cache

__all__ = ["RunState", "restored_requests", "saved_requests"]


class RunState:
    """The file of one run's partial results, in the user's cache, named by a hash of `key`.

    Args:
        key: what determines the results: hashes of checkpoints and text, protocol, dtype, device, versions.
        folder: of the file; None for `eval` in the user's cache.
    """

    def __init__(self, key: Mapping[str, Any], folder: Path | None = None) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.path = (folder or user_cache() / "eval") / f"{digest[:32]}.npz"

    def load(self) -> dict[str, np.ndarray] | None:
        """The saved arrays, or None if there are none or the file cannot be read."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Replace the saved arrays by `arrays`; whether the file could be written."""
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type] # its annotation takes the first array for the flag allow_pickle
            os.replace(partial, self.path)
        except OSError:
            return False
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return True

    def clear(self) -> None:
        """Delete the file."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def saved_requests(stats: ExpertStats) -> dict[str, np.ndarray]:
    """An expert store's counters as arrays for `RunState.save`: all requests, and those that a fallback copy answered."""
    return {"requests": np.array([stats.cache.requests, stats.fallback_hits])}


def restored_requests(saved: Mapping[str, np.ndarray]) -> ExpertStats:
    """The counters that `saved_requests` put into `saved`."""
    requests, fallback_hits = (int(count) for count in saved["requests"])
    return ExpertStats(cache=CacheStats(hits=requests - fallback_hits, misses=fallback_hits), fallback_hits=fallback_hits)
