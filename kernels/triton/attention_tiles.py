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
    """Splits whose results are combined at a time."""
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
    tokens = {"plain": 32, "int8": 64, "int4": 64}[format]
    warps = {"plain": 4, "int8": 4, "int4": 2}[format]
    stages = 3
    if chip.vendor == "hip":
        warps, tokens, stages = 4, 32, 1  # with 2 stages or 2 warps gfx1100 spills registers
    width = {"plain": 2 * C, "int8": C, "int4": C // 2}[format]
    resident = max(1, min(2, chip.shared_memory // (2 * tokens * width * stages)))
    blocks = -(-L // tokens)
    splits = max(1, min(blocks, chip.multiprocessors * resident // max(1, B * G)))
    return DecodeTiles(tokens, heads, splits, 4 if chip.vendor == "hip" else 8, warps, stages)


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
