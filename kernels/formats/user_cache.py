"""The folder in which dbrx_q keeps results of this machine, such as tuned tiles, measured bandwidths and hashes of files."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from .cache_folders import can_write, home, temporary_cache, warn_once

__all__ = ["user_cache", "write_to_cache"]

_CURE = "Set XDG_CACHE_HOME to a folder that you may write to"
_ABANDONED_SECONDS = 3600.0


def user_cache(*, note: bool = True) -> Path:
    """The user's cache folder of this package, in $XDG_CACHE_HOME or ~/.cache; it need not exist.

    Where it cannot be written, it is a folder for temporary files of this user; `note` warns of that, once.
    """
    named, of_user = os.environ.get("XDG_CACHE_HOME"), home()
    base = Path(named) if named else of_user / ".cache" if of_user is not None else None
    if base is not None and can_write(base / "dbrx_q"):
        return base / "dbrx_q"
    temporary = temporary_cache()
    wanted = base or "the .cache of a home folder"
    if temporary is None and note:
        warn_once(f"{wanted} cannot be written: measurements and hashes of files are not kept. {_CURE}")
    if temporary is None:
        return (base or Path(os.sep)) / "dbrx_q"
    if note:
        warn_once(f"{wanted} cannot be written: measurements and hashes of files are kept in {temporary}, as long as that lasts. {_CURE}")
    return temporary


def write_to_cache(path: Path, data: bytes) -> bool:
    """Write a file of the cache, whole or not at all; whether it could be written. What killed processes left in its folder is removed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("*.partial") if path.is_relative_to(user_cache()) else ():
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink(missing_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return True
