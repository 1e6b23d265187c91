"""The report of a benchmark with offloaded experts: Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path

from dbrx_q.planning.sizes import format_size

from .offload import OffloadBenchmark

__all__ = ["FILES", "KEYS", "files", "markdown"]

FILES = ("offload.json", "offload.md")
KEYS = ("path", "rows", "provenance")
"""Keys that the JSON object of every report has."""


def markdown(benchmark: OffloadBenchmark) -> str:
    """The results as a Markdown document."""
    access = "bypassing the page cache" if benchmark.direct else "through the page cache"
    record = benchmark.provenance
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"# Experts on disk: {Path(benchmark.path).name}",
        "",
        f"{record['device']}, {record['threads']} threads; {versions}. `{record['command']}`",
        "",
        f"{benchmark.experts} experts of {format_size(benchmark.expert_bytes)}, read {access}; policy {benchmark.policy}. The bound "
        "follows from the disk's bandwidth, measured before and after each row, and from the experts that were needed and not in "
        "memory, even if a fallback copy answered. If products of experts take nearly all of the time, the processor is the limit, not "
        "the disk.",
        "",
        "| experts held | test | prefetch | hits | fallback copy | needed from disk, a token | read, a token | disk | tokens/s | bound "
        "| of the bound | time in products |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in benchmark.rows:
        test = f"pp{row.tokens}" if row.prefill else f"tg{row.tokens}"
        lines.append(
            f"| {row.slots} ({row.share:.0%}) | {test} | {'yes' if row.prefetch else 'no'} | {row.hit_rate:.1%} | "
            f"{row.fallback_share:.1%} | {format_size(row.needed_bytes)} | {format_size(row.read_bytes)} | {format_size(row.link)}/s | "
            f"{row.tokens_per_second:.2f} | {row.bound:.2f} | {row.of_bound:.1%} | {row.compute_seconds * row.tokens_per_second:.0%} |"
        )
    if benchmark.gpus:
        lines += [
            "",
            "A GPU and host memory. The bound follows from the missed experts, and from the rates at which the CPU computes and the link "
            "copies them, at the same time for hybrid.",
            "",
            "| experts held | misses | prefetch | hits | needed, a token | CPU | link | by the CPU | tokens/s | bound | of the bound |",
            "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
    for gpu in benchmark.gpus:
        lines.append(
            f"| {gpu.slots} ({gpu.share:.0%}) | {gpu.miss_policy} | {'yes' if gpu.prefetch else 'no'} | {gpu.hit_rate:.1%} | "
            f"{format_size(gpu.needed_bytes)} | {format_size(gpu.cpu)}/s | {format_size(gpu.link)}/s | {gpu.on_cpu:.0%} | "
            f"{gpu.tokens_per_second:.2f} | {gpu.bound:.2f} | {gpu.of_bound:.1%} |"
        )
    return "\n".join(lines) + "\n"


def files(benchmark: OffloadBenchmark) -> dict[str, bytes]:
    """The contents of the report's files, by their names."""
    return {"offload.json": (json.dumps(benchmark.to_dict(), indent=2) + "\n").encode(), "offload.md": markdown(benchmark).encode()}
