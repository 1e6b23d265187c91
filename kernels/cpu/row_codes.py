"""Sixteen rows of a packed weight as vectors whose lanes are the rows: codes as bytes, scales as float32, zero-points or offsets.

In this form a product reads four neighbours along K of sixteen rows at once, and needs no sum across lanes. `FORMATS` holds what differs
between formats. Dimension letters: `K` input features, `G` group size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vector as v

__all__ = [
    "BLOCK",
    "FORMATS",
    "KINDS",
    "RowCodes",
    "int8_block",
    "nibble_block",
    "nibble_line",
    "nibble_values",
    "row_scales",
    "uint8_block",
]

BLOCK = 128
"""Elements along K that are decoded at a time."""
_SCALE_GROUPS = 16  # groups whose scales are transposed together


def _row(b: Any, base: Any, pitch: Any, row: int, last: Any) -> Any:
    """The address of a row; rows after the last are the last."""
    index = b.select(b.icmp_signed("<", v.I64(row), last), v.I64(row), last)
    return b.add(base, b.mul(index, pitch))


@intrinsic(prefer_literal=True)
def row_scales(typing_context, scales, zeros, n_groups, row_groups, last, scales_out, zeros_out, kind):
    """Write the scales of sixteen rows as float32 and their zero-points as int32 or offsets as float32, 128 bytes from group to group;
    zero-points are 128 for signed codes, which are then read with 128 added.

    scales, zeros: addresses of the first of `n_groups` groups of the first row; zeros are the offsets of a format that has them.
    row_groups: groups of a row. last: the last row, 0 to 15, which those after it repeat. kind: a literal, `RowCodes.kind`.
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None
    codes = RowCodes.of_kind(kind.literal_value)
    has_offsets, has_zeros, bits = codes.offsets is not None, codes.has_zeros, codes.bits

    def codegen(context, b, signature, args):
        scales, zeros, n_groups, row_groups, last, scales_out, zeros_out, _ = args
        scale_pitch = b.mul(row_groups, v.I64(2))
        zero_pitch = scale_pitch if has_offsets else _bytes_of(b, row_groups, bits)
        halves, word, pair = v.vector(v.I16, _SCALE_GROUPS), v.vector(v.I32, 1), v.vector(v.I32, 2)
        # The zero-points of sixteen groups are 2 * bits bytes. Those of the first eight are in the first word of these, those of the others
        # in the last, which may overlap it. Rotated, the zero-point of group g is at bit 16 of lane g, above the float16 scale.
        last_word = 2 * bits - 4
        rotations = [(bits * g + 16 - (8 * last_word if g >= 8 else 0)) % 32 for g in range(_SCALE_GROUPS)]

        def zero_words(address: Any) -> Any:
            """The first and the last word of sixteen zero-points."""
            if bits == 4:
                return v.load(b, address, pair)
            words = v.load(b, address, word), v.load(b, b.add(address, v.I64(last_word)), word)
            return b.shuffle_vector(*words, v.constant(pair, [0, 1]))

        def widened(words: Any) -> Any:
            """The numbers in the lower halves of 32-bit words as float32."""
            if codes.offsets == torch.bfloat16:
                return b.bitcast(b.shl(words, v.constant(v.V16I, [16] * 16)), v.V16F)
            return v.half_to_float(b, b.trunc(words, halves))

        def write(first: Any, scale_at: Callable[[int], Any], zero_at: Callable[[int], Any], count: Any) -> None:
            rows = []
            for row in range(16):
                both = b.zext(v.load(b, scale_at(row), halves), v.V16I)
                if has_offsets:
                    offset = b.zext(v.load(b, zero_at(row), halves), v.V16I)
                    both = b.or_(both, b.shl(offset, v.constant(v.V16I, [16] * 16)))
                elif has_zeros:
                    turned = _rotated(b, v.broadcast(b, zero_words(zero_at(row)), [0] * 8 + [1] * 8), rotations)
                    both = b.or_(both, b.and_(turned, v.constant(v.V16I, [(2**bits - 1) << 16] * 16)))
                rows.append(both)
            for group, words in enumerate(v.transposed(b, rows)):
                with b.if_then(b.icmp_signed("<", v.I64(group), count)):
                    at = b.add(first, v.I64(group))
                    upper = b.lshr(words, v.constant(v.V16I, [16] * 16))
                    v.store(b, widened(words), b.add(scales_out, b.mul(at, v.I64(128))))
                    zero = widened(upper) if has_offsets else upper if has_zeros else v.constant(v.V16I, [128] * 16)
                    v.store(b, zero, b.add(zeros_out, b.mul(at, v.I64(128))))

        zero_width = _SCALE_GROUPS * (16 if has_offsets else bits) // 8

        def zero_bytes_of(groups: Any) -> Any:
            """The bytes of the offsets or of the zero-points of some groups of a row."""
            return _bytes_of(b, groups, 16 if has_offsets else bits)

        full = b.sdiv(n_groups, v.I64(_SCALE_GROUPS))
        with cgutils.for_range(b, full) as chunk:
            first = b.mul(chunk.index, v.I64(_SCALE_GROUPS))
            scale_base, zero_base = b.add(scales, b.mul(first, v.I64(2))), b.add(zeros, zero_bytes_of(first))
            write(
                first,
                lambda row: _row(b, scale_base, scale_pitch, row, last),
                lambda row: _row(b, zero_base, zero_pitch, row, last),
                v.I64(_SCALE_GROUPS),
            )
        first = b.mul(full, v.I64(_SCALE_GROUPS))
        left = b.sub(n_groups, first)
        with b.if_then(b.icmp_signed(">", left, v.I64(0))):
            scale_base, zero_base = b.add(scales, b.mul(first, v.I64(2))), b.add(zeros, zero_bytes_of(first))
            write(
                first,
                lambda row: v.padded_copy(b, _row(b, scale_base, scale_pitch, row, last), b.mul(left, v.I64(2)), 2 * _SCALE_GROUPS),
                lambda row: v.padded_copy(b, _row(b, zero_base, zero_pitch, row, last), zero_bytes_of(left), zero_width),
                left,
            )
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7, kind), codegen


def _bytes_of(b: Any, groups: Any, bits: int) -> Any:
    """The bytes of a row's zero-points or offsets of `bits` bits."""
    return b.lshr(b.add(b.mul(groups, v.I64(bits)), v.I64(7)), v.I64(3))


def _rotated(b: Any, words: Any, counts: list[int]) -> Any:
    """Each lane rotated right by its count, modulo 32."""
    rotate = cgutils.get_or_insert_function(b.module, ir.FunctionType(v.V16I, [v.V16I] * 3), "llvm.fshr.v16i32")
    return b.call(rotate, [words, words, v.constant(v.V16I, [count % 32 for count in counts])])


def nibble_line(b: Any, address: Any, bits: int) -> Any:
    """A block of 128 codes of 2, 3 or 4 bits of a row as 16 words that have int4's nibbles: `nibble_values` gives the codes.

    The fields of low bits in the lower half of the line come from the same bytes as those in the upper half, and the high bits of all four
    quarters from the same 16 bytes; `formats/int2_int3.py` draws both.
    """
    if bits == 4:
        return v.load(b, address, v.V16I)
    low = v.broadcast(b, v.load(b, address, v.vector(v.I32, 8)), [*range(8)] * 2)
    line = b.lshr(low, v.constant(v.V16I, [0] * 8 + [2] * 8))
    if bits == 2:
        return line
    high = v.broadcast(b, v.load(b, b.add(address, v.I64(32)), v.vector(v.I32, 4)), [*range(4)] * 4)
    high = _rotated(b, high, [lane // 4 - 2 for lane in range(16)])  # bit q of quarter q to bit 2
    two, one = (v.constant(v.V16I, [mask] * 16) for mask in (0x33333333, 0xCCCCCCCC))
    return b.or_(b.and_(line, two), b.and_(high, one))


def nibble_values(b: Any, line: Any, bits: int) -> list[Any]:
    """The codes of a `nibble_line`, or of as many words of sixteen of them, as bytes: those of even elements and those of odd ones."""
    mask = v.constant(v.V64, [2**bits - 1] * 64)
    return [b.and_(b.bitcast(b.lshr(line, v.constant(v.V16I, [shift] * 16)) if shift else line, v.V64), mask) for shift in (0, 4)]


@intrinsic(prefer_literal=True)
def nibble_block(typing_context, codes, pitch, last, block, out, bits):
    """Write the codes of a block of 128 of sixteen rows as bytes: 32 vectors, 128 bytes apart.

    A lane of vector 2i holds elements 8i, 8i+2, 8i+4 and 8i+6 of its row, of vector 2i+1 the odd ones between. codes: address of the first
    row; pitch: bytes of a row; last: the last row, which those after it repeat; bits: of a code, a literal.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        codes, pitch, last, block, out, _ = args
        base = b.add(codes, b.mul(block, v.I64(16 * bits.literal_value)))
        lines = [nibble_line(b, _row(b, base, pitch, row, last), bits.literal_value) for row in range(16)]
        for i, words in enumerate(v.transposed(b, lines)):
            for j, values in enumerate(nibble_values(b, words, bits.literal_value)):
                v.store(b, values, b.add(out, v.I64(128 * (2 * i + j))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, bits), codegen


@intrinsic
def int8_block(typing_context, codes, pitch, last, block, out):
    """As `nibble_block`, the signed codes plus 128; a lane of vector i holds elements 4i to 4i+3."""

    def codegen(context, b, signature, args):
        _byte_block(b, args, signed=True)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def uint8_block(typing_context, codes, pitch, last, block, out):
    """As `int8_block`, for unsigned codes, which stay as they are."""

    def codegen(context, b, signature, args):
        _byte_block(b, args, signed=False)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


def _byte_block(b: Any, args: Any, *, signed: bool) -> None:
    codes, pitch, last, block, out = args
    for line in range(2):
        base = b.add(b.add(codes, b.mul(block, v.I64(BLOCK))), v.I64(64 * line))
        for i, words in enumerate(_transposed_lines(b, base, pitch, last)):
            octets = b.bitcast(words, v.V64)
            values = b.xor(octets, v.constant(v.V64, [-128] * 64)) if signed else octets
            v.store(b, values, b.add(out, v.I64(128 * (16 * line + i))))


def _transposed_lines(b: Any, base: Any, pitch: Any, last: Any) -> list[Any]:
    """64 bytes of each of sixteen rows as sixteen vectors whose lanes are the rows."""
    lines = []
    for row in range(16):
        address = _row(b, base, pitch, row, last)
        lines.append(v.load(b, address, v.V16I))
    return v.transposed(b, lines)


@dataclass(frozen=True)
class RowCodes:
    """What differs between the formats."""

    bits: int
    """Bits of a code, 2, 3, 4 or 8. Codes of 8 bits are signed in a format without offsets; all others are unsigned."""
    offsets: torch.dtype | None = None
    """The dtype of scales and offsets in a format with offsets; None: float16 scales, and zero-points of as many bits as a code below 8."""

    @property
    def nibbles(self) -> bool:
        """Whether codes are read as `nibble_line`, and activations in its order."""
        return self.bits <= 4

    @property
    def has_zeros(self) -> bool:
        """Whether groups have zero-points."""
        return self.nibbles and self.offsets is None

    @property
    def block_bytes(self) -> int:
        """Bytes of the codes of a block of a row."""
        return BLOCK * self.bits // 8

    @property
    def zero_bits(self) -> int:
        """Bits of a zero-point or an offset; in a format without them any number."""
        return self.bits if self.offsets is None else 16

    @property
    def kind(self) -> int:
        """The number by which compiled code knows these values."""
        return self.bits + 16 * _OFFSETS.index(self.offsets)

    @classmethod
    def of_kind(cls, kind: int) -> RowCodes:
        """The inverse of `kind`."""
        return cls(kind % 16, _OFFSETS[kind // 16])


_OFFSETS = (None, torch.float16, torch.bfloat16)
FORMATS = {
    "int2": RowCodes(2),
    "int3": RowCodes(3),
    "int4": RowCodes(4),
    "int8": RowCodes(8),
    "affine4": RowCodes(4, torch.float16),
    "affine8": RowCodes(8, torch.float16),
    "affine4-bf16": RowCodes(4, torch.bfloat16),
    "affine8-bf16": RowCodes(8, torch.bfloat16),
}
"""By format."""
KINDS = {name: codes.kind for name, codes in FORMATS.items()}
"""`RowCodes.kind` by format, since every product asks for it."""
