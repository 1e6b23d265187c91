"""Writes the results of `dbrx-q bench` as a document and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_q.eval.report_folder import write_files
from dbrx_q.plots import INK, render, style

from .model import ModelBenchmark, SpeedRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FILES", "KEYS", "markdown", "plot", "write_report"]

FILES = ("bench.json", "bench.md", "bench.png", "bench.svg")
KEYS = ("path", "rows", "provenance")
"""Keys that the JSON object of every report has."""

_LOG_FROM = 30  # ratio of a panel's largest to its smallest value from which the axis is logarithmic
_TITLES = {"pp": "Prefill", "tg": "Decode"}


def write_report(result: ModelBenchmark, folder: Path) -> None:
    """Write `FILES` into `folder`, which is created if missing.

    Raises:
        RequestError: a file cannot be written.
        UnsupportedError: matplotlib is not installed.
    """
    drawing = plot(result)
    contents = (
        (json.dumps(result.to_dict(), indent=2) + "\n").encode(),
        markdown(result).encode(errors="replace"),
        render(drawing, "png"),
        render(drawing, "svg"),
    )
    write_files(folder, dict(zip(FILES, contents, strict=True)))


def markdown(result: ModelBenchmark) -> str:
    """The results as a Markdown document."""
    record = result.provenance
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"# Speed and memory of {Path(result.path).name or result.path}",
        "",
        f"{record['device']}, {record['threads']} threads, {record['system']}; {versions}. `{record['command']}`",
        "",
    ]
    if not result.complete:
        lines += [f"**Interrupted: {len(result.rows) + len(result.first_token)} of {result.planned} rows were finished.**", ""]
    lines += [
        "| model | format | size | bits per weight | parameters | device | dtype | KV cache |",
        "|---|---|---|---|---|---|---|---|",
        f"| {result.path} | {result.format} | {_size(result.bytes)} | {result.bits_per_weight:.2f} | {_parameters(result.parameters)} | "
        f"{result.device} | {result.dtype} | {result.kv} |",
        "",
        "| test | tokens/s | ceiling | of the ceiling | limited by |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(_cells(result, row))} |" for row in result.rows),
        "",
        f"Mean and standard deviation of {result.repeats} repeats; shares are of medians. The ceiling follows from the bytes and "
        f"operations of a token and from the rates of {_bandwidth_name(result)} and a large {result.dtype} matmul, measured in turns with "
        "each row.",
        "",
    ]
    for row in (row for row in result.rows if row.hit_rate < 1):
        copy = f", and {_share(row.fallback_share)} were answered by the fallback copy" if row.fallback_share else ""
        lines += [f"{row.name}: {_share(row.hit_rate)} of the requests for experts hit the cache{copy}.", ""]
    if result.first_token:
        lines += ["| prompt | time to first token |", "|---|---|"]
        lines += [f"| {row.prompt_tokens} tokens | {_time(row.seconds)} ± {_time(row.stdev)} |" for row in result.first_token]
        lines.append("")
    lines += ["| memory | after loading | peak while loading | peak of the run |", "|---|---|---|---|"]
    for name in result.peak_memory:
        used = (memory.get(name, 0) for memory in (result.loaded_memory, result.load_peak_memory, result.peak_memory))
        lines.append(f"| {name} | {' | '.join(_of(value, result.bytes) for value in used)} |")
    lines += ["", f"Load time {_time(result.load_seconds)}; weights in memory {_of(result.weight_bytes, result.bytes)}."]
    if "sha256" in record:
        lines.append(f"Checkpoint {record['sha256']}.")
    return "\n".join(lines) + "\n"


def plot(result: ModelBenchmark) -> Figure:
    """Tokens/s of every row as a bar with its ceiling as a mark, in one panel for prefill and one for decode."""
    from matplotlib.figure import Figure

    panels = [(kind, rows) for kind in _TITLES if (rows := [row for row in result.rows if row.kind == kind])]
    heights = [len(rows) + 1 for _, rows in panels]
    drawing = Figure(figsize=(8, 1.4 + 0.42 * sum(heights)), layout="constrained")
    axes = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (kind, rows) in zip(axes, panels, strict=True):
        _panel(panel, kind, rows)
    axes[-1].set_xlabel("tokens/s: median, with the standard deviation over the repeats", color=INK)
    _titles(drawing, axes[0], result)
    return drawing


def _panel(axes: Axes, kind: str, rows: list[SpeedRow]) -> None:
    measured, allowed = style(0).colour, style(1).colour
    places = list(range(len(rows)))
    speeds, ceilings = [row.median for row in rows], [row.ceiling for row in rows]
    axes.barh(places, speeds, height=0.6, color=measured, label="measured")
    below = [min(row.stdev, 0.9 * row.median) for row in rows]  # a logarithmic axis cannot show negative values
    axes.errorbar(speeds, places, xerr=[below, [row.stdev for row in rows]], fmt="none", ecolor=INK, elinewidth=1)
    axes.vlines(ceilings, [y - 0.38 for y in places], [y + 0.38 for y in places], colors=allowed, linewidth=2.5, label="ceiling")
    least, most = min(speeds + ceilings), max(speeds + ceilings)
    if most > _LOG_FROM * least:
        axes.set_xscale("log")
        axes.set_xlim(least / 3, most * (most / least) ** 0.6)  # room for the text
    else:
        axes.set_xlim(0, most * 1.5)
    for y, row in zip(places, rows, strict=True):
        text = f"{_speed(row.median)}, {_share(row.of_ceiling)} of the {row.bound} ceiling"
        end = max(row.median + row.stdev, row.ceiling)
        axes.annotate(text, (end, y), (6, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_title(_TITLES[kind], loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, labelcolor=INK)


def _titles(drawing: Figure, first: Axes, result: ModelBenchmark) -> None:
    interrupted = "" if result.complete else " (interrupted)"
    name = Path(result.path).name or result.path
    record = result.provenance
    device = f"{record['device']}, {record['threads']} threads" if result.device == "cpu" else record["device"]
    drawing.suptitle(f"{name}: {result.format}, {_size(result.bytes)}{interrupted}\n{device}", fontsize=10, color=INK, parse_math=False)
    first.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)


def _cells(result: ModelBenchmark, row: SpeedRow) -> Iterator[str]:
    yield row.name
    yield f"{_speed(row.mean)} ± {_speed(row.stdev)}"
    yield _speed(row.ceiling)
    yield _share(row.of_ceiling)
    if row.bound == "bandwidth":
        reached = f"{_size(row.bytes_per_second)}/s reached"
        yield f"{_bandwidth_name(result)}: {_size(row.bytes_per_token)} a token at {_size(row.bandwidth)}/s; {reached}"
    else:
        yield f"{result.dtype} matmul: {row.flops_per_token / 1e9:.3g} GFLOP a token at {row.matmul_rate / 1e12:.3g} TFLOP/s"


def _bandwidth_name(result: ModelBenchmark) -> str:
    return "copying" if result.device.startswith("cuda") else "a plain read"


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 1000 else f"{tokens_per_second:.4g}" if tokens_per_second else "0"


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.01 else f"{100 * share:.2g}%"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _of(value: int, stored: int) -> str:
    return f"{_size(value)} ({value / stored:.3f} of stored)"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
