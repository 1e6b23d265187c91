"""Clocks that the warps of a multiprocessor take for an iteration of a loop, by a simulation of its issue from the control codes.

Every NVIDIA instruction says how many clocks its warp waits before the next one, which scoreboards it waits for, and which it holds until
its result is there or its operands are read (Jia et al. 2018, Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, chapter
2; the bits are the same up to Blackwell). Each quarter of a multiprocessor issues one instruction a clock, of the warp that is ready first;
a pipe that is busy, a barrier of the program, an unfinished asynchronous copy or matrix product makes a warp wait. So dependent chains that
too few warps hide show as clocks in which nothing is issued.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .gpu_specs import GpuSpecs
from .sass import Instruction, Pipe, multiply_adds, pipe_of

__all__ = ["clocks_of_an_iteration"]

_QUARTERS = 4
_FIRST, _COUNTED = 2, 4  # iterations of every warp before counting begins, and of the slowest one until it ends
_STAGGER = 40  # clocks between the starts of programs

# Clocks from issue to result, about those that microbenchmarks find on Ampere and Hopper (Abdelkhalik et al. 2022; Luo et al. 2024).
_SHARED_LATENCY = 30
_L1_LATENCY = 38
_SCALE_LATENCY = 150  # a sector of scales or zero-points serves 8 iterations or more: L1 hits, and DRAM once
_OTHER_LATENCY = 24  # shuffles, conversions, special functions, fences
_OPERANDS_READ = 14
_BARRIER_LATENCY = 20
_MMA_LATENCY = 32
_DATA_PATH = 128  # bytes of shared memory and L1 of a multiprocessor and clock

_WIDTH = re.compile(r"\.(?:M\w*88\.)?(128|64|4|2)\b")
_COUNT = re.compile(r"0x([0-9a-f]+)")


@dataclass
class _Warp:
    """A warp and what it waits for."""

    index: int
    """Among all warps."""
    program: int
    """That it belongs to."""
    quarter: int
    """Of the multiprocessor that issues it."""
    number: int = 0
    """Of its next instruction in the loop."""
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    """The clock at which each is released."""
    copies: list[float] = field(default_factory=list)
    """Ends of the groups of asynchronous copies that it has not waited for."""
    products: list[float] = field(default_factory=list)
    """The same of asynchronous matrix products."""
    marks: list[float] = field(default_factory=list)
    """Ends of its iterations."""


@dataclass(frozen=True)
class _Step:
    """An instruction as the scheduler sees it."""

    stall: int
    """Clocks until the warp may issue the next one."""
    holds_result: int
    """The scoreboard that is released with its result; 7 for none."""
    holds_operands: int
    """The scoreboard that is released when its operands are read; 7 for none."""
    waits: tuple[int, ...]
    """Scoreboards that must be released first."""
    kind: str
    """ "barrier"; "copy" and "product" for the end of a group, "copies" and "products" for waiting for groups; else empty."""
    pipe: str
    """That it occupies."""
    busy: float
    """For how many clocks."""
    queued: bool
    """Whether the warp goes on while its instruction waits for the pipe, as a warpgroup's asynchronous products let it."""
    latency: float
    """Clocks to its result."""
    count: int
    """Groups that may stay incomplete."""


def clocks_of_an_iteration(body: Sequence[Instruction], gpu: GpuSpecs, *, programs: int, warps: int, dram_latency: float) -> float:
    """Clocks in which all resident programs make one iteration, once all of them run.

    Args:
        body: the instructions of an iteration, in order, each executed.
        gpu: the chip.
        programs: resident on the multiprocessor.
        warps: of a program.
        dram_latency: seconds until an asynchronous copy is complete.
    """
    steps = [_step(part, gpu, dram_latency * gpu.clock) for part in body]
    runs = [_Warp(index, index // warps, index % _QUARTERS) for index in range(programs * warps)]
    issue_free = [0.0] * _QUARTERS
    pipe_free: dict[tuple[str, int], float] = {}
    at_barrier: list[list[tuple[_Warp, float]]] = [[] for _ in range(programs)]
    # (earliest issue, since when the warp wants to, a number that makes entries differ, warp): of ready warps the one that waits longest.
    ready: list[tuple[float, float, int, int]] = [(_STAGGER * warp.program, 0.0, index, index) for index, warp in enumerate(runs)]
    heapq.heapify(ready)
    order = unfinished = len(runs)
    while unfinished:
        time, since, _, which = heapq.heappop(ready)
        warp = runs[which]
        step = steps[warp.number]
        unit = step.pipe, -1 if step.pipe == "memory" else warp.quarter
        free = pipe_free.get(unit, 0.0) if step.busy else 0.0
        start = max(time, issue_free[warp.quarter], 0.0 if step.queued else free, *(warp.scoreboards[b] for b in step.waits))
        if step.kind == "copies":
            start = max(start, _complete(warp.copies, step.count))
        elif step.kind == "products":
            start = max(start, _complete(warp.products, step.count))
        order += 1
        if start > time:
            heapq.heappush(ready, (start, since, order, which))
            continue
        issue_free[warp.quarter] = start + 1
        if step.busy:
            pipe_free[unit] = max(start, free) + step.busy
        _hold(warp, step, max(start, free))
        following = start + max(1, step.stall)
        warp.number += 1
        if warp.number == len(steps):  # a warp goes on behind the last iteration, so that the others are not alone
            warp.number = 0
            warp.marks.append(following)
            unfinished -= len(warp.marks) == _FIRST + _COUNTED
        if step.kind != "barrier":
            heapq.heappush(ready, (following, following, order, which))
            continue
        waiting = at_barrier[warp.program]
        waiting.append((warp, following))
        if len(waiting) == warps:
            for other, earliest in waiting:
                order += 1
                leaves = max(earliest, start + _BARRIER_LATENCY)
                heapq.heappush(ready, (leaves, leaves, order, other.index))
            waiting.clear()
    begin, end = (max(warp.marks[number - 1] for warp in runs) for number in (_FIRST, _FIRST + _COUNTED))
    made = sum(begin < mark <= end for warp in runs for mark in warp.marks)
    return (end - begin) * len(runs) / made


def _hold(warp: _Warp, step: _Step, start: float) -> None:
    """Record when the results of an instruction that its pipe takes at `start` are there."""
    result = start + step.latency
    if step.kind == "copy":
        warp.copies.append(result)
    elif step.holds_result < 6:
        warp.scoreboards[step.holds_result] = max(warp.scoreboards[step.holds_result], result)
    if step.kind == "product":
        warp.products.append(start + step.busy + step.latency)
    if step.holds_operands < 6:
        warp.scoreboards[step.holds_operands] = max(warp.scoreboards[step.holds_operands], start + _OPERANDS_READ)


def _complete(ends: list[float], most: int) -> float:
    """When at most `most` of the groups with these ends, in order, are incomplete; forgets those that are complete then."""
    if len(ends) <= most:
        return 0.0
    last = len(ends) - most
    moment = max(ends[:last])
    del ends[:last]
    return moment


def _step(instruction: Instruction, gpu: GpuSpecs, dram_clocks: float) -> _Step:
    control, name = instruction.control, instruction.name
    waits = tuple(board for board in range(6) if control >> 11 + board & 1)
    kind, pipe, busy, latency, count = "", "", 0.0, float(_OTHER_LATENCY), 0
    units = pipe_of(instruction)
    if units is Pipe.ALU:
        pipe, busy = "alu", 2.0
    elif units is Pipe.FMA:
        pipe, busy = "fma", _QUARTERS * gpu.fma_clocks(instruction)
    elif units is Pipe.MMA:
        pipe, busy = "mma", multiply_adds(instruction) * _QUARTERS / gpu.mma_rate_of(instruction)
        kind, latency = "product" if "gsb0" in instruction.operands else "", float(_MMA_LATENCY)
    elif units is Pipe.MEMORY:
        pipe, busy = "memory", _data_clocks(instruction.opcode)
        latency = float(_L1_LATENCY if "CONSTANT" in instruction.opcode else _SCALE_LATENCY if name == "LDG" else _SHARED_LATENCY)
    elif name in ("MUFU", "I2F", "F2F", "F2I"):
        pipe, busy = "xu", 8.0
    elif name == "BAR":
        kind = "barrier"
    elif name == "LDGDEPBAR":
        kind, latency = "copy", dram_clocks
    elif instruction.opcode in ("DEPBAR.LE", "WARPGROUP.DEPBAR.LE"):
        matches = _COUNT.findall(instruction.operands)
        kind, count = "copies" if name == "DEPBAR" else "products", int(matches[0], 16) if matches else 0
    return _Step(control & 15, control >> 5 & 7, control >> 8 & 7, waits, kind, pipe, busy, "GMMA" in name, latency, count)


def _data_clocks(opcode: str) -> float:
    """Clocks of the data path for 32 lanes of the width that the opcode names; 4 bytes and less where it names none."""
    width = _WIDTH.search(opcode)
    if width is None:
        return 1.0
    lanes = {"128": 16, "64": 8, "4": 16, "2": 8}[width[1]]
    return 32 * lanes / _DATA_PATH
