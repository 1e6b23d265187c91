"""Runs one program of either side once, and reads what it measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import Tools

__all__ = ["Finished", "Programs"]

HERE = Path(__file__).resolve().parent
_LOAD_TIME = re.compile(r"load time =\s*([\d.]+) ms")
_SPARE_CONTEXT = 1024  # tokens: llama-batched-bench rounds the context of a sequence down


@dataclass(frozen=True)
class Finished:
    """A process that has ended without an error."""

    stdout: str
    """All of it."""
    stderr: str
    """All of it."""
    seconds: float
    """From its start to its end."""
    peak_bytes: int
    """Its maximum resident memory, mapped files included."""

    @property
    def load_seconds(self) -> float:
        """Seconds from the start of loading to the end of the first evaluation, as `llama-bench -v` prints them."""
        times = _LOAD_TIME.findall(self.stderr)
        if not times:
            sys.exit(f"llama-bench -v must print a load time; found none:\n{self.stderr[-2000:]}")
        return float(times[0]) / 1000


@dataclass(frozen=True)
class Programs:
    """How the programs of both sides are run."""

    tools: Tools
    """llama.cpp's."""
    threads: int
    """Of every program."""
    prefix: Sequence[str]
    """Command that starts every process, such as taskset -c 0,1."""

    def run(self, *command: str) -> Finished:
        """Run a command to its end.

        Raises:
            SystemExit: it fails.
        """
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["OMP_NUM_THREADS"] = str(self.threads)
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            begin = time.perf_counter()
            process = subprocess.Popen([*self.prefix, *command], stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - begin
            process.returncode = os.waitstatus_to_exitcode(status)
            texts = []
            for stream in (stdout, stderr):
                stream.seek(0)
                texts.append(stream.read().decode("utf-8", "replace"))
        if process.returncode:
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{texts[1][-2000:]}")
        return Finished(texts[0], texts[1], seconds, usage.ru_maxrss * 1024)

    def dbrx_q(self, python: str, checkpoint: Path, tests: Sequence[Mapping[str, Any]], **request: Any) -> tuple[dict[str, Any], Finished]:
        """(the answer of ours.py for a checkpoint, the process); the interpreter `python` decides which dbrx_q is measured."""
        request = {"path": str(checkpoint), "dtype": None, "threads": self.threads, "rates": True, "tests": list(tests)} | request
        process = self.run(python, str(HERE / "ours.py"), json.dumps(request))
        return json.loads(process.stdout.splitlines()[-1]), process

    def llama_bench(self, file: Path, layout: int, *arguments: str) -> tuple[list[dict[str, Any]], Finished]:
        """(the tests of llama-bench's JSON, the process); `layout` is 1 to let llama.cpp repack the weights."""
        program = [self.tools.path("llama-bench"), "-m", str(file), "-t", str(self.threads), "-o", "json"]
        process = self.run(*program, "--repack", str(layout), *arguments)
        return json.loads(process.stdout), process

    def batched_bench(self, file: Path, layout: int, batches: Sequence[int], prompt: int, tokens: int) -> dict[int, list[float]]:
        """Tokens/s of all sequences together, by number of sequences; see `llama_bench` for `layout`."""
        context = max(batches) * (prompt + tokens) + _SPARE_CONTEXT
        program = [self.tools.path("llama-batched-bench"), "-m", str(file), "-t", str(self.threads), "-c", str(context)]
        sizes = ["-npp", str(prompt), "-ntg", str(tokens), "-npl", ",".join(map(str, batches))]
        process = self.run(*program, *sizes, "--output-format", "jsonl", *([] if layout else ["--no-repack"]))
        rows = [json.loads(line) for line in (process.stdout + process.stderr).splitlines() if line.startswith("{")]
        if sorted(row["pl"] for row in rows) != sorted(batches):
            sys.exit(f"llama-batched-bench must report {list(batches)} sequences; found {process.stderr[-2000:]}")
        return {row["pl"]: [row["speed_tg"]] for row in rows}
