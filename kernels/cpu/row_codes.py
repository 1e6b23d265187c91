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

__all__ = ["BLOCK", "FORMATS", "KINDS", "RowCodes", "int4_block", "int8_block", "row_scales", "uint8_block"]

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
    has_offsets, has_zeros = codes.offsets is not None, codes.four_bits and codes.offsets is None

    def codegen(context, b, signature, args):
        scales, zeros, n_groups, row_groups, last, scales_out, zeros_out, _ = args
        scale_pitch = b.mul(row_groups, v.I64(2))
        zero_pitch = scale_pitch if has_offsets else b.lshr(b.add(row_groups, v.I64(1)), v.I64(1))
        halves, octet = v.vector(v.I16, _SCALE_GROUPS), v.vector(v.I8, 8)
        # The zero-point of group g is nibble g of eight bytes: rotated to bit 16 of lane g, above the float16 scale.
        rotations = v.constant(v.V16I, [(4 * g + 16) % 32 for g in range(8)] * 2)

        def widened(words: Any) -> Any:
            """The numbers in the lower halves of 32-bit words as float32."""
            if codes.offsets == torch.bfloat16:
                return b.bitcast(b.shl(words, v.constant(v.V16I, [16] * 16)), v.V16F)
            return v.half_to_float(b, b.trunc(words, halves))

        def write(first: Any, scale_at: Callable[[int], Any], zero_at: Callable[[int], Any], count: Any) -> None:
            rows = []
            for row in range(16):
                word = b.zext(v.load(b, scale_at(row), halves), v.V16I)
                if has_offsets:
                    offset = b.zext(v.load(b, zero_at(row), halves), v.V16I)
                    word = b.or_(word, b.shl(offset, v.constant(v.V16I, [16] * 16)))
                elif has_zeros:
                    nibbles = v.broadcast(b, b.bitcast(v.load(b, zero_at(row), octet), v.vector(v.I32, 2)), [0] * 8 + [1] * 8)
                    turned = _rotated(b, nibbles, rotations)
                    word = b.or_(word, b.and_(turned, v.constant(v.V16I, [0xF0000] * 16)))
                rows.append(word)
            for group, words in enumerate(v.transposed(b, rows)):
                with b.if_then(b.icmp_signed("<", v.I64(group), count)):
                    at = b.add(first, v.I64(group))
                    upper = b.lshr(words, v.constant(v.V16I, [16] * 16))
                    v.store(b, widened(words), b.add(scales_out, b.mul(at, v.I64(128))))
                    zero = widened(upper) if has_offsets else upper if has_zeros else v.constant(v.V16I, [128] * 16)
                    v.store(b, zero, b.add(zeros_out, b.mul(at, v.I64(128))))

        zero_width = 2 * _SCALE_GROUPS if has_offsets else _SCALE_GROUPS // 2

        def zero_bytes_of(groups: Any) -> Any:
            """The bytes of the offsets or of the zero-points, two to a byte, of some groups of a row."""
            return b.mul(groups, v.I64(2)) if has_offsets else b.lshr(b.add(groups, v.I64(1)), v.I64(1))

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


def _rotated(b: Any, words: Any, counts: Any) -> Any:
    """Each lane rotated right by its count."""
    rotate = cgutils.get_or_insert_function(b.module, ir.FunctionType(v.V16I, [v.V16I] * 3), "llvm.fshr.v16i32")
    return b.call(rotate, [words, words, counts])


@intrinsic
def int4_block(typing_context, codes, pitch, last, block, out):
    """Write the codes of a block of 128 of sixteen rows as bytes: 32 vectors, 128 bytes apart.

    A lane of vector 2i holds elements 8i, 8i+2, 8i+4 and 8i+6 of its row, of vector 2i+1 the odd ones between. codes: address of the first
    row; pitch: bytes of a row; last: the last row, which those after it repeat.
    """

    def codegen(context, b, signature, args):
        codes, pitch, last, block, out = args
        low = v.constant(v.V64, [15] * 64)
        for i, words in enumerate(_transposed_lines(b, b.add(codes, b.mul(block, v.I64(64))), pitch, last)):
            even = b.and_(b.bitcast(words, v.V64), low)
            odd = b.and_(b.bitcast(b.lshr(words, v.constant(v.V16I, [4] * 16)), v.V64), low)
            for j, values in enumerate((even, odd)):
                v.store(b, values, b.add(out, v.I64(128 * (2 * i + j))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def int8_block(typing_context, codes, pitch, last, block, out):
    """As `int4_block`, the signed codes plus 128; a lane of vector i holds elements 4i to 4i+3."""

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

    four_bits: bool
    """Two codes in a byte, unsigned; otherwise a byte each, signed in a format without offsets."""
    offsets: torch.dtype | None = None
    """The dtype of scales and offsets in a format with offsets; None: float16 scales, and zero-points with four bits."""

    @property
    def kind(self) -> int:
        """The number by which compiled code knows these values."""
        return int(self.four_bits) + 2 * _OFFSETS.index(self.offsets)

    @classmethod
    def of_kind(cls, kind: int) -> RowCodes:
        """The inverse of `kind`."""
        return cls(bool(kind % 2), _OFFSETS[kind // 2])


_OFFSETS = (None, torch.float16, torch.bfloat16)
FORMATS = {
    "int4": RowCodes(four_bits=True),
    "int8": RowCodes(four_bits=False),
    "affine4": RowCodes(four_bits=True, offsets=torch.float16),
    "affine8": RowCodes(four_bits=False, offsets=torch.float16),
    "affine4-bf16": RowCodes(four_bits=True, offsets=torch.bfloat16),
    "affine8-bf16": RowCodes(four_bits=False, offsets=torch.bfloat16),
}
"""By format."""
KINDS = {name: codes.kind for name, codes in FORMATS.items()}
"""`RowCodes.kind` by format, since every product asks for it."""
