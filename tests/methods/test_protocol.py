"""The protocol by which methods are measured: its tables against figures computed by hand, and runs on a small model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import protocol
import pytest
import torch
from tables import Figures, Result, divergences, mean_and_error, perplexities, plot, tables

from dbrx_q.eval.divergence import Distribution, scores
from dbrx_q.sources.open import open_source

TITLES = {"wiki": "WikiText-2", "code": "Python"}
CONTEXT, WINDOWS = 32, 3


def result(
    method: str, calibration: str, kl: dict[str, dict[int, list[float]]], seeds: tuple[int, ...] = (0,), size: str = "int4 g64"
) -> Result:
    figures = {
        text: {seed: Figures(values, [value / 2 for value in values], [3.0] * len(values)) for seed, values in by_seed.items()}
        for text, by_seed in kl.items()
    }
    return Result(method, size, calibration, seeds, 4.98, [10.0, 20.0], figures)


def results() -> list[Result]:
    return [
        result("rtn", "none", {"wiki": {0: [0.010, 0.014]}, "code": {0: [0.0199, 0.0201]}}),
        result(
            "best", "WikiText-2", {"wiki": {0: [0.005, 0.007], 1: [0.004, 0.006]}, "code": {0: [0.022, 0.026], 1: [0.018, 0.020]}}, (0, 1)
        ),
    ]


def cells(table: str, name: str) -> list[str]:
    [row] = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_table_of_divergences_has_ratios_and_the_worst_of_them_for_each_seed() -> None:
    table = divergences(results(), TITLES)
    assert cells(table, "rtn, int4 g64")[3:7] == ["0.0120 ± 0.002 (1.00)", "0.0200 ± 0.0001 (1.00)", "1.00 WikiText-2", ""]
    best = cells(table, "best, int4 g64")
    # wiki: windows (0.0045, 0.0065), mean 0.0055, standard error 0.001; code: (0.020, 0.023), mean 0.0215, standard error 0.0015.
    assert best[1:5] == ["WikiText-2", "4.98", "0.00550 ± 0.001 (0.46)", "0.0215 ± 0.002 (**1.07**)"]
    assert best[5:] == ["**1.20**, 0.95 Python", "0, 1", "15 s"]


def test_the_standard_error_is_that_of_windows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.random((2, 50))
    mean, error = mean_and_error(rows.tolist())
    assert mean == pytest.approx(rows.mean())
    assert error == pytest.approx(rows.mean(0).std(ddof=1) / 50**0.5)


def test_the_table_of_perplexities_begins_with_the_model_itself() -> None:
    table = perplexities(results(), TITLES)
    assert cells(table, "not quantized: ln PPL")[2:] == ["3.0000 ± 0.0000"] * 2
    assert cells(table, "best, int4 g64")[2:] == ["+0.0028 ± 0.0005", "+0.0107 ± 0.0008"]


def test_rows_that_are_unfinished_or_failed_say_so() -> None:
    rows = results()
    rows[1].figures["code"].pop(1)
    rows.append(result("gptq", "self", {}, (0, 1)))
    rows.append(result("awq", "self", {}, (0, 1)))
    rows[3].failures = {0: "error: too short", 1: "error: too short"}
    table = divergences(rows, TITLES)
    assert cells(table, "best, int4 g64")[5:7] == ["**1.20** Python", "0; 1 unfinished"]
    assert cells(table, "gptq, int4 g64")[3:7] == ["unfinished", "unfinished", "", "0 unfinished; 1 unfinished"]
    assert cells(table, "awq, int4 g64")[3:7] == ["failed", "failed", "", "0 failed; 1 failed"]
    assert "(" not in "".join(cells(divergences(rows[1:], TITLES), "best, int4 g64")[3:6])  # without the baseline no ratio
    assert "unfinished" in tables(rows, TITLES, "heading")


def test_the_plot_shows_the_ratios_of_each_calibration_in_a_panel_of_its_own() -> None:
    rows = results()
    rows.append(result("GGUF", "WikiText-2 (imatrix)", {"wiki": {0: [0.024]}, "code": {0: [0.030]}}, size="Q4_0"))
    rows.append(result("clip", "none", {"wiki": {0: [0.009]}, "code": {0: [0.020]}}))
    rows.append(result("rtn", "none", {"wiki": {0: [0.009]}, "code": {0: [0.020]}}, size="int8"))  # another format
    drawing = plot(rows, TITLES)
    assert [axes.get_title() for axes in drawing.axes] == ["calibration: WikiText-2", "calibration: none"]
    lines = {container.get_label(): container[0] for axes in drawing.axes for container in axes.containers}
    assert {name: np.array(line.get_ydata(), dtype=float).round(3).tolist() for name, line in lines.items()} == {
        "best": [0.458, 1.075],
        "GGUF Q4_0": [2.0, 1.5],
        "clip": [0.75, 1.0],
    }
    assert len({line.get_color() for line in lines.values()}) == len({line.get_marker() for line in lines.values()}) == 3


@pytest.fixture(scope="module")
def texts(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    book = (nano.parent / "war-of-the-worlds.txt").read_text(encoding="utf-8")
    for path, content in {
        "final/moby-dick.txt": book[20_000:21_000],
        "final/wikitext-2.txt": book[30_000:31_000],
        "calibration/wikitext-2.txt": "Too short.",
        "calibration/wikitext-2-four-fifths.txt": "Too short as well.",
    }.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")
    return folder


def test_windows_are_measured_like_float64_logits(
    small: Path, nano: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = texts / "final/moby-dick.txt"
    [figures] = protocol.measure(small, [small], text, CONTEXT, WINDOWS)
    assert figures.kl == pytest.approx([0.0] * WINDOWS, abs=1e-9)
    source = open_source(str(small))
    model = source.load(dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.tensor(source.tokenizer().encode(text.read_text(encoding="utf-8"), split_special_tokens=True))
    with torch.no_grad():
        for number in range(WINDOWS):
            window = ids[number * CONTEXT : (number + 1) * CONTEXT]
            own = Distribution.of(model(window[None]).logits[0, :-1], window[1:])
            assert figures.reference[number] == pytest.approx(float(own.nll.mean()), rel=1e-4)
            assert scores(own, own).kl.mean() == pytest.approx(figures.change[number], abs=1e-9)


def test_a_run_measures_continues_and_reports_failures(
    small: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    document = tmp_path / "document.md"
    document.write_text("Before.\n<!-- begin: methods -->\nold\n<!-- end: methods -->\nAfter.\n", encoding="utf-8")
    command = [str(small), str(tmp_path / "out"), "--texts", str(texts), "--set", "final", "--context", str(CONTEXT), "--windows", "4"]
    command += ["--document", str(document), "--plot", str(tmp_path / "plot.png"), "--only", "^(rtn, int4 g64|gptq.* WikiText-2$)"]
    assert protocol.main([*command, "--seeds", "0"]) == 1  # GPTQ's text is too short
    table = document.read_text(encoding="utf-8")
    assert table.startswith("Before.\n")
    assert table.endswith("After.\n")
    assert "\nold\n" not in table
    assert re.fullmatch(r"[\d.e-]+ ± \S+ \(1\.00\)", cells(table.split("| change")[0], "rtn, int4 g64")[3])
    assert cells(table.split("| change")[0], "gptq, int4 g64")[6] == "0 failed"
    assert "](plot.png)" in table
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert protocol.main([*command, "--measure-only"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == finished
    again = document.read_text(encoding="utf-8")
    assert cells(again.split("| change")[0], "gptq, int4 g64")[6] == "0 unfinished; 1 unfinished"
    assert cells(again.split("| change")[0], "rtn, int4 g64") == cells(table.split("| change")[0], "rtn, int4 g64")
    assert "quantizing" not in capsys.readouterr().err.split("failed:")[1]


def test_a_checkpoint_is_made_again_when_code_text_options_or_seed_change_but_not_for_a_comment(
    small: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "ROOT", tmp_path)
    for floor in ("kernels", "quantize"):
        (tmp_path / floor).mkdir()
    path = tmp_path / "quantize" / "method.py"

    def digest(code: str) -> str:
        path.write_text(code, encoding="utf-8")
        return protocol.code_digest()

    before = digest('"""A method."""\nSHARE = 0.5\n"""Of all."""\n\ndef f():\n    """What."""\n    return SHARE\n')
    assert digest('"""Another."""\nSHARE = 0.5  # why\n\ndef f():\n    """How."""\n    return SHARE\n') == before
    assert digest('"""A method."""\nSHARE = 0.6\n\ndef f():\n    """What."""\n    return SHARE\n') != before

    def folder(
        kind: str = "final", seed: int = 0, code: str = "", change: Callable[[protocol.Row], protocol.Row] = lambda row: row
    ) -> Path:
        row = change(protocol.Row("gptq", "int4 g64", ("--group-size", "64"), protocol.WIKI))
        return protocol._checkpoint(protocol.Run(small, tmp_path, texts, kind, 32, 4), row, seed, code)

    def other_groups(row: protocol.Row) -> protocol.Row:
        return protocol.Row(row.method, row.size, ("--group-size", "32"), row.calibration)

    folders = [folder(), folder(seed=1), folder(code="x"), folder("validation"), folder(change=other_groups)]
    assert len({path.name for path in folders}) == len(folders)
    assert folder() == folders[0]


def test_choices_calibrate_on_what_does_not_decide_them(texts: Path) -> None:
    def names(kind: str, calibration: str) -> list[str]:
        run = protocol.Run(Path("model"), Path("out"), texts, kind, 32, 4)
        return [Path(file).name for file in run.calibration_files(calibration)]

    assert names("validation", protocol.WIKI) == ["wikitext-2-four-fifths.txt"]
    assert names("final", protocol.MIX) == ["wikitext-2.txt", "novel.txt"]
    assert names("final", protocol.SELF) == ["self"]
    assert names("final", "none") == []


def test_a_gguf_file_is_named_by_its_type_and_matrix() -> None:
    assert protocol._gguf_result(Path("x/dbrx-nano.Q4_K_M.gguf"), 0).key == ("GGUF", "Q4_K_M", "none")
    assert protocol._gguf_result(Path("dbrx-nano.Q4_0-imatrix.gguf"), 0).key == ("GGUF", "Q4_0", "WikiText-2 (imatrix)")
