"""`dbrx-q sensitivity`: its output, interrupted and resumed runs, and refused options."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.errors import FormatError, RequestError
from dbrx_q.eval.sensitivity.result import Sensitivity
from dbrx_q.eval.texts import load_text
from dbrx_q.sources.open import open_source

DATA = Path(__file__).parents[2] / "data"
NANO, BOOK = DATA / "dbrx-nano", DATA / "war-of-the-worlds.txt"


def test_command(cli: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["sensitivity", NANO, "--text", BOOK, "--by", "layer", "--format", "int8", "--context", 64, "--windows", 2]
    outcome = cli(*arguments, "--json", "--out", tmp_path / "a" / "report")
    assert outcome.code == 0, outcome.err
    data = json.loads(outcome.out)
    assert data == json.loads((tmp_path / "a" / "report" / "sensitivity.json").read_text(encoding="utf-8"))
    result = Sensitivity.from_dict(data)
    assert (result.windows, result.context, result.tokens, result.dtype, result.by) == (2, 64, 126, "float32", "layer")
    assert (result.checkpoint, result.text, result.text_sha256) == (str(NANO), str(BOOK), load_text(str(BOOK)).sha256)
    assert result.sha256 == open_source(NANO).sha256()
    assert [(unit.name, unit.format, unit.group_size) for unit in result.units] == [(f"layer {layer}", "int8", 64) for layer in range(4)]
    assert sorted(path.name for path in (tmp_path / "a" / "report").iterdir()) == [f"sensitivity.{end}" for end in ("json", "md", "png")]

    shown = cli(*arguments)
    assert shown.code == 0
    assert len([line for line in shown.out.splitlines() if line.startswith("layer ")]) == 4
    assert "2 windows of 64 tokens, 126 predicted" in shown.out
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_command(
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    interrupt_once: Callable[..., Callable[[int, int], None]],
) -> None:
    from dbrx_q.cli import terminal

    out = tmp_path / "out"
    arguments = ["sensitivity", NANO, "--text", BOOK, "--by", "layer", "--context", 64, "--windows", 1, "--json", "--out", out]
    expected = json.loads(cli(*arguments).out)
    assert not list((tmp_path / "cache").rglob("*.npz"))
    interrupt = interrupt_once(2, error)
    reported: list[int] = []

    @contextmanager
    def progress(label: str) -> Iterator[Callable[[int, int], None]]:
        def on_run(outcome: int, total: int) -> None:
            reported.append(outcome)
            interrupt(outcome, total)

        yield on_run

    monkeypatch.setattr(terminal, "progress", progress)
    outcome = cli(*arguments)
    assert outcome.code == 2
    message = " ".join(outcome.err.split())
    if error is KeyboardInterrupt:
        assert "interrupted after 2 of 4 parts; the figures are of these alone, and the same command with --resume continues" in message
        result = Sensitivity.from_dict(json.loads(outcome.out))
        assert (result.complete, [unit.name for unit in result.units]) == (False, ["layer 0", "layer 1"])
        assert json.loads((out / "sensitivity.json").read_text(encoding="utf-8")) == json.loads(outcome.out)
    else:
        assert outcome.out == ""
        assert "what was measured is kept: the same command with --resume continues" in message
    reported.clear()
    resumed = cli(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert reported == [2, 3, 4]
    assert {**json.loads(resumed.out), "provenance": 0} == {**expected, "provenance": 0}
    assert not list((tmp_path / "cache").rglob("*.npz"))

    interrupt = interrupt_once(2, error)
    assert cli(*arguments).code == 2
    reported.clear()
    assert cli(*arguments).code == 0  # without --resume the run starts from the beginning
    assert reported == [0, 1, 2, 3, 4]


def test_figures_are_printed_before_files_are_written(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dbrx_q.eval.sensitivity import report as sensitivity_report

    def fail(*_: object) -> None:
        raise RequestError("a report's folder must be writable; No space left on device. Give another name or make room")

    arguments = ["sensitivity", NANO, "--text", BOOK, "--by", "layer", "--context", 64, "--windows", 1, "--json", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity_report, "write_files", fail)
        outcome = cli(*arguments)
    assert outcome.code == 2
    assert "No space left" in outcome.err
    result = json.loads(outcome.out)
    assert len(result["units"]) == 4
    resumed = cli(*arguments, "--resume")
    assert resumed.code == 0
    assert json.loads(resumed.out)["units"] == result["units"]
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text(encoding="utf-8")) == json.loads(resumed.out)


def test_parts_without_figures_are_listed(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from dbrx_q.eval.sensitivity import rounding, walk

    arguments = ["sensitivity", NANO, "--text", BOOK, "--by", "kind", "--context", 64, "--windows", 1]
    outcome = cli(*arguments, "--format", "nf4")
    assert outcome.code == 0
    assert "not measured: embedding in nf4:64: the embedding must be int4, int8, affine4" in " ".join(outcome.err.split())
    calls: list[int] = []

    def fail_once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise FormatError("too wide")
        return rounding.rounded(*arguments)

    monkeypatch.setattr(walk, "rounded", fail_once)
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "wte.weight in int4: too wide" in outcome.err
    assert "1 of 9 parts could not be measured" in " ".join(outcome.err.split())
    assert "out_proj" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "48"], "the group size must be one of 32, 64, 128; found 48"),
        (["--format", "nf4", "--group-size", "32"], "in nf4: the group size must be one of 64; found 32"),
        (["--context", "4000"], "the context must be from 2 to the model's 2048 tokens; found 4000"),
        (["--windows", "0"], "at least one window must be measured; found a limit of 0"),
        (["--text", "missing.txt"], "missing.txt: a text must be a file or the name of a data set"),
        (["--text", NANO / "generation_config.json"], "generation_config.json: line 1: must be JSON"),
        (["--out", BOOK], "a report is a folder; found a file"),
        (["--format", "int5"], "int5"),
        (["--by", "expert"], "expert"),
    ],
)
def test_bad_options_are_refused(cli: Callable[..., Any], arguments: list[object], message: str) -> None:
    outcome = cli("sensitivity", NANO, *([] if "--text" in arguments else ["--text", BOOK]), *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in " ".join(outcome.err.replace("│", " ").split())
    assert "Traceback" not in outcome.err


def test_a_short_text(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.", encoding="utf-8")
    outcome = cli("sensitivity", NANO, "--text", tmp_path / "short.txt", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "must fill one window of 512 tokens" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_refused(cli: Callable[..., Any], quantized_nano: Path) -> None:
    outcome = cli("sensitivity", quantized_nano, "--text", BOOK)
    assert outcome.code == 2
    assert "must start from plain weights; found int4" in outcome.err
    assert "Give the checkpoint that it was made from" in outcome.err


def test_without_matplotlib(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = cli("sensitivity", NANO, "--text", "missing.txt", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "pip install 'dbrx_q[eval]'" in outcome.err
    assert not (tmp_path / "out").exists()
