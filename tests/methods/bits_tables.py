"""The figures of a run of `bits.py`, and the tables and the plot that show them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tables import _digits, _head, _row

from dbrx_q.plots import INK, figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Figures", "Result", "plot", "size_table", "text_table"]

_CURVES = ("trellis, best", "trellis-fast, best", "trellis, without data", "int, best", "int, to nearest")
"""Series that the plot joins by lines, in the order of the legend."""
_NAMED = ("trellis, mixed", "nf4 (as bitsandbytes)", "bitsandbytes", "llama.cpp", "llama.cpp, importance matrix")
"""Series that the plot does not join."""
_UNNAMED = ("trellis, mixed", "nf4 (as bitsandbytes)")
"""Those of them whose points need no names."""


@dataclass(frozen=True)
class Figures:
    """What `dbrx-q compare` says of one checkpoint on one text."""

    kl: float
    """Mean KL(reference || checkpoint), in nats."""
    kl_error: float
    """Its standard error."""
    perplexity: float
    """Of the checkpoint."""
    reference_perplexity: float
    """Of the model itself."""
    change: float
    """Of the mean negative log-likelihood, in nats."""
    change_error: float
    """Its standard error."""
    top1: float
    """Share of tokens for which both have the same likeliest token."""
    same_experts: float
    """Share of tokens for which both choose the same set of experts, mean over layers."""

    @classmethod
    def of(cls, measured: Mapping[str, Any]) -> Figures:
        """From a row of the command's JSON with the reference's perplexity."""
        return cls(
            measured["mean_kl"],
            measured["mean_kl_stderr"],
            measured["perplexity"],
            measured["reference_perplexity"],
            measured["delta_ln_ppl"],
            measured["delta_ln_ppl_stderr"],
            measured["top1_agreement"],
            fmean(measured["router_agreement"]),
        )


@dataclass
class Result:
    """One row: a checkpoint, and what is known of it so far."""

    series: str
    """The curve of the plot that it is on; "" for none."""
    title: str
    """Options of `dbrx-q quantize`, or what a checkpoint of another program is."""
    calibration: str
    """The text that calibrated; "" without data."""
    path: Path | None = None
    """The checkpoint; None if it is unfinished."""
    texts: bool = False
    """Whether it is in the table of texts and calibrations."""
    whole: bool = False
    """Whether it is measured on the whole of the first text, too."""
    seconds: float = math.nan
    """Processor time of the quantization."""
    expert_bits: float = math.nan
    """Bits per expert weight at DBRX's dimensions."""
    dbrx_bytes: float = math.nan
    """Bytes of DBRX."""
    figures: dict[tuple[str, int | None], Figures] = field(default_factory=dict)
    """By text and number of windows, None for all."""
    failure: str = ""
    """Last line of the error of the quantization."""


def size_table(results: Sequence[Result], text: str, windows: int) -> str:
    """All formats in one calibration: what each costs in bytes and in quality on the first windows of a text."""
    columns = ["`dbrx-q quantize` with", "calibration", "bits per expert weight", "DBRX, GB", "mean KL", "the same, whole text"]
    columns += ["perplexity", "change of ln PPL", "top token", "same experts", "processor time"]
    lines = _head(columns, words=2)
    known = [result.figures[text, windows] for result in results if (text, windows) in result.figures]
    if known:
        lines.append(_row(["not quantized", "", "16", "263.2", "0", "0", f"{known[0].reference_perplexity:.3f}", "0", "", "", ""]))
    for result in results:
        if result.series or not result.texts:  # the others are calibrated on another text
            lines.append(_row(_cells(result, text, windows)))
    return "\n".join(lines)


def _cells(result: Result, text: str, windows: int) -> list[str]:
    title = f"`{result.title}`" if result.title.startswith("--") else result.title
    figures, whole = result.figures.get((text, windows)), result.figures.get((text, None))
    if figures is None:
        return [title, result.calibration, "", "", "failed" if result.failure else "unfinished", *[""] * 6]
    return [
        title,
        result.calibration,
        f"{result.expert_bits:.3f}",
        f"{result.dbrx_bytes / 1e9:.1f}",
        f"{_digits(figures.kl, 3)} ± {_digits(figures.kl_error, 1)}",
        "" if whole is None else _digits(whole.kl, 3),
        f"{figures.perplexity:.3f}",
        f"{figures.change:+.4f} ± {figures.change_error:.4f}",
        f"{figures.top1:.2%}",
        f"{figures.same_experts:.2%}",
        "" if math.isnan(result.seconds) else f"{result.seconds:.0f} s",
    ]


def text_table(results: Sequence[Result], texts: Mapping[str, str], windows: int) -> str:
    """The formats in `texts` by calibration and text: mean KL and, in brackets, its ratio to that on the first text by the first.

    The last line says whether the order of formats is the same everywhere.
    """
    rows = [result for result in results if result.texts]
    names, calibrations = list(dict.fromkeys(_format(row) for row in rows)), list(dict.fromkeys(row.calibration for row in rows))
    by_key = {(_format(row), row.calibration): row for row in rows}
    columns = [f"{title}, calibrated on {calibration}" for calibration in calibrations for title in texts.values()]
    lines = _head(["experts", *columns], words=1)
    first = next(iter(texts))
    orders: dict[tuple[str, str], list[str]] = {}
    for name in names:
        base = by_key[name, calibrations[0]].figures.get((first, windows))
        cells = []
        for calibration in calibrations:
            for text in texts:
                row = by_key.get((name, calibration))
                figures = None if row is None else row.figures.get((text, windows))
                ratio = f" ({figures.kl / base.kl:.2f})" if figures is not None and base is not None else ""
                cells.append("unfinished" if figures is None else f"{_digits(figures.kl, 3)}{ratio}")
                if figures is not None:
                    orders.setdefault((calibration, text), []).append(name)
        lines.append(_row([f"`{name}`", *cells]))
    for key, present in orders.items():
        present.sort(key=lambda name: by_key[name, key[0]].figures[key[1], windows].kl)
    complete = {key: order for key, order in orders.items() if len(order) == len(names)}
    finished = complete and len(complete) == len(calibrations) * len(texts)
    return "\n".join([*lines, "", _verdict(complete, texts) if finished else "Unfinished."])


def _verdict(orders: Mapping[tuple[str, str], Sequence[str]], texts: Mapping[str, str]) -> str:
    """Whether the formats have the same order by every calibration and on every text."""
    usual = next(iter(orders.values()))
    others = [
        f"{', '.join(order)} on {texts[text]} by {calibration}"
        for (calibration, text), order in orders.items()
        if list(order) != list(usual)
    ]
    verdict = f"From the least divergence to the most: {', '.join(usual)}"
    verdict += f"; in another order: {'; '.join(others)}." if others else ", on every text and by either calibration."
    return textwrap.fill(verdict, 120, break_long_words=False, break_on_hyphens=False)


def _format(result: Result) -> str:
    """The format and group size that a title names."""
    words = result.title.split()
    group = f":{words[words.index('--group-size') + 1]}" if "--group-size" in words else ""
    return words[words.index("--format") + 1] + group


def _point_name(result: Result) -> str:
    """The type that ends the title of a file of another program."""
    return result.title.rsplit(" ", 1)[-1]


def plot(results: Sequence[Result], text: str, windows: int) -> Figure:
    """Mean KL over bits per expert weight, both logarithmic; a colour and a mark for each series."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    from dbrx_q.plot_labels import NamedPoint, label_points

    shown = [result for result in results if result.series and (text, windows) in result.figures]
    series = sorted(dict.fromkeys(result.series for result in shown), key=lambda name: (*_CURVES, *_NAMED, name).index(name))
    drawing, axes = figure(9.0, 6.0)
    names = []
    for number, name in enumerate(series):
        look = style(number)
        rows = sorted((result for result in shown if result.series == name), key=lambda result: result.expert_bits)
        points = [(row.expert_bits, row.figures[text, windows].kl) for row in rows]
        line = look.dash if name in _CURVES else "none"
        axes.plot(
            *zip(*points, strict=True), color=look.colour, marker=look.marker, linestyle=line, markersize=6, linewidth=1.4, label=name
        )
        if name in _NAMED and name not in _UNNAMED:
            names += [NamedPoint(*point, _point_name(row), look.colour) for point, row in zip(points, rows, strict=True)]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator([2, 2.5, 3, 3.5, 4, 5, 6, 8, 12, 16]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(FixedLocator([factor * 10.0**power for power in range(-5, 2) for factor in (1, 2, 5)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    kls = [row.figures[text, windows].kl for row in shown]
    if kls:
        axes.set_ylim(min(kls) / 1.4, max(kls) * 1.4)
    axes.set_xlabel("bits per expert weight")
    axes.set_ylabel("mean KL")
    if series:
        legend = axes.legend(frameon=False, fontsize=9)
        for entry in legend.get_texts():
            entry.set_color(INK)
    label_points(drawing, axes, names)
    return drawing
