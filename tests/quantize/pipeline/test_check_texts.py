"""`dbrx-q quantize --check-text`: what it prints, plans and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.quantize.calibration.sources import CalibrationWarning

DATA = Path(__file__).parents[2] / "data"
BOOK, WIKI = DATA / "war-of-the-worlds.txt", DATA / "wikitext2-test.txt"
SIZES = ("--sequences", 8, "--length", 64)
BEST = ("--method", "best", "--calibration", BOOK, *SIZES)
CHECK = ("--check-text", WIKI, "--check-sequences", 4)
Cli = Callable[..., Any]


def test_the_last_lines_say_what_was_measured(small: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("quantize", small, tmp_path / "out", *BEST, *CHECK, "--no-worse-than-rtn")
    assert outcome.code in (0, 1), outcome.err  # random weights may be hurt
    lines = outcome.out.splitlines()
    assert any(
        line.startswith("check text wikitext2-test.txt: mean KL ") and " ± " in line and ", rounding to nearest " in line for line in lines
    )
    assert any(line.startswith("Calibration hurt ") for line in lines)
    assert any(" of 16 matrices are rounded to nearest" in line for line in lines)
    again = cli("quantize", small, tmp_path / "out", *BEST, *CHECK, "--no-worse-than-rtn", "--resume")
    assert (again.code, again.out) == (0, "")
    assert "was completed without" not in again.err
    other = cli("quantize", small, tmp_path / "out", *BEST, "--check-text", DATA / "README.md", "--no-worse-than-rtn", "--resume")
    assert "was completed without the check text" in other.err
    assert f"--text {DATA / 'README.md'} measures it" in other.err


def test_methods_without_calibration_are_checked_too(small: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("quantize", small, tmp_path / "rtn", "--length", 64, *CHECK, "--json")
    assert outcome.code == 0, outcome.err
    (record,) = json.loads(outcome.out)["held_out"]
    assert (record["name"], record["kind"], record["sequences"], record["tokens"]) == ("wikitext2-test.txt", "check text", 4, 4 * 63)
    assert record["divergence"]["quantized"] == record["divergence"]["nearest"]
    assert not record["hurts"]
    outcome = cli("quantize", small, tmp_path / "out", "--length", 64, *CHECK)
    assert "rounding to nearest" not in outcome.out


def test_a_dry_run_plans_the_check(small: Path, tmp_path: Path, cli: Cli) -> None:
    command = ("quantize", small, tmp_path / "out", *BEST, "--dry-run")
    plain, checked = (json.loads(cli(*command, *more, "--json").out) for more in ((), CHECK))
    assert (plain["checked_tokens"], checked["checked_tokens"]) == (0, 4 * 64)
    assert plain["held_out_tokens"] == checked["held_out_tokens"] == 2 * 64
    assert checked["activations"] - plain["activations"] == 2 * 3 * 4 * 64 * 64 * 4
    assert checked["flops"] - plain["flops"] == pytest.approx(checked["check_flops"])
    text = cli(*command, *CHECK).out
    assert "held out           128  tokens" in text
    assert "check texts        256  tokens, which take about" in text


def test_texts_that_say_nothing_are_refused(small: Path, tmp_path: Path, cli: Cli) -> None:
    short, part = tmp_path / "short.txt", tmp_path / "part.txt"
    short.write_text("The old man")
    part.write_text(BOOK.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    out = tmp_path / "out"
    for arguments, message in (
        ((*BEST, "--check-text", short), "must hold at least one sequence of 64 tokens; found 3"),
        ((*BEST, "--check-text", tmp_path / "none.txt"), "none.txt: a text must be a file"),
        ((*BEST, *CHECK, *CHECK), "must name each text once"),
        ((*BEST, "--check-text", BOOK), "must name a text that --calibration does not"),
        ((*BEST, "--calibration", f"{WIKI}:0", *CHECK), f"which is its source {WIKI.name}"),
        ((*SIZES, "--method", "hqq", "--no-worse-than-rtn"), "as the method takes no calibration"),
        ((*BEST, "--check-text", WIKI, "--check-sequences", 0), "--check-sequences"),
    ):
        outcome = cli("quantize", small, out, *arguments)
        assert (outcome.code, outcome.out) == (2, ""), arguments
        assert message in " ".join(outcome.err.split()), outcome.err
        assert "Traceback" not in outcome.err
    assert not out.exists()
    sequences = ("--method", "best", "--calibration", BOOK, "--sequences", 1400, "--length", 64)
    with pytest.warns(CalibrationWarning, match=r"part.txt: \d+% of its sequences is also in the text that calibrates"):
        assert cli("quantize", small, out, *sequences, "--check-text", part, "--dry-run").code == 0
