"""Writes sensitivities as a table, a plot and files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_q.checkpoint.layout import ATTENTION_MATRICES, EXPERT_MATRICES, layer_of, role_of
from dbrx_q.eval.report_folder import write_files
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.plots import INK, MUTED, figure, log_axis, render, style

from .result import Sensitivity, UnitResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FILES", "KEYS", "markdown", "plot", "short_name", "table", "without_figures", "write_report"]

FILES = ("sensitivity.json", "sensitivity.md", "sensitivity.png")
KEYS = ("checkpoint", "units", "provenance")
"""Keys that the JSON object of every report has."""

_ROWS = (*ATTENTION_MATRICES, *EXPERT_MATRICES)  # of the heat map, from the top
_HATCHES = ("", "///", "...", "xxx")  # of bars: one per format
_WRITTEN = 16  # columns up to which a cell has room for its figure


def write_report(sensitivity: Sensitivity, folder: Path) -> None:
    """Write `FILES` into `folder`, which is created if missing.

    Raises:
        RequestError: a file cannot be written; `folder` is then as it was.
        UnsupportedError: matplotlib is not installed.
    """
    contents = (
        (json.dumps(sensitivity.to_dict(), indent=2, allow_nan=False) + "\n").encode(),
        markdown(sensitivity).encode(errors="replace"),
        render(plot(sensitivity), "png"),
    )
    write_files(folder, dict(zip(FILES, contents, strict=True)))


def short_name(name: str) -> str:
    """A unit's name for tables: `blocks.0.w1` for the w1 of block 0."""
    layer = layer_of(name)
    return f"blocks.{layer}.{role_of(name)}" if layer >= 0 else name.removesuffix(".weight").rsplit(".", 1)[-1]


def table(sensitivity: Sensitivity) -> list[tuple[str, ...]]:
    """A header, and a row per unit and format, sorted by the loss per saved byte, largest first; rows without that figure are last."""
    header = ("quantized", "format", "bits per weight", "MB saved", "mean KL", "change of ln PPL", "weight error", "KL per GB saved")
    units = sorted(sensitivity.units, key=lambda unit: (math.isnan(unit.kl_per_saved_byte), -unit.kl_per_saved_byte))
    rows: list[tuple[str, ...]] = [header]
    rows += [
        (
            short_name(unit.name),
            str(TensorFormat(unit.format, unit.group_size)),
            f"{unit.bits_per_weight:.3f}",
            f"{unit.saved_bytes / 1e6:.3f}",
            f"{_figure(unit.mean_kl, '.3e')} ± {_figure(unit.mean_kl_stderr, '.1e')}",
            f"{_figure(unit.delta_ln_ppl, '+.3e')} ± {_figure(unit.delta_ln_ppl_stderr, '.1e')}",
            f"{unit.weight_error:.4f}",
            _figure(unit.kl_per_saved_byte * 1e9, ".3e"),
        )
        for unit in units
    ]
    return rows


def without_figures(sensitivity: Sensitivity) -> list[str]:
    """A line for every unit and format that was not measured, with the reason."""
    return [
        f"not measured: {short_name(part.name)} in {TensorFormat(part.format, part.group_size)}: {part.reason}"
        for part in sensitivity.skipped + sensitivity.failed
    ]


def markdown(sensitivity: Sensitivity) -> str:
    """The results as a Markdown document."""
    return "\n".join(_lines(sensitivity)) + "\n"


def plot(sensitivity: Sensitivity) -> Figure:
    """Mean KL of every unit: for tensors a heat map of layers and matrices per format, for kinds and layers bars.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    return _heat_maps(sensitivity) if sensitivity.by == "tensor" else _bars(sensitivity)


def _lines(sensitivity: Sensitivity) -> Iterator[str]:
    yield f"# Sensitivity of {sensitivity.checkpoint} by {sensitivity.by}"
    yield ""
    if not sensitivity.complete:
        yield "**Partial**: the run was interrupted; the units listed are measured completely."
        yield ""
    yield "One part at a time is quantized by rounding to nearest, everything else stays plain. KL is the divergence of the predictions,"
    yield "in nats per token. Parts that lose most per saved byte are listed first."
    yield ""
    yield f"- perplexity of the unquantized model: {sensitivity.perplexity:.4f}"
    yield f"- text: {sensitivity.text} (SHA-256 `{sensitivity.text_sha256}`), {sensitivity.windows} windows of {sensitivity.context}"
    yield f"  tokens, {sensitivity.protocol}: {sensitivity.tokens:,} tokens predicted"
    yield f"- checkpoint: SHA-256 `{sensitivity.sha256}`, computed in {sensitivity.dtype}"
    yield f"- command: `{sensitivity.provenance.get('command', '')}`"
    versions = ", ".join(f"{name} {version}" for name, version in sensitivity.provenance.get("versions", {}).items())
    yield f"- on {sensitivity.provenance.get('device', '')}, {sensitivity.provenance.get('threads', '')} threads; {versions}"
    yield ""
    notes = without_figures(sensitivity)
    if notes:
        yield from (f"- {note}" for note in notes)
        yield ""
    header, *rows = table(sensitivity)
    yield "| " + " | ".join(header) + " |"
    yield "|---|---|" + "---:|" * (len(header) - 2)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _figure(value: float, spec: str) -> str:
    return "n/a" if math.isnan(value) else format(value, spec)


def _formats(sensitivity: Sensitivity) -> list[tuple[str, int]]:
    """Formats and group sizes in the order requested, read from a unit that has all of them: the embedding has int8 alone."""
    of_unit: dict[str, list[tuple[str, int]]] = {}
    for unit in sensitivity.units:
        of_unit.setdefault(unit.name, []).append((unit.format, unit.group_size))
    units = sorted(of_unit.values(), key=len, reverse=True)
    return list(dict.fromkeys(fmt for formats in units for fmt in formats))


def _title(sensitivity: Sensitivity) -> str:
    partial = "" if sensitivity.complete else ", partial"
    return f"Mean KL (nats per token) if one {sensitivity.by} is quantized{partial}"


def _heat_maps(sensitivity: Sensitivity) -> Figure:
    import numpy as np
    from matplotlib.colors import LogNorm

    formats = _formats(sensitivity)
    layers = 1 + max((layer_of(unit.name) for unit in sensitivity.units), default=-1)
    columns = layers + 2  # embedding, blocks, head
    width = max(6.5, 2.6 + columns * (0.75 if columns <= _WRITTEN else 0.3))
    drawing, axes = figure(width, 0.7 + 2.3 * len(formats))
    axes.remove()
    panels: list[Axes] = list(drawing.subplots(len(formats), 1, squeeze=False, sharex=True)[:, 0])
    positive = [unit.mean_kl for unit in sensitivity.units if 0 < unit.mean_kl < math.inf] or [1e-6]
    low, high = min(positive), max(positive)
    norm = LogNorm(low, high if high > low else 10 * low)
    image: Any = None
    for panel, fmt in zip(panels, formats, strict=True):
        cells = np.full((len(_ROWS), columns), np.nan)
        for unit in sensitivity.units:
            if (unit.format, unit.group_size) == fmt:
                rows, column = _cells(unit, columns)
                cells[rows, column] = unit.mean_kl
                if columns <= _WRITTEN:
                    _write(panel, unit, rows, column, norm)
        masked = np.ma.masked_invalid(cells)
        image = panel.pcolormesh(np.clip(masked, low, None), norm=norm, cmap="cividis_r", edgecolors="white", linewidth=0)
        _borders(panel, columns)
        panel.invert_yaxis()
        panel.grid(False)
        panel.set_facecolor("#f0f1f3")
        panel.set_yticks([row + 0.5 for row in range(len(_ROWS))], _ROWS, color=INK, fontsize=9)
        panel.tick_params(length=0)
        for side in panel.spines.values():
            side.set_visible(False)
        panel.set_title(f"{fmt[0]}, groups of {fmt[1]}", loc="left", fontsize=10, color=INK)
    step = 1 if layers <= 24 else 5
    ticks = [0.5, *(1.5 + layer for layer in range(0, layers, step)), columns - 0.5]
    panels[-1].set_xticks(ticks, ["wte", *(str(layer) for layer in range(0, layers, step)), "head"], color=INK, fontsize=9)
    panels[-1].set_xlabel("layer", color=INK)
    bar = drawing.colorbar(image, ax=panels, pad=0.015, aspect=12 * len(formats))
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", color=MUTED, labelcolor=INK, labelsize=9)
    drawing.suptitle(_title(sensitivity), fontsize=11, color=INK, x=0.01, ha="left")
    return drawing


def _cells(unit: UnitResult, columns: int) -> tuple[slice, int]:
    """(rows, column) of a tensor's cells: the embedding and the head fill a whole column."""
    layer, role = layer_of(unit.name), role_of(unit.name)
    if layer >= 0:
        row = _ROWS.index(role)
        return slice(row, row + 1), layer + 1
    return slice(0, len(_ROWS)), 0 if role == "embedding" else columns - 1


def _write(panel: Axes, unit: UnitResult, rows: slice, column: int, norm: Any) -> None:
    dark = 0 < unit.mean_kl < math.inf and norm(unit.mean_kl) > 0.5
    text = _figure(unit.mean_kl, ".1e") if unit.mean_kl else "0"
    panel.text(column + 0.5, (rows.start + rows.stop) / 2, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)


def _borders(panel: Axes, columns: int) -> None:
    """White lines between cells, except across the columns of embedding and head."""
    panel.hlines(range(1, len(_ROWS)), 1, columns - 1, colors="white", linewidth=1.2)
    panel.vlines(range(1, columns), 0, len(_ROWS), colors="white", linewidth=1.2)


def _bars(sensitivity: Sensitivity) -> Figure:
    formats = _formats(sensitivity)
    names = list(dict.fromkeys(unit.name for unit in sensitivity.units))
    drawing, axes = figure(max(6.5, 1.8 + len(names) * (0.3 + 0.25 * len(formats))), 4.2)
    floor = log_axis(axes, [unit.mean_kl for unit in sensitivity.units])
    bottom = axes.get_ylim()[0]
    share = 0.8 / len(formats)

    def middle(unit: UnitResult, number: int) -> float:
        return names.index(unit.name) - 0.4 + share * (number + 0.5)

    for number, fmt in enumerate(formats):
        units = [unit for unit in sensitivity.units if (unit.format, unit.group_size) == fmt]
        for unit in (unit for unit in units if not math.isfinite(unit.mean_kl)):
            text = _figure(unit.mean_kl, ".1e")
            axes.text(middle(unit, number), bottom, text, ha="center", va="bottom", rotation=90, fontsize=7.5, color=INK)
        units = [unit for unit in units if math.isfinite(unit.mean_kl)]
        middles = [middle(unit, number) for unit in units]
        heights = [max(unit.mean_kl, floor) - bottom for unit in units]
        # An error larger than the value would reach below the axis.
        errors = [[min(unit.mean_kl_stderr, 0.95 * unit.mean_kl) for unit in units], [unit.mean_kl_stderr for unit in units]]
        axes.bar(
            middles,
            heights,
            share * 0.92,
            bottom=bottom,
            color=style(number).colour,
            hatch=_HATCHES[number % len(_HATCHES)],
            edgecolor="white",
            linewidth=0,
            label=f"{fmt[0]}, groups of {fmt[1]}",
            yerr=errors,
            error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
        )
    axes.set_xticks(range(len(names)), [name.removeprefix("layer ") for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(False, axis="x")
    axes.set_xlabel("layer" if sensitivity.by == "layer" else "")
    axes.set_ylabel("mean KL (nats per token)")
    axes.set_title(_title(sensitivity), loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return drawing
