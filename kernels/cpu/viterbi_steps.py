"""One position of the Viterbi search of a trellis code (`formats/viterbi.py`) as vector code that is generated for the code.

The sums of neighbouring ends are lanes of a vector, 64 bytes or 32 words of 16 bits. States of such ends that have the same highest k bits
are neighbours too: their predecessors are lanes / 2^k neighbouring ends, and since the index map is linear, their costs are those of as
many levels in the order of the lanes, but for an exclusive or of the lanes with a constant. So a vector of costs is one of a few base
vectors with its lanes permuted by a constant, and no cost is gathered.

The 2^k states that lead to the same end compete in pairs, in rounds. A comparison leaves a mask; the traceback follows the masks of the
winners.

Dimension letters: `S` = 2^L states, `Q` = 2^(L-k) ends, `n` = 2^i levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dbrx_q.kernels.formats.trellis_codes import TrellisCode
from dbrx_q.kernels.formats.viterbi import CAP, NARROW_CAP, NARROW_SHIFT

from . import vector as v

__all__ = ["SearchShape", "level_costs", "narrow_costs", "renew", "step"]

_VECTOR_BYTES = 64
_COLUMN_BITS = 8  # of a column of the index map in a number; an index has at most eight bits
_PER_NUMBER = 7


@dataclass(frozen=True)
class SearchShape:
    """What the generated code depends on: all of a code but its levels, as whole numbers that numba can keep with compiled code."""

    bits: int
    """k."""
    state_bits: int
    """L."""
    index_bits: int
    """i."""
    low_columns: int
    """The index of each state with a single bit set, for the lowest seven bits of states, 8 bits each."""
    high_columns: int
    """The same for the other bits of states."""

    @classmethod
    def of(cls, code: TrellisCode) -> SearchShape:
        """The shape of a code."""
        columns = code.columns()
        packed = [
            sum(column << _COLUMN_BITS * i for i, column in enumerate(part)) for part in (columns[:_PER_NUMBER], columns[_PER_NUMBER:])
        ]
        return cls(code.bits, code.state_bits, code.index_bits, *packed)

    @property
    def ends(self) -> int:
        """Q."""
        return 1 << (self.state_bits - self.bits)

    def index(self, state: int) -> int:
        """The index of a state."""
        index = 0
        for bit in range(self.state_bits):
            if state >> bit & 1:
                packed = self.low_columns if bit < _PER_NUMBER else self.high_columns
                index ^= packed >> _COLUMN_BITS * (bit % _PER_NUMBER) & (1 << _COLUMN_BITS) - 1
        return index

    @cached_property
    def level_order(self) -> tuple[int, ...]:
        """The indices of the levels in the order of the base vectors: place 64 h + l has index A(l) ^ rest[h].

        Raises:
            ValueError: an index map that base vectors cannot serve.
        """
        lanes = [self.index(lane) for lane in range(_VECTOR_BYTES)]
        if len(set(lanes)) != _VECTOR_BYTES:
            raise ValueError(f"the lowest six bits of a state must give 64 indices; found {len(set(lanes))}. Choose other shifts")
        rests: list[int] = []
        seen: set[int] = set()
        for rest in range(1 << self.index_bits):
            if rest not in seen:
                rests.append(rest)
                seen.update(rest ^ lane for lane in lanes)
        return tuple(lane ^ rest for rest in rests for lane in lanes)


@intrinsic(prefer_literal=True)
def level_costs(typing_context, x, unit, levels, to, count):
    """The costs of all levels for one element, as 16-bit words at `to`; levels: address of float32 [count]; `count` is a literal."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    vectors = count.literal_value // 16

    def codegen(context, b, signature, args):
        x, unit = (v.broadcast(b, value, [0] * 16) for value in args[:2])
        half, cap = (v.constant(v.V16F, [value] * 16) for value in (0.5, float(CAP)))
        costs = []
        for i in range(vectors):
            away = b.fsub(x, v.load(b, b.add(args[2], v.I64(64 * i)), v.V16F))
            costs.append(_floats(b, "floor", b.fadd(b.fmul(b.fmul(away, away), unit), half)))
        least = costs[0]
        for cost in costs[1:]:
            least = _smaller(b, cost, least)
        for distance in (8, 4, 2, 1):
            least = _smaller(b, v.broadcast(b, least, [lane ^ distance for lane in range(16)]), least)
        for i, cost in enumerate(costs):
            whole = b.fptoui(_smaller(b, b.fsub(cost, least), cap), v.V16I)
            v.store(b, b.trunc(whole, v.vector(v.I16, 16)), b.add(args[3], v.I64(32 * i)))
        return context.get_dummy_value()

    return types.void(types.float32, types.float32, types.int64, types.int64, count), codegen


@intrinsic
def narrow_costs(typing_context, words, octets, vectors):
    """Write the costs of the first pass: words over 64, rounded, as bytes of at most `NARROW_CAP`; `vectors` of 64 bytes."""

    def codegen(context, b, signature, args):
        words, octets, vectors = args
        wide = v.vector(v.I16, _VECTOR_BYTES)

        def splat(value: int) -> Any:
            return v.constant(wide, [value] * _VECTOR_BYTES)

        with cgutils.for_range(b, vectors) as loop:
            cost = v.load(b, b.add(words, b.mul(loop.index, v.I64(2 * _VECTOR_BYTES))), wide)
            cost = b.lshr(b.add(cost, splat(1 << NARROW_SHIFT - 1)), splat(NARROW_SHIFT))
            narrow = b.trunc(_on_lanes(b, "umin", cost, splat(NARROW_CAP)), v.V64)
            v.store(b, narrow, b.add(octets, b.mul(loop.index, v.I64(_VECTOR_BYTES))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic(prefer_literal=True)
def step(typing_context, sums, costs, new_sums, masks, table, sum_bytes, bits, state_bits, index_bits, low_columns, high_columns):
    """Go from one position to the one before: fill `new_sums` and the masks of all comparisons.

    The arguments from `sum_bytes` on are literals, the last five a `SearchShape`; the others are addresses. Ends and costs have `sum_bytes`
    bytes, 1 or 2. sums, new_sums: [Q]. costs: [n] in `SearchShape.level_order`. masks: [Q/l, 2^k - 1] of l bits, l = 64 / `sum_bytes`, by
    rounds; a bit is set where the state with the lower number wins. table: scratch memory of n vectors.
    """
    numbers = (sum_bytes, bits, state_bits, index_bits, low_columns, high_columns)
    if not all(isinstance(number, types.IntegerLiteral) for number in numbers):
        return None
    width, *members = (number.literal_value for number in numbers)
    code = _StepCode(SearchShape(*members), width)

    def codegen(context, b, signature, args):
        code.generate(b, *args[:5])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, *numbers), codegen


class _StepCode:
    """Generates `step` for sums of `width` bytes.

    The ends of a vector are group g of l, the states that lead to them are [j, g] for each choice j of the highest k bits. Vectors of costs
    are numbered by `place`, which is linear in j and in g. So where place[0, g] = place[j, 0] for some j, groups g' and g' ^ g have the
    same vectors of costs in another order: a turn of the loop serves all such groups from 2^k registers.
    """

    def __init__(self, shape: SearchShape, width: int) -> None:
        self._k, self._Q, self._width = shape.bits, shape.ends, width
        self._lanes = lanes = _VECTOR_BYTES // width
        self._kind = v.vector(ir.IntType(8 * width), lanes)
        order = {index: place for place, index in enumerate(shape.level_order)}
        self._choices = [order[shape.index(j * shape.ends)] for j in range(1 << shape.bits)]
        self._groups = [order[shape.index(g * lanes)] for g in range(shape.ends // lanes)]
        self._vectors = len(order)

    def generate(self, b: Any, sums: Any, costs: Any, new_sums: Any, masks: Any, table: Any) -> None:
        """Emit the code; all arguments are addresses."""
        if self._vectors >= len(self._choices) * len(self._groups):  # each vector of costs is used once, or not at all
            base = [v.load(b, b.add(costs, v.I64(_VECTOR_BYTES * h)), self._kind) for h in range(self._vectors // self._lanes)]
            for group, place in enumerate(self._groups):
                vectors = [self._permuted(b, base[(place ^ choice) // self._lanes], place ^ choice) for choice in self._choices]
                self._group(b, v.I64(group), vectors, sums, new_sums, masks)
            return
        with cgutils.for_range(b, v.I64(self._vectors // self._lanes)) as loop:
            base_vector = v.load(b, b.add(costs, b.mul(loop.index, v.I64(_VECTOR_BYTES))), self._kind)
            rows = b.add(table, b.mul(loop.index, v.I64(_VECTOR_BYTES * self._lanes)))
            for lane in range(self._lanes):
                v.store(b, self._permuted(b, base_vector, lane), b.add(rows, v.I64(_VECTOR_BYTES * lane)))
        alike = {group: self._choices.index(place) for group, place in enumerate(self._groups) if place in self._choices}
        firsts: list[int] = []
        served: set[int] = set()
        for group in range(len(self._groups)):
            if group not in served:
                firsts.append(group)
                served.update(group ^ other for other in alike)
        numbers = [number for first in firsts for number in (first, self._groups[first] * _VECTOR_BYTES)]
        constants = cgutils.global_constant(b, "trellis_groups", ir.Constant(ir.ArrayType(v.I64, len(numbers)), numbers))
        with cgutils.for_range(b, v.I64(len(firsts))) as loop:
            at = b.add(b.ptrtoint(constants, v.I64), b.mul(loop.index, v.I64(16)))
            first, place = (b.load(b.inttoptr(b.add(at, v.I64(8 * i)), v.I64.as_pointer())) for i in range(2))
            vectors = [v.load(b, b.add(table, b.xor(place, v.I64(choice * _VECTOR_BYTES))), self._kind) for choice in self._choices]
            for other, moved in alike.items():
                swapped = [vectors[j ^ moved] for j in range(len(vectors))]
                self._group(b, b.xor(first, v.I64(other)), swapped, sums, new_sums, masks)

    def _permuted(self, b: Any, base_vector: Any, place: int) -> Any:
        return v.broadcast(b, base_vector, [lane ^ place % self._lanes for lane in range(self._lanes)])

    def _group(self, b: Any, group: Any, vectors: list[Any], sums: Any, new_sums: Any, masks: Any) -> None:
        """The new sums of a group of ends and its masks; vectors: the costs by choice."""
        k, lanes, choices = self._k, self._lanes, len(vectors)
        piece = v.vector(self._kind.element, lanes >> k)
        sums_at = b.add(sums, b.mul(group, v.I64(_VECTOR_BYTES >> k)))
        masks_at = b.add(masks, b.mul(group, v.I64((choices - 1) * lanes // 8)))

        def winner(first: int, count: int) -> Any:
            """The least total of `count` choices."""
            if count == 1:
                before = v.load(b, b.add(sums_at, v.I64(self._width * first * (self._Q >> k))), piece)
                return _on_lanes(b, "uadd.sat", v.broadcast(b, before, [lane >> k for lane in range(lanes)]), vectors[first])
            low, high = winner(first, count // 2), winner(first + count // 2, count // 2)
            least = _on_lanes(b, "umin", low, high)
            mask = choices - 2 * choices // count + first // count
            wins = b.bitcast(b.icmp_unsigned("==", least, low), ir.IntType(lanes))
            v.store(b, wins, b.add(masks_at, v.I64(mask * lanes // 8)))
            return least

        v.store(b, winner(0, choices), b.add(new_sums, b.mul(group, v.I64(_VECTOR_BYTES))))


@intrinsic(prefer_literal=True)
def renew(typing_context, sums, vectors, sum_bytes):
    """Subtract the least of the sums from all of them: `vectors` vectors of elements of `sum_bytes` bytes, a literal."""
    if not isinstance(sum_bytes, types.IntegerLiteral):
        return None
    lanes = _VECTOR_BYTES // sum_bytes.literal_value
    kind = v.vector(ir.IntType(8 * sum_bytes.literal_value), lanes)

    def codegen(context, b, signature, args):
        sums, vectors = args[:2]
        slot = cgutils.alloca_once(b, kind)
        b.store(v.constant(kind, [-1] * lanes), slot)
        with cgutils.for_range(b, vectors) as loop:
            more = v.load(b, b.add(sums, b.mul(loop.index, v.I64(_VECTOR_BYTES))), kind)
            b.store(_on_lanes(b, "umin", b.load(slot), more), slot)
        least, distance = b.load(slot), lanes // 2
        while distance:
            least = _on_lanes(b, "umin", least, v.broadcast(b, least, [lane ^ distance for lane in range(lanes)]))
            distance //= 2
        with cgutils.for_range(b, vectors) as loop:
            at = b.add(sums, b.mul(loop.index, v.I64(_VECTOR_BYTES)))
            v.store(b, b.sub(v.load(b, at, kind), least), at)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, sum_bytes), codegen


def _smaller(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def _floats(b: Any, name: str, value: Any) -> Any:
    kind = ir.FunctionType(v.V16F, [v.V16F])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v16f32"), [value])


def _on_lanes(b: Any, name: str, x: Any, y: Any) -> Any:
    """LLVM's function of that name on two vectors of whole numbers."""
    kind = ir.FunctionType(x.type, [x.type] * 2)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{x.type.count}i{x.type.element.width}"), [x, y])
