"""`dbrx-q tasks`: refused requests, errors, interruptions and resumed runs."""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import lm_eval.tasks
import pytest

from dbrx_q.eval.tasks import harness, shared_prefix
from dbrx_q.sources.streamed import ConvertedSource

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
ALL_TASKS = "own_choices,own_text,own_answers"  # of conftest.py


@pytest.mark.usefixtures("few_tasks")
def test_unknown_tasks_are_refused_with_similar_names(tasks_folder: Path, cli: Callable[..., Any]) -> None:
    near = cli("tasks", NANO, "--tasks", "own_text,own_choice", "--tasks-path", tasks_folder)
    assert (near.code, near.out) == (2, "")
    assert "found 'own_choice'. Did you mean own_choices" in near.err
    far = cli("tasks", NANO, "--tasks", "zzz", "--tasks-path", tasks_folder)
    assert far.code == 2
    assert "found 'zzz'. `lm-eval ls tasks`" in far.err


def test_a_data_set_that_cannot_be_fetched(tasks_folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    task = (tasks_folder / "own_text.yaml").read_text(encoding="utf-8")
    remote = re.sub(r"dataset_path.*\n.*\n", "dataset_path: nobody/nothing\n", task).replace("task: own_text", "task: own_remote")
    (tasks_folder / "own_remote.yaml").write_text(remote, encoding="utf-8")
    shown = cli("tasks", NANO, "--tasks", "own_remote", "--tasks-path", tasks_folder)
    assert (shown.code, shown.out) == (2, "")
    [line] = [line for line in shown.err.splitlines() if line.startswith("dbrx-q: error")]
    assert "the tasks own_remote must load" in line
    assert "Check the network" in line
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", ","), "at least one task must be named"),
        (("--tasks", "own_text", "--tasks-path", "no/such/folder"), "no/such/folder: must be a folder"),
        (("--tasks", "own_text", "--out", "no/such/folder/a.json"), "must be a file in a folder that exists"),
        (("--tasks", "own_text", "--batch", "0"), "batch"),
        (("--tasks", "own_text", "--device", "tpu"), "device must be"),
    ],
)
def test_bad_options_are_refused(cli: Callable[..., Any], options: tuple[str, ...], message: str) -> None:
    shown = cli("tasks", NANO, *options)
    assert (shown.code, shown.out) == (2, "")
    assert message in shown.err


@pytest.mark.usefixtures("unloaded")
def test_requests_that_the_model_cannot_answer_are_refused(tasks_folder: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tasks_folder / "own_answers.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("max_gen_toks: 6", "max_gen_toks: 5000"), encoding="utf-8")
    shown = cli("tasks", NANO, "--tasks", "own_answers", "--tasks-path", tasks_folder, "--out", tmp_path / "result.json")
    assert (shown.code, shown.out) == (2, "")
    assert "max_gen_toks must be from 1 to 2047" in shown.err
    assert not (tmp_path / "result.json").exists()


def test_without_the_harness(tasks_folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    shown = cli("tasks", NANO, "--tasks", "own_text", "--tasks-path", tasks_folder)
    assert (shown.code, shown.out) == (2, "")
    assert "pip install 'dbrx_q[tasks]'" in shown.err


@pytest.mark.usefixtures("unloaded")
def test_more_examples_than_a_task_has_are_refused_before_loading(tasks_folder: Path, cli: Callable[..., Any]) -> None:
    with (tasks_folder / "own_choices.yaml").open("a", encoding="utf-8") as file:
        file.write("fewshot_split: test\n")
    shown = cli("tasks", NANO, "--tasks", "own_choices", "--tasks-path", tasks_folder, "--num-fewshot", 9)
    assert (shown.code, shown.out) == (2, "")
    [line] = [line for line in shown.err.splitlines() if line.startswith("dbrx-q: error")]
    assert "the tasks own_choices must run; ValueError: Sample larger than population" in line
    assert "Lower --num-fewshot" in line
    assert "--resume" not in line


@pytest.mark.usefixtures("unloaded")
def test_unsafe_tasks_are_refused(tasks_folder: Path, cli: Callable[..., Any]) -> None:
    with (tasks_folder / "own_answers.yaml").open("a", encoding="utf-8") as file:
        file.write("unsafe_code: true\n")
    shown = cli("tasks", NANO, "--tasks", "own_answers", "--tasks-path", tasks_folder)
    assert (shown.code, shown.out) == (2, "")
    assert "own_answers is marked unsafe" in shown.err


@pytest.mark.usefixtures("unloaded")
def test_only_an_earlier_result_is_replaced(cli: Callable[..., Any], tmp_path: Path) -> None:
    for content in ("my notes", "[]", '{"tasks": []}'):
        out = tmp_path / "notes.json"
        out.write_text(content, encoding="utf-8")
        shown = cli("tasks", NANO, "--tasks", "own_text", "--out", out)
        assert (shown.code, shown.out) == (2, "")
        assert "only a former result of this command is replaced" in shown.err
        assert out.read_text(encoding="utf-8") == content


def test_answers_are_saved_when_the_harness_fails(tasks_folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("tasks", NANO, "--tasks", "own_answers", "--tasks-path", tasks_folder)
    with monkeypatch.context() as broken:
        broken.setattr(lm_eval.evaluator, "_process_results", lambda *_: 1 / 0)
        shown = cli(*options)
    assert (shown.code, shown.out) == (2, "")
    assert "the tasks own_answers must run; ZeroDivisionError" in shown.err
    assert "with --resume continues" in shown.err
    monkeypatch.setattr(harness, "generate", None)
    assert cli(*options, "--resume").code == 0


def test_errors_of_dbrx_q_are_not_rewritten(tasks_folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("tasks", NANO, "--tasks", "own_answers", "--tasks-path", tasks_folder)


def test_a_full_disk_loses_no_figures(tasks_folder: Path, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    options = ("tasks", NANO, "--tasks", "own_text", "--tasks-path", tasks_folder, "--out", out, "--json")

    def fail_after_100_bytes(path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_bytes", fail_after_100_bytes)
        shown = cli(*options)
    assert shown.code == 2
    assert "No space left on device" in shown.err
    report = json.loads(shown.out)
    assert list(tmp_path.glob("*partial")) + list(tmp_path.glob(".*partial")) == []
    assert not out.exists()
    monkeypatch.setattr(shared_prefix.PrefixScorer, "_run_model", None)  # nothing is left to run
    assert cli(*options, "--resume").code == 0
    assert json.loads(out.read_text(encoding="utf-8"))["results"] == report["results"]
    assert not list((tmp_path / "user").rglob("*.npz"))


@pytest.mark.parametrize("presses", [(2,), (3, 6), (8,)])
def test_a_resumed_run_gives_the_same_figures(
    tasks_folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, presses: tuple[int, ...]
) -> None:
    options = ("tasks", NANO, "--tasks", ALL_TASKS, "--tasks-path", tasks_folder, "--batch", 2, "--json")
    expected_report = json.loads(cli(*options).out)
    score, write = shared_prefix.PrefixScorer._run_batch, harness.generate
    calls_left = 0

    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls_left
            calls_left -= 1
            if calls_left == 0:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(shared_prefix.PrefixScorer, "_run_batch", interrupted(score))
    monkeypatch.setattr(harness, "generate", interrupted(write))
    answered_before = 0
    for calls in presses:
        calls_left = calls
        shown = cli(*options, *(["--resume"] if answered_before else []))
        assert (shown.code, shown.out) == (2, "")
        [(answered, total)] = re.findall(r"interrupted after (\d+) of (\d+) requests; the same command with --resume continues", shown.err)
        assert answered_before < int(answered) < int(total) == 10 + 2 + 3
        answered_before = int(answered)
    calls_left = 0
    shown = cli(*options, "--resume")
    assert shown.code == 0, shown.err
    report = json.loads(shown.out)
    del report["provenance"], expected_report["provenance"]
    assert report == expected_report


def test_an_interruption_before_the_first_answer_cannot_be_resumed(
    tasks_folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ConvertedSource, "load", press)
    shown = cli("tasks", NANO, "--tasks", "own_text", "--tasks-path", tasks_folder)
    assert (shown.code, shown.out) == (2, "")
    assert "interrupted; nothing was left half-written" in shown.err
