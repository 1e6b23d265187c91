"""Packed codes in other orders, without a change of their values, at the speed of memory.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `M` = N/8 words of 8 outputs.
"""

from __future__ import annotations

import torch

from .addresses import integer, store_half_integer, store_integer
from .compiled import compiled

__all__ = ["rows_of_awq", "unpack_codes", "unpack_nibbles"]

_OUTPUT_OF = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles of an AWQ word, from the lowest
_LOWER = 0xFFFFFFFF
_CHUNK = 512  # inputs whose lines of the source are read at a time


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes uint8 [N, K] of rows of packed codes of 2, 3, 4, 5, 6 or 8 bits, uint8 [N, K * bits / 8]; K is a multiple of 8.

    Code k of a row is bits k * bits .. (k + 1) * bits - 1 of its bytes, counted from the lowest bit of the first byte: code 0 is in the
    lowest bits. Words of 32 bits are such bytes on a machine that stores the lowest byte first, also where codes straddle words. A code of
    8 bits is a byte: they are not copied.
    """
    return packed if bits == 8 else _unpacked(packed, bits, 8)


def unpack_nibbles(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """As `unpack_codes` for 2 and 3 bits, with two codes a byte: uint8 [N, K/2], the even element in the low nibble as in int4."""
    return _unpacked(packed, bits, 4)


def _unpacked(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    eights = packed.numel() // bits  # 8 codes take `bits` bytes
    packed, out = packed.contiguous(), torch.empty(len(packed), packed.shape[1] // bits * width, dtype=torch.uint8)
    # The compiled code reads 8 bytes for each 8 codes: the last ones from a copy with zeros behind it.
    whole = max(0, (packed.numel() - 8) // bits)
    tail = torch.nn.functional.pad(packed.view(-1)[whole * bits :], (0, 8))
    _unpack(packed.data_ptr(), whole, bits, width, out.data_ptr())
    _unpack(tail.data_ptr(), eights - whole, bits, width, out.data_ptr() + whole * width)
    return out


@compiled()
def _unpack(source, eights, bits, width, target):
    """Unpack 8 codes at a time from an address to another, to `width` = 8 or 4 bits for each."""
    # Fields of 4, 2 and 1 codes; of two neighbours the upper one moves to the left.
    four, two, one = (1 << 4 * bits) - 1, (1 << 2 * bits) - 1, (1 << bits) - 1
    two |= two << 4 * width
    one |= one << 2 * width
    one |= one << 4 * width
    for _ in range(eights):
        codes = integer(source, 0)
        codes = (codes & four) | ((codes >> 4 * bits & four) << 4 * width)
        codes = (codes & two) | ((codes >> 2 * bits & two) << 2 * width)
        codes = (codes & one) | ((codes >> bits & one) << width)
        if width == 8:
            store_integer(codes, target)
        else:
            store_half_integer(codes, target)
        source += bits
        target += width


def rows_of_awq(qweight: torch.Tensor) -> torch.Tensor:
    """The codes of each output as int4 packs them, uint8 [N, K/2], from AWQ's words int32 [K, M]; K is a multiple of 8.

    The nibbles of a word, from the lowest, are those of outputs 0, 2, 4, 6, 1, 3, 5, 7 of 8 neighbours.
    """
    K, M = qweight.shape
    if M % 2 or K % 16:  # the compiled code takes two words of two eights of inputs
        padded = rows_of_awq(torch.nn.functional.pad(qweight, (0, M % 2, 0, K % 16)))
        return padded[: M * 8, : K // 2].contiguous()
    source, out = qweight.contiguous(), torch.empty(M * 8, K // 2, dtype=torch.uint8)
    _transpose_awq(source.data_ptr(), K, M, out.data_ptr())
    return out


@compiled()
def _transpose_awq(source, K, M, target):
    """source: the address of [K, M] words. target: that of [8 M, K/8]. A chunk's lines of the source stay in the second-level cache."""
    pitch, out_pitch = M * 4, K // 2
    for first_k in range(0, K, _CHUNK):
        for m in range(0, M, 2):
            at, to = source + first_k * pitch + m * 4, target + first_k // 2 + m * 8 * out_pitch
            for _ in range(min(_CHUNK, K - first_k) // 16):
                a = _transposed_nibbles(at, pitch)
                b = _transposed_nibbles(at + 8 * pitch, pitch)
                for nibble in range(8):
                    row = to + _OUTPUT_OF[nibble] * out_pitch
                    store_integer((a[nibble] & _LOWER) | b[nibble] << 32, row)
                    store_integer((a[nibble] >> 32 & _LOWER) | (b[nibble] & ~_LOWER), row + 8 * out_pitch)
                at += 16 * pitch
                to += 8


@compiled()
def _transposed_nibbles(at, pitch):
    """Of two columns of 8 words at once, one in the lower halves: nibble i of word p of the result is nibble p of word i."""
    a, b, c, d = integer(at, 0), integer(at + pitch, 0), integer(at + 2 * pitch, 0), integer(at + 3 * pitch, 0)
    at += 4 * pitch
    e, f, g, h = integer(at, 0), integer(at + pitch, 0), integer(at + 2 * pitch, 0), integer(at + 3 * pitch, 0)
    a, e = _exchanged(a, e, 16, 0x0000FFFF0000FFFF)
    b, f = _exchanged(b, f, 16, 0x0000FFFF0000FFFF)
    c, g = _exchanged(c, g, 16, 0x0000FFFF0000FFFF)
    d, h = _exchanged(d, h, 16, 0x0000FFFF0000FFFF)
    a, c = _exchanged(a, c, 8, 0x00FF00FF00FF00FF)
    b, d = _exchanged(b, d, 8, 0x00FF00FF00FF00FF)
    e, g = _exchanged(e, g, 8, 0x00FF00FF00FF00FF)
    f, h = _exchanged(f, h, 8, 0x00FF00FF00FF00FF)
    a, b = _exchanged(a, b, 4, 0x0F0F0F0F0F0F0F0F)
    c, d = _exchanged(c, d, 4, 0x0F0F0F0F0F0F0F0F)
    e, f = _exchanged(e, f, 4, 0x0F0F0F0F0F0F0F0F)
    g, h = _exchanged(g, h, 4, 0x0F0F0F0F0F0F0F0F)
    return a, b, c, d, e, f, g, h


@compiled()
def _exchanged(low, high, shift, mask):
    """Both words, after the upper fields of `low` are exchanged with the lower fields of `high`."""
    difference = ((low >> shift) ^ high) & mask
    return low ^ (difference << shift), high ^ difference
