"""The static roofline of every usual launch on every chip: computes the rows, and writes their table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dbrx_q.errors import DbrxError, RequestError
from dbrx_q.eval.document import check_section, replace_section
from dbrx_q.eval.parent_process import end_with_parent

from .gpu_specs import GPUS
from .static_cases import STEP, StaticCase, record, static_cases
from .static_roofline import FIXED_SECONDS, LaunchCost, launch_cost

__all__ = ["BEGIN", "END", "StaticRow", "as_json", "check_report", "document", "matching_cases", "static_rows", "table", "write_report"]

BEGIN = "<!-- written by `dbrx-q bench static` -->"
END = "<!-- end of what is written -->"


@dataclass(frozen=True)
class StaticRow:
    """One case on one chip."""

    chip: str
    """In `GPUS`."""
    case: str
    """Its name."""
    op: str
    """Of `StaticCase`."""
    decode: bool
    """Whether copy bandwidth is the ceiling; the matmul rate otherwise."""
    launches: tuple[tuple[LaunchCost, int], ...]
    """Costs, and how often each is launched."""
    torch_operators: int = 0
    """Of `StaticCase`."""

    @property
    def seconds(self) -> float:
        """Expected time of all launches, one after the other."""
        return sum(cost.seconds * times for cost, times in self.launches) + self.torch_operators * FIXED_SECONDS

    @property
    def ideal(self) -> float:
        """Seconds at the ceiling."""
        return sum(cost.ideal * times for cost, times in self.launches)

    @property
    def share(self) -> float:
        """Expected share of the ceiling."""
        return self.ideal / self.seconds

    @property
    def steady_share(self) -> float:
        """The same without the fixed time of each launch."""
        return self.ideal / sum(cost.bounds[cost.bound] * times for cost, times in self.launches)

    @property
    def simulated(self) -> float:
        """Time of all launches by the simulation of their loops."""
        return sum(cost.simulated * times for cost, times in self.launches) + self.torch_operators * FIXED_SECONDS


def matching_cases(words: Sequence[str], *, everything: bool = False) -> list[StaticCase]:
    """The cases whose op is, or whose name contains, one of `words`; all of them without words.

    Raises:
        RequestError: a word that matches none.
    """
    cases = static_cases(everything=everything)
    for word in words:
        if not word.strip() or not any(_matches(case, word) for case in cases):
            names = ", ".join(dict.fromkeys(case.op for case in cases))
            raise RequestError(f"--case must be one of {names}, or a part of a case's name; found {word!r:.40}. Leave it out for all cases")
    return [case for case in cases if not words or any(_matches(case, word) for word in words)]


def static_rows(
    chips: Sequence[str],
    *,
    words: Sequence[str] = (),
    everything: bool = False,
    processes: int = 2,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[StaticRow]:
    """Compile and count, in worker processes.

    Args:
        chips: names in `GPUS`.
        words: see `matching_cases`.
        everything: whether to take more formats and sizes.
        processes: number of worker processes.
        report: called with (done, total).

    Raises:
        RequestError: a chip is unknown, or a word matches no case.
    """
    for name in chips:
        if name not in GPUS:
            raise RequestError(f"--chip must be one of {', '.join(GPUS)}; found {name!r:.40}. Choose one of these")
    names = [case.name for case in matching_cases(words, everything=everything)]
    work = [(chip, name, everything) for chip in dict.fromkeys(chips) for name in names]
    if processes == 1:
        for done, which in enumerate(work, 1):
            yield _row(which)
            report(done, len(work))
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        for done, row in enumerate(pool.map(_row, work), 1):
            report(done, len(work))
            yield row


def table(rows: Sequence[StaticRow]) -> str:
    """A Markdown table for each chip: a row for each launch, and for the sum of a case's launches."""
    parts = []
    for chip in dict.fromkeys(row.chip for row in rows):
        gpu = GPUS[chip]
        parts.append(f"**{chip}, {gpu.product}** ({gpu.copy_bandwidth / 1e12:.2f} TB/s, {gpu.matmul_rate / 1e12:.0f} TFLOP/s)\n")
        parts.append(
            "| case | kernel | instructions per 16 bytes: all / ALU / FMA / memory / MMA / uniform / other | registers | programs an SM "
            "| KB in flight | waves, tail | issue | ALU | FMA | MMA | DRAM | us | bound | share, without fixed time | simulated |"
        )
        parts.append("|---" * 16 + "|")
        for row in rows:
            if row.chip == chip:
                parts += _lines(row)
        parts.append("")
    return "\n".join(parts).rstrip("\n")


def document(rows: Sequence[StaticRow]) -> str:
    """The tables, preceded by how they were made, in lines of at most 120 columns."""
    import triton

    text = (
        f"`dbrx-q bench static` computed this with Triton {triton.__version__}, without a GPU: nothing was measured. Each launch was "
        "compiled and its instructions were counted; times of the bounds are in microseconds. The share is of copy bandwidth, for prefill "
        "of the matmul rate. The last column "
        "has time and share by a simulation of the loops, which hides latencies only as far as the resident warps do."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False) + "\n\n" + table(rows)


def check_report(path: Path) -> None:
    """Refuse a document that the table has no place in.

    Raises:
        RequestError: the file lacks the marker lines, or cannot be read.
    """
    check_section(path, BEGIN, END)


def write_report(path: Path, text: str) -> None:
    """Replace the text between the two marker lines of `path`.

    Raises:
        RequestError: the file lacks the marker lines.
    """
    replace_section(path, BEGIN, END, text)


def as_json(rows: Sequence[StaticRow]) -> dict[str, Any]:
    """All figures; times are in seconds."""
    import triton

    return {
        "triton": triton.__version__,
        "rows": [
            {
                "chip": row.chip,
                "case": row.case,
                "op": row.op,
                "ceiling": "copy bandwidth" if row.decode else "matmul rate",
                "seconds": row.seconds,
                "share": row.share,
                "steady_share": row.steady_share,
                "simulated": row.simulated,
                "ideal": row.ideal,
                "torch_operators": row.torch_operators,
                "launches": [
                    {**asdict(cost), "seconds": cost.seconds, "share": cost.share, "times": times} for cost, times in row.launches
                ],
            }
            for row in rows
        ],
    }


def _matches(case: StaticCase, word: str) -> bool:
    return word == case.op or word.lower() in case.name.lower()


def _lines(row: StaticRow) -> list[str]:
    lines = []
    for cost, times in row.launches:
        kernel = cost.kernel.removesuffix("_kernel") + (f" x {times}" if times > 1 else "")
        counts = " / ".join(f"{count:.0f}" for count in cost.per_16_bytes.values()) or "-"
        bounds = " | ".join(f"{seconds * 1e6:.1f}" for seconds in cost.bounds.values())
        lines.append(
            f"| {row.case} | {kernel} | {counts} | {cost.registers} | {cost.resident} ({cost.limit}) | {cost.in_flight / 1024:.0f} "
            f"| {cost.waves:.2f}, {cost.tail:.2f} | {bounds} | {cost.seconds * 1e6:.1f} | {cost.bound} "
            f"| {cost.share:.0%}, {cost.steady_share:.0%} | {cost.simulated * 1e6:.1f}, {cost.simulated_share:.0%} |"
        )
    if len(row.launches) > 1:
        rate = f", {1 / row.seconds:.0f} tokens/s" if row.op == STEP else ""
        shares = f"**{row.share:.0%}**, {row.steady_share:.0%} | {row.simulated * 1e6:.1f}, {row.ideal / row.simulated:.0%}"
        lines.append(f"| **{row.case}** | all{rate} {'| ' * 10}| {row.seconds * 1e6:.1f} | | {shares} |")
    return lines


@cache
def _case(name: str, everything: bool) -> StaticCase:
    return next(case for case in static_cases(everything=everything) if case.name == name)


def _row(which: tuple[str, str, bool]) -> StaticRow:
    chip, name, everything = which
    case = _case(name, everything)
    costs = []
    for launch, times in record(case, chip):
        try:
            costs.append((launch_cost(launch, chip, new_tokens=case.new_tokens, decode=case.decode), times))
        except DbrxError:
            raise
        except Exception as error:  # Triton raises many kinds of errors, and some cannot be pickled
            raise DbrxError(f"{launch.kernel.__name__}, {name}, does not compile for {chip}: {type(error).__name__}: {error}") from None
    return StaticRow(chip, name, case.op, case.decode, tuple(costs), case.torch_operators)
