"""A process that serves one item at a time, and that the run may kill: an illegal access ends all work of a CUDA process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from dbrx_q.errors import DbrxError
from dbrx_q.eval.parent_process import end_with_parent

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["ItemError", "Worker"]

_CONTEXT = get_context("spawn")
_START_SECONDS = 120  # until a process has imported torch and found its GPU


class ItemError(DbrxError):
    """An item that failed, or whose process died or was killed.

    Args:
        message: the reason.
        value: what the item found out nevertheless.
    """

    def __init__(self, message: str, value: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.value = dict(value or {})


class Worker:
    """A process for items of a run.

    Args:
        settings: of the run.
        compiles: whether it compiles kernels and uses no GPU.
    """

    def __init__(self, settings: Settings, *, compiles: bool = False) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, settings, compiles), daemon=True)
        self._process.start()
        theirs.close()
        self._hello: dict[str, Any] | None = None

    @property
    def hello(self) -> dict[str, Any]:
        """Name of the GPU and its chip, as the process found them; empty for one that compiles.

        Raises:
            ItemError: it could not start.
        """
        if self._hello is None:
            self._hello = self.receive(_START_SECONDS)
        return self._hello

    def call(self, what: str, name: str, arguments: Mapping[str, Any], limit: float) -> Any:
        """Send an item and wait for its result; `ItemError` as for `receive`."""
        started = time.monotonic()
        _ = self.hello
        self.send(what, name, arguments)
        return self.receive(max(0.1, limit - (time.monotonic() - started)))

    def send(self, what: str, name: str, arguments: Mapping[str, Any]) -> None:
        """Send an item."""
        with suppress(OSError):  # a process that died is noticed by `receive`
            self._connection.send((what, name, dict(arguments)))

    def fileno(self) -> int:
        """Lets `multiprocessing.connection.wait` wait for this process."""
        return self._connection.fileno()

    def receive(self, limit: float) -> Any:
        """The result of the item that was sent.

        Raises:
            ItemError: the item raised, took longer than `limit` seconds, or its process died. In the last two cases the worker is gone.
        """
        try:
            if not self._connection.poll(limit):
                self.kill()
                raise ItemError(f"killed after {limit:.0f} s")
            succeeded, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.kill()
            raise ItemError(f"its process died with exit code {code}") from None
        if not succeeded:
            raise ItemError(str(value))
        return value

    @property
    def alive(self) -> bool:
        """Whether it can take another item."""
        return self._process.is_alive() and not self._connection.closed

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join(10)
        self._connection.close()


def _serve(connection: Connection, settings: Settings, compiles: bool) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends its workers
    os.dup2(2, 1)  # what libraries print must not mix with the run's output
    if compiles:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # recorded tests must not take the GPU
    try:
        connection.send((True, _hello(settings, compiles)))
        while True:
            what, name, arguments = connection.recv()
            try:
                connection.send((True, _answer(what, name, settings, arguments)))
            except Exception as error:  # of any library; the journal has it
                lines = str(error).strip().splitlines() or [""]
                connection.send((False, f"{type(error).__name__}: {lines[0][:300]}"))
    except (EOFError, OSError):
        return  # the run ended


def _hello(settings: Settings, compiles: bool) -> dict[str, Any]:
    from dataclasses import asdict

    import torch

    from .settings import DRY_CHIP

    if compiles:
        torch.set_num_threads(1)
        return {}
    if settings.dry:
        return {"device": "meta", "chip": asdict(DRY_CHIP)}
    from dbrx_q.eval.bench.device_timing import device_or_error
    from dbrx_q.kernels.triton.launch import chip_of

    device_or_error("dbrx-q bench gpu")
    return {"device": torch.cuda.get_device_name(settings.torch_device), "chip": asdict(chip_of(settings.torch_device))}


def _answer(what: str, name: str, settings: Settings, arguments: Mapping[str, Any]) -> Any:
    from dbrx_q.kernels.triton.launch import Chip

    match what:
        case "record":
            from .recorded import record

            return record(name, settings, Chip(**arguments["chip"]), arguments["names"])
        case "compile":
            from .compiling import compile_as_the_jit

            compile_as_the_jit(arguments["request"], Chip(**arguments["chip"]))
            return {}
    from .measurements import measure

    return measure(what, name, settings, arguments)
