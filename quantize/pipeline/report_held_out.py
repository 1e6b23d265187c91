"""What the report says of held-out tokens and check texts: tables, sentences and a plot."""

from __future__ import annotations

from dbrx_q.plots import INK, figure, render, style
from dbrx_q.quantize.calibration.held_out import CHECKED, MeanDivergence
from dbrx_q.quantize.methods.choose import METHODS

from .records import HeldOutRecord, RunRecord

__all__ = ["check_lines", "draw_ratios", "hurt_line", "layer_table", "nearest_line", "source_lines", "still_worse"]

_MOST_NAMES = 12  # of matrices, in a line


def hurt_line(run: RunRecord) -> str | None:
    """One sentence: on which texts the quantized model is further from the original than rounding to nearest; None without any text."""
    if not run.held_out or run.method == "rtn":
        return None
    subject = "Calibration" if METHODS[run.method].calibrated else f"The method {run.method}"
    hurt = [record for record in run.held_out if record.hurts]
    if hurt:
        return f"{subject} hurt on {'; on '.join(map(_compared, hurt))}"
    worst = max(run.held_out, key=_ratio)
    ratio = f"mean KL is at most {_ratio(worst):.2f} of that of rounding to nearest, on {worst.name}"
    return f"{subject} hurt nowhere on what was held out: {ratio}"


def check_lines(run: RunRecord) -> list[str]:
    """A sentence for each check text."""
    return [
        f"check text {record.name}: mean KL {_figure(record.divergence.quantized)}"
        + ("" if run.method == "rtn" else f", rounding to nearest {_figure(record.divergence.nearest)}")
        for record in run.held_out
        if record.kind == CHECKED
    ]


def nearest_line(run: RunRecord) -> str | None:
    """How many matrices are stored as rounded to nearest; None for a run that did not compare them."""
    if not run.falls_back:
        return None
    packed = sum(record.relative_error is not None for record in run.records)
    names = run.nearest_instead
    shown = ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")
    return f"{len(names)} of {packed} matrices are rounded to nearest, which errs less on held-out tokens" + (f": {shown}" if names else "")


def still_worse(run: RunRecord) -> str | None:
    """The error of a run that was to be no worse than rounding to nearest, and is; otherwise None."""
    hurt = [record for record in run.held_out if record.hurts]
    if not run.falls_back or not hurt:
        return None
    return (
        f"the result must be no worse than rounding to nearest; found it worse by more than two standard errors on "
        f"{'; on '.join(map(_compared, hurt))}. Give such texts to --calibration, or choose the method rtn"
    )


def source_lines(run: RunRecord) -> list[str]:
    """Markdown: a table of the divergences on every source and check text."""
    lines = [
        "| text | is | sequences | predicted tokens | mean KL | rounding to nearest | ratio | worse |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in run.held_out:
        figures = f"{_figure(record.divergence.quantized)} | {_figure(record.divergence.nearest)} | {_ratio(record):.3f}"
        what = f"{record.name} | {record.kind} | {record.sequences} | {record.tokens:,}"
        lines.append(f"| {what} | {figures} | {'**yes**' if record.hurts else 'no'} |")
    return lines


def layer_table(run: RunRecord) -> list[str]:
    """Markdown: for every layer and source the error of the layer's output, and its ratio to that of rounding to nearest."""
    lines = ["| layer | " + " | ".join(record.name for record in run.held_out) + " |", "|---|" + "---|" * len(run.held_out)]
    for layer in sorted(run.held_out[0].layer_errors):
        cells = [record.layer_errors[layer] for record in run.held_out]
        lines.append(f"| {layer} | " + " | ".join(f"{error:.4f} ({_over(error, nearest):.3f})" for error, nearest in cells) + " |")
    return lines


def draw_ratios(run: RunRecord) -> bytes:
    """A PNG: a line per source over the layers, the error of a layer's output relative to that of rounding to nearest."""
    drawing, axes = figure()
    axes.axhline(1.0, color=INK, linewidth=1.2)
    axes.annotate("rounding to nearest", (0.005, 1.0), (0, 3), ("axes fraction", "data"), textcoords="offset points", fontsize=8, color=INK)
    for number, record in enumerate(run.held_out):
        look, layers = style(number), sorted(record.layer_errors)
        ratios = [_over(*record.layer_errors[layer]) for layer in layers]
        label = f"{record.name} ({record.kind})"
        axes.plot(layers, ratios, label=label, color=look.colour, marker=look.marker, linestyle=look.dash, markersize=4, linewidth=1.4)
    axes.set_xlabel("layer")
    axes.set_ylabel("error of the layer's output / rounding to nearest")
    axes.set_ylim(bottom=0)
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, ncols=2, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    return render(drawing, "png")


def _compared(record: HeldOutRecord) -> str:
    """As "python.txt: mean KL 0.0205, rounding to nearest 0.0160"."""
    return f"{record.name}: mean KL {record.divergence.quantized.mean:.3g}, rounding to nearest {record.divergence.nearest.mean:.3g}"


def _figure(divergence: MeanDivergence) -> str:
    return f"{divergence.mean:.4g} ± {divergence.stderr:.2g}"


def _ratio(record: HeldOutRecord) -> float:
    return _over(record.divergence.quantized.mean, record.divergence.nearest.mean)


def _over(error: float, nearest: float) -> float:
    """1 for two errors of 0."""
    return error / nearest if nearest else (float("inf") if error else 1.0)
