"""Writes the report of a comparison into a folder: Markdown, JSON, plots and one HTML page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_q.eval.report_folder import write_files
from dbrx_q.plot_labels import NamedPoint, label_line_ends, label_points
from dbrx_q.plots import MUTED, figure, log_axis, render, style

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
"""Keys that the JSON object of every report has."""


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write report.md, report.json, report.html, divergence.png and divergence.svg into `folder`.

    Raises:
        RequestError: a file cannot be written; `folder` is then as it was.
    """
    divergence = divergence_plot(comparison)
    files = {
        "report.md": markdown(comparison).encode(errors="replace"),
        "report.json": (json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n").encode(),
        "divergence.png": render(divergence, "png"),
        "divergence.svg": render(divergence, "svg"),
        "report.html": html(comparison, divergence_plot(comparison), layer_plot(comparison)).encode(errors="replace"),
    }
    write_files(folder, files)


def divergence_plot(comparison: Comparison) -> Figure:
    """Mean KL divergence with its standard error over bits per weight, a named point per checkpoint.

    A line joins the checkpoints that no other beats in both. A divergence that is not finite has no point.
    """
    drawing, axes = figure(8.0, 5.2)
    shown = [number for number, row in enumerate(comparison.results) if math.isfinite(row.mean_kl)]
    rows = [comparison.results[number] for number in shown]
    zero = log_axis(axes, [row.mean_kl for row in rows])
    heights = [row.mean_kl if row.mean_kl > 0 else zero for row in rows]
    best = sorted((row.bits_per_weight, height) for row, height in zip(rows, heights, strict=True) if front(row, rows))
    axes.plot([bits for bits, _ in best], [height for _, height in best], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    names = short_names([row.path for row in comparison.results])
    points = []
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
        )
        points.append(NamedPoint(row.bits_per_weight, height, names[number], look.colour))
    _set_bits_axis(axes, [row.bits_per_weight for row in rows])
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("mean KL divergence, nats per token")
    label_points(drawing, axes, points)
    return drawing


def _set_bits_axis(axes: Axes, bits: list[float]) -> None:
    """Make the x axis logarithmic where a checkpoint of 8 or 16 bits would crowd those near 4."""
    if not bits or max(bits) < 1.5 * min(bits):
        axes.margins(x=0.12)  # room for names
        return
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    low, high = min(bits) / 1.12, max(bits) * 1.15
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 32) if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


def layer_plot(comparison: Comparison) -> Figure:
    """Relative error of the hidden states after every block: a line per checkpoint, named at its end."""
    from matplotlib.ticker import MaxNLocator

    drawing, axes = figure(8.0, 4.4)
    names = short_names([row.path for row in comparison.results])
    zero = log_axis(axes, [error for row in comparison.results for error in row.hidden_error])
    ends = []
    for number, (row, name) in enumerate(zip(comparison.results, names, strict=True)):
        look = style(number)
        heights = [error if error > 0 else zero for error in row.hidden_error]
        axes.plot(range(len(heights)), heights, color=look.colour, marker=look.marker, markersize=5, linestyle=look.dash, linewidth=1.6)
        finite = [layer for layer, height in enumerate(heights) if math.isfinite(height)]
        last = finite[-1] if finite else -1
        ends.append(NamedPoint(last, heights[last], name, look.colour))
    axes.set_xlabel("layer")
    axes.set_ylabel("error of hidden states, relative")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_line_ends(drawing, axes, ends)
    return drawing
