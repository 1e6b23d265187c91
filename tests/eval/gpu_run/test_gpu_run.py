"""A run of `bench gpu`: its journal, its order, a whole run without a GPU that is stopped and continued, and its document."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
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
from dbrx_q.eval.gpu_run.run import _Processes
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


def children_of(pid: int) -> list[int]:
    """The processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


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


WHOLE = {"schema": 1, "item": "rows/a", "status": "done", "code": "c", "device": "d", "date": "2026-12-01", "seconds": 1.5, "value": {}}
FOREIGN = [
    *('{"schema": 2, "item": "a"}', "[]", "nonsense", '{"item": "a"}', '{"mine": 1}', "\xff"),
    *(json.dumps(WHOLE | {name: value}) for name, value in (("item", 1), ("status", "half"), ("seconds", "1"), ("value", []), ("more", 1))),
]


@pytest.mark.parametrize(
    "content", [*(line + "\n" for line in FOREIGN), *(line for line in FOREIGN if not line.startswith('{"schema": 1, "item": "'))]
)
def test_a_file_that_no_run_wrote_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content, encoding="latin-1")
    for read in (read_records, Journal):
        with pytest.raises(RequestError, match=r"line 1: a line must be a result of schema 1.*Name another folder"):
            read(tmp_path)
    assert (tmp_path / FILE).read_text(encoding="latin-1") == content


def test_results_are_read_from_ordinary_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    for read in (read_records, Journal):
        with pytest.raises(RequestError, match="is not an ordinary file"):
            read(tmp_path)


def test_a_result_that_does_not_fit_on_the_disk_leaves_those_before_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(record("rows/a"))
    before, (soft, hard) = (tmp_path / FILE).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))  # the kernel writes 50 bytes and then no more, as on a full disk
    try:
        with pytest.raises(RequestError, match="Free space and run the same command again"):
            journal.append(record("rows/b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / FILE).read_bytes() == before
    journal.append(record("rows/c"))
    journal.close()
    assert [line["item"] for line in whole_lines(tmp_path)] == ["rows/a", "rows/c"]


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


RUN_WITH_PROCESSES = """
import os, signal
from pathlib import Path
from dbrx_q.eval.gpu_run.commands import run_within
from dbrx_q.eval.gpu_run.settings import Settings
from dbrx_q.eval.gpu_run.worker import Worker

worker = Worker(Settings("meta", Path()))
assert worker.hello
os.kill(worker._process.pid, signal.SIGSTOP)  # as one that is busy reads no message
run_within(["sleep", "600"], 600, cwd=Path())
"""


def test_processes_end_with_a_run_that_was_killed() -> None:
    run = subprocess.Popen([sys.executable, "-c", RUN_WITH_PROCESSES])
    children: list[int] = []
    while not any(Path(f"/proc/{pid}/comm").read_text(encoding="utf-8") == "sleep\n" for pid in children):
        assert run.poll() is None
        time.sleep(0.1)
        children = children_of(run.pid)
    assert len(children) >= 2
    run.kill()
    run.wait()
    assert all(ends(pid) for pid in children)


@pytest.mark.parametrize("command", ["static", "resources"])
def test_processes_that_compile_end_with_a_command_that_was_killed(tmp_path: Path, command: str) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", "from dbrx_q.cli import main; main()", "bench", command, "--chip", "sm_90"],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(children := children_of(run.pid)) < 3:  # two that compile, and Python's resource tracker
        assert run.poll() is None
        time.sleep(0.1)
    while not any(tmp_path.iterdir()):  # what they compile
        assert run.poll() is None
        time.sleep(0.1)
    run.kill()
    run.wait()
    assert all(ends(pid) for pid in children)


def test_a_worker_whose_item_is_interrupted_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    processes = _Processes(Settings("meta", tmp_path))
    workers = []

    def interrupted() -> None:
        with processes.work_folder() as folder:
            (Path(folder) / "model").mkdir()
            workers.append(processes.device())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not workers[0].alive
    assert not list(tmp_path.iterdir())


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
    # The tests may run with nohup, whose processes ignore the signal.
    listening = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); from dbrx_q.cli import main; main()"
    command = [sys.executable, "-c", listening, "bench", "gpu", "--device", "meta", "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (folder / FILE).read_bytes():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)  # of a terminal that is closed; SIGTERM is handled alike
    assert process.wait(20) == 128 + signal.SIGHUP
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


def test_items_that_failed_twice_are_named_and_fail_the_run(cli: Cli, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for item in plan(Settings("meta", tmp_path)):
        for _ in range(2):
            status = FAILED if item.stage == "offload" else DONE
            journal.append(replace(record(item.key, status, error="no"), code=code_version(), device="meta"))
    journal.close()
    outcome = cli("bench", "gpu", "--device", "meta", "--out", tmp_path)
    assert outcome.code == 2
    assert "failed twice before: offload/24 GB" in outcome.out
    assert "1 given up" in outcome.out
    assert "1 items failed" in outcome.err


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TRITON_INTERPRET", "1", "kernels must be compiled"),
        ("TRITON_CACHE_DIR", "/proc/none", "a folder that you may write to"),
        ("DBRX_Q_PDL", "yes", "DBRX_Q_PDL must be 0 or 1"),
    ],
)
@pytest.mark.parametrize(
    "command", ["gpu --device meta --out {}", "static --chip sm_90", "resources --chip sm_90", "static --record {}/r.json"]
)
def test_nothing_begins_where_kernels_cannot_be_compiled(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str, command: str
) -> None:
    monkeypatch.setenv(variable, value)
    outcome = cli("bench", *command.format(tmp_path).split())
    assert outcome.code == 2
    assert message in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("static --record {}/r.json --json --chip sm_90", "found also --chip, --json. Leave them out"),
        ("static --record {}", "it is a folder"),
        ("static --chip sm_90 --case ", "--case must be one of"),
        ("resources --out {}/file/x.md", "must be in a folder that exists"),
        ("kernels --out {}/file", "is no folder that you may write to"),
        ("tune --out {}", "it is a folder"),
    ],
)
def test_results_that_could_not_be_written_are_refused_first(cli: Cli, tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "file").touch()
    outcome = cli("bench", *arguments.format(tmp_path).split(" "))
    assert outcome.code == 2
    assert message in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "meta"), "Missing option '--out'"),
        (("--device", "cpu", "--out", "{}/run"), "--device must be cuda or meta"),
        (("--device", "meta", "--minutes", "0", "--out", "{}/run"), "--minutes must be above 0"),
        (("--device", "meta", "--minutes", "nan", "--out", "{}/run"), "--minutes must be above 0"),
        (("--minutes", "-1", "--out", "{}/run"), "--minutes must be above 0"),
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


DAMAGED = [("tuning/x", {}), ("rows/x", {"kernel": "a"}), ("ceilings/before", {"bandwidth": "fast"}), ("compile/tiles", {"compiled": 1})]


@pytest.mark.parametrize(("item", "value"), DAMAGED)
def test_a_document_of_damaged_results_is_refused(cli: Cli, tmp_path: Path, item: str, value: dict[str, Any]) -> None:
    journal = Journal(tmp_path)
    journal.append(record(item, DONE, **value))
    journal.close()
    outcome = cli("bench", "gpu-report", tmp_path, "--out", tmp_path / "r.md")
    assert outcome.code == 2
    assert "results must have what `dbrx-q bench gpu` writes" in outcome.err
    assert not (tmp_path / "r.md").exists()


def test_a_document_is_of_one_device_and_does_not_replace_its_results(cli: Cli, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(replace(record("memcheck/one call of each op", calls=["a"]), device="meta"))
    journal.append(record("ceilings/before", bandwidth=4.2e12, matmul=7.0e14))
    journal.close()
    text = document(read_records(tmp_path))
    assert "results of other devices, which are left out: meta." in " ".join(text.split())
    assert "calls recorded" not in text
    before = (tmp_path / FILE).read_bytes()
    outcome = cli("bench", "gpu-report", tmp_path, "--out", tmp_path / FILE)
    assert outcome.code == 2
    assert "must not replace the results" in outcome.err
    assert (tmp_path / FILE).read_bytes() == before


def test_without_compute_sanitizer_there_is_no_memory_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commands.memory_check(Settings("cuda", tmp_path), 1) == {"available": False}
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 2 errors'; exit 99\n", encoding="utf-8")
    program.chmod(0o755)
    with pytest.raises(ItemError, match="2 errors; exit code 99"):
        commands.memory_check(Settings("cuda", tmp_path), 10)


def test_results_of_other_code_are_not_taken_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_version() == code_version()
    assert len(code_version()) == 12
    monkeypatch.setenv("DBRX_Q_PDL", "0")
    assert code_version.__wrapped__() != code_version()
