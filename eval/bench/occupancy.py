"""How many programs a multiprocessor holds, and how a grid spreads over multiprocessors.

NVIDIA's occupancy rules (CUDA C++ Programming Guide, "Hardware Multithreading", and the occupancy calculator): registers are allocated to
warps in units of 256, to whole quarters of a multiprocessor; shared memory in units of 128 bytes, of which each program takes 1 KB more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .gpu_specs import GpuSpecs

__all__ = ["Occupancy", "occupancy", "spread"]

_REGISTERS = 65536  # of a multiprocessor
_REGISTER_UNIT = 256
_QUARTERS = 4
_SHARED_UNIT = 128
_SHARED_OF_THE_SYSTEM = 1024


@dataclass(frozen=True)
class Occupancy:
    """The programs that a multiprocessor holds at a time."""

    programs: int
    """Their number."""
    limit: str
    """What allows no more: "registers", "shared memory", "warps" or "blocks"."""


def occupancy(gpu: GpuSpecs, *, warps: int, registers: int, shared_memory: int) -> Occupancy:
    """The resident programs of a kernel.

    Args:
        gpu: the chip.
        warps: of a program.
        registers: of a thread.
        shared_memory: bytes of a program.
    """
    of_a_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    resident_warps = _REGISTERS // _QUARTERS // of_a_warp * _QUARTERS
    of_a_program = -(-(shared_memory + _SHARED_OF_THE_SYSTEM) // _SHARED_UNIT) * _SHARED_UNIT
    limits = {
        "warps": gpu.warps // warps,
        "blocks": gpu.blocks,
        "registers": resident_warps // warps,
        "shared memory": gpu.shared_memory // of_a_program,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limit)


def spread(programs: float, multiprocessors: int) -> float:
    """Work of the busiest multiprocessor over that of an average one: the tail of a grid of equal programs."""
    return math.ceil(round(programs, 6) / multiprocessors) * multiprocessors / programs if programs else 1.0
