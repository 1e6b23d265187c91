"""A folder that appears under its final name only when it is complete.

It is built in `NAME.partial` beside it. A marker file in there is locked as long as somebody works on it, so that two runs never
share one, and a folder of that name that holds no marker is somebody else's and is left alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import RequestError

__all__ = ["MARKER_NAME", "check_destination", "staged_folder"]

MARKER_NAME = ".dbrx_q-unfinished"
_RESERVE_BYTES = 16 << 20  # small files beside the weights


@contextmanager
def staged_folder(destination: Path, needed: int) -> Iterator[Path]:
    """Gives the folder to write into; it becomes `destination` when the block ends, and is removed when the block fails.

    Args:
        destination: a folder that does not exist or is empty.
        needed: bytes that will be written.

    Raises:
        RequestError: a destination that is not empty, cannot be written, has too little room, or is being written by another run.
    """
    check_destination(destination)
    target = Path(os.path.realpath(destination))
    partial = target.with_name(target.name + ".partial")
    absent = [folder for folder in partial.parents if not folder.exists()]
    marker = -1
    try:
        marker = _claim(partial)
        free = shutil.disk_usage(partial).free
        if free < needed + _RESERVE_BYTES:
            where = partial.parent
            raise RequestError(f"{where}: the result takes {needed:,} bytes and the disk has {free:,} free. Make room or choose another")
        yield partial
        os.unlink(partial / MARKER_NAME)
        _move_into_place(partial, target)
    except BaseException as error:
        _discard(partial if marker >= 0 else None, absent)
        if not isinstance(error, OSError) or (error.filename and not str(error.filename).startswith(str(partial))):
            raise
        reason = error.strerror or str(error)
        raise RequestError(f"{destination}: the destination must be writable; {reason}. Nothing was left behind") from None
    finally:
        if marker >= 0:
            os.close(marker)


def check_destination(destination: Path) -> None:
    """Refuse a destination that holds something.

    Raises:
        RequestError: it is a file or a folder that is not empty.
    """
    if destination.exists() and not destination.is_dir():
        raise RequestError(f"{destination}: the destination must be a folder; found a file. Give another name")
    if destination.is_dir() and any(destination.iterdir()):
        raise RequestError(f"{destination}: the destination must be empty or not exist; it holds files. Give another name or remove it")


def _claim(partial: Path) -> int:
    """Make the folder ours; the open and locked marker."""
    if partial.exists():
        if not (partial / MARKER_NAME).is_file():
            raise RequestError(
                f"{partial}: the result is built here, but this was made by something else. Move it away or give another name"
            )
        left = os.open(partial / MARKER_NAME, os.O_RDWR)
        try:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial)  # left by a run that was killed
        except BlockingIOError:
            raise RequestError(f"{partial}: another run is writing here. Wait for it or give another name") from None
        finally:
            os.close(left)
    partial.mkdir(parents=True)
    marker = os.open(partial / MARKER_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return marker


def _move_into_place(partial: Path, target: Path) -> None:
    os.rename(partial, target)  # takes the place of an empty folder; fails if something was put there meanwhile
    with suppress(OSError):  # the result is complete, whether or not this file system can sync a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _discard(partial: Path | None, absent: Sequence[Path]) -> None:
    """Remove what was begun and the folders that were made for it; a further Ctrl-C waits until that is done."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in absent:
            with suppress(OSError):
                folder.rmdir()
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
