"""Benchmarks the Triton kernels at DBRX's shapes against the GPU's copy bandwidth and bf16 matmul rate, and against alternatives.

Dimension letters: `T` tokens, `E` experts, `A` active experts, `D` d_model, `F` ffn hidden, `N` output features, `K` input features,
`B` sequences, `H`/`G` query and key/value heads, `L` tokens in the cache, `C` channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .ceilings import MATMUL_ON_GPU, CeilingMeter
from .device_timing import Environment, MedianTime, environment, turns
from .kernel_work import COPY, MATMUL, Work, dbrx_works, decode_step_work

__all__ = ["KernelBenchmark", "KernelTiming", "bench_kernels", "markdown", "time_work"]


@dataclass(frozen=True)
class KernelTiming:
    """The measurement of one row."""

    kernel: str
    """Name of the op."""
    case: str
    """Format and sizes, in words."""
    seconds: float | None
    """Median of one call of our kernel; None if it could not run."""
    ceiling: str
    """What limits the row: the copy bandwidth, counted on packed bytes, or the bf16 matmul rate."""
    share: float | None
    """Share of the ceiling that our kernel reaches."""
    target: float | None
    """Share that it should reach, if there is a target."""
    rival: str | None
    """A contender that it should be faster than, if there is one."""
    met: bool | None
    """Whether it reaches the target and is faster than the rival; None without a target, or if the rival could not run."""
    peers: dict[str, float]
    """Median seconds of the other contenders, by name."""
    eager: tuple[str, ...]
    """Contenders that could not be captured in a CUDA graph."""
    failed: dict[str, str]
    """Contenders that could not run, with the reason."""


@dataclass(frozen=True)
class KernelBenchmark:
    """The results of one run."""

    environment: Environment
    """Where and when it ran."""
    command: str
    """That ran it."""
    copy_bandwidth: float
    """bytes/s, read and written."""
    matmul_rate: float
    """Floating-point operations per second in bf16."""
    rows: tuple[KernelTiming, ...]
    """In the order of the benchmark."""

    def as_json(self) -> dict[str, object]:
        """The JSON object of `dbrx-q bench kernels --json`."""
        return asdict(self)


def bench_kernels(
    device: torch.device,
    command: str,
    *,
    model: Path | None = None,
    repeats: int = 20,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> KernelBenchmark:
    """Measure every row of the table.

    Args:
        device: a CUDA device.
        command: recorded in the result.
        model: a checkpoint of DBRX's dimensions whose whole decode step is measured as well.
        repeats: turns that count.
        report: called with (done, total).
    """
    rates = CeilingMeter(device, torch.bfloat16).measure(repeats)
    works = [work.make for work in dbrx_works(device)]
    if model is not None:
        works.append(lambda: decode_step_work(model, device))
    rows = []
    for done, make in enumerate(works):
        report(done, len(works))
        rows.append(_row(make, rates.bandwidth, rates.matmul, repeats))
        torch.cuda.empty_cache()
    report(len(works), len(works))
    return KernelBenchmark(environment(device), command, rates.bandwidth, rates.matmul, tuple(rows))


def markdown(result: KernelBenchmark) -> str:
    """The results as a Markdown document."""
    environment, size = result.environment, MATMUL_ON_GPU
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    lines = [
        "# Kernels at DBRX's shapes",
        "",
        f"{environment.date}, {environment.device} ({environment.chip}, {environment.multiprocessors} multiprocessors), {versions}. "
        f"`{result.command}`",
        "",
        f"Measured in the same run: copying {result.copy_bandwidth / 1e9:.0f} GB/s (read and written), bf16 matmul of {size} x {size} x "
        f"{size} {result.matmul_rate / 1e12:.0f} TFLOP/s. Medians; contenders run in turns from CUDA graphs; weights, keys and values "
        "are not in the L2 cache, what the router, the norm and the store read is.",
        "",
        "| kernel | case | time | share | of | target | met | the same work by other libraries |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in result.rows]
    failed = [f"- {row.kernel}, {row.case}: {name}: {reason}" for row in result.rows for name, reason in row.failed.items()]
    if failed:
        lines += ["", "Not measured:", "", *failed]
    return "\n".join(lines) + "\n"


def _cells(row: KernelTiming) -> Iterator[str]:
    yield row.kernel
    yield row.case
    yield "" if row.seconds is None else _time(row.seconds) + (" (no graph)" if "dbrx_q" in row.eager else "")
    yield "" if row.share is None else f"{row.share:.1%}"
    yield row.ceiling
    yield "" if row.target is None else f"{row.target:.0%}" + (f", faster than {row.rival}" if row.rival else "")
    yield {True: "yes", False: "no", None: ""}[row.met]
    yield ", ".join(f"{name} {_time(seconds)}{' (no graph)' if name in row.eager else ''}" for name, seconds in row.peers.items())


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _row(make: Callable[[], Work], bandwidth: float, rate: float, repeats: int) -> KernelTiming:
    work = make()
    times, failed = time_work(work, repeats)
    ours = times.pop("dbrx_q", None)
    share = None if ours is None else work.amount / ours.seconds / {COPY: bandwidth, MATMUL: rate}[work.ceiling]
    met = None
    if work.target is not None:
        met = share is not None and share >= work.target
        if work.rival is not None and ours is not None:
            met = met and ours.seconds < times[work.rival].seconds if work.rival in times else None
    eager = [name for name, timed in times.items() if not timed.graph]
    if ours is not None and not ours.graph:
        eager.append("dbrx_q")
    return KernelTiming(
        work.kernel,
        work.case,
        None if ours is None else ours.seconds,
        work.ceiling,
        share,
        work.target,
        work.rival,
        met,
        {name: timed.seconds for name, timed in times.items()},
        tuple(eager),
        failed,
    )


def time_work(work: Work, repeats: int) -> tuple[dict[str, MedianTime], dict[str, str]]:
    """(times of the contenders that ran, reasons why others could not: a missing library, too little memory)."""
    calls: dict[str, Sequence[Callable[[], object]]] = {}
    failed: dict[str, str] = {}
    for name, prepare in work.contenders.items():
        try:
            calls[name] = prepare()
            calls[name][0]()
            torch.cuda.synchronize()
        except Exception as error:  # another library may raise anything; the row reports it
            calls.pop(name, None)
            lines = str(error).splitlines() or [""]
            failed[name] = f"{type(error).__name__}: {lines[0][:200]}"
    return turns(calls, repeats=repeats, capture=work.capture), failed
