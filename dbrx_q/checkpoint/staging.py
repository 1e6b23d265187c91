"""A folder that appears under its final name only when it is complete.

A run builds it in `NAME.partial` beside the destination and holds a lock on a marker file in there, so that two runs never share it. A
folder of that name without a marker belongs to another program and is left alone. A run that can be resumed writes its progress into the
marker.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dbrx_q.errors import RequestError

__all__ = ["MARKER_NAME", "check_destination", "partial_of", "staged_folder"]

MARKER_NAME = ".dbrx_q-unfinished"
_RESERVE_BYTES = 16 << 20  # small files beside the weights


@contextmanager
def staged_folder(
    destination: Path, needed: int, *, resume: bool | None = None, keep: Callable[[BaseException], bool] = lambda error: False
) -> Iterator[Path]:
    """Yields the folder to write into; it becomes `destination` when the block ends, and is removed when the block fails.

    Args:
        destination: a folder that does not exist or is empty.
        needed: bytes that will be written.
        resume: True continues an earlier run whose marker records progress; False refuses to discard that progress; None discards it, for
            work that cannot be resumed.
        keep: called with the error of a failed block; returns whether the folder stays for a later run. A folder that was resumed always
            stays.

    Raises:
        RequestError: the destination is not empty, cannot be written, has too little room, or is being written by another run; or an
            earlier run's progress is stored there and `resume` is False.
    """
    check_destination(destination)
    target = Path(os.path.realpath(destination))
    partial = partial_of(destination)
    absent = [folder for folder in partial.parents if not folder.exists()]
    marker, resumed = -1, False
    try:
        marker, resumed = _claim(partial, resume)
        free = shutil.disk_usage(partial).free + _size_of(partial)
        if free < needed + _RESERVE_BYTES:
            raise RequestError(
                f"{partial.parent}: the result takes {needed:,} bytes and the disk has {free:,} free. Make room or choose another"
            )
        yield partial
        _move_into_place(partial, target)
        os.unlink(target / MARKER_NAME)
    except BaseException as error:
        kept = marker >= 0 and (resumed or keep(error))
        if not kept:
            _discard(partial if marker >= 0 else None, absent)
        if not isinstance(error, OSError) or (error.filename and not str(error.filename).startswith(str(partial))):
            raise
        reason = error.strerror or str(error)
        rest = f"What is finished is kept in {partial}: fix that and continue with --resume" if kept else "Nothing was left behind"
        raise RequestError(f"{destination}: the destination must be writable; {reason}. {rest}") from None
    finally:
        if marker >= 0:
            os.close(marker)


def partial_of(destination: Path) -> Path:
    """The folder in which `destination` is built."""
    target = Path(os.path.realpath(destination))
    return target.with_name(target.name + ".partial")


def check_destination(destination: Path) -> None:
    """Refuse a destination that holds files.

    Raises:
        RequestError: it is a file, or a folder that is not empty.
    """
    if destination.exists() and not destination.is_dir():
        raise RequestError(f"{destination}: the destination must be a folder; found a file. Give another name")
    if destination.is_dir() and any(destination.iterdir()):
        raise RequestError(f"{destination}: the destination must be empty or not exist; it holds files. Give another name or remove it")


def _claim(partial: Path, resume: bool | None) -> tuple[int, bool]:
    """Take possession of the folder; (the open and locked marker, whether the folder holds an earlier run's progress)."""
    busy = RequestError(f"{partial}: another run is writing here. Wait for it or give another name")
    empty = partial.is_dir() and not any(partial.iterdir())  # left by a run that ended before it wrote the marker
    if partial.exists() and not empty:
        if not (partial / MARKER_NAME).is_file():
            raise RequestError(
                f"{partial}: the result is built in this folder, but it was made by something else. Move it away or give another name"
            )
        old_marker = os.open(partial / MARKER_NAME, os.O_RDWR)
        try:
            fcntl.flock(old_marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if resume is not None and os.fstat(old_marker).st_size:
                if resume:
                    return os.dup(old_marker), True  # the copy keeps the lock
                raise RequestError(f"{partial}: this folder holds an unfinished run. Continue it with --resume, or remove it")
            shutil.rmtree(partial)  # left by a run that was killed
        except BlockingIOError:
            raise busy from None
        finally:
            os.close(old_marker)
    partial.mkdir(parents=True, exist_ok=empty)
    try:
        marker = os.open(partial / MARKER_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise busy from None
    fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return marker, False


def _size_of(folder: Path) -> int:
    """Bytes on the disk of the files below a folder."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _move_into_place(partial: Path, target: Path) -> None:
    os.rename(partial, target)  # replaces an empty folder; fails if files were put there meanwhile
    with suppress(OSError):  # the result is complete, whether or not this file system can sync a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _discard(partial: Path | None, absent: Sequence[Path]) -> None:
    """Remove the unfinished folder and the parents that were created for it; Ctrl-C is ignored meanwhile."""
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
