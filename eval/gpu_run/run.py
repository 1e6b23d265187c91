"""Runs the plan while the time lasts: each item in a process that may be killed, each result written when it comes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from multiprocessing.connection import wait
from tempfile import TemporaryDirectory
from typing import Any, cast

from dbrx_q.errors import RequestError
from dbrx_q.eval.bench.device_timing import Environment
from dbrx_q.eval.bench.tune import tuning_of
from dbrx_q.kernels.triton.launch import Chip
from dbrx_q.kernels.triton.tiles import Problem, Tiles
from dbrx_q.model.tuned_tiles import TileChoice, write_tuning

from .commands import memory_check, run_tests
from .journal import DONE, FAILED, Journal, Record
from .plan import CEILINGS, SOURCES, Item, plan
from .settings import DRY_CHIP, Settings, code_version
from .worker import ItemError, Worker

__all__ = ["TUNING_FILE", "Outcome", "check_minutes", "run"]

TUNING_FILE = "tuning.json"
"""Measured tiles, in the folder of a run; as `dbrx-q bench tune` writes them."""
_MARGIN = 4.0  # seconds before the deadline at which the last item has ended
_ATTEMPTS = 2
_DRY_PROCESSES = 2
_POISONED = ("CUDA error", "AcceleratorError", "illegal", "device-side", "unspecified launch")  # after which a process can use no GPU


@dataclass
class Outcome:
    """What one run did."""

    done: int = 0
    """Items that succeeded."""
    failed: list[str] = field(default_factory=list)
    """Items that failed, in this run."""
    skipped: int = 0
    """Items that earlier runs had finished."""
    given_up: list[str] = field(default_factory=list)
    """Items that failed in so many earlier runs that this one did not try them."""
    not_reached: list[str] = field(default_factory=list)
    """Items for which the time did not suffice."""


def run(settings: Settings, seconds: float, *, report: Callable[[str], None] = lambda line: None) -> Outcome:
    """Do what the plan has and no earlier run has done, and stop before `seconds` are over.

    Args:
        settings: of the run.
        seconds: after which nothing may run any more.
        report: called with a line about each item.

    Raises:
        RequestError: the time is no time, or the folder has no place for results.
        DbrxError: there is no GPU.
    """
    check_minutes(seconds / 60)
    ends = time.monotonic() + seconds - _MARGIN
    journal = Journal(settings.folder)
    try:
        items = plan(settings)
        if ends - time.monotonic() < min(item.expected for item in items):
            return Outcome(not_reached=[item.key for item in items])
        with _Processes(settings) as processes:
            return _Run(settings, ends, journal, processes, report).items()
    finally:
        journal.close()


def check_minutes(minutes: float) -> None:
    """Refuse a time that is no time.

    Raises:
        RequestError: `minutes` is not above 0.
    """
    if not minutes > 0:
        raise RequestError(f"--minutes must be above 0; found {minutes:g}")


class _Processes:
    """The worker on the GPU and those that compile; all are killed at the end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._device: Worker | None = None
        self._compilers: list[Worker] = []

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (self._device, *self._compilers):
            if worker is not None:
                worker.kill()

    def device(self) -> Worker:
        """A process that is alive."""
        if self._device is None or not self._device.alive:
            self._device = Worker(self._settings)
        return self._device

    def drop_device(self) -> None:
        """End the process on the GPU; the next item gets a new one."""
        if self._device is not None:
            self._device.kill()
            self._device = None

    def compilers(self) -> list[Worker]:
        """As many processes as there are cores."""
        self._compilers = [worker for worker in self._compilers if worker.alive]
        count = _DRY_PROCESSES if self._settings.dry else len(os.sched_getaffinity(0))
        self._compilers += [Worker(self._settings, compiles=True) for _ in range(count - len(self._compilers))]
        return self._compilers

    def drop_compilers(self) -> None:
        """End them, which frees their memory."""
        for worker in self._compilers:
            worker.kill()
        self._compilers = []

    @contextmanager
    def work_folder(self) -> Iterator[str]:
        """For temporary files of an item; deleted also where its process is killed."""
        with TemporaryDirectory(prefix="dbrx_q-gpu-run-") as folder:
            try:
                yield folder
            except BaseException as error:
                if not isinstance(error, ItemError):
                    self.drop_device()  # it would go on writing
                raise


class _Run:
    """One pass over the plan."""

    def __init__(self, settings: Settings, ends: float, journal: Journal, processes: _Processes, report: Callable[[str], None]) -> None:
        self._settings, self._ends, self._journal, self._processes, self._report = settings, ends, journal, processes, report
        self._code = code_version()
        self._outcome = Outcome()
        self._reserved = 0.0
        hello: dict[str, Any] = {"device": "meta", "chip": asdict(DRY_CHIP)} if settings.dry else processes.device().hello
        self._device, self._chip = str(hello["device"]), dict(hello["chip"])

    def items(self) -> Outcome:
        """Start each item for which there is time."""
        items = plan(self._settings, Chip(**self._chip))
        if all(item.again or self._finished(item) for item in items):
            given_up = [item.key for item in items if not item.again and not self._succeeded(item)]
            return Outcome(skipped=len(items) - len(given_up), given_up=given_up)
        last = f"ceilings/{CEILINGS[1]}"
        for item in items:
            self._reserved = sum(other.expected for other in items if other.key == last) if item.key != last else 0.0
            if not item.again and self._succeeded(item):
                self._outcome.skipped += 1
            elif not item.again and self._finished(item):
                self._outcome.given_up.append(item.key)
            elif self._left() < item.expected or (item.stage == "tuned" and not self._choices()):
                self._outcome.not_reached.append(item.key)
            elif item.stage != "compile" or self._stages_to_compile(item, items):
                self._one(item, items)
        return self._outcome

    def _left(self) -> float:
        """Seconds for the next item; the ceilings at the end have theirs."""
        return self._ends - time.monotonic() - self._reserved

    def _mine(self, key: str) -> list[Record]:
        """Earlier results of an item, by this code on this GPU."""
        return [r for r in self._journal.records if r.item == key and (r.code, r.device) == (self._code, self._device)]

    def _finished(self, item: Item) -> bool:
        """Whether it succeeded, or failed so often that another attempt is of no use."""
        return self._succeeded(item) or len(self._mine(item.key)) >= _ATTEMPTS

    def _succeeded(self, item: Item) -> bool:
        return any(record.status == DONE for record in self._mine(item.key))

    def _one(self, item: Item, items: list[Item]) -> None:
        date, started = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
        limit = min(item.limit, self._left())
        try:
            status, value = DONE, self._value(item, items, limit)
            self._outcome.done += 1
            reasons = [str(reason) for reason in value.get("failed", {}).values()] if item.stage in ("rows", "tuned", "model") else []
        except ItemError as error:
            status, value = FAILED, {"error": str(error)} | error.value
            self._outcome.failed.append(item.key)
            reasons = [str(error)]
        if any(word in reason for word in _POISONED for reason in reasons):
            self._processes.drop_device()
        seconds = time.monotonic() - started
        self._journal.append(Record(item.key, status, self._code, self._device, date, round(seconds, 3), value))
        self._report(f"{seconds:7.1f} s  {item.key}" + ("" if status == DONE else f": {value['error'][:200]}"))
        if item.stage == "tuning" and status == DONE:
            self._write_tuning()

    def _value(self, item: Item, items: list[Item], limit: float) -> dict[str, Any]:
        if item.stage == "compile":
            return self._compile(self._stages_to_compile(item, items), limit, last=item.name == list(SOURCES)[-1])
        if item.stage == "tests":
            if not self._settings.dry:
                self._processes.drop_device()  # tests need its memory
            return run_tests(item.name, self._settings, limit)
        if item.stage == "memcheck" and not self._settings.dry:
            return memory_check(self._settings, limit)
        arguments = {"choices": self._choices()} if item.stage == "tuned" else {"seconds": limit / 2}
        with self._processes.work_folder() as folder:
            value: dict[str, Any] = self._processes.device().call(item.stage, item.name, arguments | {"folder": folder}, limit)
        return value

    def _stages_to_compile(self, item: Item, items: list[Item]) -> dict[str, list[str]]:
        """The names of items that are still to run, by the source that their launches are recorded from."""
        pending = {
            source: [other.name for other in items if other.stage == source and not self._finished(other)] for source in SOURCES[item.name]
        }
        return {source: names for source, names in pending.items() if names}

    def _compile(self, sources: dict[str, list[str]], limit: float, *, last: bool) -> dict[str, Any]:
        """Record the launches of each source and compile them, in as many processes as there are cores."""
        ends = time.monotonic() + limit
        workers = self._processes.compilers()
        waiting: deque[tuple[str, str, dict[str, Any]]] = deque(
            ("record", source, {"chip": self._chip, "names": names}) for source, names in sources.items()
        )
        kernels: dict[str, int] = {}
        failed: dict[str, str] = {}
        seen: set[str] = set()
        running: dict[Worker, tuple[str, str]] = {}
        compiled = 0
        while waiting or running:
            for worker in [worker for worker in workers if worker not in running and worker.alive][: len(waiting)]:
                _ = worker.hello
                what, name, arguments = waiting.popleft()
                worker.send(what, name, arguments)
                running[worker] = what, name
            left = ends - time.monotonic()
            if left <= 0 or not running:
                break
            for worker in cast("list[Worker]", wait(list[Any](running), left)):
                what, name = running.pop(worker)
                try:
                    value = worker.receive(1)
                except ItemError as error:
                    failed[name] = str(error)
                    continue
                if what == "compile":
                    compiled += 1
                    continue
                kernels[name] = len(value)
                new = [request for request in value if repr(request) not in seen]
                seen.update(map(repr, new))
                waiting.extend(("compile", f"{r.kernel} {r.constants} {r.options}", {"chip": self._chip, "request": r}) for r in new)
        for worker in running:  # too slow
            worker.kill()
        if last or self._settings.dry:
            self._processes.drop_compilers()
        result = {
            "kernels": kernels,
            "compiled": compiled,
            "left": len(waiting) + len(running),
            "failed": failed,
            "processes": len(workers),
        }
        if not compiled and (failed or waiting):
            raise ItemError(f"nothing was compiled: {next(iter(failed.values()), 'no time was left')}", result)
        return result

    def _choices(self) -> list[dict[str, Any]]:
        """Measured tiles of the items so far."""
        records = [r for r in self._journal.records if r.item.startswith("tuning/") and (r.code, r.device) == (self._code, self._device)]
        return [record.value["choice"] for record in records if record.status == DONE and record.value.get("choice") is not None]

    def _write_tuning(self) -> None:
        systems = [record for record in self._mine("system/versions") if record.status == DONE]
        if self._settings.dry or not systems:
            return
        measured_on = Environment(**{name: systems[-1].value[name] for name in Environment.__dataclass_fields__})
        choices = [
            TileChoice(**{**choice, "problem": Problem(**choice["problem"]), "tiles": Tiles(**choice["tiles"])})
            for choice in self._choices()
        ]
        write_tuning(tuning_of(measured_on, choices), self._settings.folder / TUNING_FILE)
