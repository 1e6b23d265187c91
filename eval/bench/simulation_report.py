"""The report of a simulation of expert caches: Markdown, JSON and a plot."""

from __future__ import annotations

import json
from typing import Any

from dbrx_q.experts.sweep import Sweep
from dbrx_q.planning.sizes import format_size
from dbrx_q.plots import panels, render, style

__all__ = ["FILES", "KEYS", "files", "markdown"]

FILES = ("simulation.json", "simulation.md", "simulation.png", "simulation.svg")
KEYS = ("rows", "curve", "slots")


def markdown(found: Sweep) -> str:
    """The table of all policies."""
    how = "one by one" if found.one_by_one else "in the steps of the recording"
    lines = [
        f"{found.tokens:,} tokens, {how}; {found.slots} slots for {found.experts} experts ({found.slots / found.experts:.0%})"
        + (f"; misses: {found.miss_policy}" if found.miss_policy else ""),
        "",
        "| policy | prefetch | hits | misses | prefetched | brought, a token | by the CPU | from disk, a token | predicted | tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found.rows:
        name = f"{row.policy} (the bound: it knows the future)" if row.policy == found.bound else row.policy
        predicted = f"{row.accuracy:.1%}" if row.prefetch else ""
        lines.append(
            f"| {name} | {'yes' if row.prefetch else 'no'} | {row.hit_rate:.1%} | {row.misses:,} | {row.prefetches:,} | "
            f"{row.brought:.2f} | {row.on_cpu:.2f} | {format_size(row.disk_bytes)} | {predicted} | {row.tokens_per_second:.2f} |"
        )
    if found.curve:
        shares = sorted({point.share for point in found.curve})
        at = {(point.policy, point.share): point for point in found.curve}
        lines += [
            "",
            "Hits and tokens/s without prefetch, with slots for another share of the experts:",
            "",
            f"| policy | {' | '.join(f'{share:.1%}' for share in shares)} |",
            f"|---|{'---:|' * len(shares)}",
        ]
        for policy in dict.fromkeys(point.policy for point in found.curve):
            cells = [f"{at[policy, share].hit_rate:.1%}, {at[policy, share].tokens_per_second:.2f}" for share in shares]
            lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def files(found: Sweep) -> dict[str, bytes]:
    """The report's files by name."""
    drawing, (hits, speed) = panels(2, 12.0, 4.6)
    for number, policy in enumerate(dict.fromkeys(point.policy for point in found.curve)):
        points = [point for point in found.curve if point.policy == policy]
        look = style(number)
        label = f"{policy} (bound)" if policy == found.bound else policy
        shares = [100 * point.share for point in points]
        drawn: dict[str, Any] = {"label": label, "color": look.colour, "marker": look.marker, "linestyle": look.dash, "markersize": 5}
        hits.plot(shares, [100 * point.hit_rate for point in points], **drawn)
        speed.plot(shares, [point.tokens_per_second for point in points], **drawn)
    for axes in (hits, speed):
        axes.set_xlim(0, 100)
        axes.set_xlabel("experts that have a slot, %")
    hits.set_ylim(0, 100)
    hits.set_ylabel("requests that hit, %")
    speed.set_ylim(bottom=0)
    speed.set_ylabel("tokens/s that the machine's bandwidths allow")
    hits.legend(frameon=False, fontsize=9)
    return {
        "simulation.json": (json.dumps(found.to_dict(), indent=2) + "\n").encode(),
        "simulation.md": markdown(found).encode(),
        "simulation.png": render(drawing, "png"),
        "simulation.svg": render(drawing, "svg"),
    }
