"""Tile choices of the attention kernels: pure functions of shape, format and chip.

Dimension letters: `B` sequences, `L` capacity in tokens, `H` query heads, `G` key/value heads, `C` channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from .launch import Chip

__all__ = ["DecodeTiles", "PrefillTiles", "decode_tiles", "prefill_tiles"]


@dataclass(frozen=True)
class DecodeTiles:
    """The work of one program of decoding."""

    tokens: int
    """Tokens of a block of the cache."""
    heads: int
    """Query heads of a tile."""
    splits: int
    """Programs that share a sequence and a key/value head."""
    together: int
    """Splits whose results are loaded at a time when they are combined."""
    warps: int
    """Warps of the program."""
    stages: int
    """Stages of the pipeline that loads blocks."""


@dataclass(frozen=True)
class PrefillTiles:
    """The work of one program of prefill."""

    queries: int
    """Queries of a tile."""
    tokens: int
    """Tokens of a block of the cache."""
    warps: int
    """Warps of the program."""
    stages: int
    """Stages of the pipeline that loads blocks."""


def decode_tiles(format: str, B: int, H: int, G: int, L: int, C: int, chip: Chip) -> DecodeTiles:
    """Tiles with enough programs to keep every multiprocessor loading at any lengths, which only the device knows."""
    heads = max(chip.smallest_dot, _power_of_two(H // G))
    tokens, warps, stages = {"plain": (32, 4, 3), "int8": (64, 4, 3), "int4": (64, 2, 3)}[format]
    together, most = 8 if chip.name == "sm_80" else 16, 2  # on sm_80, 16 spill 8 bytes a thread of int4 and 16 of int8
    if chip.vendor == "hip":
        warps, tokens, stages, together = 4, 32, 1, 4  # with 2 stages or 2 warps gfx1100 spills registers
    elif format == "int8" and chip.shared_memory > 128 * 1024:
        tokens = 128  # half the barriers and 10 % fewer instructions per byte, with as many splits to combine as blocks of 64
    elif format == "int4" and chip.name == "sm_90":
        most = 4  # with two, four warps an SM load at 60 % of the bandwidth; blocks of 128 spill 8 bytes a thread (Triton 3.7.1)
    width = {"plain": 2 * C, "int8": C, "int4": C // 2}[format]
    loaded = 2 * tokens * width * max(1, stages - 1)  # keys and values of the blocks in shared memory
    resident = max(1, min(most, chip.shared_memory // (loaded + 5 * 1024)))
    blocks = -(-L // tokens)
    splits = max(1, min(blocks, chip.multiprocessors * resident // max(1, B * G)))
    return DecodeTiles(tokens, heads, splits, together, warps, stages)


def prefill_tiles(format: str, C: int, chip: Chip) -> PrefillTiles:
    """Tiles that suit the matrix units and fit into shared memory."""
    wide = chip.shared_memory > 128 * 1024
    if chip.vendor == "hip":
        if chip.name.startswith("gfx9"):
            return PrefillTiles(64, 32, 4, 1)
        return PrefillTiles(64, 16, 16, 1)  # lanes of RDNA hold matrix operands twice: anything larger spills
    if chip.name == "sm_80" and format != "plain":
        return PrefillTiles(32, 64, 8, 2)  # with 64 queries int8 spills 96 bytes a thread, int4 16
    # With 4 warps, 64 queries spill 8 to 128 bytes a thread; with 8, 128 of int8 spill 8.
    return PrefillTiles(128 if wide and format != "int8" else 64, 64, 8, 2)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
