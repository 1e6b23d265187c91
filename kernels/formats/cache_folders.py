"""Folders for compiled kernels and other results of this machine where the usual ones cannot be written, as in containers.

The usual folders are in the home folder. A user without one, or with one that is read-only, gets a private folder for temporary files.
"""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from functools import cache
from pathlib import Path

__all__ = ["CacheWarning", "can_write", "home", "temporary_cache", "warn_once"]


class CacheWarning(UserWarning):
    """Results that are kept from one process to the next cannot be stored where they should be."""


def home() -> Path | None:
    """The user's home folder; None for a user without one, such as a container's user that the system does not know."""
    expanded = os.path.expanduser("~")
    return Path(expanded) if os.path.isabs(expanded) else None


def can_write(folder: Path) -> bool:
    """Whether files can be written in `folder`, once it is created if it does not exist."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return existing is not None and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


@cache
def temporary_cache() -> Path | None:
    """A folder of this user alone among the temporary files, which it is created in; None where it cannot be.

    Compiled kernels are code. A folder of that name that another user owns or may write to is therefore not used.
    """
    folder = Path(tempfile.gettempdir()) / f"dbrx_q-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and can_write(folder) else None


@cache
def warn_once(message: str) -> None:
    """Warn with `message`, once in this process."""
    warnings.warn(message, CacheWarning, stacklevel=3)
