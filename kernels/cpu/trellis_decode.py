"""Streams of the trellis formats decoded in registers: k vectors of bytes become the levels of 128 rows and four inputs.

The index of a level is linear in the bits of its state, so it is the XOR of two or three bytes of the stream, each multiplied by a bit
matrix. Chips with GFNI multiply 64 bytes by a matrix in one instruction; others look up the halves of a byte in tables of 16 bytes (AVX2,
NEON) or add one column for each bit. With AVX-512 VBMI an instruction looks up 64 or 128 levels.

Dimension letters: `k` bits per element.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from dbrx_q.kernels.formats.trellis_codes import CODES, TrellisCode

from . import vector as v

__all__ = [
    "KINDS",
    "TURNS",
    "SlowDecodingWarning",
    "code_of",
    "decoded",
    "has_byte_shuffles",
    "has_fast_decoding",
    "level_offset",
    "warn_of_slow_decoding",
]

KINDS = {name: kind for kind, name in enumerate(CODES)}
"""The number by which compiled code knows a format."""
TURNS = 8
"""Vectors of a step: vector v has the levels of rows 16 v to 16 v + 15, lane by lane, for four inputs."""
_ZERO = ir.Constant(v.V64, None)


def code_of(kind: int) -> TrellisCode:
    """The code of a number of `KINDS`."""
    return CODES[list(CODES)[kind]]


def has_fast_decoding() -> bool:
    """Whether the chip multiplies bytes by bit matrices and looks up levels in 512-bit registers (AVX-512 VBMI, GFNI)."""
    return {"avx512vbmi", "avx512bw", "gfni"} <= v.chip_features()


class SlowDecodingWarning(UserWarning):
    """This chip lacks instructions that trellis weights are decoded fastest with."""


@cache
def warn_of_slow_decoding() -> None:
    """Say once in a process that this chip lacks `has_fast_decoding`."""
    if not has_fast_decoding():
        text = "trellis weights decode slowly on this CPU, which lacks AVX-512 VBMI or GFNI; results are the same (docs/cpu.md)"
        warnings.warn(text, SlowDecodingWarning, stacklevel=3)


def level_offset() -> int:
    """What is added to levels: 128 where the chip multiplies unsigned bytes by signed ones, otherwise nothing."""
    return 128 if v.has_byte_products() else 0


def decoded(b: Any, code: TrellisCode, lines: list[Any], offset: int) -> list[Any]:
    """The levels plus `offset`, `TURNS` vectors of 64 bytes, from the k lines of four inputs (`formats/trellis.py` draws them)."""
    stream = _Stream(b, lines)
    result = []
    for turn in range(TURNS):
        begin = code.bits * turn
        products = [_product(b, stream.at(place), matrix) for place, matrix in _factors(code, begin)]
        index = products[0]
        for product in products[1:]:
            index = b.xor(index, product)
        result.append(_lookup(b, index, [level + offset for level in code.levels]))
    return result


def _factors(code: TrellisCode, begin: int) -> list[tuple[int, tuple[int, ...]]]:
    """For a state that begins at bit `begin` of a lane: where bytes of the stream begin, and what their bits add to the index."""
    end, columns = begin + code.state_bits, code.columns()
    first = begin // 8 * 8
    half = (begin + 4) // 8 * 8 - 4
    if end > first + 16 and begin >= half >= 0 and end <= half + 16:  # two bytes that begin at bit 4 instead of three
        first = half
    places = range(first, end, 8)
    return [(place, tuple(columns[bit - begin] if begin <= bit < end else 0 for bit in range(place, place + 8))) for place in places]


class _Stream:
    """The bytes of all lanes that begin at a bit: those of the lines, of the lines of the next lanes, and those in between."""

    def __init__(self, b: Any, lines: list[Any]) -> None:
        self._b, self._bytes = b, {8 * i: line for i, line in enumerate(lines)}
        self._period = 8 * len(lines)

    def at(self, place: int) -> Any:
        """A vector of bytes; `place` is a multiple of four."""
        if place not in self._bytes:
            self._bytes[place] = self._next_lane(self.at(place - self._period)) if place >= self._period else self._between(place)
        return self._bytes[place]

    def _next_lane(self, line: Any) -> Any:
        b = self._b
        return b.bitcast(v.broadcast(b, b.bitcast(line, v.V16I), [(lane + 1) % 16 for lane in range(16)]), v.V64)

    def _between(self, place: int) -> Any:
        b, words = self._b, v.vector(v.I16, 32)
        four, low = v.constant(words, [4] * 32), v.constant(v.V64, [15] * 64)
        below = b.bitcast(b.lshr(b.bitcast(self.at(place - 4), words), four), v.V64)
        above = b.bitcast(b.shl(b.bitcast(self.at(place + 4), words), four), v.V64)
        return b.or_(b.and_(below, low), b.and_(above, b.not_(low)))


def _product(b: Any, line: Any, matrix: tuple[int, ...]) -> Any:
    """Each byte times a bit matrix: the XOR of `matrix[j]` over the bits j that are set."""
    features = v.chip_features()
    if "gfni" in features and "avx2" in features:
        # Byte 7 - i of a matrix has the bits whose parity is bit i of the result.
        rows = [sum((matrix[j] >> i & 1) << j for j in range(8)) for i in range(7, -1, -1)]
        width = 64 if "avx512bw" in features else 32
        kind = v.vector(v.I8, width)
        constant = v.constant(kind, _signed(rows) * (width // 8))
        return _by_parts(b, width, [line], lambda part: v.x86(b, f"vgf2p8affineqb.{8 * width}", kind, part, constant, v.I8(0)))
    if has_byte_shuffles():
        low = v.constant(v.V64, [15] * 64)
        high = b.bitcast(b.lshr(b.bitcast(line, v.vector(v.I16, 32)), v.constant(v.vector(v.I16, 32), [4] * 32)), v.V64)
        parts = []
        for nibbles, columns in ((line, matrix[:4]), (high, matrix[4:])):
            if any(columns):
                parts.append(_sixteen(b, [_xor(columns, n) for n in range(16)], b.and_(nibbles, low)))
        return parts[0] if len(parts) == 1 else b.xor(*parts)
    result = _ZERO
    for j, column in enumerate(matrix):
        if column:
            spread = b.ashr(b.shl(line, v.constant(v.V64, [7 - j] * 64)), v.constant(v.V64, [7] * 64))
            result = b.xor(result, b.and_(spread, v.constant(v.V64, _signed([column] * 64))))
    return result


def has_byte_shuffles() -> bool:
    """Whether the chip looks up bytes in registers of 16."""
    return not v.chip_features().isdisjoint({"avx2", "neon"})


def _xor(columns: tuple[int, ...], bits: int) -> int:
    result = 0
    for j, column in enumerate(columns):
        result ^= column if bits >> j & 1 else 0
    return result


def _lookup(b: Any, index: Any, table: list[int]) -> Any:
    """The entries, bytes, of a table of 64, 128 or 256."""
    if has_fast_decoding():
        tables = [v.constant(v.V64, _signed(table[i : i + 64])) for i in range(0, len(table), 64)]
        if len(tables) == 1:
            return v.x86(b, "avx512.permvar.qi.512", v.V64, tables[0], index)
        pairs = [v.x86(b, "avx512.vpermi2var.qi.512", v.V64, x, index, y) for x, y in zip(tables[::2], tables[1::2], strict=True)]
        return pairs[0] if len(pairs) == 1 else b.select(b.icmp_signed("<", index, _ZERO), pairs[1], pairs[0])
    if has_byte_shuffles():
        low = b.and_(index, v.constant(v.V64, [15] * 64))
        values = [_sixteen(b, table[i : i + 16], low) for i in range(0, len(table), 16)]
        words, bit = v.vector(v.I16, 32), 4
        while len(values) > 1:
            top = b.bitcast(b.shl(b.bitcast(index, words), v.constant(words, [7 - bit] * 32)), v.V64)  # the bit as the sign
            chosen = b.icmp_signed("<", top, _ZERO)
            values = [b.select(chosen, y, x) for x, y in zip(values[::2], values[1::2], strict=True)]
            bit += 1
        return values[0]
    memory = cgutils.global_constant(b, "levels", ir.Constant(v.vector(v.I8, len(table)), [v.I8(n) for n in _signed(table)]))
    pointer, result = b.bitcast(memory, v.I8.as_pointer()), _ZERO
    for lane in range(64):
        at = b.zext(b.extract_element(index, v.I32(lane)), v.I64)
        result = b.insert_element(result, b.load(b.gep(pointer, [at])), v.I32(lane))
    return result


def _sixteen(b: Any, table: list[int], index: Any) -> Any:
    """The entries of a table of 16 bytes; `index` is at most 15."""
    if "avx2" in v.chip_features():
        kind = v.vector(v.I8, 32)
        constant = v.constant(kind, _signed(table * 2))
        return _by_parts(b, 32, [index], lambda part: v.x86(b, "avx2.pshuf.b", kind, constant, part))
    kind = v.vector(v.I8, 16)
    constant = v.constant(kind, _signed(table))
    function = ir.FunctionType(kind, [kind, kind])
    tbl = cgutils.get_or_insert_function(b.module, function, "llvm.aarch64.neon.tbl1.v16i8")
    return _by_parts(b, 16, [index], lambda part: b.call(tbl, [constant, part]))


def _by_parts(b: Any, width: int, values: list[Any], function: Any) -> Any:
    """`function` of parts of `width` bytes of vectors of 64, side by side."""
    if width == 64:
        return function(*values)
    parts = [function(*(v.broadcast(b, value, list(range(i, i + width))) for value in values)) for i in range(0, 64, width)]
    while len(parts) > 1:
        order = v.constant(v.vector(v.I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [b.shuffle_vector(x, y, order) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _signed(octets: list[int]) -> list[int]:
    return [(octet + 128) % 256 - 128 for octet in octets]
