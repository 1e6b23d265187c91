"""Threads that read experts from disk into slots."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dbrx_q.checkpoint.folder import check_finite
from dbrx_q.checkpoint.layout import expert_name
from dbrx_q.errors import CheckpointError
from dbrx_q.planning.host_memory import available_bytes
from dbrx_q.planning.offloading import READ_ALIGNMENT, READ_BYTES, READ_THREADS

from .files import ExpertFiles
from .slots import ExpertSlots

__all__ = ["ExpertReader", "Load", "reads_faster_directly", "supports_direct"]

_MEASURED_EXPERTS = 8  # of some 100 MB each
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class Load:
    """The load of one expert into a slot.

    Args:
        pieces: number of reads that it takes.
        begin: called before the first read; returns the tensors that are read into.
        finish: called with these tensors after the last read.
    """

    def __init__(self, pieces: int, begin: Callable[[], list[torch.Tensor]], finish: Callable[[list[torch.Tensor]], None]) -> None:
        self._left, self._begin, self._finish = pieces, begin, finish
        self._stored: list[torch.Tensor] | None = None
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self._done.is_set()

    def wait(self) -> None:
        """Return when the expert is in its slot.

        Raises:
            CheckpointError: it could not be read, or what was read is damaged.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Return when the slot is no longer written, whether the load succeeded or not."""
        self._done.wait()

    def views(self) -> list[np.ndarray]:
        """The bytes of every stored part of the expert, to be written."""
        with self._lock:
            if self._stored is None:
                self._stored = self._begin()
            return [_bytes_of(piece) for piece in self._stored]

    def piece_done(self, error: BaseException | None) -> None:
        """Called by a thread that has finished a read, with its error if it failed."""
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            last = self._left == 0
        if last:
            try:
                if self._error is None and self._stored is not None:
                    self._finish(self._stored)
            except BaseException as problem:  # reported to the waiting layer
                self._error = problem
            self._stored = None
            self._done.set()

    @property
    def failed(self) -> bool:
        """Whether a read failed, so that the others need not be made."""
        return self._error is not None


@dataclass(frozen=True)
class _ReadPiece:
    """One read: a range of a file, and its place in the stored parts of an expert."""

    load: Load
    """The load that it belongs to."""
    path: Path
    """The file."""
    offset: int
    """The first byte in the file."""
    nbytes: int
    """How many bytes are read."""
    parts: slice
    """The stored parts of the expert that are contiguous in the file."""
    first: int
    """The first byte, counted from the beginning of `parts`."""


class ExpertReader:
    """Reads experts with a few threads, those that a layer waits for first.

    Args:
        files: where each expert is stored.
        direct: whether to bypass the page cache (O_DIRECT), which then keeps no second copy of the experts in slots.
        threads: how many threads read.

    Raises:
        CheckpointError: a file cannot be opened.
    """

    def __init__(self, files: ExpertFiles, *, direct: bool = False, threads: int = READ_THREADS) -> None:
        self._files, self.direct = files, direct
        self._fds: dict[Path, int] = {}
        self._urgent: deque[_ReadPiece] = deque()
        self._early: deque[_ReadPiece] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._checked: set[tuple[int, int]] = set()
        self._busy, self._busy_since, self._busy_seconds, self._bytes = 0, 0.0, 0.0, 0
        try:
            for path in files.paths:
                self._fds[path] = os.open(path, os.O_RDONLY | (_O_DIRECT if direct else 0))
        except OSError as error:
            self._close_files()
            raise CheckpointError(f"{error.filename}: shard must be readable; {error.strerror}") from None
        self._threads = [threading.Thread(target=self._work, name=f"expert-reader-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        with self._changed:
            return self._bytes

    @property
    def busy_seconds(self) -> float:
        """Seconds in which at least one thread read."""
        with self._changed:
            return self._busy_seconds + (time.perf_counter() - self._busy_since if self._busy else 0.0)

    def load(self, layer: int, expert: int, slots: ExpertSlots, slot: int, *, urgent: bool) -> Load:
        """Start to read an expert into a slot, which no other thread may read or write until the load is done."""
        kind, extents = self._files.kinds[layer], self._files.extents(layer, expert)

        def begin() -> list[torch.Tensor]:
            return slots.views(slot) if kind.as_stored else [torch.empty(part.shape, dtype=part.dtype) for part in kind.stored]

        def finish(stored: list[torch.Tensor]) -> None:
            if (layer, expert) not in self._checked:
                for part, piece in zip(kind.stored, stored, strict=True):
                    name = expert_name(layer, part.matrix, expert, part.name)
                    check_finite(piece, name, extents[0].path)
                self._checked.add((layer, expert))
            if not kind.as_stored:
                slots.put(slot, stored)

        ranges, first_part = [], 0
        for extent in extents:
            parts = slice(first_part, first_part + extent.parts)
            first_part = parts.stop
            ranges += [(extent, parts, start) for start in range(0, extent.nbytes, READ_BYTES)]
        load = Load(len(ranges), begin, finish)
        pieces = [
            _ReadPiece(load, extent.path, extent.offset + start, min(READ_BYTES, extent.nbytes - start), parts, start)
            for extent, parts, start in ranges
        ]
        with self._changed:
            closed = self._closed
            if not closed:
                queue = self._urgent if urgent else self._early
                queue.extend(pieces)
                self._changed.notify_all()
        for _ in pieces if closed else ():
            load.piece_done(_CancelledError())
        return load

    def prioritize(self, load: Load) -> None:
        """A layer waits for this load now."""
        with self._changed:
            moved = [piece for piece in self._early if piece.load is load]
            if moved:
                self._early = deque(piece for piece in self._early if piece.load is not load)
                self._urgent.extend(moved)
                self._changed.notify_all()

    def cancel(self, load: Load) -> None:
        """This load is no longer needed: reads that were not started are not made."""
        with self._changed:
            for name in ("_early", "_urgent"):
                queue: deque[_ReadPiece] = getattr(self, name)
                dropped = [piece for piece in queue if piece.load is load]
                if dropped:
                    setattr(self, name, deque(piece for piece in queue if piece.load is not load))
                    for _ in dropped:
                        load.piece_done(_CancelledError())

    def close(self) -> None:
        """End the threads and close the files; loads that were not started fail."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            waiting = [*self._urgent, *self._early]
            self._urgent.clear()
            self._early.clear()
            self._changed.notify_all()
        for piece in waiting:
            piece.load.piece_done(_CancelledError())
        for thread in self._threads:
            thread.join()
        self._close_files()

    def _close_files(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def _work(self) -> None:
        buffer = np.frombuffer(mmap.mmap(-1, READ_BYTES + 2 * READ_ALIGNMENT), np.uint8) if self.direct else None
        while self._work_once(buffer):
            pass

    def _work_once(self, buffer: np.ndarray | None) -> bool:
        """Wait for a piece and read it. A function of its own, so that a waiting thread has no reference to any slot."""
        with self._changed:
            while not (self._urgent or self._early or self._closed):
                self._changed.wait()
            if self._closed:
                return False
            piece = (self._urgent or self._early).popleft()
            if not self._busy:
                self._busy_since = time.perf_counter()
            self._busy += 1
        error: BaseException | None = None
        try:
            if not piece.load.failed:
                self._read(piece, buffer)
        except BaseException as problem:  # reported to the waiting layer; the thread keeps running
            error = problem
        with self._changed:
            self._busy -= 1
            if not self._busy:
                self._busy_seconds += time.perf_counter() - self._busy_since
            self._bytes += piece.nbytes if error is None else 0
        piece.load.piece_done(error)
        return True

    def _read(self, piece: _ReadPiece, buffer: np.ndarray | None) -> None:
        targets = _byte_range(piece.load.views()[piece.parts], piece.first, piece.nbytes)
        if buffer is None:
            _read_fully(self._fds[piece.path], targets, piece.offset, piece.nbytes, piece.path)
            return
        first = piece.offset // READ_ALIGNMENT * READ_ALIGNMENT
        end = -(-(piece.offset + piece.nbytes) // READ_ALIGNMENT) * READ_ALIGNMENT
        _read_fully(self._fds[piece.path], [buffer[: end - first]], first, piece.offset + piece.nbytes - first, piece.path)
        position = piece.offset - first
        for target in targets:
            target[:] = buffer[position : position + target.nbytes]
            position += target.nbytes


class _CancelledError(CheckpointError):
    """A load was cancelled; only a closed store shows this message to a user."""

    def __init__(self) -> None:
        super().__init__("the expert store was closed; load the model again")


def reads_faster_directly(files: ExpertFiles, *, uncached_bytes: int) -> bool:
    """Whether experts should be read past the page cache.

    If free memory can hold all experts that are read repeatedly, the page cache is one more tier, and is used. Otherwise it would hold few
    of them, and the faster of the two ways is chosen, measured on experts that are not in the page cache.

    Args:
        files: where each expert is stored.
        uncached_bytes: of experts that have no slot.
    """
    if not supports_direct(files.paths[0]) or available_bytes() >= uncached_bytes:
        return False
    return _seconds_of(files, direct=True) < _seconds_of(files, direct=False)


def _seconds_of(files: ExpertFiles, *, direct: bool) -> float:
    """Seconds to read a few experts that are not in the page cache, with as many threads as a store has."""
    expert_ids = [(layer, e) for layer in range(len(files.kinds)) for e in range(files.n_experts)]
    step = max(1, len(expert_ids) // _MEASURED_EXPERTS)
    chosen = expert_ids[int(direct) :: 2 * step][:_MEASURED_EXPERTS]
    if hasattr(os, "posix_fadvise"):
        for expert_id in chosen:
            for extent in files.extents(*expert_id):
                with open(extent.path, "rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)
    reader = ExpertReader(files, direct=direct)
    try:
        kind = files.kinds[chosen[0][0]]
        slots = ExpertSlots(kind, 1, torch.device("cpu"))
        started = time.perf_counter()
        for expert_id in (expert_id for expert_id in chosen if files.kinds[expert_id[0]] == kind):
            reader.load(*expert_id, slots, 0, urgent=True).wait()
        return time.perf_counter() - started
    finally:
        reader.close()


def supports_direct(path: Path) -> bool:
    """Whether the file can be read past the page cache (O_DIRECT)."""
    if not _O_DIRECT:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | _O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, READ_ALIGNMENT) as page:
            os.preadv(fd, [page], 0)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _read_fully(fd: int, views: Sequence[np.ndarray], offset: int, wanted: int, path: Path) -> None:
    """Read at least `wanted` bytes, from `offset` on, into the views, one view after the other."""
    n_read, capacity = 0, sum(view.nbytes for view in views)
    while n_read < wanted:
        try:
            n = os.preadv(fd, [view.data for view in _byte_range(views, n_read, capacity - n_read)], offset + n_read)
        except OSError as error:
            # With O_DIRECT, a read cannot continue from the end of the file if that is not aligned.
            n, problem = (0, "") if error.errno == errno.EINVAL and n_read else (-1, error.strerror)
            if n < 0:
                raise CheckpointError(
                    f"{path}: read failed at byte {offset + n_read}; {problem}. Check the disk, or fetch the file again"
                ) from None
        if n == 0:
            raise CheckpointError(
                f"{path}: the file became shorter while it was read; byte {offset + n_read} is gone. Fetch or quantize it again"
            )
        n_read += n


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


def _byte_range(views: Sequence[np.ndarray], first: int, length: int) -> list[np.ndarray]:
    """Bytes first .. first + length - 1 of the views, counted through all of them."""
    selected, position = [], 0
    for view in views:
        low, high = max(first - position, 0), min(first + length - position, view.nbytes)
        if low < high:
            selected.append(view[low:high])
        position += view.nbytes
    return selected
