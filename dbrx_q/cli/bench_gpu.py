"""`dbrx-q bench gpu` and `dbrx-q bench gpu-report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from . import options, terminal
from .options import OUTPUT, WORK, argument, option

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
    import signal
    from types import FrameType

    from dbrx_q.errors import RequestError
    from dbrx_q.eval.bench.device_timing import device_or_error
    from dbrx_q.eval.gpu_run.journal import FILE
    from dbrx_q.eval.gpu_run.run import run
    from dbrx_q.eval.gpu_run.settings import Settings

    if device not in ("cuda", "meta"):
        raise RequestError(f"--device must be cuda or meta; found {device!r}. Choose one of these")
    if device == "cuda":
        device_or_error("dbrx-q bench gpu")

    def terminate(_: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)  # by which all processes of the run are killed

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        outcome = run(Settings(device, out.absolute()), 60 * minutes, report=terminal.say)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{outcome.done} done, {len(outcome.failed)} failed, {outcome.skipped} done before, {len(outcome.not_reached)} not reached")
    for title, keys in (("failed", outcome.failed), ("not reached", outcome.not_reached)):
        for key in keys:
            print(f"{title}: {key}")
    print(out / FILE)
    if outcome.failed:
        raise terminal.failed(f"{len(outcome.failed)} items failed; {out / FILE} says why")


def gpu_report(
    folder: Annotated[Path, argument("DIR", "Folder of the results of `dbrx-q bench gpu`.")],
    out: options.OutFile,
) -> None:
    """Write the results of `bench gpu` as a Markdown document, on any machine: tables, shares of the ceilings, targets, what is missing."""
    from dbrx_q.eval.gpu_run.report import write_document

    write_document(folder, out)
    print(out)
