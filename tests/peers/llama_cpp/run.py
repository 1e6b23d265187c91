"""Measures dbrx_q and llama.cpp in turns on one machine, on the same weights, and writes the tables as Markdown and JSON.

    .venv/bin/python tests/peers/llama_cpp/run.py /tmp/peers                          # everything; builds llama.cpp first
    .venv/bin/python tests/peers/llama_cpp/run.py /tmp/peers --only prefill,decode    # sections whose names begin so
    .venv/bin/python tests/peers/llama_cpp/run.py /tmp/peers --before OLD/.venv/bin/python   # beside another checkout

README.md in the folder above says what runs and how to read the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import make_checkpoints
from figures import BUSY, SectionResult, markdown
from other_work import OtherWork
from processes import Programs
from sections import SECTIONS, Competitor, Machine, Section, competitors
from tools import SDIST, built_tools

__all__ = ["main"]

_SLOW = 0.7  # a configuration of llama.cpp below this share of its best is left out
_TURNS_OF_ALL = 2  # before such configurations are left out


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for."""
    options = _options(arguments)
    names = [name for name in SECTIONS if any(name.startswith(prefix) for prefix in options.only.split(","))]
    if not names:
        sys.exit(f"--only must name sections of {', '.join(SECTIONS)}; found {options.only!r}")
    options.work.mkdir(parents=True, exist_ok=True)
    tools = built_tools(options.work, options.build)
    int8 = [name for name in names if name.startswith("int8")]
    formats, kinds = [], []
    if len(int8) < len(names):
        formats, kinds = ["int4"], options.types.split(",")
    if int8:
        formats, kinds = [*formats, "int8"], [*kinds, "Q8_0"]
    files = make_checkpoints(options.work, options.layers, formats, kinds, tools, keep=options.keep)
    pythons = {"dbrx_q": sys.executable} | ({"dbrx_q before": str(options.before)} if options.before else {})
    programs = Programs(tools, options.threads, shlex.split(options.prefix))
    machine = Machine(files, programs, options.types.split(","), pythons, "amx_int8" in _cpuinfo("flags"))
    machine.facts |= _facts(options) | {name: _commit(python) for name, python in pythons.items()}
    machine.facts["compiler of llama.cpp"] = tools.compiler
    results: list[SectionResult] = []
    for name in names:
        results.append(_measured(name, SECTIONS[name], machine, options.turns))
        _write(options.out or options.work, results, machine.facts)
    print(markdown(results, machine.facts))
    return 0


def _measured(name: str, section: Section, machine: Machine, turns: int) -> SectionResult:
    """The turns of one section. The first competitor of a turn changes from turn to turn."""
    result = SectionResult(name, section.title, section.note, section.unit, section.higher_is_better, section.cases)
    machine.rates = result.rates
    taking_part = competitors(section, machine)
    result.kinds = {competitor.name: competitor.kind for competitor in taking_part}
    result.beside = {competitor.name: competitor.beside for competitor in taking_part if competitor.beside}
    for competitor in taking_part:
        result.figures[competitor.name] = {case: {} for case in section.cases}
    if not section.higher_is_better:
        for competitor in taking_part:
            competitor.run()  # files enter the page cache, and kernels are compiled
    for turn in range(turns):
        if turn == _TURNS_OF_ALL and section.higher_is_better:
            taking_part = [competitor for competitor in taking_part if not _is_slow(competitor, result)]
        first = turn % len(taking_part)
        other_work = OtherWork()
        for competitor in taking_part[first:] + taking_part[:first]:
            samples = competitor.run()
            for case in section.cases:
                result.figures[competitor.name][case][turn] = statistics.median(samples[case])
            shown = ", ".join(f"{result.figures[competitor.name][case][turn]:.4g}" for case in section.cases)
            print(f"{name} turn {turn + 1}: {competitor.name}: {shown} {section.unit}", file=sys.stderr, flush=True)
        share = other_work.share()
        if share is not None:
            result.other_work.append(share)
        if share is not None and share > BUSY:
            print(f"other programs took {share:.0%} of all processors' time: measure on an idle machine", file=sys.stderr, flush=True)
    return result


def _is_slow(competitor: Competitor, result: SectionResult) -> bool:
    """Whether a configuration of llama.cpp is far from its best in every case."""
    if competitor.kind != "llama.cpp":
        return False
    return all(
        max(result.figures[competitor.name][case].values()) < _SLOW * result.spread(result.best_peer(case) or "", case).median
        for case in result.cases
    )


def _write(folder: Path, results: Sequence[SectionResult], facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "llama-cpp.md").write_text(markdown(results, facts) + "\n", encoding="utf-8")
    data = {"facts": facts, "sections": [result.to_dict() for result in results]}
    (folder / "llama-cpp.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    """What the machine and the command line say."""
    flags = _cpuinfo("flags").split()
    return {
        "chip": f"{_cpuinfo('model name')} (family {_cpuinfo('cpu family')}, model {_cpuinfo('model')})",
        "vector extensions": ", ".join(name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in flags),
        "cores": os.cpu_count(),
        "threads of both programs": options.threads,
        "layers": options.layers,
        "llama.cpp's sources": "an existing build" if options.build else SDIST,
    }


def _commit(python: str) -> str:
    """The commit of the dbrx_q that an interpreter imports, with "-dirty" where files differ from it; its version without a checkout."""
    where = [python, "-c", "import dbrx_q; print(dbrx_q.__file__, dbrx_q.__version__)"]
    path, version = subprocess.run(where, capture_output=True, text=True, check=True, cwd="/").stdout.split()
    command = ["git", "-C", str(Path(path).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or version


def _cpuinfo(key: str) -> str:
    """What Linux says of the first core; "" where it says nothing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for sources, build and checkpoints; what is there is used again")
    parser.add_argument("--only", default="", help=f"sections, by the beginnings of their names: {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--turns", type=int, default=5, help="turns of every section (5)")
    parser.add_argument("--layers", type=int, default=1, help="layers of DBRX's dimensions, 6.6 GB each while they are quantized (1)")
    parser.add_argument("--types", default="Q4_0,Q4_K_M,IQ4_XS", help="llama.cpp's 4-bit types (Q4_0,Q4_K_M,IQ4_XS)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both programs (2)")
    parser.add_argument("--build", type=Path, help="a build folder of llama.cpp; without it, the sdist is downloaded and built")
    parser.add_argument("--before", type=Path, help="interpreter of another checkout's environment, to measure that dbrx_q too")
    parser.add_argument("--prefix", default="", help="command that starts every process that is measured, as 'taskset -c 0,1'")
    parser.add_argument("--keep", action="store_true", help="keep the bfloat16 checkpoint")
    parser.add_argument("--out", type=Path, help="folder of llama-cpp.md and llama-cpp.json; default: the work folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
