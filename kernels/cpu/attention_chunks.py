"""Attention of a few query heads to a chunk of a KV cache, as it is stored: short-vector code for LLVM.

The keys of sixteen tokens are multiplied by every query of a block, each product with an accumulator of its own, whose lanes are added in
a fixed tree. Scores, their exponentials and the weighted sum of the values are float32. A query's result has the same bits in a block of
any size, and whether vectors have 4, 8 or 16 lanes.

Dimension letters: `R` query heads that share a key/value head, `C` channels of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vector as v

__all__ = ["CHUNK", "STORED", "Stored", "attend_to_chunk", "combine_chunks"]

CHUNK = 256
"""Tokens of a chunk."""
_LANES = 16
_VECTOR_BYTES = 4 * _LANES
# As measured for int4 weights (`int4.py`).
_PREFETCH_BYTES = 4096
_LINE = 64  # bytes
# Tokens whose values are added before the next channels of these tokens. ms for 4096 tokens, bfloat16 / int8, of 48 heads on one thread:
# 16 tokens 1.67 / 1.30, 32 1.61 / 1.22, 64 1.88 / 1.23, 256 1.92 / 1.20.
_TOKENS = 32

# 2^f for f from -1/2 to 1/2, lowest power first: a relative error of 7.3e-8 in float32 with every rounding.
_EXP2 = (1.0, 0.69314718, 0.24022646, 0.055503286, 0.0096184891, 0.0013399931, 0.00015345812)
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to a whole number, which the low bits then hold


@dataclass(frozen=True)
class Stored:
    """How keys and values are stored."""

    code: int
    """The literal that names it in compiled code."""
    unit_bytes: int
    """Bytes that one load takes: 16 elements, of int4 two times 16."""
    parts: int = 1
    """Vectors of 16 elements in them; the second belongs to the second half of the channels."""
    scales: int = 0
    """float16 for each token and head: 1 a step; 2 a step and a minimum."""


STORED = {
    "float32": Stored(0, 64),
    "bfloat16": Stored(1, 32),
    "float16": Stored(2, 32),
    "int8": Stored(3, 16, scales=1),
    "int4": Stored(4, 16, parts=2, scales=2),
}
"""By the dtype of a plain cache, or the format of another."""

_BY_CODE = {stored.code: name for name, stored in STORED.items()}


def _wide_registers() -> bool:
    """Whether 24 vectors of sixteen float32 fit the registers."""
    return "avx512f" in v.chip_features()


def _floats(value: float) -> Any:
    return v.constant(v.V16F, [value] * _LANES)


def _all(b: Any, value: Any) -> Any:
    return v.broadcast(b, value, [0] * _LANES)


def _at(b: Any, address: Any, *terms: tuple[Any, int]) -> Any:
    """address + the sum of index * bytes."""
    for index, size in terms:
        address = b.add(address, b.mul(index, v.I64(size)) if not isinstance(index, int) else v.I64(index * size))
    return address


def _slots(b: Any, count: int) -> list[Any]:
    return [cgutils.alloca_once(b, v.V16F) for _ in range(count)]


def _fused(b: Any, x: Any, y: Any, total: Any) -> Any:
    """x * y + total, rounded once where the chip can."""
    kind = ir.FunctionType(x.type, [x.type] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fmuladd.v16f32"), [x, y, total])


def _unit(b: Any, name: str, address: Any) -> list[Any]:
    """The float32 vectors that one load of keys or values holds, without their scales."""
    if name == "float32":
        return [v.load(b, address, v.V16F)]
    if name == "bfloat16":
        bits = b.zext(v.load(b, address, v.vector(v.I16, _LANES)), v.V16I)
        return [b.bitcast(b.shl(bits, v.constant(v.V16I, [16] * _LANES)), v.V16F)]
    if name == "float16":
        return [v.half_to_float(b, v.load(b, address, v.vector(v.I16, _LANES)))]
    codes = v.load(b, address, v.vector(v.I8, _LANES))
    if name == "int4":
        # Less 8, so that sums cancel less; as bytes, of which a vector operation takes more at a time.
        middle = v.constant(codes.type, [8] * _LANES)
        halves = b.and_(codes, v.constant(codes.type, [15] * _LANES)), b.lshr(codes, v.constant(codes.type, [4] * _LANES))
        return [b.sitofp(b.sext(b.sub(half, middle), v.V16I), v.V16F) for half in halves]
    return [b.sitofp(b.sext(codes, v.V16I), v.V16F)]


def _shuffled(b: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(x, y, v.constant(v.V16I, lanes))


def _halved(b: Any, vectors: list[Any], level: int) -> list[Any]:
    """Pairs of vectors as one each, with half as many partial sums per token; four levels make one vector of the sums of sixteen."""
    quarters = range(0, _LANES, 4)
    if level == 0:
        low = [lane for q in quarters for lane in (q, _LANES + q, q + 1, _LANES + q + 1)]
        high = [lane + 2 for lane in low]
    elif level == 1:
        low = [lane for q in quarters for lane in (q, q + 1, _LANES + q, _LANES + q + 1)]
        high = [lane + 2 for lane in low]
    else:
        order = (0, 1, 4, 5) if level == 2 else (0, 2, 4, 6)
        low = [4 * q + i for q in order for i in range(4)]
        high = [lane + (8 if level == 2 else 4) for lane in low]
    pairs = zip(vectors[::2], vectors[1::2], strict=True)
    return [b.fadd(_shuffled(b, x, y, low), _shuffled(b, x, y, high)) for x, y in pairs]


def _largest(b: Any, x: Any, y: Any) -> Any:
    """The larger of two numbers; `y` where `x` is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _across(b: Any, vector: Any, combine: Any) -> Any:
    """All lanes combined, in all lanes."""
    for distance in (8, 4, 2, 1):
        vector = combine(vector, _shuffled(b, vector, vector, [lane ^ distance for lane in range(_LANES)]))
    return vector


def _exp2(b: Any, x: Any) -> Any:
    """2^x for x <= 0: 0 below 2^-126, NaN for NaN."""
    tiny = b.fcmp_ordered("<", x, _floats(-126.0))
    x = b.select(tiny, _floats(-126.0), x)
    shifted = b.fadd(x, _floats(_MAGIC))
    fraction = b.fsub(x, b.fsub(shifted, _floats(_MAGIC)))
    power = _floats(_EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        power = _fused(b, power, fraction, _floats(coefficient))
    # A product, not an addition to the exponent, which would make numbers of NaN.
    exponent = b.shl(b.add(b.bitcast(shifted, v.V16I), v.constant(v.V16I, [127] * _LANES)), v.constant(v.V16I, [23] * _LANES))
    return b.select(tiny, _floats(0.0), b.fmul(power, b.bitcast(exponent, v.V16F)))


def _scales(b: Any, stored: Stored, scales: Any, first: Any, n: Any) -> list[Any]:
    """float32 vectors for tokens first .. first + 15: the steps, and of int4 what a code of 8 stands for; no load passes token n - 1."""
    count = stored.scales * _LANES
    kind = v.vector(v.I16, count)
    buffer, slot = cgutils.alloca_once(b, kind), cgutils.alloca_once(b, v.I64)
    address, left = _at(b, scales, (first, 2 * stored.scales)), b.sub(n, first)
    b.store(address, slot)
    with b.if_then(b.icmp_signed("<", left, v.I64(_LANES)), likely=False):
        b.store(ir.Constant(kind, None), buffer)
        copy = b.ptrtoint(buffer, v.I64)
        with cgutils.for_range(b, b.mul(left, v.I64(stored.scales))) as loop:
            half = b.load(b.inttoptr(_at(b, address, (loop.index, 2)), v.I16.as_pointer()), align=2)
            v.store(b, half, _at(b, copy, (loop.index, 2)))
        b.store(copy, slot)
    halves = v.half_to_float(b, v.load(b, b.load(slot), kind))
    step = stored.scales
    factors = [b.shuffle_vector(halves, halves, v.constant(v.V16I, list(range(i, count, step)))) for i in range(step)]
    return factors if step == 1 else [factors[0], _fused(b, factors[0], _floats(8.0), factors[1])]


@dataclass(frozen=True)
class _Chunk:
    """What the code for one chunk works on. Values of LLVM where no type is said."""

    name: str
    """The key in `STORED`."""
    rows: int
    """Query heads of the block."""
    q: Any
    """Address of the queries, float32 [rows, C], multiplied by log2(e) / sqrt(C)."""
    n: Any
    """Tokens of the chunk, at least 1."""
    C: Any
    """Channels."""
    scores: Any
    """Address of float32 [rows, CHUNK]: scores, then the factors of the values."""

    @property
    def stored(self) -> Stored:
        return STORED[self.name]

    def units(self, b: Any) -> Any:
        """Loads of a head."""
        return b.udiv(self.C, v.I64(_LANES * self.stored.parts))

    def token(self, b: Any, address: Any, t: Any) -> Any:
        """The address of a token's keys or values."""
        return b.add(address, b.mul(t, b.mul(self.units(b), v.I64(self.stored.unit_bytes))))

    def channel(self, b: Any, unit: Any, part: int) -> Any:
        """The first channel of a vector of a load."""
        channel = b.mul(unit, v.I64(_LANES))
        return b.add(channel, b.udiv(self.C, v.I64(2))) if part else channel

    def query(self, b: Any, row: int, channel: Any) -> Any:
        return v.load(b, _at(b, self.q, (b.add(b.mul(self.C, v.I64(row)), channel), 4)), v.V16F)

    def score_at(self, b: Any, row: int, t: Any) -> Any:
        return _at(b, self.scores, (b.add(t, v.I64(row * CHUNK)), 4))

    def sum_at(self, b: Any, out: Any, row: int, channel: Any) -> Any:
        return _at(b, out, (b.add(b.mul(self.C, v.I64(row)), channel), 4))

    def groups(self, b: Any) -> Any:
        """Groups of sixteen tokens."""
        return b.udiv(b.add(self.n, v.I64(_LANES - 1)), v.I64(_LANES))


def _query_sums(b: Any, chunk: _Chunk) -> list[Any]:
    """The sum of each query, in all lanes; int4 needs it for its offsets."""
    totals = _slots(b, chunk.rows)
    for slot in totals:
        b.store(_floats(0.0), slot)
    with cgutils.for_range(b, b.udiv(chunk.C, v.I64(_LANES))) as loop:
        for row, slot in enumerate(totals):
            b.store(b.fadd(b.load(slot), chunk.query(b, row, b.mul(loop.index, v.I64(_LANES)))), slot)
    return [_across(b, b.load(slot), b.fadd) for slot in totals]


def _write_scores(b: Any, chunk: _Chunk, keys: Any, scales: Any) -> list[Any]:
    """Write the scores of all queries and tokens, -inf after token n - 1. Returns the largest of each query, in all lanes."""
    stored, rows, last = chunk.stored, chunk.rows, b.sub(chunk.n, v.I64(1))
    together = 4 if _wide_registers() else 1
    sums = _query_sums(b, chunk) if stored.scales == 2 else []
    largest = _slots(b, rows)
    for slot in largest:
        b.store(_floats(-math.inf), slot)
    partial = cgutils.alloca_once(b, ir.ArrayType(v.V16F, rows * _LANES // together))
    partial_at = b.ptrtoint(partial, v.I64)
    totals = [_slots(b, together) for _ in range(rows)]
    with cgutils.for_range(b, chunk.groups(b)) as group:
        first = b.mul(group.index, v.I64(_LANES))
        with cgutils.for_range(b, v.I64(_LANES // together)) as part:
            addresses = []
            for j in range(together):
                t = b.add(first, b.add(b.mul(part.index, v.I64(together)), v.I64(j)))
                addresses.append(chunk.token(b, keys, b.select(b.icmp_signed("<", t, last), t, last)))
            lines = b.udiv(b.mul(chunk.units(b), v.I64(together * stored.unit_bytes)), v.I64(_LINE))
            with cgutils.for_range(b, lines) as line:
                v.prefetch(b, _at(b, addresses[0], (_PREFETCH_BYTES, 1), (line.index, _LINE)))
            for slot in (slot for of_row in totals for slot in of_row):
                b.store(_floats(0.0), slot)
            with cgutils.for_range(b, chunk.units(b)) as loop:
                offset = b.mul(loop.index, v.I64(stored.unit_bytes))
                vectors = []
                for address in addresses:
                    vectors.append(_unit(b, chunk.name, b.add(address, offset)))
                for half in range(stored.parts):
                    channel = chunk.channel(b, loop.index, half)
                    for row in range(rows):
                        query = chunk.query(b, row, channel)
                        for j in range(together):
                            b.store(_fused(b, query, vectors[j][half], b.load(totals[row][j])), totals[row][j])
            for row in range(rows):
                sums_of_row = [b.load(slot) for slot in totals[row]]
                for level in range(together.bit_length() - 1):
                    sums_of_row = _halved(b, sums_of_row, level)
                v.store(b, sums_of_row[0], _at(b, partial_at, (part.index, _VECTOR_BYTES), (row * _LANES // together, _VECTOR_BYTES)))
        factors = _scales(b, stored, scales, first, chunk.n) if stored.scales else []
        positions = b.add(_all(b, b.trunc(first, v.I32)), v.constant(v.V16I, list(range(_LANES))))
        inside = b.icmp_signed("<", positions, _all(b, b.trunc(chunk.n, v.I32)))
        for row in range(rows):
            count = _LANES // together
            score = [v.load(b, _at(b, partial_at, (row * count + i, _VECTOR_BYTES)), v.V16F) for i in range(count)]
            for level in range(together.bit_length() - 1, 4):
                score = _halved(b, score, level)
            value = score[0]
            if factors:
                value = b.fmul(value, factors[0])
            if len(factors) == 2:
                value = _fused(b, factors[1], sums[row], value)
            value = b.select(inside, value, _floats(-math.inf))
            v.store(b, value, chunk.score_at(b, row, first))
            b.store(_largest(b, value, b.load(largest[row])), largest[row])
    return [_across(b, b.load(slot), lambda x, y: _largest(b, x, y)) for slot in largest]


def _write_factors(b: Any, chunk: _Chunk, largest: list[Any], scales: Any, stats: Any) -> list[Any]:
    """Replace the scores by the factors of the values' codes, and write each query's largest score and sum of exponentials to `stats`.

    Returns for each query what the offsets of int4 add to every channel, in all lanes.
    """
    stored = chunk.stored
    totals, offsets = _slots(b, chunk.rows), _slots(b, chunk.rows)
    for slot in (*totals, *offsets):
        b.store(_floats(0.0), slot)
    # With all scores -inf there is nothing to subtract, and every exponential is 0.
    bases = [b.select(b.fcmp_ordered("==", x, _floats(-math.inf)), _floats(0.0), x) for x in largest]
    with cgutils.for_range(b, chunk.groups(b)) as group:
        first = b.mul(group.index, v.I64(_LANES))
        factors = _scales(b, stored, scales, first, chunk.n) if stored.scales else []
        for row, base in enumerate(bases):
            at = chunk.score_at(b, row, first)
            weight = _exp2(b, b.fsub(v.load(b, at, v.V16F), base))
            b.store(b.fadd(weight, b.load(totals[row])), totals[row])
            if len(factors) == 2:
                b.store(_fused(b, weight, factors[1], b.load(offsets[row])), offsets[row])
            v.store(b, b.fmul(weight, factors[0]) if factors else weight, at)
    for row in range(chunk.rows):
        total = _across(b, b.load(totals[row]), b.fadd)
        for i, value in enumerate((largest[row], total)):
            v.store(b, b.extract_element(value, v.I32(0)), _at(b, stats, (2 * row + i, 4)))
    return [_across(b, b.load(slot), b.fadd) for slot in offsets] if stored.scales == 2 else []


def _add_values(b: Any, chunk: _Chunk, values: Any, offsets: list[Any], out: Any) -> None:
    """Write the sums of the values by their factors to `out`, float32 [rows, C]."""
    stored, units = chunk.stored, chunk.units(b)
    together = max(1, (4 if _wide_registers() else 1) // stored.parts)
    with cgutils.for_range(b, b.udiv(chunk.C, v.I64(_LANES))) as loop:
        for row in range(chunk.rows):
            v.store(b, offsets[row] if offsets else _floats(0.0), chunk.sum_at(b, out, row, b.mul(loop.index, v.I64(_LANES))))

    def block(first: Any, count: int, start: Any, tokens: Any) -> None:
        places = [(row, unit, part) for row in range(chunk.rows) for unit in range(count) for part in range(stored.parts)]
        totals = {place: cgutils.alloca_once(b, v.V16F) for place in places}
        sums = {(r, unit, part): chunk.sum_at(b, out, r, chunk.channel(b, b.add(first, v.I64(unit)), part)) for r, unit, part in places}
        for place in places:
            b.store(v.load(b, sums[place], v.V16F), totals[place])
        with cgutils.for_range(b, tokens) as loop:
            t = b.add(start, loop.index)
            address = b.add(chunk.token(b, values, t), b.mul(first, v.I64(stored.unit_bytes)))
            vectors = []
            for unit in range(count):
                vectors.append(_unit(b, chunk.name, b.add(address, v.I64(unit * stored.unit_bytes))))
            for offset in range(0, count * stored.unit_bytes, _LINE):
                v.prefetch(b, b.add(address, v.I64(_PREFETCH_BYTES + offset)))
            for row in range(chunk.rows):
                factor = _all(b, v.lookup(b, chunk.score_at(b, row, t), v.I64(0), 1))
                for unit in range(count):
                    for part in range(stored.parts):
                        slot = totals[row, unit, part]
                        b.store(_fused(b, factor, vectors[unit][part], b.load(slot)), slot)
        for place in places:
            v.store(b, b.load(totals[place]), sums[place])

    # Some tokens at a time, so that memory is read at an even pace, not all of it for the first channels.
    with cgutils.for_range(b, b.udiv(b.add(chunk.n, v.I64(_TOKENS - 1)), v.I64(_TOKENS))) as piece:
        start = b.mul(piece.index, v.I64(_TOKENS))
        left = b.sub(chunk.n, start)
        tokens = b.select(b.icmp_signed("<", left, v.I64(_TOKENS)), left, v.I64(_TOKENS))
        whole = b.udiv(units, v.I64(together))
        with cgutils.for_range(b, whole) as loop:
            block(b.mul(loop.index, v.I64(together)), together, start, tokens)
        if together > 1:
            done = b.mul(whole, v.I64(together))
            with cgutils.for_range(b, b.sub(units, done)) as loop:
                block(b.add(done, loop.index), 1, start, tokens)


@intrinsic(prefer_literal=True)
def attend_to_chunk(typing_context, q, keys, values, key_scales, value_scales, n, C, out, stats, code, rows):
    """Attention of `rows` queries to `n` tokens, unnormalized; all arguments are addresses or counts; the last two are literals.

    out: float32 [rows, C], the sum of the values by 2^(score - largest). stats: float32 [rows, 2], the largest score and the sum of these
    exponentials.
    """
    if not isinstance(code, types.IntegerLiteral) or not isinstance(rows, types.IntegerLiteral):
        return None
    name, R = _BY_CODE[code.literal_value], rows.literal_value

    def codegen(context, b, signature, args):
        q, keys, values, key_scales, value_scales, n, C, out, stats, _, _ = args
        scores = b.ptrtoint(cgutils.alloca_once(b, ir.ArrayType(v.F32, R * CHUNK)), v.I64)
        chunk = _Chunk(name, R, q, n, C, scores)
        largest = _write_scores(b, chunk, keys, key_scales)
        offsets = _write_factors(b, chunk, largest, value_scales, stats)
        _add_values(b, chunk, values, offsets, out)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9, code, rows), codegen


@intrinsic
def combine_chunks(typing_context, parts, stats, chunks, stride, C, out):
    """Write the attention of one query, from what `attend_to_chunk` wrote for it for each chunk, in the order of the chunks.

    parts, stats: addresses of the first chunk's; those of the next are `stride` rows further. out: float32 [C]. `stats` is overwritten.
    """

    def codegen(context, b, signature, args):
        parts, stats, chunks, stride, C, out = args
        largest, total = _slots(b, 2)
        b.store(_floats(-math.inf), largest)
        b.store(_floats(0.0), total)
        with cgutils.for_range(b, chunks) as loop:
            at = _at(b, stats, (b.mul(loop.index, stride), 8))
            b.store(_largest(b, _all(b, v.lookup(b, at, v.I64(0), 1)), b.load(largest)), largest)
        base = b.load(largest)
        with cgutils.for_range(b, chunks) as loop:
            at = _at(b, stats, (b.mul(loop.index, stride), 8))
            largest_of_chunk, total_of_chunk = (_all(b, v.lookup(b, at, v.I64(i), 1)) for i in range(2))
            weight = _exp2(b, b.fsub(largest_of_chunk, base))
            b.store(_fused(b, weight, total_of_chunk, b.load(total)), total)
            v.store(b, b.extract_element(weight, v.I32(0)), at)
        with cgutils.for_range(b, b.udiv(C, v.I64(_LANES))) as channels:
            channel = b.mul(channels.index, v.I64(_LANES))
            result = _slots(b, 1)[0]
            b.store(_floats(0.0), result)
            with cgutils.for_range(b, chunks) as loop:
                row = b.mul(loop.index, stride)
                weight = _all(b, v.lookup(b, _at(b, stats, (row, 8)), v.I64(0), 1))
                part = v.load(b, _at(b, parts, (b.add(b.mul(row, C), channel), 4)), v.V16F)
                b.store(_fused(b, weight, part, b.load(result)), result)
            v.store(b, b.fdiv(b.load(result), b.load(total)), _at(b, out, (channel, 4)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), codegen
