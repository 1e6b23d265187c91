"""The folder in which dbrx_q keeps results of this machine, such as tuned tiles and hashes of files."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path:
    """The user's cache folder of this package, in $XDG_CACHE_HOME or ~/.cache; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dbrx_q"
