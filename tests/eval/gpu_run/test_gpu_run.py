"""A run of `bench gpu`: its journal, its order, a whole run without a GPU that is stopped and continued, and its document."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.errors import RequestError
from dbrx_q.eval.gpu_run import commands
from dbrx_q.eval.gpu_run.commands import parse_outcomes, run_within
from dbrx_q.eval.gpu_run.journal import DONE, FAILED, FILE, Journal, Record, read_records
from dbrx_q.eval.gpu_run.plan import SOURCES, TEST_FILES, TITLES, plan, tuned_problems
from dbrx_q.eval.gpu_run.recorded import record as record_launches
from dbrx_q.eval.gpu_run.report import document
from dbrx_q.eval.gpu_run.settings import DRY_CHIP, Settings, code_version, tree
from dbrx_q.eval.gpu_run.worker import ItemError, Worker

ROOT = Path(__file__).parents[3]
Cli = Callable[..., Any]


def record(item: str, status: str = DONE, **value: object) -> Record:
    return Record(item, status, "code", "NVIDIA H200", "2026-12-01T10:00:00+00:00", 1.5, value)


def whole_lines(folder: Path) -> list[dict[str, Any]]:
    content = (folder / FILE).read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def ends(pid: int) -> bool:
    """Whether a process ends within some seconds, though init may not collect it."""
    status = Path(f"/proc/{pid}/status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text(encoding="utf-8"):
            return True
        time.sleep(0.05)
    return False


def group_of(leader: int) -> list[int]:
    """The processes of a process group."""
    stats = [(path, path.read_text(encoding="utf-8").rpartition(")")[2].split()) for path in Path("/proc").glob("[0-9]*/stat")]
    return [int(path.parent.name) for path, fields in stats if int(fields[2]) == leader]


def test_a_journal_keeps_whole_lines_and_drops_half_of_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(record("rows/a", amount=1))
    journal.append(record("rows/b", amount=2))
    with pytest.raises(RequestError, match="another is writing here"):
        Journal(tmp_path)
    journal.close()
    with open(tmp_path / FILE, "a", encoding="utf-8") as file:
        file.write('{"schema": 1, "item": "rows/c", "sta')
    assert [entry.item for entry in read_records(tmp_path)] == ["rows/a", "rows/b"]
    again = Journal(tmp_path)
    again.append(record("rows/c"))
    again.close()
    assert [line["item"] for line in whole_lines(tmp_path)] == ["rows/a", "rows/b", "rows/c"]


@pytest.mark.parametrize("line", ['{"schema": 2, "item": "a"}', "[]", "nonsense", '{"item": "a"}'])
def test_a_journal_of_another_schema_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE).write_text(line + "\n", encoding="utf-8")
    for read in (read_records, Journal):
        with pytest.raises(RequestError, match=r"line 1: a line must be a result of schema 1.*Name another folder"):
            read(tmp_path)


def test_the_plan_of_a_gpu_reaches_everything_in_little_more_than_its_time() -> None:
    items = plan(Settings("cuda", Path()))
    keys = [item.key for item in items]
    assert len(set(keys)) == len(keys)
    assert {item.stage for item in items} == TITLES.keys()
    assert {item.name for item in items if item.stage == "compile"} == SOURCES.keys()
    assert len(tuned_problems(Settings("cuda", Path()), DRY_CHIP)) == 15
    assert all(item.expected < item.limit for item in items)
    assert sum(item.expected for item in items) < 20 * 60
    first = keys[: keys.index("tests/tests/kernels/gpu/test_products_on_gpu.py")]
    assert {"rows/moe_experts int4:64 T=1", "rows/attention decode int8 B=1", "model/decode step"} <= set(first)
    assert sum(item.expected for item in items[: len(first)]) < 4 * 60


def test_every_file_of_gpu_tests_is_in_the_plan() -> None:
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/*/gpu/test_*.py")}
    assert files == {name for name, _, _ in TEST_FILES}
    assert tree() == ROOT


MACHINE_LACKS = (
    "gguf",
    "bitsandbytes",
    "datasets",
    "transformers",
    "matplotlib",
    "lm_eval",
    "hypothesis",
    "selenium",
    "accelerate",
    "tokenizers",
)


def test_pytest_collects_gpu_tests_without_packages_that_a_machine_lacks(tmp_path: Path) -> None:
    lacking = "import sys; sys.modules.update(dict.fromkeys({!r})); sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", lacking.format(MACHINE_LACKS), "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    ended = run_within(command, 120, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, cwd=ROOT)
    assert ended.code == 0, ended.output
    collected = {line.partition("::")[0] for line in ended.output.splitlines() if "::" in line}
    assert collected == {name for name, _, _ in TEST_FILES}


def test_what_pytest_printed_is_counted_also_where_it_was_killed() -> None:
    output = """
tests/a.py::test_one[int4:64-1] PASSED                       [ 33%]
tests/a.py::test_two FAILED                                  [ 66%]
[gw1] [ 80%] SKIPPED tests/a.py::test_three
[gw0] [ 90%] ERROR tests/a.py::test_four
tests/a.py::test_five """
    assert parse_outcomes(output) == {"passed": 1, "skipped": 1, "failed": ["tests/a.py::test_two", "tests/a.py::test_four"]}


def test_launches_of_the_bundled_model_are_recorded_without_running_other_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pytest, "main", lambda _: pytest.fail("only tests of kernels are recorded by running them"))
    requests = record_launches("tests", Settings("cuda", tmp_path), DRY_CHIP, ["tests/dbrx_q/gpu/test_model_on_gpu.py"])
    assert {"gate_up_decode_kernel", "gate_up_prefill_kernel", "decode_kernel", "prefill_kernel"} <= {item.kernel for item in requests}


def test_a_program_is_killed_at_its_limit_with_what_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    ended = run_within([sys.executable, "-c", child], 1.5, cwd=tmp_path)
    assert ended.code is None
    assert ends(int(ended.output))


def test_a_worker_that_dies_or_takes_too_long_is_an_error(tmp_path: Path) -> None:
    worker = Worker(Settings("meta", tmp_path))
    assert worker.hello["device"] == "meta"
    with pytest.raises(ItemError, match="StopIteration"):
        worker.call("rows", "no such row", {}, 60)
    assert worker.alive
    os.kill(worker._process.pid or 0, signal.SIGSTOP)
    with pytest.raises(ItemError, match="killed after 0 s"):
        worker.call("ceilings", "before", {}, 0.2)
    assert not worker.alive


def test_a_run_is_stopped_and_continued(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    early = cli("bench", "gpu", "--device", "meta", "--minutes", "0.05", "--out", folder)
    assert early.code == 0, early.err
    items = plan(Settings("meta", folder))
    assert f"0 done, 0 failed, 0 done before, {len(items)} not reached" in early.out
    command = [sys.executable, "-c", "from dbrx_q.cli import main; main()", "bench", "gpu", "--device", "meta", "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (folder / FILE).read_bytes():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert all(ends(pid) for pid in group_of(process.pid))
    stopped = whole_lines(folder)
    assert 0 < len(stopped) < len(items)
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.write('{"schema": 1')
    done = cli("bench", "gpu", "--device", "meta", "--out", folder)
    assert done.code == 0, done.err
    assert "0 failed" in done.out
    assert "0 not reached" in done.out
    lines = {line["item"]: line for line in whole_lines(folder)}
    assert lines.keys() == {item.key for item in items}
    compiled = lines["compile/all but tiles"]["value"]
    assert compiled["failed"] == {}
    assert compiled["compiled"] >= 6
    assert compiled["kernels"] == {"rows": 2, "model": 2, "tests": 2}
    assert lines["rows/moe_experts int4:64 T=1"]["value"]["launches"] == ["gate_up_decode_kernel", "down_decode_kernel"]
    assert len(lines["model/decode step"]["value"]["launches"]) >= 16
    assert lines["tests/tests/kernels/gpu/test_small_ops_on_gpu.py"]["value"]["collected"] > 20
    started = time.monotonic()
    again = cli("bench", "gpu", "--device", "meta", "--out", folder)
    assert f"{len(items)} done before" in again.out
    assert time.monotonic() - started < 60
    out = tmp_path / "docs" / "run.md"
    assert cli("bench", "gpu-report", folder, "--out", out).code == 0
    text = out.read_text(encoding="utf-8")
    assert "Not reached" not in text
    assert "nothing was timed" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "meta"), "Missing option '--out'"),
        (("--device", "cpu", "--out", "{}/run"), "--device must be cuda or meta"),
        (("--device", "meta", "--minutes", "0", "--out", "{}/run"), "--minutes must be above 0"),
        (("--device", "meta", "--minutes", "nan", "--out", "{}/run"), "--minutes must be above 0"),
        (("--device", "meta", "--out", "{}/file"), "results need a folder"),
        (("--device", "meta", "--out", "{}/other"), "must be a result of schema 1"),
    ],
)
def test_bad_requests(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_text("{}\n", encoding="utf-8")
    outcome = cli("bench", "gpu", *(word.format(tmp_path) for word in arguments))
    assert outcome.code == 2
    assert message in outcome.err


def test_a_report_needs_results(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("bench", "gpu-report", tmp_path, "--out", tmp_path / "r.md")
    assert outcome.code == 2
    assert "a run must have left its results there" in outcome.err


def test_the_document_has_shares_of_the_mean_ceiling_targets_failures_and_what_is_missing() -> None:
    timed = {"kernel": "linear", "case": "Wqkv", "ceiling": "copy bandwidth", "amount": 4e6, "target": 0.75, "rival": None, "failed": {}}
    times = {"dbrx_q": {"seconds": 1.25e-6, "graph": True}, "bf16 weight": {"seconds": 5e-6, "graph": False}}
    system = {"chip": "sm_90", "multiprocessors": 132, "python": "3.12.3", "versions": {"triton": "3.6.0"}, "missing": ["gguf"]}
    records = [
        record("system/versions", **system),
        record("ceilings/before", bandwidth=4.2e12, matmul=7.0e14),
        record("ceilings/after", bandwidth=3.8e12, matmul=7.2e14),
        record("rows/Wqkv int8:64 T=1", FAILED, error="first attempt"),
        record("rows/Wqkv int8:64 T=1", **timed, times=times),
        record("rows/lm_head", FAILED, error="killed after 30 s"),
        record("tests/tests/a.py", FAILED, error="exit code 1", passed=3, skipped=0, failed=["a::b"], tail="assert | no"),
        record("memcheck/one call of each op", available=True, errors=0),
        replace(record("compile/all but tiles", kernels={"rows": 9, "tests": 3}, compiled=10, failed={"k": "e"}, left=1), seconds=33.0),
    ]
    text = document(records)
    assert text.startswith("# NVIDIA H200, 2026-12-01\n")
    assert "Missing packages: gguf." in " ".join(text.split())
    assert "| linear, Wqkv | 1.2 us | 80.0% | copy bandwidth | 75% | yes | bf16 weight 5.0 us (no graph) |" in text
    assert "- lm_head: killed after 30 s" in text
    assert "first attempt" not in text
    assert "| tests/a.py | 3 | 1 | 0 | 2 | exit code 1 |" in text
    assert "- `a::b`" in text
    assert "- ends with: `assert \\| no`" in text
    assert "| all but tiles | 12 | 10 | 1 | 1 | 33 |" in text
    assert "| one call of each op | 0 errors |" in text
    assert "- model/decode step" in text.partition("## Not reached")[2]
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith(("|", "- ")))
    with pytest.raises(RequestError, match="needs results"):
        document([])


def test_without_compute_sanitizer_there_is_no_memory_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commands.memory_check(Settings("cuda", tmp_path), 1) == {"available": False}
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 2 errors'; exit 99\n", encoding="utf-8")
    program.chmod(0o755)
    with pytest.raises(ItemError, match="2 errors; exit code 99"):
        commands.memory_check(Settings("cuda", tmp_path), 10)


def test_results_of_other_code_are_not_taken_for_this_one() -> None:
    assert code_version() == code_version()
    assert len(code_version()) == 12
