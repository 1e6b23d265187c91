"""The report of a comparison: its files, and its page as Chromium shows it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.errors import RequestError
from dbrx_q.eval.compare.report import FILES, KEYS, write_report
from dbrx_q.eval.compare.report_markdown import front, table
from dbrx_q.eval.compare.result import Comparison, QuantResult, WorstToken
from dbrx_q.eval.report_folder import check_report_folder, write_files

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
HOSTILE = "<script>document.title = 'broken'</script>\"'&\n\t\U0001f600 \u05e9\u05dc\u05d5\u05dd \u202e \udcff |$\\frac{$`*"
CONTRASTS = """
const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n };
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
const behind = node => node ? over(parse(getComputedStyle(node).backgroundColor), behind(node.parentElement)) : [255, 255, 255];
const light = colour => colour.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const contrasts = [];
for (const node of document.querySelectorAll("body *")) {
  const text = [...node.childNodes].filter(child => child.nodeType === 3).map(child => child.data.trim()).join("");
  if (!text) continue;
  const style = getComputedStyle(node), back = behind(node);
  const front = over(parse(node instanceof SVGElement ? style.fill : style.color), back);
  const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
  contrasts.push([node.tagName + " " + text.slice(0, 40), (high + 0.05) / (low + 0.05)]);
}
return contrasts;
"""
PARTS = ("summary", "table", "divergence", "layers", "router", "tokens", "provenance")


def result(number: int, *, layers: int = 4, kl: float | None = None) -> QuantResult:
    mean = 0.02 / (number + 1) if kl is None else kl
    worst = [
        WorstToken(100 + i, f"before {i} {HOSTILE}", f"tok{i}", mean * (50 - i), "left", f"right{number}", 0.75, 0.125) for i in range(10)
    ]
    return QuantResult(
        path=f"checkpoints/model-{number}",
        format=f"int{4 + number} g64",
        bits_per_weight=4.25 + number,
        bytes=1_000_000 * (4 + number),
        perplexity=36.0 - number / 10,
        perplexity_stderr=0.2,
        mean_kl=mean,
        mean_kl_stderr=mean / 50,
        median_kl=mean / 2,
        p90_kl=mean * 3,
        p99_kl=mean * 8,
        p999_kl=mean * 20,
        max_kl=mean * 50,
        delta_ln_ppl=mean / 3,
        delta_ln_ppl_stderr=mean / 30,
        top1_agreement=0.9123,
        top5_agreement=0.9234,
        rms_dp=0.0345,
        router_agreement=[0.99 - 0.03 * layer / layers - 0.01 * number for layer in range(layers)],
        router_jaccard=[0.995 - 0.01 * layer / layers for layer in range(layers)],
        hidden_error=[0.01 * (layer + 1) for layer in range(layers)] if mean else [0.0] * layers,
        tokens=5110,
        sha256=f"{number:064x}",
        worst_tokens=worst,
    )


def comparison(results: list[QuantResult], **changes: Any) -> Comparison:
    base = Comparison(
        reference="models/original",
        reference_format="bfloat16",
        reference_bits_per_weight=16.0,
        reference_bytes=30_000_000,
        reference_perplexity=35.5,
        reference_perplexity_stderr=0.17,
        text="wiki.txt",
        context=512,
        stride=512,
        protocol="non-overlapping",
        tokens=5110,
        total_tokens=5110,
        complete=True,
        approximation="",
        results=results,
        provenance={
            "command": "dbrx-q compare models/original a b",
            "versions": {"dbrx_q": "0.1.0", "torch": "2.13.0"},
            "device": "a processor",
            "threads": 2,
            "system": "Linux x86_64",
            "text_sha256": "ab" * 32,
            "reference_sha256": "cd" * 32,
        },
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its driver here; `make browser` installs it on Debian")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "disable-sync", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def opened(browser: Any, shown: Comparison, folder: Path, width: int = 1280, scheme: str = "light") -> Any:
    write_report(shown, folder)
    # Not the window's size, which Chromium keeps above 500.
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get((folder / "report.html").as_uri())
    return browser


def test_chromium_shows_every_part(browser: Any, tmp_path: Path) -> None:
    results = [result(number) for number in range(3)]
    page = opened(browser, comparison(results), tmp_path)
    for part in PARTS:
        section = page.find_element("id", part)
        assert section.is_displayed(), part
        assert section.size["height"] > 40, part
        assert section.size["width"] > 400, part
    assert page.title == "Divergence from models/original"
    assert "5,110 tokens" in page.find_element("id", "summary").text
    table = page.find_element("id", "table").text
    for row in results:
        assert f"model-{row.path[-1]}" in table
        assert f"{row.bits_per_weight:.3f}" in table
        assert f"{row.mean_kl:.4g}" in table
    assert page.find_elements("css selector", "#table td.best")
    for part, least in (("divergence", 200), ("layers", 200)):
        drawing = page.find_element("css selector", f"#{part} svg")
        assert drawing.size["height"] > least
        assert all(f"model-{number}" in drawing.get_attribute("textContent") for number in range(3))
    heat = page.find_elements("css selector", "#router td.heat")
    assert len(heat) == 3 * 4
    colours = {cell.value_of_css_property("background-color") for cell in heat}
    assert len(colours) > 3  # the less agreement, the stronger
    tokens = page.find_elements("css selector", "#tokens tbody tr")
    assert len(tokens) == 30
    assert "tok0" in tokens[0].text
    assert "75.00%" in tokens[0].text
    assert page.find_element("css selector", "#tokens mark").value_of_css_property("background-color") != "rgba(0, 0, 0, 0)"
    provenance = page.find_element("id", "provenance").text
    for words in ("dbrx-q compare models/original a b", "a processor", "torch 2.13.0", "ab" * 32, "cd" * 32, results[1].sha256):
        assert words in provenance


def test_text_from_models_is_escaped(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, comparison([replace(result(0), path=HOSTILE)], reference=HOSTILE, text=HOSTILE), tmp_path)
    assert page.title.startswith("Divergence from <script>")
    assert not page.find_elements("css selector", "script")
    assert "<script>document.title" in page.find_element("css selector", "#tokens td.words").text
    for sign in ("↵", "⇥", "\\u202e", "\\udcff"):
        assert sign in page.find_element("css selector", "#tokens td.words").text
    assert "\u202e" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    document = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in document
    lines = [re.sub(r"\\.", "", line) for line in document.splitlines() if line.startswith("|")]
    header = next(line for line in lines if line.startswith("| checkpoint | format"))
    assert len([line for line in lines if line.count("|") == header.count("|")]) == 4


def test_the_page_loads_no_other_resource(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, comparison([result(0), result(1)]), tmp_path)
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert not [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for attribute in ('src="', "@import", "url(http"):
        assert attribute not in text


@pytest.mark.parametrize("layers", [4, 40])
def test_only_tables_scroll_on_a_narrow_screen(browser: Any, tmp_path: Path, layers: int) -> None:
    from selenium.webdriver.common.by import By

    results = [
        replace(result(number, layers=layers), path=f"a/very/long/path/to/a/checkpoint/that/is/number-{number}") for number in range(12)
    ]
    page = opened(browser, comparison(results), tmp_path, width=400)
    assert page.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [400, 400]
    for part in ("table", "router", "tokens"):
        scrolled = page.find_element(By.CSS_SELECTOR, f"#{part} .scroll")
        assert page.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", scrolled), part
    assert page.find_element(By.CSS_SELECTOR, "#divergence svg").size["width"] > 600  # smaller, its text could not be read


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_colour_schemes(browser: Any, tmp_path: Path, scheme: str) -> None:
    """WCAG 2 requires a contrast of at least 4.5 between a text and its background."""
    results = [replace(result(number), router_agreement=[1.0, 0.9, 0.8, 0.5]) for number in range(12)]
    page = opened(browser, comparison(results, complete=False), tmp_path, scheme=scheme)
    dark = page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")
    ratios = page.execute_script(CONTRASTS)
    assert len(ratios) > 100
    assert {text: ratio for text, ratio in ratios if ratio < 4.5} == {}


def test_a_partial_run_is_marked(browser: Any, tmp_path: Path) -> None:
    partial = comparison([result(0)], complete=False, tokens=1022, approximation="the reference kept its 64 likeliest tokens")
    summary = opened(browser, partial, tmp_path).find_element("id", "summary").text
    assert "interrupted after 1,022 of 5,110 tokens" in summary
    assert "64 likeliest" in summary
    document = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "1,022 of 5,110" in document
    assert "64 likeliest" in document


def test_a_checkpoint_that_does_not_diverge_is_drawn(tmp_path: Path) -> None:
    write_report(comparison([result(0, kl=0.0)]), tmp_path)
    write_report(comparison([result(0, kl=0.0), result(1)]), tmp_path)
    assert (tmp_path / "divergence.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_overflows_is_reported(tmp_path: Path, value: float) -> None:
    broken = replace(result(0, kl=value), perplexity=value, hidden_error=[0.1, value, value, value])
    write_report(comparison([broken, result(1), result(2)]), tmp_path)
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert data["results"][0]["mean_kl"] is None
    document = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "model-2 is the closest" in document
    assert "both smaller and closer: model-1, model-2." in document
    write_report(comparison([broken]), tmp_path)


def test_files_of_a_report(tmp_path: Path) -> None:
    written = comparison([result(0), result(1)])
    (tmp_path / "mine.txt").write_text("stays")
    write_report(comparison([result(2)]), tmp_path)
    write_report(written, tmp_path)
    names = {"report.md", "report.json", "report.html", "divergence.png", "divergence.svg", "mine.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert Comparison.from_dict(json.loads((tmp_path / "report.json").read_text())) == written
    document = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = [line for line in document.splitlines() if line.startswith("| model-0 | int4")]
    assert len(rows) == 1
    header = next(line for line in document.splitlines() if line.startswith("| checkpoint | format"))
    assert rows[0].count("|") == header.count("|")
    assert "| 0.02000 |" in rows[0]


def test_the_front_of_bits_and_divergence() -> None:
    rows = [replace(result(0), bits_per_weight=bits, mean_kl=kl) for bits, kl in ((4, 0.02), (5, 0.01), (5, 0.03), (6, 0.01), (8, 0.001))]
    assert [front(row, rows) for row in rows] == [True, True, False, False, True]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="a report is a folder; found a file"):
        check_report_folder(tmp_path / "file", FILES, KEYS)
    with pytest.raises(RequestError, match="a report's folder must be writable"):
        write_report(comparison([result(0)]), tmp_path / "file" / "report")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RequestError, match="must be writable"):
        check_report_folder(tmp_path / "new" / "report", FILES, KEYS)


def test_only_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    report, folder = tmp_path / "report", tmp_path / "other"
    write_report(comparison([result(0)]), report)
    check_report_folder(report, FILES, KEYS)
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    check_report_folder(folder, FILES, KEYS)
    (folder / "report.md").write_text("my own")
    with pytest.raises(RequestError, match=r"report.md: only an earlier report is replaced"):
        check_report_folder(folder, FILES, KEYS)


def test_a_report_that_cannot_be_finished_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "report", {"report.md": b"old", "report.json": b"old"})
    full = OSError(28, "No space left on device")
    write = Path.write_bytes

    def fails(path: Path, data: bytes) -> int:
        if ".report.json." in path.name:
            raise full
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fails)
    for folder in (tmp_path / "report", tmp_path / "new" / "report"):
        with pytest.raises(RequestError, match="No space left on device"):
            write_files(folder, {"report.md": b"new", "report.json": b"new"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == {"report.md": b"old", "report.json": b"old"}
    assert not (tmp_path / "new").exists()


def test_quantization_time_has_a_column_where_it_is_known() -> None:
    plain = table(comparison([result(0), result(1)])).splitlines()
    assert not any("quantized in" in line for line in plain)
    timed = table(comparison([replace(result(0), quantize_seconds=2.345), result(1)])).splitlines()
    assert timed[0] == plain[0] + " quantized in |"
    assert timed[3] == plain[3] + " 2.3 s |"
    assert len({line.count("|") for line in timed}) == 1
