"""The table of every Triton kernel's resources on every chip, and the document that contains it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from dbrx_q.errors import DbrxError, RequestError
from dbrx_q.eval.document import check_section, replace_section
from dbrx_q.eval.parent_process import end_with_parent
from dbrx_q.kernels.triton.launch import CHIPS, Chip, Launch

from .kernel_resources import Resources, compile_launch
from .kernel_shapes import FORMATS, dbrx_launches, usual_launches

__all__ = ["BEGIN", "END", "ResourceRow", "check_report", "document", "problems", "resources", "table", "write_report"]

BEGIN = "<!-- written by `dbrx-q bench resources` -->"
END = "<!-- end of what is written -->"
_PACKED_LOAD = 16  # bytes of each load of packed codes


@dataclass(frozen=True)
class ResourceRow:
    """One kernel, launched by one case, on one chip."""

    case: str
    """Describes the call that launches the kernel."""
    resources: Resources
    """Of the compiled kernel."""


def resources(
    chips: Sequence[str] = tuple(CHIPS),
    *,
    everything: bool = False,
    processes: int = 2,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[ResourceRow]:
    """Compile the launches of `dbrx_launches` for `chips`, in worker processes.

    Args:
        chips: names in `dbrx_q.kernels.triton.launch.CHIPS`.
        everything: whether to compile every launch in every format; otherwise `usual_launches`.
        processes: number of worker processes.
        report: called with (done, total).

    Raises:
        RequestError: a chip is unknown.
    """
    for name in chips:
        if name not in CHIPS:
            raise RequestError(f"a chip must be one of {', '.join(CHIPS)}; found {name!r}. Choose one of these")
    chips = tuple(dict.fromkeys(chips))
    work = [(name, everything, number) for name in chips for number in range(len(_launches(name, everything)))]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        for done, row in enumerate(pool.map(_compile, work, chunksize=4), 1):
            report(done, len(work))
            yield row


def problems(row: ResourceRow, chip: Chip) -> list[str]:
    """Rules that a compiled kernel breaks: it fits the chip's shared memory, has no spills, loads packed data 16 bytes at a time, and waits
    for the kernel before it, where it may begin early, before it touches memory."""
    broken, used = [], row.resources
    if used.shared_memory > chip.shared_memory:
        broken.append(f"{used.shared_memory} bytes of shared memory, more than the {chip.shared_memory} of {chip.name}")
    if used.spills:
        broken.append(f"{used.spills} bytes of local memory")
    if used.packed_loads and set(used.packed_loads) != {_PACKED_LOAD}:
        broken.append(f"packed data loaded {used.packed_loads} bytes at a time, not {_PACKED_LOAD}")
    if early := used.early_accesses:
        broken.append(f"touches memory before it waits for the kernel before it: {', '.join(early)}")
    return broken


def document(rows: Sequence[ResourceRow]) -> str:
    """The table, preceded by how it was made and what its columns mean, in lines of at most 120 columns."""
    import triton

    text = (
        f"`dbrx-q bench resources` wrote this with Triton {triton.__version__}: {len(rows)} kernels, compiled ahead of time. It called "
        "every op on tensors without memory at DBRX's shapes, for 1 to 17 tokens and powers of two up to 4096, and compiled for each chip "
        "what that chip's tile choices launched. A case names a call that needs the kernel. Of kernels that differ only before and after "
        "their main loop, the table shows the one with the most code there. Weights are int4 and int8 in groups of 64, on sm_86 NF4 and "
        "plain too (`--all` compiles each, in every group size and in float16). A cell holds the registers of a thread / the shared memory "
        "of a program in KB / the bytes of a thread in local memory (spills)."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False) + "\n\n" + table(rows)


def table(rows: Iterable[ResourceRow]) -> str:
    """A Markdown table: a row per kernel and case, a column per chip with registers / shared memory in KB / spills."""
    rows = list(rows)
    chips = [name for name in CHIPS if any(row.resources.chip == name for row in rows)]
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        line = cells.setdefault((row.resources.kernel, row.case), {})
        line.setdefault(row.resources.chip, []).append(_cell(row.resources))
    lines = [f"| kernel | case | {' | '.join(chips)} |", "|---" * (2 + len(chips)) + "|"]
    for (kernel, case), line in sorted(cells.items(), key=lambda item: item[0][0]):
        lines.append(f"| {kernel} | {case} | {' | '.join('; '.join(line.get(chip, [])) for chip in chips)} |")
    return "\n".join(lines)


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


def _cell(used: Resources) -> str:
    return f"{used.registers} / {used.shared_memory / 1024:.1f} / {used.spills}"


@cache
def _launches(name: str, everything: bool) -> list[tuple[str, Launch]]:
    if not everything:
        return usual_launches(CHIPS[name])
    return dbrx_launches(CHIPS[name]) + dbrx_launches(CHIPS[name], formats=FORMATS[:1], dtypes=(torch.float16,))


def _compile(which: tuple[str, bool, int]) -> ResourceRow:
    name, everything, number = which
    case, launch = _launches(name, everything)[number]
    try:
        return ResourceRow(case, compile_launch(launch, CHIPS[name]))
    except Exception as error:  # Triton raises many kinds of errors, and some cannot be pickled
        raise DbrxError(f"{launch.kernel.__name__}, {case}, does not compile for {name}: {type(error).__name__}: {error}") from None
