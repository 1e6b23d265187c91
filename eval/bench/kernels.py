"""The Triton kernels at DBRX's shapes on this GPU, beside its copy bandwidth, its bf16 matmul rate, and what a user would take instead.

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

__all__ = ["KernelBenchmark", "KernelTiming", "bench_kernels", "markdown"]


@dataclass(frozen=True)
class KernelTiming:
    """One kernel. seconds: the median of one call; peers: of the same work by other means.

    share: of `ceiling`, the copy bandwidth counted on packed bytes or the bf16 matmul rate. target: the share that it should reach, or
    None. met: whether it does, and is faster than `rival` where one is named. eager: contenders that no CUDA graph could hold.
    failed: why a contender could not run.
    """

    kernel: str
    case: str
    seconds: float | None
    ceiling: str
    share: float | None
    target: float | None
    rival: str | None
    met: bool | None
    peers: dict[str, float]
    eager: tuple[str, ...]
    failed: dict[str, str]


@dataclass(frozen=True)
class KernelBenchmark:
    """One run. copy_bandwidth: bytes/s, read and written. matmul_rate: floating-point operations per second in bf16."""

    environment: Environment
    command: str
    copy_bandwidth: float
    matmul_rate: float
    rows: tuple[KernelTiming, ...]

    def as_json(self) -> dict[str, object]:
        """Plain values."""
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
        command: that is noted with the results.
        model: a checkpoint of DBRX's dimensions whose whole decode step is measured too.
        repeats: turns that count.
        report: called with (done, total).
    """
    rates = CeilingMeter(device, torch.bfloat16).measure(repeats)
    works: list[Callable[[], Work]] = list(dbrx_works(device))
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
    """The results as a document."""
    where, size = result.environment, MATMUL_ON_GPU
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    lines = [
        "# Kernels at DBRX's shapes",
        "",
        f"{where.date}, {where.device} ({where.chip}, {where.multiprocessors} multiprocessors), {versions}. `{result.command}`",
        "",
        f"Measured in the same run: copying {result.copy_bandwidth / 1e9:.0f} GB/s (read and written), bf16 matmul of {size} x {size} x "
        f"{size} {result.matmul_rate / 1e12:.0f} TFLOP/s. Medians, contenders turn by turn, from CUDA graphs, inputs that "
        "are not in the L2 cache.",
        "",
        "| kernel | case | time | share | of | target | met | the same work by other means |",
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
    times, failed = _times(work, repeats)
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


def _times(work: Work, repeats: int) -> tuple[dict[str, MedianTime], dict[str, str]]:
    """What could be timed, and why the rest could not: a library that is missing, memory that is too small."""
    calls: dict[str, Sequence[Callable[[], object]]] = {}
    failed: dict[str, str] = {}
    for name, prepare in work.contenders.items():
        try:
            calls[name] = prepare()
            calls[name][0]()
            torch.cuda.synchronize()
        except Exception as error:  # a peer may fail in any way; the row says how
            calls.pop(name, None)
            lines = str(error).splitlines() or [""]
            failed[name] = f"{type(error).__name__}: {lines[0][:200]}"
    return turns(calls, repeats=repeats, capture=work.capture), failed
