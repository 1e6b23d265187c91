"""Programs of their own that a run starts, each with a time limit: test files, and compute-sanitizer on one call of each op."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dbrx_q.eval import parent_process

from .settings import Settings, tree
from .worker import ItemError

__all__ = ["Finished", "memory_check", "run_tests", "run_within"]

_OUTCOME = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) )?(?P<test>\S+::\S.*?)(?: (?P<last>[A-Z]+))?(?: +\[ *\d+%\])?$")
_COUNTED = {"PASSED": "passed", "XFAIL": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
_TAIL = 2000  # characters of a program's output to keep
_FAILURES = 40


@dataclass(frozen=True)
class Finished:
    """How a program ended."""

    code: int | None
    """The exit code; None if it was killed."""
    output: str
    """What it printed."""


def run_within(command: Sequence[str], limit: float, environment: dict[str, str] | None = None, *, cwd: Path) -> Finished:
    """Run a program in a process group of its own, which is killed after `limit` seconds or when this call is interrupted.

    Args:
        command: the path of the program and its arguments.
        limit: seconds.
        environment: variables to add.
        cwd: where it runs.
    """
    with TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", parent_process.__file__, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # also what it started
                process.wait()
        output.seek(0)
        return Finished(code, output.read().decode("utf-8", "replace"))


def run_tests(name: str, settings: Settings, limit: float) -> dict[str, Any]:
    """Run a file of tests, or collect it where there is no GPU.

    Raises:
        ItemError: tests failed, or could not be collected; the message counts them.
    """
    root = tree()
    assert root is not None
    command = [sys.executable, "-m", "pytest", str(root / name), "--rootdir", str(root), "-c", str(root / "pyproject.toml")]
    # The machine's versions are not those that CI has, and its plugins are not the project's: neither may turn a warning into a failure.
    command += ["-p", "no:cacheprovider", "-m", "gpu", "--color=no", "-W", "default"]
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if settings.dry:
        ended = run_within([*command, "--collect-only", "-q"], limit, environment, cwd=settings.folder)
        tests = sum("::" in line for line in ended.output.splitlines())
        if ended.code != 0 or not tests:
            raise ItemError(f"the tests could not be collected: {ended.output[-_TAIL:]}")
        return {"dry": True, "collected": tests}
    ended = run_within([*command, "-v", "--tb=short"], limit, environment, cwd=settings.folder)
    counts = parse_outcomes(ended.output)
    if ended.code != 0:
        what = "killed at its time limit" if ended.code is None else f"exit code {ended.code}"
        raise ItemError(what, counts | {"tail": ended.output[-_TAIL:]})
    return counts


def parse_outcomes(output: str) -> dict[str, Any]:
    """Counts of the outcomes that `pytest -v` printed, and the names of tests that failed; also of a run that was killed."""
    outcomes: dict[str, str] = {}
    for line in output.splitlines():
        match = _OUTCOME.match(line)
        outcome = match and (match["first"] or match["last"])
        if match and outcome in _COUNTED:
            outcomes[match["test"]] = _COUNTED[outcome]
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    values = list(outcomes.values())
    return {"passed": values.count("passed"), "skipped": values.count("skipped"), "failed": failed[:_FAILURES]}


def memory_check(settings: Settings, limit: float) -> dict[str, Any]:
    """Call each op once under compute-sanitizer's memcheck.

    Raises:
        ItemError: it found an error, or could not run.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"available": False}
    command = [program, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-m", "dbrx_q.eval.gpu_run.one_call"]
    ended = run_within(command, limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, cwd=settings.folder)
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", ended.output)
    if ended.code != 0 or not summary:
        what = "killed at its time limit" if ended.code is None else f"exit code {ended.code}"
        errors = f"{summary[-1]} errors; " if summary else ""
        raise ItemError(f"compute-sanitizer: {errors}{what}", {"head": ended.output[:_TAIL], "tail": ended.output[-_TAIL:]})
    return {"available": True, "errors": int(summary[-1])}
