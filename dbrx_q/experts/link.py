"""The way from host memory to a card: one thread and, on a GPU, one stream of its own, so that copies overlap what is computed."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import DbrxError

__all__ = ["PINNED_BYTES", "Arrival", "Link", "make_link"]

_RING_BUFFERS = 4
# Of one pinned buffer. What stays in the last-level cache is filled faster, and takes no bandwidth of the memory that the CPU reads
# experts from: one core fills 4 of 16 MiB at 8.7 to 9.7 GB/s, of 4 MiB at 9.5 to 14.9, of 2 MiB at 12.5 to 15.9 (EPYC, 32 MiB of cache).
_RING_BYTES = 2 << 20

PINNED_BYTES = _RING_BUFFERS * _RING_BYTES
"""Host memory that the link of a GPU keeps."""


class Arrival:
    """A copy on its way.

    Attributes:
        nbytes: that travel.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._event: torch.cuda.Event | None = None

    def finish(self, event: torch.cuda.Event | None, error: BaseException | None) -> None:
        """The link has sent all of it; `event` tells on a GPU when it is there."""
        self._event, self._error = event, error
        self._done.set()

    @property
    def done(self) -> bool:
        """Whether the source is read no more."""
        return self._done.is_set()

    def settle(self) -> None:
        """Return when the source is read no more."""
        self._done.wait()

    def wait(self) -> None:
        """Let what is computed on the card from now on see the bytes; the host waits until they are sent, not until a GPU has them.

        Raises:
            DbrxError: the link was closed.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


@dataclass(frozen=True, eq=False)  # each is itself: tensors do not compare to one answer
class _Job:
    sources: Sequence[torch.Tensor]
    targets: Sequence[torch.Tensor]
    after: torch.cuda.Event | None
    arrival: Arrival


class Link(ABC):
    """Copies experts to one card, one after the other: those that somebody waits for, then those that the next layer may need, then those
    that were foreseen and not needed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._urgent: deque[_Job] = deque()
        self._early: deque[_Job] = deque()
        self._deferred: deque[_Job] = deque()
        self._closed = self._sending = False
        self._bytes, self._busy_seconds = 0, 0.0
        self._thread = threading.Thread(target=self._work, name="expert-link", daemon=True)
        self._thread.start()

    @property
    def bytes_copied(self) -> int:
        """Bytes sent so far."""
        with self._changed:
            return self._bytes

    @property
    def busy_seconds(self) -> float:
        """Seconds in which the thread was sending."""
        with self._changed:
            return self._busy_seconds

    def copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], *, after: torch.cuda.Event | None = None, urgent: bool
    ) -> Arrival:
        """Begin to copy tensors of the host to their counterparts on the card, once the card has passed `after`."""
        arrival = Arrival(sum(source.nbytes for source in sources))
        with self._changed:
            if self._closed:
                arrival.finish(None, _closed())
            else:
                (self._urgent if urgent else self._early).append(_Job(sources, targets, after, arrival))
                self._changed.notify_all()
        return arrival

    def hurry(self, arrival: Arrival) -> None:
        """Somebody waits for it now."""
        with self._changed:
            if (job := self._take_back(arrival)) is not None:
                self._urgent.append(job)

    def defer(self, arrival: Arrival) -> None:
        """Nobody needed it yet; it comes behind all others."""
        with self._changed:
            if (job := self._take_back(arrival)) is not None:
                self._deferred.append(job)

    def abandon(self, arrival: Arrival) -> None:
        """Nobody wants it any more: return when nothing is read or sent for it, which fails if it did not begin."""
        with self._changed:
            job = self._take_back(arrival)
            if job is not None:
                arrival.finish(None, DbrxError("the copy was given up"))
                self._changed.notify_all()
        arrival.settle()

    def settle(self) -> None:
        """Return when nothing is on its way."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._sending or any(self._queues)))

    def close(self) -> None:
        """End the thread; copies that did not begin fail."""
        with self._changed:
            self._closed = True
            waiting = [job for queue in self._queues for job in queue]
            for queue in self._queues:
                queue.clear()
            self._changed.notify_all()
        for job in waiting:
            job.arrival.finish(None, _closed())
        self._thread.join()

    @abstractmethod
    def _send(self, job: _Job) -> torch.cuda.Event | None:
        """Copy; gives what tells when all is there, None where it is already."""

    @property
    def _queues(self) -> tuple[deque[_Job], ...]:
        """What has not begun, in the order in which it will."""
        return self._urgent, self._early, self._deferred

    def _take_back(self, arrival: Arrival) -> _Job | None:
        """Out of its queue, for whoever holds the lock; None where it has begun."""
        for queue in self._queues:
            for job in queue:
                if job.arrival is arrival:
                    queue.remove(job)
                    return job
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or any(self._queues)):
                    self._changed.wait()
                if self._closed:
                    return
                job = next(queue for queue in self._queues if queue).popleft()
                self._sending = True
            started = time.perf_counter()
            event, error = None, None
            try:
                event = self._send(job)
            except BaseException as problem:  # whoever waits must hear of it, and the thread must live on
                error = problem
            with self._changed:
                self._busy_seconds += time.perf_counter() - started
                self._bytes += job.arrival.nbytes if error is None else 0
                self._sending = False
                self._changed.notify_all()
            job.arrival.finish(event, error)


class _HostLink(Link):
    """To a card that is host memory: what the tests of several cards run on."""

    def _send(self, job: _Job) -> None:
        for source, target in zip(job.sources, job.targets, strict=True):
            target.copy_(source)


class _CudaLink(Link):
    """Through a ring of pinned buffers: host memory need not be pinned, which fails where much of it is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._ring = [torch.empty(_RING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_RING_BUFFERS)]
        self._sent = [torch.cuda.Event() for _ in self._ring]
        self._next = 0
        super().__init__()

    def close(self) -> None:
        super().close()
        self._stream.synchronize()  # what is on its way is written to slots that will be given back

    def _send(self, job: _Job) -> torch.cuda.Event:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if job.after is not None:
                self._stream.wait_event(job.after)
            for source, target in zip(job.sources, job.targets, strict=True):
                origin, goal = source.view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
                for piece, there in zip(origin.split(_RING_BYTES), goal.split(_RING_BYTES), strict=True):
                    self._send_piece(piece, there)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def _send_piece(self, piece: torch.Tensor, target: torch.Tensor) -> None:
        buffer, sent = self._ring[self._next][: piece.numel()], self._sent[self._next]
        self._next = (self._next + 1) % len(self._ring)
        sent.synchronize()  # this thread alone waits, until the buffer's last contents have left
        buffer.copy_(piece)
        target.copy_(buffer, non_blocking=True)
        sent.record(self._stream)


def make_link(device: torch.device) -> Link:
    """The way to a device."""
    return _CudaLink(device) if device.type == "cuda" else _HostLink()


def _closed() -> DbrxError:
    return DbrxError("the expert store was closed; load the model again")
