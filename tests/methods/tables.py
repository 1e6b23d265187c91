"""The figures of a run of `protocol.py`, and the tables and the plot that show them.

Dimension letters: `W` windows of a text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dbrx_q.plots import INK, MUTED, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BASELINE", "IMATRIX", "Figures", "Result", "divergences", "perplexities", "plot", "tables", "worst_ratios"]

BASELINE = ("rtn", "int4 g64", "none")
"""Method, format and calibration of the row that ratios are taken of: rounding to nearest, without data."""
IMATRIX = " (imatrix)"
"""Ends the calibration of a GGUF file that was made with an importance matrix."""


@dataclass(frozen=True)
class Figures:
    """What one checkpoint predicts on one text, beside the reference."""

    kl: list[float]
    """[W], mean KL(reference || checkpoint) of each window's tokens, in nats."""
    change: list[float]
    """[W], mean negative log-likelihood of the checkpoint less that of the reference, in nats."""
    reference: list[float]
    """[W], mean negative log-likelihood of the reference, in nats."""

    def save(self, path: Path) -> None:
        """Write the figures as JSON, in one step."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Figures:
        """The figures that `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass
class Result:
    """One row of the tables: a method with one calibration, and what is known of it so far."""

    method: str
    """Such as "best"."""
    size: str
    """Format of the experts, such as "int4 g64", or what a file of another program is."""
    calibration: str
    """What the method saw, such as "WikiText-2"; "none" without data."""
    seeds: tuple[int, ...]
    """Seeds that the row is to have; without data, one of any number."""
    bits_per_weight: float = math.nan
    """Of the whole checkpoint."""
    seconds: list[float] = field(default_factory=list)
    """Duration of the quantization, for each seed that is finished; empty where it is not recorded."""
    figures: dict[str, dict[int, Figures]] = field(default_factory=dict)
    """By name of the text, then by seed."""
    failures: dict[int, str] = field(default_factory=dict)
    """Last line of the error, by seed whose quantization failed."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells the rows of a table apart."""
        return self.method, self.size, self.calibration

    @property
    def state(self) -> str:
        """The seeds that all texts have, and those that are unfinished or failed; empty for a finished row without data."""
        done = [seed for seed in self.seeds if self.figures and all(seed in by_seed for by_seed in self.figures.values())]
        if self.calibration == "none" and len(done) == len(self.seeds):
            return ""
        parts = [", ".join(map(str, done))] if done else []
        parts += [f"{seed} failed" if seed in self.failures else f"{seed} unfinished" for seed in self.seeds if seed not in done]
        return "; ".join(parts)


def mean_and_error(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean over windows and seeds, and its standard error over windows; rows: [seeds, W], a row for each seed on the same windows."""
    windows = np.asarray(rows, dtype=np.float64).mean(0)  # [W]
    error = windows.std(ddof=1) / math.sqrt(len(windows)) if len(windows) > 1 else math.nan
    return float(windows.mean()), float(error)


def ratios(result: Result, baseline: Result | None, text: str) -> dict[int, float]:
    """By finished seed, mean KL over that of the baseline on the same text; empty if the baseline is unfinished."""
    known = {} if baseline is None else baseline.figures.get(text, {})
    if not known:
        return {}
    expected = float(np.mean([np.mean(figures.kl) for figures in known.values()]))
    return {seed: float(np.mean(figures.kl)) / expected for seed, figures in result.figures.get(text, {}).items()}


def worst_ratios(result: Result, baseline: Result | None, texts: Sequence[str]) -> dict[int, tuple[float, str]]:
    """By seed, the largest ratio of any text, and that text; without seeds of which a text has not been measured."""
    by_text = {text: ratios(result, baseline, text) for text in texts}
    return {
        seed: max((by_text[text][seed], text) for text in texts)
        for seed in result.seeds
        if texts and all(seed in by_seed for by_seed in by_text.values())
    }


def _relative_error(result: Result, text: str) -> float:
    """Standard error of the mean KL over the mean KL itself."""
    mean, error = mean_and_error([figures.kl for figures in result.figures[text].values()])
    return error / mean


def tables(results: Sequence[Result], titles: Mapping[str, str], heading: str) -> str:
    """The Markdown that goes between the markers of a document.

    Args:
        results: the rows, in order.
        titles: name of a text to the heading of its column, in order.
        heading: one paragraph on what was measured.
    """
    return "\n\n".join([heading, divergences(results, titles), perplexities(results, titles)])


def divergences(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    """Mean KL with its standard error and, in brackets, its ratio to the baseline; a ratio above 1 is bold."""
    baseline = _baseline(results)
    lines = _head(["method", "calibration", "bits per weight", *titles.values(), "worst ratio", "seeds", "quantized in"], words=2)
    for result in results:
        cells = [_divergence(result, baseline, text) for text in titles]
        worst = worst_ratios(result, baseline, list(titles)).values()
        seconds = f"{np.mean(result.seconds):.0f} s" if result.seconds else ""
        bits = "" if math.isnan(result.bits_per_weight) else f"{result.bits_per_weight:.2f}"
        summary = ", ".join(_ratio(ratio) for ratio, _ in worst) + (f" {titles[max(worst)[1]]}" if worst else "")
        lines.append(_row([f"{result.method}, {result.size}", result.calibration, bits, *cells, summary, result.state, seconds]))
    return "\n".join(lines)


def perplexities(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    """Change of ln PPL with its standard error; the first row has the reference's own perplexity."""
    lines = _head(["change of ln PPL", "calibration", *titles.values()], words=2)
    lines.append(_row(["not quantized: ln PPL", "", *(_reference(results, text) for text in titles)]))
    for result in results:
        cells = []
        for text in titles:
            figures = list(result.figures.get(text, {}).values())
            mean, error = mean_and_error([one.change for one in figures]) if figures else (math.nan, math.nan)
            cells.append(f"{mean:+.4f} ± {error:.4f}" if figures else "unfinished")
        lines.append(_row([f"{result.method}, {result.size}", result.calibration, *cells]))
    return "\n".join(lines)


def _reference(results: Sequence[Result], text: str) -> str:
    figures = next((one for result in results for one in result.figures.get(text, {}).values()), None)
    if figures is None:
        return "unfinished"
    mean, error = mean_and_error([figures.reference])
    return f"{mean:.4f} ± {error:.4f}"


def _divergence(result: Result, baseline: Result | None, text: str) -> str:
    by_seed = result.figures.get(text, {})
    if not by_seed:
        return "failed" if len(result.failures) == len(result.seeds) else "unfinished"
    mean, error = mean_and_error([figures.kl for figures in by_seed.values()])
    known = ratios(result, baseline, text)
    return f"{_digits(mean, 3)} ± {_digits(error, 1)}" + (f" ({_ratio(float(np.mean(list(known.values()))))})" if known else "")


def _digits(value: float, count: int) -> str:
    """So many significant digits: "0.00550", "2e-05"."""
    return f"{value:#.{count}g}".replace(".e", "e").rstrip(".")


def _ratio(value: float) -> str:
    return f"**{value:.2f}**" if value > 1.0 else f"{value:.2f}"


def _head(columns: Sequence[str], words: int) -> list[str]:
    """The two lines that begin a table, whose first `words` columns are words and whose others are numbers."""
    return [_row(columns), "|" + "---|" * words + "---:|" * (len(columns) - words)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _baseline(results: Sequence[Result]) -> Result | None:
    return next((result for result in results if result.key == BASELINE), None)


def plot(results: Sequence[Result], titles: Mapping[str, str]) -> Figure:
    """Ratio of mean KL to the baseline's on every text: a panel for each calibration, a line with a colour and a mark for each method.

    Rows of the baseline's format and GGUF files are shown, as far as every text is measured. Bars are standard errors over windows.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    baseline, texts = _baseline(results), list(titles)
    comparable = [result for result in results if result.key != BASELINE and (result.size == BASELINE[1] or result.method == "GGUF")]
    shown = [result for result in comparable if worst_ratios(result, baseline, texts)]
    panel_of = {result.key: result.calibration.removesuffix(IMATRIX) for result in shown}
    calibrations = list(dict.fromkeys(panel_of.values()))
    methods = list(dict.fromkeys((result.method, result.size) for result in shown))
    means = {result.key: [float(np.mean(list(ratios(result, baseline, text).values()))) for text in texts] for result in shown}
    drawing, axes = panels(max(1, len(calibrations)), 3.1 * max(1, len(calibrations)) + 1.5, 5.0)
    values = [value for row in means.values() for value in row] + [1.0]
    for panel, calibration in zip(axes, calibrations or [""], strict=True):
        panel.axhline(1.0, color=INK, linewidth=1.2)
        for result in shown:
            if panel_of[result.key] == calibration:
                look = style(methods.index((result.method, result.size)))
                panel.errorbar(
                    range(len(texts)),
                    means[result.key],
                    yerr=[_relative_error(result, text) * mean for text, mean in zip(texts, means[result.key], strict=True)],
                    color=look.colour,
                    marker=look.marker,
                    linestyle=look.dash,
                    markersize=7,
                    linewidth=1.2,
                    capsize=2,
                    label=f"{result.method} {result.size}" if result.method == "GGUF" else result.method,
                )
        panel.set_title(f"calibration: {calibration}" if calibration else "", fontsize=10, color=INK)
        panel.set_yscale("log")
        panel.set_ylim(min(values) / 1.15, max(values) * 1.15)
        ticks = [tick for tick in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10) if min(values) / 1.15 <= tick]
        panel.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= max(values) * 1.15]))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xticks(range(len(texts)), [titles[text] for text in texts], rotation=30, ha="right")
        panel.set_xlim(-0.3, len(texts) - 0.7)
    axes[0].set_ylabel("mean KL, relative to rtn, int4 g64")
    entries: dict[str, object] = {}
    for panel in axes:
        handles, names = panel.get_legend_handles_labels()
        entries |= {name: entries.get(name, handle) for name, handle in zip(names, handles, strict=True)}
    if entries:
        legend = drawing.legend(list(entries.values()), list(entries), loc="outside right upper", frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_color(INK)
    else:
        axes[0].text(0.5, 0.5, "unfinished", transform=axes[0].transAxes, color=MUTED, ha="center")
    return drawing
