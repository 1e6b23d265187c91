"""The way from host memory to a gpu: one thread and, on a GPU, one stream of its own, so that copies overlap what is computed."""

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
from dbrx_q.planning.offloading import LINK_BUFFER_BYTES, LINK_BUFFERS, LINK_COPY_THREADS

__all__ = ["Arrival", "Link", "make_link"]


_URGENT, _EARLY, _DEFERRED = range(3)


class Arrival:
    """A copy on its way.

    Attributes:
        nbytes: that travel.
        sent: of them, about so many have left.
        rank: what comes first is the least.
        abandoned: nobody wants it any more.
    """

    def __init__(self, nbytes: int, rank: tuple[int, int] = (_URGENT, 0)) -> None:
        self.nbytes, self.rank = nbytes, rank
        self.sent = 0
        self.abandoned = False
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._event: torch.cuda.Event | None = None

    def finish(self, event: torch.cuda.Event | None, error: BaseException | None) -> None:
        """The link has sent all of it; `event` tells on a GPU when it is there."""
        self._event, self._error = event, error
        self._done.set()

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for it."""
        return self.rank[0] == _URGENT

    @property
    def done(self) -> bool:
        """Whether the source is read no more."""
        return self._done.is_set()

    def settle(self) -> None:
        """Return when the source is read no more."""
        self._done.wait()

    def wait(self) -> None:
        """Let what is computed on the GPU from now on see the bytes; the host waits until they are sent, not until a GPU has them.

        Raises:
            DbrxError: the link was closed, or the copy given up.
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
    """Copies experts to one GPU, one after the other: those that somebody waits for, then those that the next layer may need, then those
    that were predicted and not needed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._numbers = itertools.count()
        self._closed = False
        self._current: Arrival | None = None
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

    def left_of(self, expected: Collection[Arrival]) -> int:
        """Bytes that go before anything else, of a copy that is not among those that are expected."""
        current = self._current
        return 0 if current is None or current.abandoned or current in expected else current.nbytes - current.sent

    def copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], *, after: torch.cuda.Event | None = None, urgent: bool
    ) -> Arrival:
        """Begin to copy tensors of the host to their counterparts on the GPU, once the GPU has passed `after`."""
        arrival = Arrival(sum(source.nbytes for source in sources), self._rank(_URGENT if urgent else _EARLY))
        with self._changed:
            if self._closed:
                arrival.finish(None, _closed())
            else:
                self._jobs.append(_Job(sources, targets, after, arrival))
                self._changed.notify_all()
        return arrival

    def hurry(self, arrival: Arrival) -> None:
        """Somebody waits for it now: it comes behind those that somebody waits for already."""
        if arrival.rank[0] != _URGENT:
            arrival.rank = self._rank(_URGENT)

    def defer(self, arrival: Arrival) -> None:
        """Nobody needs it now; it comes behind all others."""
        if arrival.rank[0] != _DEFERRED:
            arrival.rank = self._rank(_DEFERRED)

    def abandon(self, arrival: Arrival) -> None:
        """Nobody wants it any more: it fails, if it has not all been sent; until then its source may still be read."""
        arrival.abandoned = True
        arrival.rank = self._rank(_URGENT)  # it takes no time

    def settle(self) -> None:
        """Return when nothing is on its way."""
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._current or self._jobs))

    def close(self) -> None:
        """End the thread; copies that did not begin fail."""
        with self._changed:
            self._closed = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in waiting:
            job.arrival.finish(None, _closed())
        self._thread.join()

    @abstractmethod
    def _send(self, job: _Job) -> torch.cuda.Event | None:
        """Copy, unless it is abandoned on the way; gives what tells when all is there, None where it is already."""

    def _rank(self, kind: int) -> tuple[int, int]:
        return kind, next(self._numbers)

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Wait for a copy and make it, in a frame that is left then: a thread that waits holds no memory."""
        with self._changed:
            while not (self._closed or self._jobs):
                self._changed.wait()
            if self._closed:
                return False
            job = min(self._jobs, key=lambda job: job.arrival.rank)
            self._jobs.remove(job)
            self._current = job.arrival
        started = time.perf_counter()
        event: torch.cuda.Event | None = None
        error: BaseException | None = None
        try:
            event = None if job.arrival.abandoned else self._send(job)
        except BaseException as problem:  # whoever waits must hear of it, and the thread must live on
            error = problem
        if job.arrival.abandoned:
            error = error or DbrxError("the copy was given up")
        with self._changed:
            self._busy_seconds += time.perf_counter() - started
            self._bytes += job.arrival.nbytes if error is None else job.arrival.sent
            job.arrival.finish(event, error)
            self._current = None
            self._changed.notify_all()
        return True


class _HostLink(Link):
    """To a GPU that is host memory: what the tests of several GPUs run on."""

    def _send(self, job: _Job) -> None:
        for source, target in zip(job.sources, job.targets, strict=True):
            if job.arrival.abandoned:
                return
            target.copy_(source)
            job.arrival.sent += source.nbytes


class _Filler:
    """Pinned buffers that one thread fills and sends, in turn."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(LINK_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(LINK_BUFFERS)]
        self._sent = [torch.cuda.Event() for _ in self._buffers]
        self._next = 0

    def send(self, stream: torch.cuda.Stream, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], arrival: Arrival) -> None:
        """Copy pieces of host memory to their counterparts, by way of the buffers."""
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            for piece, target in pieces:
                if arrival.abandoned:
                    return
                buffer, sent = self._buffers[self._next], self._sent[self._next]
                self._next = (self._next + 1) % LINK_BUFFERS
                sent.synchronize()  # this thread alone waits, until the buffer's last contents have left
                ctypes.memmove(buffer.data_ptr(), piece.data_ptr(), piece.nbytes)  # in this thread: torch's would bring threads of its own
                target.copy_(buffer[: piece.nbytes], non_blocking=True)
                sent.record(stream)
                arrival.sent += piece.nbytes


class _CudaLink(Link):
    """Through a ring of pinned buffers: host memory need not be pinned, which fails where much of it is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._fillers = [_Filler() for _ in range(LINK_COPY_THREADS)]
        self._pool = ThreadPoolExecutor(LINK_COPY_THREADS, "expert-filler")
        super().__init__()

    def close(self) -> None:
        super().close()
        self._pool.shutdown()
        self._stream.synchronize()  # what is on its way is written to slots that will be given back

    def _send(self, job: _Job) -> torch.cuda.Event:
        if job.after is not None:
            self._stream.wait_event(job.after)
        pieces = [
            piece
            for source, target in zip(job.sources, job.targets, strict=True)
            for piece in zip(_bytes_of(source).split(LINK_BUFFER_BYTES), _bytes_of(target).split(LINK_BUFFER_BYTES), strict=True)
        ]
        shares = [
            self._pool.submit(filler.send, self._stream, pieces[i::LINK_COPY_THREADS], job.arrival)
            for i, filler in enumerate(self._fillers)
        ]
        errors = [error for share in shares if (error := share.exception()) is not None]  # all have come to an end
        if errors:
            raise errors[0]
        with torch.cuda.device(self._device):
            event = torch.cuda.Event()
            event.record(self._stream)
        return event


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def make_link(device: torch.device) -> Link:
    """The way to a device."""
    return _CudaLink(device) if device.type == "cuda" else _HostLink()


def _closed() -> DbrxError:
    return DbrxError("the expert store was closed; load the model again")
