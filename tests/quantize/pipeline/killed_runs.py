"""Kills the quantizer at random moments, resumes it, and compares the result with an uninterrupted run: a script of `test_resume.py`.

Each run is a fork of a process that has imported everything and ended its threads, so that a run spends no time on imports.

    python killed_runs.py SOURCE FOLDER METHOD KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.backends.backend_agg  # noqa: F401 # for the plots of each run
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.methods.choose import METHODS
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.report import NAME as REPORT_NAME
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint


def sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if not path.name.startswith(REPORT_NAME)}


def main(source: Path, folder: Path, method: str, kills: int, seed: int) -> dict[str, object]:
    sequences = CalibrationSequences.single(torch.arange(8 * 48).view(8, 48) % 90) if METHODS[method].calibrated else None
    request = QuantizationRequest(
        lambda c: default_formats(c.config, TensorFormat("int4", 64)), method=method, sequences=sequences, shard_bytes=100_000
    )
    if METHODS[method].in_pieces:
        quantize_checkpoint(source, folder / "first", request)  # loads compiled code once; that starts no threads
    uninterrupted = run(source, folder / "whole", request, None)
    expected = sums(folder / "whole")
    draw = random.Random(seed)
    moments, differ, begun = 0, [], 0
    while moments < kills:
        out = folder / f"out{moments}"
        kill = draw.randrange(uninterrupted.tensors), draw.expovariate(uninterrupted.tensors / uninterrupted.seconds)
        if not run(source, out, request, kill).killed:
            shutil.rmtree(out)  # it ended before it was killed
            continue
        partial = folder / f"{out.name}.partial"
        begun += bool(list(partial.glob("*.safetensors")))
        if draw.random() < 0.3:  # killed once more
            run(source, out, request, (draw.randrange(uninterrupted.tensors), draw.uniform(0, uninterrupted.seconds)))
        if not out.exists():
            run(source, out, request, None)
        if sums(out) != expected or partial.exists():
            differ.append(moments)
        shutil.rmtree(out)
        moments += 1
    return {"kills": moments, "begun": begun, "differ": differ}


class Run(NamedTuple):
    """The outcome of one run."""

    killed: bool
    """Whether it was killed before it ended."""
    tensors: int
    """Tensors that it finished."""
    seconds: float
    """From the first tensor to the end or the kill."""


def run(source: Path, out: Path, request: QuantizationRequest, kill: tuple[int, float] | None) -> Run:
    """Run the quantizer in a child process, and kill it.

    Args:
        kill: (tensors, seconds): SIGKILL follows so many seconds after so many tensors are rounded (0: after the start); None for no kill.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            pipe = os.fdopen(writing, "w")
            pipe.write(".")
            pipe.flush()
            quantize_checkpoint(source, out, request, resume=True, on_bytes=lambda *_: print(".", end="", file=pipe, flush=True))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writing)
    started, tensors = time.perf_counter(), -1
    while tensors < (kill[0] if kill else 1 << 30) and (new_dots := len(os.read(reading, 1 if kill else 4096))):
        if tensors < 1:
            started = time.perf_counter()
        tensors += new_dots
    if kill:
        time.sleep(kill[1])
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return Run(os.WIFSIGNALED(status), tensors, time.perf_counter() - started)


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    print(json.dumps(main(Path(arguments[0]), Path(arguments[1]), arguments[2], int(arguments[3]), int(arguments[4]))))
