"""The table of formats of all sizes: which figures stand where, what DBRX would take, and that finished work is used again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bits
import ggml_types
import numpy as np
import pytest
from bits import Mix, Row, size_at_dbrx
from bits_tables import Figures, Result, plot, size_table, text_table

from dbrx_q.sources.open import open_source

TEXTS = {"wiki": "WikiText-2", "novel": "A novel"}


def figures(kl: float) -> Figures:
    return Figures(kl, kl / 100, 34.5, 34.0, 0.0146, 0.0005, 0.95, 0.9)


def result(title: str, calibration: str, kl: dict[str, float], series: str = "") -> Result:
    measured = {(text, 96): figures(value) for text, value in kl.items()}
    return Result(series, title, calibration, Path(), True, False, 12.3, 2.002, 37.0e9, measured)


def rows() -> list[Result]:
    return [
        result("--format int4 --group-size 64 --method best", "wiki", {"wiki": 0.005, "novel": 0.006}, "int, best"),
        result("--format trellis2 --method best", "wiki", {"wiki": 0.04, "novel": 0.05}, "trellis, best"),
        result("--format int4 --group-size 64 --method best", "book", {"wiki": 0.01, "novel": 0.005}),
        result("--format trellis2 --method best", "book", {"wiki": 0.06, "novel": 0.045}),
    ]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_sizes_has_one_calibration_and_says_what_is_unfinished_or_failed() -> None:
    others = [Result("int, best", "--format int3 --method best", "wiki", failure="x"), Result("int, best", "--format int2", "wiki")]
    _, _, reference, int4, trellis2, int3, int2 = (cells(line) for line in size_table([*rows(), *others], "wiki", 96).splitlines())
    assert reference[:2] == ["not quantized", ""]
    assert reference[6] == "34.000"
    assert int4[0] == "`--format int4 --group-size 64 --method best`"
    assert trellis2[2:] == ["2.002", "37.0", "0.0400 ± 0.0004", "", "34.500", "+0.0146 ± 0.0005", "95.00%", "90.00%", "12 s"]
    assert (int3[4], int2[4]) == ("failed", "unfinished")


def test_the_table_of_texts_says_by_how_much_each_format_grows_and_whether_the_order_is_the_same() -> None:
    table, verdict = text_table(rows(), TEXTS, 96).split("\n\n")
    assert cells(table.splitlines()[3]) == ["`trellis2`", "0.0400 (1.00)", "0.0500 (1.25)", "0.0600 (1.50)", "0.0450 (1.12)"]
    assert verdict == "From the least divergence to the most: int4:64, trellis2, on every text and by either calibration."
    swapped = rows()
    swapped[3].figures["novel", 96] = figures(0.004)
    assert text_table(swapped, TEXTS, 96).endswith("int4:64, trellis2; in another order: trellis2, int4:64 on A novel by book.")
    assert text_table(rows()[:3], TEXTS, 96).endswith("Unfinished.")


def test_the_plot_joins_the_formats_of_a_method_and_names_files_of_other_programs() -> None:
    shown = [*rows(), result("llama.cpp's file in Q4_0", "", {"wiki": 0.02}, "llama.cpp")]
    shown[0].expert_bits = 4.3
    shown.append(result("--format trellis4 --method best", "wiki", {"wiki": 0.0038}, "trellis, best"))
    shown[-1].expert_bits = 4.002
    [axes] = plot(shown, "wiki", 96).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert np.array(lines["trellis, best"].get_xydata()).tolist() == [[2.002, 0.04], [4.002, 0.0038]]
    assert set(lines) == {"trellis, best", "int, best", "llama.cpp"}
    assert [text.get_text() for text in axes.texts] == ["Q4_0"]


def test_sizes_are_those_of_dbrx_and_not_of_the_small_model(nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    assert size_at_dbrx(nano) == (16.0, pytest.approx(263.19e9, rel=1e-4))
    folder = tmp_path / "int4"
    assert cli("quantize", nano, folder, "--group-size", 64).code == 0
    expert_bits, whole = size_at_dbrx(folder)
    assert expert_bits == pytest.approx(4 + 20 / 64)
    assert whole == pytest.approx(73.3e9, rel=1e-3)
    assert size_at_dbrx(nano.parent / "dbrx-nano-gguf" / "dbrx-nano.Q4_0.gguf")[0] == pytest.approx(4.5)


def test_a_mix_may_take_the_bits_between_two_formats(nano: Path) -> None:
    low, middle, high = (bits._target(nano, Mix("int4:64", "int8:64", share)) for share in (0.0, 0.5, 1.0))
    assert middle == pytest.approx((low + high) / 2, abs=1e-4)


def test_a_run_measures_and_is_used_again_until_code_or_options_change(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    book = (Path(__file__).parents[1] / "data" / "war-of-the-worlds.txt").read_text(encoding="utf-8")
    for name in ("final/wikitext-2.txt", "calibration/wikitext-2.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(book[20_000:24_000], encoding="utf-8")
    size = ("--format", "int4", "--group-size", "32")
    monkeypatch.setattr(bits, "ROWS", (Row("int, to nearest", "rtn", size), Row("int, best", "best", (*size, "--length", "64"), bits.WIKI)))
    monkeypatch.setattr(bits, "CONTEXT", 32)
    monkeypatch.setattr(bits, "WINDOWS", 4)
    monkeypatch.setattr(bits, "TEXTS", {"wikitext-2": "WikiText-2"})
    document = tmp_path / "document.md"
    document.write_text(
        "".join(f"<!-- begin: {name} -->\nold\n<!-- end: {name} -->\n" for name in ("bits", "bits-texts")), encoding="utf-8"
    )
    command = [str(small), str(tmp_path / "out"), "--texts", str(tmp_path), "--document", str(document)]
    assert bits.main([*command, "--plot", str(tmp_path / "plot.svg"), "--only", "^rtn"]) == 0
    text = document.read_text(encoding="utf-8")
    assert "| `--format int4 --group-size 32 --method rtn` |" in text
    assert "](plot.svg)" in text
    assert "old" not in text
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert len(capsys.readouterr().err.splitlines()) == 2  # the commands that quantized and measured

    assert bits.main([*command, "--only", "^rtn"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(bits, "code_digest", lambda: "other")
    assert bits.main([*command, "--only", "^rtn", "--any-code"]) == 0
    assert capsys.readouterr().err == ""
    assert bits.main([*command, "--measure-only"]) == 0  # the other row stays unfinished
    assert capsys.readouterr().err == ""
    assert "unfinished" in document.read_text(encoding="utf-8")
    assert bits.main([*command, "--only", "^rtn"]) == 0
    assert capsys.readouterr().err.count("dbrx-q quantize") == 1


def test_a_block_of_a_type_of_llama_cpp_may_hold_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    class Library:
        @staticmethod
        def ggml_quantize_chunk(kind: Any, source: Any, codes: Any, start: Any, rows: Any, width: Any, weights: Any) -> int:
            given.update(kind=kind.value, rows=rows.value, width=width.value, weights=weights)
            return rows.value * width.value // 256 * 84

    values = ggml_types.quantized(np.ones((4, 128), np.float32), "Q2_K", Library, np.arange(128))  # type: ignore[arg-type]
    assert values.shape == (4, 128)
    assert (given["kind"], given["rows"], given["width"]) == (10, 2, 256)


def test_a_folder_of_a_type_of_llama_cpp_says_its_bits(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Q2_K-imatrix"
    folder.mkdir()
    for path in nano.iterdir():
        (folder / path.name).symlink_to(path)
    record = {"type": "Q2_K", "imatrix": True, "bits": dict.fromkeys(("w1", "v1", "w2"), 2.625)}
    (folder / ggml_types.TYPE_FILE).write_text(json.dumps(record), encoding="utf-8")
    row = bits._of_another_program(folder)
    assert (row.series, row.title) == ("llama.cpp, importance matrix", "experts in llama.cpp's Q2_K")
    assert size_at_dbrx(folder)[0] == 2.625
    assert open_source(str(folder)).bits_per_weight == 16
