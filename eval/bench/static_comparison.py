"""Two states of the kernels side by side, by what `dbrx-q bench static --json` printed for each, with one or several versions of Triton.

    python -m dbrx_q.eval.bench.static_comparison --before FILE... --after FILE... --out docs/notes/kernel-roofline.md

A file of the one state belongs to the file of the other that has the same version of Triton.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dbrx_q.errors import RequestError
from dbrx_q.eval.document import replace_section

from .gpu_specs import GPUS
from .static_cases import STEP

__all__ = ["BEGIN", "END", "comparison", "main"]

BEGIN = "<!-- written by `python -m dbrx_q.eval.bench.static_comparison` -->"
END = "<!-- end of what is written -->"
_DETAILED = "sm_90"

Report = dict[str, Any]
"""What `static_report.as_json` returns."""


def comparison(before: list[Report], after: list[Report]) -> str:
    """A section for each version of Triton that both states have: shares of every case on all chips, and the loops on one.

    A share is that of the bounds; the one of the simulation follows in parentheses.

    Raises:
        RequestError: the states have no version in common.
    """
    pairs = [(old, new) for new in after for old in before if old["triton"] == new["triton"]]
    if not pairs:
        found = " and ".join(", ".join(report["triton"] for report in reports) for reports in (before, after))
        raise RequestError(f"--before and --after must have a version of Triton in common; found {found}. Run both with one version")
    return "\n\n".join(_section(old, new) for old, new in pairs)


def main() -> None:
    """Replace the section of a document, or print it."""
    parser = argparse.ArgumentParser(prog="python -m dbrx_q.eval.bench.static_comparison", description=__doc__.split("\n")[0])
    for name in ("--before", "--after"):
        parser.add_argument(name, nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    before, after = ([json.loads(path.read_text(encoding="utf-8")) for path in paths] for paths in (options.before, options.after))
    text = comparison(before, after)
    if options.out is None:
        print(text)
    else:
        replace_section(options.out, BEGIN, END, text)


def _section(before: Report, after: Report) -> str:
    old = {(row["chip"], row["case"]): row for row in before["rows"]}
    new = {(row["chip"], row["case"]): row for row in after["rows"] if (row["chip"], row["case"]) in old}
    chips = [chip for chip in GPUS if any(chip == name for name, _ in new)]
    cases = list(dict.fromkeys(case for _, case in new))
    lines = [f"### Triton {after['triton']}", "", f"| case | {' | '.join(f'{chip}, {GPUS[chip].product}' for chip in chips)} |"]
    lines.append("|---" * (len(chips) + 1) + "|")
    for case in cases:
        cells = [_shares(old[chip, case], new[chip, case]) if (chip, case) in new else "" for chip in chips]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    if _DETAILED in chips:
        lines += ["", f"On {_DETAILED}, {GPUS[_DETAILED].product}:", ""]
        lines.append(
            "| case | kernel | instructions per 16 bytes | ALU | issue, us | ALU, us | DRAM, us | share without fixed time | simulated |"
        )
        lines.append("|---" * 9 + "|")
        for case in cases:
            if new[_DETAILED, case]["op"] != STEP:
                lines += _details(old[_DETAILED, case], new[_DETAILED, case])
    return "\n".join(lines)


def _shares(old: Report, new: Report) -> str:
    """Shares by bounds, and in parentheses by simulation."""
    before, after = (100 * row["ideal"] / row["simulated"] for row in (old, new))
    cell = f"{100 * old['share']:.0f} → {100 * new['share']:.0f} % ({before:.0f} → {after:.0f} %)"
    if new["op"] == STEP:
        cell += f", {1 / old['seconds']:.0f} → {1 / new['seconds']:.0f} tokens/s"
    return cell


def _details(old: Report, new: Report) -> list[str]:
    lines = []
    for launch in new["launches"]:
        same = [part for part in old["launches"] if part["kernel"] == launch["kernel"]]
        if not same or not launch["per_16_bytes"]:
            continue
        pair = same[0], launch
        counts = (" → ".join(f"{part['per_16_bytes'][name]:.0f}" for part in pair) for name in ("total", "alu"))
        bounds = (" → ".join(f"{1e6 * part['bounds'][name]:.1f}" for part in pair) for name in ("issue", "ALU", "DRAM"))
        steady = " → ".join(f"{100 * part['ideal'] / part['bounds'][part['bound']]:.0f}" for part in pair)
        simulated = " → ".join(f"{100 * part['ideal'] / part['simulated']:.0f}" for part in pair)
        kernel = launch["kernel"].removesuffix("_kernel")
        lines.append(f"| {new['case']} | {kernel} | {' | '.join((*counts, *bounds))} | {steady} % | {simulated} % |")
    return lines


if __name__ == "__main__":
    main()
