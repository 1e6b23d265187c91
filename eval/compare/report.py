"""The report of a comparison: Markdown, JSON, plots and one HTML page, in a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_q.eval.report_folder import write_files
from dbrx_q.plots import INK, figure, label_points, log_axis, render, style

from .report_html import html
from .report_markdown import front, markdown
from .report_text import short_names
from .result import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FILES", "KEYS", "divergence_plot", "layer_plot", "write_report"]

FILES = ("report.md", "report.json", "report.html", "divergence.png", "divergence.svg")
KEYS = ("reference", "results", "provenance")
"""What the JSON object of a report has at least."""

_LABELLED = 6  # points that have room for names beside them


def write_report(found: Comparison, folder: Path) -> None:
    """Write report.md, report.json, report.html, divergence.png and divergence.svg into `folder`.

    Raises:
        RequestError: a file cannot be written; `folder` is then as it was.
    """
    divergence = divergence_plot(found)
    files = {
        "report.md": markdown(found).encode(errors="replace"),
        "report.json": (json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n").encode(),
        "divergence.png": render(divergence, "png"),
        "divergence.svg": render(divergence, "svg"),
        "report.html": html(found, divergence_plot(found), layer_plot(found)).encode(errors="replace"),
    }
    write_files(folder, files)


def divergence_plot(found: Comparison) -> Figure:
    """Mean KL divergence, with its standard error, over bits per weight; the line joins what nothing else beats."""
    drawing, axes = figure(8.0, 4.8)
    shown = [number for number, row in enumerate(found.results) if math.isfinite(row.mean_kl)]
    rows = [found.results[number] for number in shown]
    zero = log_axis(axes, [row.mean_kl for row in rows])
    heights = [row.mean_kl if row.mean_kl > 0 else zero for row in rows]
    best = sorted((row.bits_per_weight, height) for row, height in zip(rows, heights, strict=True) if front(row, rows))
    bits, lowest = [point[0] for point in best], [point[1] for point in best]
    axes.plot(bits, lowest, color=style(5).colour, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    names = short_names([row.path for row in found.results])
    for number, row, height in zip(shown, rows, heights, strict=True):
        look = style(number)
        axes.errorbar(
            [row.bits_per_weight],
            [height],
            yerr=[[min(row.mean_kl_stderr, 0.99 * height)], [row.mean_kl_stderr]],
            color=look.colour,
            marker=look.marker,
            markersize=7,
            capsize=3,
            linestyle="none",
            zorder=3,
            label=names[number],
        )
    _spread(axes, [row.bits_per_weight for row in rows])
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("mean KL divergence, nats per token")
    if len(rows) > _LABELLED:
        _legend(axes)
    else:
        points = [(row.bits_per_weight, height) for row, height in zip(rows, heights, strict=True)]
        label_points(drawing, axes, points, [names[number] for number in shown])
    return drawing


def _spread(axes: Axes, bits: list[float]) -> None:
    """A logarithmic x axis where 16 bits would crowd all that are near 4."""
    if not bits or max(bits) < 2 * min(bits):
        return
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(min(bits) / 1.08, max(bits) * 1.15)
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 32) if min(bits) / 1.08 <= tick <= max(bits) * 1.15]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


def layer_plot(found: Comparison) -> Figure:
    """Error of the hidden states after every block, a line per checkpoint."""
    from matplotlib.ticker import MaxNLocator

    drawing, axes = figure(8.0, 4.2)
    names = short_names([row.path for row in found.results])
    zero = log_axis(axes, [error for row in found.results for error in row.hidden_error])
    for number, (row, name) in enumerate(zip(found.results, names, strict=True)):
        look = style(number)
        heights = [error if error > 0 else zero for error in row.hidden_error]
        axes.plot(
            range(len(heights)),
            heights,
            color=look.colour,
            marker=look.marker,
            markersize=5,
            linestyle=look.dash,
            linewidth=1.6,
            label=name,
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("error of hidden states, relative")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return drawing


def _legend(axes: Axes) -> None:
    """Names beside the plot, as they are spelled."""
    legend = axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for text in legend.get_texts():
        text.set_parse_math(False)
