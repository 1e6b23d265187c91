"""`dbrx-q bench gpu` and `dbrx-q bench gpu-report`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from . import options, terminal
from .options import OUTPUT, WORK, argument, option

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["gpu", "gpu_report"]


def gpu(
    out: Annotated[Path, option(OUTPUT, "Folder of the results; a run continues what is there.", "--out", metavar="DIR", default=False)],
    minutes: Annotated[float, option(WORK, "Minutes after which the run has ended.", "--minutes", metavar="N")] = 12.0,
    device: Annotated[
        str, option(WORK, "cuda, or meta to try the run without a GPU: small shapes, nothing is timed.", metavar="DEVICE")
    ] = "cuda",
) -> None:
    """Test and measure this GPU in a quarter of an hour: correctness, kernels, a whole model's step, offloading, tiles.

    The most valuable results come first, each as one line of DIR/results.jsonl as soon as it is there. The run stops before the time is
    up; the same command continues it. It needs no network and no checkpoint. docs/kernels.md says how to prepare a GPU machine for it.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.device_timing import device_or_error
    from dbrx_q.eval.bench.kernel_resources import check_compiler
    from dbrx_q.eval.gpu_run.journal import FILE
    from dbrx_q.eval.gpu_run.run import check_minutes, run
    from dbrx_q.eval.gpu_run.settings import Settings

    if device not in ("cuda", "meta"):
        raise RequestError(f"--device must be cuda or meta; found {device!r}. Choose one of these")
    check_minutes(minutes)
    if device == "cuda":
        device_or_error("dbrx-q bench gpu")
    check_compiler()
    with _ended_by_signals():
        outcome = run(Settings(device, out.absolute()), 60 * minutes, report=terminal.say)
    counts = f"{outcome.done} done, {len(outcome.failed)} failed, {outcome.skipped} done before, {len(outcome.not_reached)} not reached"
    print(counts + (f", {len(outcome.given_up)} given up" if outcome.given_up else ""))
    for title, keys in (("failed", outcome.failed), ("failed twice before", outcome.given_up), ("not reached", outcome.not_reached)):
        for key in keys:
            print(f"{title}: {key}")
    print(out / FILE)
    failures = len(outcome.failed) + len(outcome.given_up)
    if failures:
        raise terminal.failed(f"{failures} items failed; {out / FILE} says why")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, end the run in order: all of its processes are killed."""

    def end(number: int, frame: FrameType | None) -> None:
        for name in before:
            signal.signal(name, signal.SIG_IGN)  # another one must not stop the killing
        raise SystemExit(128 + number)

    names = [name for name in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(name) != signal.SIG_IGN]  # as nohup has it
    before = {name: signal.signal(name, end) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def gpu_report(
    folder: Annotated[Path, argument("DIR", "Folder of the results of `dbrx-q bench gpu`.")],
    out: options.OutFile,
) -> None:
    """Write the results of `bench gpu` as a Markdown document, on any machine: tables, shares of the ceilings, targets, what is missing."""
    from dbrx_q.eval.gpu_run.report import write_document

    write_document(folder, out)
    print(out)
