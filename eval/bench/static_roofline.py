"""How long a launch should take on a chip, computed from its machine code: no GPU is needed, and none has confirmed the figures.

Instructions of every loop are counted in the listing and multiplied by the iterations that the launch's constants give; all other
instructions count once for each program. Each bound is the time that one resource of the chip would take alone:

    issue   warp instructions / 4 a clock and multiprocessor / SUSTAINED_ISSUE
    ALU     integer and logic instructions / 2 a clock
    FMA     float instructions / 4 a clock (2 on an A100), IMAD / 2, packed 16-bit by chip
    MMA     products of matrix instructions / the chip's rate
    DRAM    bytes / copy bandwidth, or bytes in flight / DRAM_LATENCY where that is less

The busiest multiprocessor sets the pace of all but DRAM. The expected time is the largest bound plus the fixed time of a launch.

A second figure has no assumed share of the issue slots: `warp_timing.py` simulates the loop with the programs that a multiprocessor holds,
round after round, the last one with fewer. It shows dependent chains that too few warps hide, and tails of long programs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dbrx_q.errors import DbrxError
from dbrx_q.kernels.triton.launch import CHIPS, Launch

from .gpu_specs import GPUS, GpuSpecs
from .kernel_resources import compile_launch
from .launch_work import LaunchWork, work_of
from .occupancy import occupancy, spread
from .sass import Instruction, Loop, Pipe, code_outside, multiply_adds, parse, pipes, product_loops
from .warp_timing import clocks_of_an_iteration

__all__ = ["DEPENDENT_FIXED_SECONDS", "DRAM_LATENCY", "FIXED_SECONDS", "SUSTAINED_ISSUE", "Code", "LaunchCost", "cost_of", "launch_cost"]

SUSTAINED_ISSUE = 0.70
"""Share of the issue slots that a loop with dependences, barriers and waits fills; assumed, as no kernel was timed."""

FIXED_SECONDS = 4.5e-6
"""Of a launch in a CUDA graph: the gap to the one before, launching programs, first loads, the last programs; assumed, 4 to 5 us."""

DEPENDENT_FIXED_SECONDS = 3.4e-6
"""The same with programmatic dependent launch and weights loaded before the wait; assumed: 10 us less for the 9 launches of a layer."""

DRAM_LATENCY = 0.8e-6
"""Seconds from a load to its data under load, by which bytes in flight become a bandwidth; assumed."""

_PRODUCT = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)\b")
_ISSUE_RATE = 4.0
_ALU_RATE = 2.0


@dataclass(frozen=True)
class LaunchCost:
    """One compiled launch on one chip."""

    kernel: str
    """Name of its function."""
    loops: tuple[dict[str, float], ...]
    """Of each loop with matrix instructions: instructions of one warp by pipe and "total", "iterations" of an average program, and "clocks"
    in which all resident programs make one."""
    per_16_bytes: dict[str, float]
    """Instructions of a thread for 16 packed bytes by pipe and "total", over all such loops; empty where there are none."""
    registers: int
    """Of a thread."""
    shared_memory: int
    """Bytes of a program."""
    warps: int
    """Of a program."""
    stages: int
    """Of the pipeline."""
    resident: int
    """Programs that a multiprocessor holds."""
    limit: str
    """What allows no more."""
    programs: float
    """Programs that compute."""
    waves: float
    """Programs over those that the chip holds."""
    tail: float
    """Work of the busiest multiprocessor over that of an average one."""
    in_flight: int
    """Bytes of packed codes that the programs of a multiprocessor have requested ahead."""
    bounds: dict[str, float]
    """Seconds by resource: "issue", "ALU", "FMA", "MMA" and "DRAM"."""
    bound: str
    """The largest of them."""
    fixed: float
    """Seconds that are added."""
    ideal: float
    """Seconds that the ceiling allows: DRAM bytes at copy bandwidth, or products at the matmul rate."""
    simulated: float
    """Seconds by the simulated loops instead of the bounds of instructions, DRAM and the fixed time as before."""
    dependent: bool
    """Whether programmatic dependent launch overlaps it with the launch before."""

    @property
    def seconds(self) -> float:
        """Expected time."""
        return self.bounds[self.bound] + self.fixed

    @property
    def share(self) -> float:
        """Expected share of the ceiling."""
        return self.ideal / self.seconds

    @property
    def steady_share(self) -> float:
        """The same without the fixed time, which weighs the more the shorter a launch is."""
        return self.ideal / self.bounds[self.bound]

    @property
    def simulated_share(self) -> float:
        """Share of the ceiling by the simulated time."""
        return self.ideal / self.simulated


@dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    listing: str
    """Of `cuobjdump -sass`."""
    registers: int
    """Of a thread."""
    shared_memory: int
    """Bytes of a program."""
    products: int = 0
    """Matrix instructions of the PTX, whose loops make the iterations of the source; 0 if unknown."""


def launch_cost(launch: Launch, chip: str, *, new_tokens: int = 1, decode: bool = True) -> LaunchCost:
    """Compile a launch for a chip and count its code; arguments as of `cost_of`."""
    compiled = compile_launch(launch, CHIPS[chip])
    code = Code(compiled.sass, compiled.registers, compiled.shared_memory, len(_PRODUCT.findall(compiled.assembly)))
    return cost_of(launch, work_of(launch, new_tokens=new_tokens), code, GPUS[chip], decode=decode)


def cost_of(launch: Launch, work: LaunchWork, code: Code, gpu: GpuSpecs, *, decode: bool = True) -> LaunchCost:
    """The cost of a launch by its code.

    Args:
        launch: what was compiled.
        work: of the launch.
        code: for the chip.
        gpu: the chip.
        decode: whether the ceiling is copy bandwidth; the matmul rate otherwise.

    Raises:
        DbrxError: the code has another number of loops with matrix instructions than the work describes.
    """
    instructions = parse(code.listing)
    resident = occupancy(gpu, warps=launch.warps, registers=code.registers, shared_memory=code.shared_memory)
    loops = product_loops(instructions)
    if len(loops) != len(work.iterations):
        raise DbrxError(
            f"{launch.kernel.__name__} must have {len(work.iterations)} loops with matrix instructions, as `launch_work.py` describes it; "
            f"found {len(loops)}. Describe its work there"
        )
    work = _unrolled(work, loops, code.products)
    once = code_outside(instructions, loops)
    weighted = [(once, 1.0), *((loop.instructions, times) for loop, times in zip(loops, work.iterations, strict=True))]
    programs_each = work.programs / gpu.multiprocessors  # of an average multiprocessor
    tail = spread(work.programs, gpu.multiprocessors)

    total, alu, fma, products = 0.0, 0.0, 0.0, 0.0
    for part, times in weighted:
        count = pipes(part)
        total += times * sum(count.values())
        alu += times * count[Pipe.ALU]
        fma += times * sum(map(gpu.fma_clocks, part))
        products += times * sum(multiply_adds(instruction) / gpu.mma_rate_of(instruction) for instruction in part)
    busiest = programs_each * tail * launch.warps / gpu.clock
    held = max(1, min(resident.programs, math.ceil(round(programs_each, 6))))
    in_flight = held * max(1, launch.stages - 1) * max(work.packed_bytes, default=0)
    bandwidth = gpu.copy_bandwidth
    if in_flight:
        bandwidth = min(bandwidth, in_flight * gpu.multiprocessors / DRAM_LATENCY)
    bounds = {
        "issue": total / _ISSUE_RATE / SUSTAINED_ISSUE * busiest,
        "ALU": alu / _ALU_RATE * busiest,
        "FMA": fma * busiest,
        "MMA": products * busiest,
        "DRAM": work.dram_bytes / bandwidth,
    }
    dependent = launch.pdl
    fixed = DEPENDENT_FIXED_SECONDS if dependent else FIXED_SECONDS
    timing = [_rounds(loop.instructions, launch, work, resident.programs, gpu) for loop in loops]
    clocks = sum(times * in_all for times, (_, in_all) in zip(work.iterations, timing, strict=True))
    outside = len(once) / _ISSUE_RATE * busiest
    slowest = clocks / gpu.clock + outside if loops else max(bounds[name] for name in bounds)
    return LaunchCost(
        kernel=launch.kernel.__name__,
        loops=tuple(
            {**_counts(loop.instructions), "iterations": round(times, 3)} for loop, times in zip(loops, work.iterations, strict=True)
        ),
        per_16_bytes=_per_16_bytes(launch, loops, work),
        registers=code.registers,
        shared_memory=code.shared_memory,
        warps=launch.warps,
        stages=launch.stages,
        resident=resident.programs,
        limit=resident.limit,
        programs=work.programs,
        waves=work.programs / (resident.programs * gpu.multiprocessors),
        tail=tail,
        in_flight=in_flight,
        bounds=bounds,
        bound=max(bounds, key=lambda name: bounds[name]),
        fixed=fixed,
        ideal=work.dram_bytes / gpu.copy_bandwidth if decode else work.operations / gpu.matmul_rate,
        simulated=max(slowest, bounds["DRAM"]) + fixed,
        dependent=dependent,
    )


def _unrolled(work: LaunchWork, loops: list[Loop], products: int) -> LaunchWork:
    """The work by iterations of the machine code, which are several of the source's where the assembler unrolled its loops."""
    times = round(sum(multiply_adds(part) > 0 for loop in loops for part in loop.instructions) / products) if products else 1
    if times < 2:
        return work
    packed = tuple(nbytes * times for nbytes in work.packed_bytes)
    return replace(work, iterations=tuple(count / times for count in work.iterations), packed_bytes=packed)


def _rounds(body: tuple[Instruction, ...], launch: Launch, work: LaunchWork, resident: int, gpu: GpuSpecs) -> tuple[float, float]:
    """(clocks of an iteration of all programs that are resident at a time, the same of all programs of the busiest multiprocessor)."""
    programs = math.ceil(round(work.programs, 6) / gpu.multiprocessors)
    together = max(1, min(programs, resident))
    rounds, rest = divmod(programs, together)
    timed = {
        count: clocks_of_an_iteration(body, gpu, programs=count, warps=launch.warps, dram_latency=DRAM_LATENCY)
        for count in {together, rest} - {0}
    }
    return timed[together], rounds * timed[together] + timed.get(rest, 0.0)


def _counts(instructions: Iterable[Instruction]) -> dict[str, float]:
    counts: Counter[Pipe] = pipes(instructions)
    return {"total": float(sum(counts.values())), **{pipe.value: float(counts[pipe]) for pipe in Pipe}}


def _per_16_bytes(launch: Launch, loops: list[Loop], work: LaunchWork) -> dict[str, float]:
    """Each loop counts by its iterations."""
    if not loops:
        return {}
    threads = 32 * launch.warps
    pieces = sum(times * packed / threads / 16 for times, packed in zip(work.iterations, work.packed_bytes, strict=True))
    sums: dict[str, float] = {}
    for loop, times in zip(loops, work.iterations, strict=True):
        for name, count in _counts(loop.instructions).items():
            sums[name] = sums.get(name, 0.0) + times * count
    return {name: count / pieces for name, count in sums.items()}
