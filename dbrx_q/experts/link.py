"""Copies from host memory to a GPU, on a thread and a CUDA stream of their own, so that they overlap computation.

A `Link` orders copies by need. Its CUDA version sends through a ring of pinned buffers; the version on host memory is for tests.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from dbrx_q.errors import DbrxError
from dbrx_q.planning.offloading import LINK_BUFFER_BYTES, LINK_BUFFERS

__all__ = ["Link", "PendingCopy", "make_link"]

_URGENT, _EARLY, _DEFERRED = range(3)  # a layer waits for it; the next layer may need it; it was predicted and not needed


class PendingCopy:
    """A copy that was started.

    Attributes:
        nbytes: bytes to copy.
        sent: about how many of them were sent.
        rank: (urgency, number): of waiting copies, the one of the lowest rank is sent next.
        cancelled: whether it is no longer wanted.
    """

    def __init__(self, nbytes: int, rank: tuple[int, int] = (_URGENT, 0)) -> None:
        self.nbytes, self.rank = nbytes, rank
        self.sent = 0
        self.cancelled = False
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._event: torch.cuda.Event | None = None

    def finish(self, event: torch.cuda.Event | None, error: BaseException | None) -> None:
        """Called by the link when all bytes were sent; a GPU passes `event` when they have arrived."""
        self._event, self._error = event, error
        self._done.set()

    @property
    def urgent(self) -> bool:
        """Whether a layer waits for it."""
        return self.rank[0] == _URGENT

    @property
    def done(self) -> bool:
        """Whether the source is no longer read."""
        return self._done.is_set()

    def join(self) -> None:
        """Return when the source is no longer read, whether the copy succeeded or not."""
        self._done.wait()

    def wait(self) -> None:
        """Make the bytes visible to all work that the current GPU starts from now on.

        The calling thread waits until the bytes are sent, not until they have arrived.

        Raises:
            DbrxError: the link was closed, or the copy cancelled.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


@dataclass(frozen=True, eq=False)  # compared by identity: comparing tensors gives no single bool
class _Job:
    """What the link's thread is to copy."""

    sources: Sequence[torch.Tensor]
    """In host memory."""
    targets: Sequence[torch.Tensor]
    """Their counterparts on the GPU."""
    after: torch.cuda.Event | None
    """The GPU must have passed it before a target is written."""
    pending: PendingCopy
    """The state of the copy."""


class Link(ABC):
    """Copies experts to one GPU, one after the other.

    Copies that a layer waits for come first, then those that the next layer may need, then those that were predicted and not needed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._numbers = itertools.count()
        self._closed = False
        self._current: PendingCopy | None = None
        self._bytes, self._busy_seconds = 0, 0.0
        self._thread = threading.Thread(target=self._work, name="expert-link", daemon=True)
        self._thread.start()

    @property
    def bytes_copied(self) -> int:
        """Bytes copied so far."""
        with self._changed:
            return self._bytes

    @property
    def busy_seconds(self) -> float:
        """Seconds in which the thread was copying."""
        with self._changed:
            return self._busy_seconds

    def bytes_before(self, expected: Collection[PendingCopy]) -> int:
        """Unsent bytes of the copy in progress, which precede all `expected` copies; 0 if it is one of them."""
        current = self._current
        return 0 if current is None or current.cancelled or current in expected else current.nbytes - current.sent

    def copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], *, after: torch.cuda.Event | None = None, urgent: bool
    ) -> PendingCopy:
        """Start to copy tensors in host memory to their counterparts on the GPU, once the GPU has passed `after`."""
        pending = PendingCopy(sum(source.nbytes for source in sources), self._rank(_URGENT if urgent else _EARLY))
        with self._changed:
            if self._closed:
                pending.finish(None, _closed())
            else:
                self._jobs.append(_Job(sources, targets, after, pending))
                self._changed.notify_all()
        return pending

    @abstractmethod
    def follow(self) -> None:
        """Send what is copied from now on after all work that the GPU's current stream has been given.

        For memory that was just allocated: that stream may still use it for an earlier owner, as torch's allocator knows of no other.
        """

    def prioritize(self, pending: PendingCopy) -> None:
        """A layer waits for this copy now: it is sent after those that are urgent already."""
        if pending.rank[0] != _URGENT:
            pending.rank = self._rank(_URGENT)

    def defer(self, pending: PendingCopy) -> None:
        """This copy is not needed now: it is sent after all others."""
        if pending.rank[0] != _DEFERRED:
            pending.rank = self._rank(_DEFERRED)

    def cancel(self, pending: PendingCopy) -> None:
        """This copy is no longer wanted: it fails unless all of it was sent. Its source may be read until the copy is done."""
        pending.cancelled = True
        pending.rank = self._rank(_URGENT)  # ending it takes no time

    def drain(self) -> None:
        """Return when no copy is waiting or in progress."""
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._current or self._jobs))

    def close(self) -> None:
        """End the thread; copies that were not started fail."""
        with self._changed:
            self._closed = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in waiting:
            job.pending.finish(None, _closed())
        self._thread.join()

    @abstractmethod
    def _send(self, job: _Job) -> torch.cuda.Event | None:
        """Copy, unless the copy is cancelled meanwhile; returns the event after it, or None if the bytes have arrived already."""

    def _rank(self, kind: int) -> tuple[int, int]:
        return kind, next(self._numbers)

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Wait for a copy and make it. A function of its own, so that a waiting thread has no reference to any tensor."""
        with self._changed:
            while not (self._closed or self._jobs):
                self._changed.wait()
            if self._closed:
                return False
            job = min(self._jobs, key=lambda job: job.pending.rank)
            self._jobs.remove(job)
            self._current = job.pending
        started = time.perf_counter()
        event: torch.cuda.Event | None = None
        error: BaseException | None = None
        try:
            event = None if job.pending.cancelled else self._send(job)
        except BaseException as problem:  # reported to the waiting layer; the thread keeps running
            error = problem
        if job.pending.cancelled:
            error = error or DbrxError("the copy was cancelled")
        with self._changed:
            self._busy_seconds += time.perf_counter() - started
            self._bytes += job.pending.nbytes if error is None else job.pending.sent
            job.pending.finish(event, error)
            self._current = None
            self._changed.notify_all()
        return True


class _HostLink(Link):
    """To a GPU that is a part of host memory: the tests of several GPUs run on it."""

    def follow(self) -> None:
        pass  # host memory has no streams

    def _send(self, job: _Job) -> None:
        for source, target in zip(job.sources, job.targets, strict=True):
            if job.pending.cancelled:
                return
            target.copy_(source)
            job.pending.sent += source.nbytes


class _StagingRing:
    """Pinned buffers that one thread fills and sends in turn."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(LINK_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(LINK_BUFFERS)]
        # A thread that waits for a blocking event sleeps; by default it would keep a core from the experts that the CPU computes.
        self._sent = [torch.cuda.Event(blocking=True) for _ in self._buffers]
        self._next = 0

    def send(self, stream: torch.cuda.Stream, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], pending: PendingCopy) -> None:
        """Copy pieces of host memory to their counterparts on the GPU, through the buffers."""
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            for piece, target in pieces:
                if pending.cancelled:
                    return
                buffer, sent = self._buffers[self._next], self._sent[self._next]
                self._next = (self._next + 1) % LINK_BUFFERS
                sent.synchronize()  # only this thread waits, until the previous contents were sent
                ctypes.memmove(buffer.data_ptr(), piece.data_ptr(), piece.nbytes)  # torch's copy would start more threads
                target.copy_(buffer[: piece.nbytes], non_blocking=True)
                sent.record(stream)
                pending.sent += piece.nbytes


class _CudaLink(Link):
    """To a CUDA device, through pinned buffers. Pinning the slots themselves would fail where they are a large part of host memory."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._rings = [_StagingRing() for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, "expert-staging")
        super().__init__()

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        super().close()
        self._pool.shutdown()
        self._stream.synchronize()  # copies in progress write to slots that are freed afterwards

    def _send(self, job: _Job) -> torch.cuda.Event:
        if job.after is not None:
            self._stream.wait_event(job.after)
        pieces = [
            piece
            for source, target in zip(job.sources, job.targets, strict=True)
            for piece in zip(_bytes_of(source).split(LINK_BUFFER_BYTES), _bytes_of(target).split(LINK_BUFFER_BYTES), strict=True)
        ]
        shares = [
            self._pool.submit(ring.send, self._stream, pieces[i :: len(self._rings)], job.pending) for i, ring in enumerate(self._rings)
        ]
        errors = [error for share in shares if (error := share.exception()) is not None]  # waits for all
        if errors:
            raise errors[0]
        with torch.cuda.device(self._device):
            event = torch.cuda.Event()
            event.record(self._stream)
        return event


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def make_link(device: torch.device, threads: int = 2) -> Link:
    """A link to a device, with so many threads that fill pinned buffers where it is a GPU."""
    return _CudaLink(device, threads) if device.type == "cuda" else _HostLink()


def _closed() -> DbrxError:
    return DbrxError("the expert store was closed; load the model again")
