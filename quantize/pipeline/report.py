"""The report of a run, beside the checkpoint: JSON, Markdown and plots."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_q.checkpoint.layout import ATTENTION_MATRICES, EXPERT_MATRICES, KINDS, role_of
from dbrx_q.errors import UnsupportedError
from dbrx_q.plots import INK, check_plot_extra, figure, render, style

from .records import RunRecord, TensorRecord
from .report_held_out import draw_ratios, hurt_line, layer_table, nearest_line, source_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NAME", "write_report"]

NAME = "quantization_report"
_MATRICES = (*ATTENTION_MATRICES, *EXPERT_MATRICES)
_MOST_NAMES = 12  # of experts, in a line


def write_report(folder: Path, run: RunRecord) -> list[str]:
    """Write `quantization_report.json`, `.md` and PNG plots into a folder; returns the names of the files.

    Without matplotlib the plots are omitted, and the Markdown says so.
    """
    plots: dict[str, bytes] = {}
    missing = ""
    try:
        check_plot_extra("the report's plots")
        plots = {f"{NAME}_{name}.png": draw(run) for name, draw in _drawings(run).items()}
    except UnsupportedError as error:
        missing = str(error)
    data = asdict(run) | {
        "bits_per_weight": _bits(run.records),
        "bits_by_kind": bits_by_kind(run),
        "undersampled_experts": _undersampled(run),
        "nearest_instead": run.nearest_instead,
        "source_names": _without_folders(run.source_names),
    }
    _write(folder / f"{NAME}.json", (json.dumps(_finite(data), indent=1, allow_nan=False) + "\n").encode())
    for name, png in plots.items():
        _write(folder / name, png)
    _write(folder / f"{NAME}.md", _markdown(run, list(plots), missing).encode())
    return [f"{NAME}.json", f"{NAME}.md", *plots]


def bits_by_kind(run: RunRecord) -> dict[str, float]:
    """Bits per weight, as written, of every kind of tensor in the checkpoint."""
    records_by_kind = {kind: [record for record in run.records if record.kind == kind] for kind in KINDS}
    return {kind: _bits(records) for kind, records in records_by_kind.items() if records}


def error_table(run: RunRecord) -> list[tuple[str, str, float, float, float | None]]:
    """(matrix, format, mean and largest relative error, mean output error or None) for every kind of packed matrix and format."""
    groups: dict[tuple[str, str], list[TensorRecord]] = {}
    for record in run.records:
        if record.relative_error is not None:
            groups.setdefault((_matrix(record), record.format), []).append(record)
    rows = []
    for (matrix, fmt), records in groups.items():
        errors = [record.relative_error or 0.0 for record in records]
        outputs = [record.output_error for record in records if record.output_error is not None]
        rows.append((matrix, fmt, _mean(errors), max(errors), _mean(outputs) if outputs else None))
    return rows


def calibration_sentence(calibration: Mapping[str, Any]) -> str:
    """What quantization_config says of the calibration, as a part of a sentence."""
    named = {name: value for name, value in calibration.items() if name != "sources"}
    sources = [f"{len(calibration['sources'])} source(s)"] if "sources" in calibration else []
    return ", ".join([*sources, *(f"{name.replace('_', ' ')} {value}" for name, value in named.items())])


def source_table(calibration: Mapping[str, Any]) -> list[str]:
    """The table of the calibration's sources; nothing where one text alone calibrated."""
    if "sources" not in calibration:
        return []
    lines = ["", "| source | weight | sequences | held out | SHA-256 |", "|---|---|---|---|---|"]
    for source in calibration["sources"]:
        lines.append(f"| {source['name']} | {source['weight']:.3g} | {source['sequences']} | {source['held_out']} | {source['sha256']} |")
    return lines


def _markdown(run: RunRecord, plots: Sequence[str], missing: str) -> str:
    lines = [f"# Quantization of {Path(run.source).name or run.source}", ""]
    before = 8 * run.bytes_in / run.parameters
    lines += [f"Quantization method `{run.method}`, {_bits(run.records):.3f} bits per weight ({before:.3f} before), "]
    lines[-1] += f"{run.bytes_out:,} bytes of {run.bytes_in:,} in {run.shards} shard(s)."
    calibration = run.options.get("calibration")
    if calibration:
        lines += ["", f"Calibrated with {calibration_sentence(calibration)}.", *source_table(calibration)]
    if run.options.get("kept"):
        lines += ["", f"{run.kept} of {len(run.records)} matrices were repacked without rounding: {', '.join(run.options['kept'])}."]
    if run.rounded_again:
        again = ", ".join(f"{count} of {label}" for label, count in run.rounded_again.items())
        lines += ["", f"Matrices that the source had rounded already and that were rounded again: {again}."]
    earlier = f" after {run.resumed_seconds:,.1f} s of tensors that earlier runs had finished" if run.resumed_seconds else ""
    gpu = f", {run.peak_device_bytes:,} on {run.device}" if run.device != "cpu" else ""
    lines += ["", f"Took {run.seconds:,.1f} s{earlier}; peak memory {run.peak_memory_bytes:,} bytes{gpu}."]
    lines += ["", "## Bits and time by kind", "", "| kind | parameters | bits per weight | seconds |", "|---|---|---|---|"]
    for kind, bits in bits_by_kind(run).items():
        records = [record for record in run.records if record.kind == kind]
        lines.append(f"| {kind} | {sum(r.parameters for r in records):,} | {bits:.3f} | {sum(r.seconds for r in records):,.1f} |")
    lines += [
        "",
        "## Errors",
        "",
        "Weights: root of the sum of squared errors over the sum of squares. Outputs: the same for the outputs of a",
    ]
    lines += ["sample of rows on the calibration tokens."]
    lines += ["", "| matrix | format | weights, mean | largest | outputs, mean |", "|---|---|---|---|---|"]
    for matrix, fmt, mean, largest, outputs in error_table(run):
        lines.append(f"| {matrix} | {fmt} | {mean:.4f} | {largest:.4f} | {'' if outputs is None else f'{outputs:.4f}'} |")
    if run.stream_errors:
        lines += ["", "## Output of each layer", "", "Relative error against the original model, on the calibration tokens.", ""]
        lines += ["| layer | error |", "|---|---|", *(f"| {layer} | {error:.4f} |" for layer, error in sorted(run.stream_errors.items()))]
    if run.expert_tokens:
        lines += ["", "## Tokens per expert", "", "| layer | fewest | median | most |", "|---|---|---|---|"]
        for layer, counts in sorted(run.expert_tokens.items()):
            lines.append(f"| {layer} | {' | '.join(_spread(counts))} |")
    if run.expert_tokens_by_source:
        lines += ["", "## Tokens per expert, by source", "", *_tokens_by_source(run)]
    if any(record.damping is not None for record in run.records):
        lines += ["", "## Damping and weights of sources", "", *_shrinkage_lines(run)]
    if run.held_out:
        lines += ["", "## Held-out tokens", "", *_held_out_lines(run)]
    lines += ["", "## Undersampled experts", "", *_undersampled_lines(run)]
    lines += ["", "## Plots", ""] + [f"![{name}]({name})" for name in plots] + ([missing] if missing else [])
    return "\n".join(lines) + "\n"


def _held_out_lines(run: RunRecord) -> list[str]:
    """What the tokens to which nothing is fitted, and check texts, say of the result."""
    lines = [f"{line}." for line in (hurt_line(run), nearest_line(run)) if line is not None]
    lines = [part for line in lines for part in (line, "")]
    lines += ["KL divergence from the original model, the mean over sequences and its standard error. Worse: by more than two standard"]
    lines += ["errors of the difference. Nothing is fitted to these tokens; check texts decide nothing either.", "", *source_lines(run)]
    lines += [
        "",
        "Relative error of each layer's output and, in brackets, its ratio to that of rounding to nearest:",
        "",
        *layer_table(run),
    ]
    return lines


def _tokens_by_source(run: RunRecord) -> list[str]:
    """Tables of the tokens of each source that reach the experts: in all layers, and in each layer."""
    layers, shown_names = sorted(run.expert_tokens_by_source), _without_folders(run.source_names)
    lines = ["| source | fewest | median | most | experts that it never reaches |", "|---|---|---|---|---|"]
    for n, name in enumerate(run.source_names):
        missing = run.unreached_experts.get(name)
        if missing is None:
            continue
        counts = [count for layer in layers for count in run.expert_tokens_by_source[layer][n]]
        lines.append(f"| {shown_names[n]} | {' | '.join(_spread(counts))} | {len(missing)} of {len(counts)}{_named(missing)} |")
    shown = [n for n, name in enumerate(run.source_names) if name in run.unreached_experts]
    lines += ["", "Fewest, median and most in each layer:", ""]
    lines += ["| layer | " + " | ".join(shown_names[n] for n in shown) + " |", "|---|" + "---|" * len(shown)]
    for layer in layers:
        cells = [", ".join(_spread(run.expert_tokens_by_source[layer][n])) for n in shown]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return lines


def _without_folders(names: Sequence[str]) -> list[str]:
    """Names of calibration sources without the folders of this machine, since the report is uploaded with the checkpoint."""
    shown = []
    for name in names:
        prefix, path = ("self=", name[5:]) if name.startswith("self=") else ("", name)
        shown.append(prefix + Path(path).name if Path(path).exists() else name)
    return shown


def _shrinkage_lines(run: RunRecord) -> list[str]:
    """What was chosen for the matrices of each role, each time the least, the median and the largest."""
    names = [str(source["name"]) for source in run.options.get("calibration", {}).get("sources", [])]
    lines = ["Least, median and largest for the matrices of each name: the share of the mean of a Hessian's diagonal that is added to the"]
    lines[0] += " diagonal, and the factor that each source's tokens got." if names else " diagonal."
    lines += ["", f"| matrix | damping |{''.join(f' {name} |' for name in names)}", "|---|---|" + "---|" * len(names)]
    matrices: dict[str, list[TensorRecord]] = {}
    for record in run.records:
        if record.damping is not None:
            matrices.setdefault(_matrix(record), []).append(record)
    for matrix, records in matrices.items():
        columns = [[record.damping or 0.0 for record in records]]
        columns += [[(record.source_weights or [1.0] * len(names))[n] for record in records] for n in range(len(names))]
        lines.append(f"| {matrix} |" + "".join(f" {', '.join(f'{value:.3g}' for value in _three(column))} |" for column in columns))
    return lines


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    """(least, median, largest)."""
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _spread(counts: Sequence[int]) -> tuple[str, str, str]:
    """The fewest, the median and the most."""
    ordered = sorted(counts)
    return f"{ordered[0]:,}", f"{ordered[len(ordered) // 2]:,}", f"{ordered[-1]:,}"


def _named(experts: Sequence[tuple[int, int]]) -> str:
    """ ": layer 0 expert 3 and 5 more" for a cell of a table; "" for none."""
    names = [f"layer {layer} expert {expert}" for layer, expert in experts]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f": {', '.join(names[:_MOST_NAMES])}{more}" if names else ""


def _undersampled_lines(run: RunRecord) -> list[str]:
    undersampled = _undersampled(run)
    moved = [record for record in run.records if record.device.startswith("cpu:")]
    lines = []
    for how, outcome in (
        ("layer", "were calibrated with all tokens of their layer, weighted by the router"),
        ("none", "were quantized without data"),
    ):
        names = [f"layer {layer} expert {expert}" for layer, expert, by in undersampled if by == how]
        if names:
            shown = ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")
            lines.append(f"{len(names)} expert(s) that too few tokens reach {outcome}: {shown}.")
    if moved:
        lines.append(f"{len(moved)} matrices were rounded on the CPU: {moved[0].device.removeprefix('cpu: ')}.")
    return lines or ["None."]


def _undersampled(run: RunRecord) -> list[tuple[int, int, str]]:
    return sorted({(record.layer, record.expert, record.calibrated_by) for record in run.undersampled})


def _drawings(run: RunRecord) -> dict[str, Callable[[RunRecord], bytes]]:
    drawings: dict[str, Callable[[RunRecord], bytes]] = {"bits": _draw_bits}
    if any(record.relative_error is not None and record.layer >= 0 for record in run.records):
        drawings = {"error": _draw_errors} | drawings
    if run.stream_errors or any(record.output_error is not None for record in run.records):
        drawings["outputs"] = _draw_outputs
    if run.expert_tokens:
        drawings["tokens"] = _draw_tokens
    if run.held_out and run.method != "rtn":
        drawings["held_out"] = draw_ratios
    return drawings


def _draw_errors(run: RunRecord) -> bytes:
    return _lines_by_layer(run, "relative_error", "relative error of the weights")


def _draw_outputs(run: RunRecord) -> bytes:
    return _lines_by_layer(run, "output_error", "relative error of the outputs", run.stream_errors)


def _lines_by_layer(run: RunRecord, what: str, label: str, stream: Mapping[int, float] | None = None) -> bytes:
    """One line per matrix over the layers: the mean over experts, with a band from the smallest to the largest."""
    drawing, axes = figure()
    for number, matrix in enumerate(_MATRICES):
        layers: dict[int, list[float]] = {}
        for record in run.records:
            value = getattr(record, what)
            if record.layer >= 0 and _matrix(record) == matrix and value is not None:
                layers.setdefault(record.layer, []).append(value)
        if not layers:
            continue
        places, look = sorted(layers), style(number)
        means = [_mean(layers[layer]) for layer in places]
        axes.plot(places, means, label=matrix, color=look.colour, marker=look.marker, linestyle=look.dash, markersize=4, linewidth=1.4)
        if any(len(values) > 1 for values in layers.values()):
            least, most = ([edge(layers[layer]) for layer in places] for edge in (min, max))
            axes.fill_between(places, least, most, color=look.colour, alpha=0.12, linewidth=0)
    if stream:
        places = sorted(stream)
        axes.plot(places, [stream[layer] for layer in places], label="output of the layer", color=INK, linewidth=2)
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    if axes.get_legend_handles_labels()[0]:  # no matrix was rounded where all were kept
        axes.legend(frameon=False, ncols=3, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    return render(drawing, "png")


def _draw_bits(run: RunRecord) -> bytes:
    """One line per kind over the layers, and one for all tensors of a layer."""
    drawing, axes = figure()
    layers = sorted({record.layer for record in run.records if record.layer >= 0})
    for number, name in enumerate((*EXPERT_MATRICES, "attention")):
        bits = [_bits(r for r in run.records if r.layer == layer and name in (r.kind, _matrix(r))) for layer in layers]
        look = style(number)
        axes.plot(layers, bits, label=name, color=look.colour, marker=look.marker, linestyle=look.dash, markersize=4, linewidth=1.2)
    axes.plot(layers, [_bits(r for r in run.records if r.layer == layer) for layer in layers], label="whole layer", color=INK, linewidth=2)
    axes.set_xlabel("layer")
    axes.set_ylabel("bits per weight")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    axes.legend(frameon=False, ncols=5, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    return render(drawing, "png")


def _draw_tokens(run: RunRecord) -> bytes:
    """One cell per expert and layer, with its number where cells are large enough."""
    layers = sorted(run.expert_tokens)
    counts = [run.expert_tokens[layer] for layer in layers]
    drawing, axes = figure(8.0, min(10.0, 1.8 + 0.3 * len(layers)))
    axes.grid(visible=False)
    image = axes.imshow(counts, aspect="auto", cmap="cividis", vmin=0)
    most = max(map(max, counts)) or 1
    if len(layers) <= 40 and len(counts[0]) <= 16:
        for row, experts in enumerate(counts):
            for column, count in enumerate(experts):
                colour = "white" if count < 0.55 * most else "black"
                axes.text(column, row, _short(count), ha="center", va="center", color=colour, fontsize=6.5)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    shown = range(0, len(layers), max(1, len(layers) // 20))
    axes.set_yticks(shown, [str(layers[n]) for n in shown])
    axes.set_xticks(range(0, len(counts[0]), max(1, len(counts[0]) // 16)))
    drawing.colorbar(image, ax=axes, label="tokens that reach the expert")
    return render(drawing, "png")


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _short(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"


def _matrix(record: TensorRecord) -> str:
    """As "w1" or "Wqkv"; outside the blocks the kind."""
    return role_of(record.name) if record.kind in ("experts", "attention") else record.kind


def _bits(records: Iterable[TensorRecord]) -> float:
    sizes = [(record.nbytes, record.parameters) for record in records]
    return 8 * sum(nbytes for nbytes, _ in sizes) / (sum(parameters for _, parameters in sizes) or 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, data: bytes) -> None:
    incomplete = path.with_name(path.name + ".begun")
    incomplete.write_bytes(data)
    os.replace(incomplete, path)
