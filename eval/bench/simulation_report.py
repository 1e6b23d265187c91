"""The report of a simulation of expert caches: Markdown, JSON and a plot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dbrx_q.experts.sweep import Sweep
from dbrx_q.planning.sizes import format_size
from dbrx_q.plot_labels import NamedPoint, label_line_ends
from dbrx_q.plots import panels, render, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FILES", "KEYS", "files", "markdown"]

FILES = ("simulation.json", "simulation.md", "simulation.png", "simulation.svg")
KEYS = ("rows", "curve", "slots")
"""Keys that the JSON object of every report has."""


def markdown(sweep: Sweep) -> str:
    """The table of all policies."""
    order = "one by one" if sweep.token_by_token else "in the steps of the recording"
    lines = [
        f"{sweep.tokens:,} tokens, {order}; {sweep.slots} slots for {sweep.experts} experts ({sweep.slots / sweep.experts:.0%})"
        + (f"; misses: {sweep.miss_policy}" if sweep.miss_policy else ""),
        "",
        "| policy | prefetch | hits | misses | prefetched | loaded, a token | by the CPU | from disk, a token | predicted | tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sweep.rows:
        name = f"{row.policy} (the bound: it knows the future)" if row.policy == sweep.bound else row.policy
        predicted = f"{row.prefetch_accuracy:.1%}" if row.prefetch else ""
        lines.append(
            f"| {name} | {'yes' if row.prefetch else 'no'} | {row.hit_rate:.1%} | {row.misses:,} | {row.prefetches:,} | "
            f"{row.loads_per_token:.2f} | {row.cpu_misses_per_token:.2f} | {format_size(row.disk_bytes_per_token)} | {predicted} | "
            f"{row.tokens_per_second:.2f} |"
        )
    if sweep.curve:
        shares = sorted({point.share for point in sweep.curve})
        points = {(point.policy, point.share): point for point in sweep.curve}
        lines += [
            "",
            "Hits and tokens/s without prefetch, with slots for another share of the experts:",
            "",
            f"| policy | {' | '.join(f'{share:.1%}' for share in shares)} |",
            f"|---|{'---:|' * len(shares)}",
        ]
        for policy in dict.fromkeys(point.policy for point in sweep.curve):
            cells = [f"{points[policy, share].hit_rate:.1%}, {points[policy, share].tokens_per_second:.2f}" for share in shares]
            lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def files(sweep: Sweep) -> dict[str, bytes]:
    """The contents of the report's files, by their names."""
    drawing = _plot(sweep)
    return {
        "simulation.json": (json.dumps(sweep.to_dict(), indent=2) + "\n").encode(),
        "simulation.md": markdown(sweep).encode(),
        "simulation.png": render(drawing, "png"),
        "simulation.svg": render(drawing, "svg"),
    }


def _plot(sweep: Sweep) -> Figure:
    """Hits and tokens/s over the share of experts that have a slot: a line per policy, named at its end."""
    drawing, (hits, speed) = panels(2, 13.0, 4.6)
    hit_ends, speed_ends = [], []
    for number, policy in enumerate(dict.fromkeys(point.policy for point in sweep.curve)):
        points = [point for point in sweep.curve if point.policy == policy]
        look = style(number)
        name = f"{policy} (bound)" if policy == sweep.bound else policy
        shares = [100 * point.share for point in points]
        hit_rates, speeds = [100 * point.hit_rate for point in points], [point.tokens_per_second for point in points]
        for axes, values in ((hits, hit_rates), (speed, speeds)):
            axes.plot(shares, values, color=look.colour, marker=look.marker, linestyle=look.dash, markersize=5)
        hit_ends.append(NamedPoint(shares[-1], hit_rates[-1], name, look.colour))
        speed_ends.append(NamedPoint(shares[-1], speeds[-1], name, look.colour))
    for axes in (hits, speed):
        axes.set_xlim(0, 100)
        axes.set_xlabel("experts that have a slot, %")
    hits.set_ylim(0, 100)
    hits.set_ylabel("requests that hit, %")
    speed.set_ylim(bottom=0)
    speed.set_ylabel("tokens/s that the machine's bandwidths allow")
    label_line_ends(drawing, hits, hit_ends)
    label_line_ends(drawing, speed, speed_ends)
    return drawing
