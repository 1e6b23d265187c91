"""One position of the Viterbi search of a trellis code (`formats/viterbi.py`) as vector code that is generated for the code.

The words of 32 neighbouring ends fill a vector. Their states that have the same highest k bits are neighbours too: the predecessors are
32 / 2^k neighbouring ends, and since the index map is linear, the costs are those of 32 levels in the order of the lanes, but for an
exclusive or of the lanes with a constant. So a vector of costs is one of 2^i / 32 base vectors with its lanes permuted, and no cost is
gathered. Sums alone are kept, without choices: the way back along the best path finds the choice of each state on it from the sums before
it. A first pass in bytes has 64 ends in a vector.

Dimension letters: `S` = 2^L states, `Q` = 2^(L-k) ends, `n` = 2^i levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dbrx_q.kernels.formats.trellis_codes import TrellisCode
from dbrx_q.kernels.formats.viterbi import NARROW_CAP, NARROW_MOST, cost_cap, most_word

from . import vector as v

__all__ = ["SearchShape", "level_costs", "narrow_costs", "step", "word"]

_VECTOR_BYTES = 64
_COLUMN_BITS = 8  # of a column of the index map in a number; an index has at most eight bits
_PER_NUMBER = 7
_PERMUTATIONS = {1: ("avx512vbmi", "avx512.permvar.qi.512"), 2: ("avx512bw", "avx512.permvar.hi.512")}


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
    @cache
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
        if len(set(lanes)) != len(lanes):
            raise ValueError(f"the lowest six bits of a state must give 64 indices; found {len(set(lanes))}. Choose other shifts")
        rests: list[int] = []
        seen: set[int] = set()
        for rest in range(1 << self.index_bits):
            if rest not in seen:
                rests.append(rest)
                seen.update(rest ^ lane for lane in lanes)
        return tuple(lane ^ rest for rest in rests for lane in lanes)

    @cached_property
    def _places(self) -> dict[int, int]:
        return {index: place for place, index in enumerate(self.level_order)}

    def place(self, state: int) -> int:
        """The place of a state's level in `level_order`, linear in the state."""
        return self._places[self.index(state)]


@intrinsic(prefer_literal=True)
def level_costs(typing_context, x, unit, levels, to, bits, index_bits):
    """Write the costs of all levels for one element as words at `to`.

    levels: address of float32 [n]. The last two arguments are literals.
    """
    if not all(isinstance(number, types.IntegerLiteral) for number in (bits, index_bits)):
        return None
    k, vectors = bits.literal_value, (1 << index_bits.literal_value) // 16

    def codegen(context, b, signature, args):
        x, unit = (v.broadcast(b, value, [0] * 16) for value in args[:2])
        half, cap = (v.constant(v.V16F, [value] * 16) for value in (0.5, float(cost_cap(k))))
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

    return types.void(types.float32, types.float32, types.int64, types.int64, bits, index_bits), codegen


@intrinsic
def narrow_costs(typing_context, words, octets, vectors, shift):
    """Write the costs of a first pass in bytes: words, shifted right and rounded, of at most `NARROW_CAP`; `vectors` of 64 bytes."""

    def codegen(context, b, signature, args):
        words, octets, vectors, shift = args
        wide = v.vector(v.I16, _VECTOR_BYTES)
        bits = v.broadcast(b, b.trunc(shift, v.I16), [0] * _VECTOR_BYTES)
        half = b.lshr(b.shl(_splat(wide, 1), bits), _splat(wide, 1))
        with cgutils.for_range(b, vectors) as loop:
            cost = v.load(b, b.add(words, b.mul(loop.index, v.I64(2 * _VECTOR_BYTES))), wide)
            cost = _on_lanes(b, "umin", b.lshr(b.add(cost, half), bits), _splat(wide, NARROW_CAP))
            v.store(b, b.trunc(cost, v.V64), b.add(octets, b.mul(loop.index, v.I64(_VECTOR_BYTES))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def step(typing_context, sums, costs, new_sums, least, table, width, renews, bits, state_bits, index_bits, low_columns, high_columns):
    """Go from one position to the one before: fill `new_sums`, and return the least of them where `renews` is not 0, else 0.

    A step that renews caps its sums; any other subtracts `least` from the sums it reads, so that no sum is written twice.

    The arguments from `width` on are literals, the last five a `SearchShape`; the others are addresses, `least` a number. sums, new_sums:
    [Q] of `width` bytes, 2 or, in a first pass in bytes, 1. costs: [n] of `width` bytes, in `SearchShape.level_order`. table: scratch
    memory of n vectors.
    """
    numbers = (width, renews, bits, state_bits, index_bits, low_columns, high_columns)
    if not all(isinstance(number, types.IntegerLiteral) for number in numbers):
        return None
    element_bytes, renewing, *members = (number.literal_value for number in numbers)
    code = _StepCode(SearchShape(*members), element_bytes, renews=bool(renewing))

    def codegen(context, b, signature, args):
        return code.generate(b, *args[:5])

    return types.int64(*[types.int64] * 5, *numbers), codegen


@intrinsic(prefer_literal=True)
def word(typing_context, sums, least, costs, end, place, width, bits, state_bits, index_bits, low_columns, high_columns):
    """The winning word of an end: the sum and the choice that `step` takes, from the same sums and costs, before any renewal.

    The arguments from `width` on are literals; sums and costs are the addresses that `step` was given, place is that of the end.
    """
    numbers = (width, bits, state_bits, index_bits, low_columns, high_columns)
    if not all(isinstance(number, types.IntegerLiteral) for number in numbers):
        return None
    element_bytes, *members = (number.literal_value for number in numbers)
    shape = SearchShape(*members)
    k, element, most = shape.bits, ir.IntType(8 * element_bytes), most_word(shape.bits)

    def number_at(b, address, index):
        at = b.inttoptr(b.add(address, b.mul(index, v.I64(element_bytes))), element.as_pointer())
        return b.zext(b.load(at), v.I64)

    def codegen(context, b, signature, args):
        sums, least, costs, end, place = args[:5]
        words = []
        for choice in range(1 << k):
            total = number_at(b, sums, b.add(b.lshr(end, v.I64(k)), v.I64(choice * (shape.ends >> k))))
            if element_bytes == 2:
                total = _smaller_whole(b, total, v.I64(most >> k))
            total = b.add(total, number_at(b, costs, b.xor(place, v.I64(shape.place(choice * shape.ends)))))
            if element_bytes == 1:
                total = _smaller_whole(b, total, b.add(least, v.I64(NARROW_MOST)))
            words.append(b.or_(b.shl(total, v.I64(k)), v.I64(choice)))
        while len(words) > 1:
            words = [_smaller_whole(b, words[i], words[i + 1]) for i in range(0, len(words), 2)]
        winner = b.sub(words[0], b.shl(least, v.I64(k)))
        return _smaller_whole(b, winner, v.I64(most)) if element_bytes == 2 else winner

    return types.int64(*[types.int64] * 5, *numbers), codegen


class _StepCode:
    """Generates `step`.

    The ends of a vector are a group g, the states that lead to them are [j, g] for each choice j of the highest k bits. Vectors of costs
    are numbered by `place`, which is linear in j and in g. So where place[0, g] = place[j, 0] for some j, groups g' and g' ^ g have the
    same vectors of costs in another order: a turn of the loop serves all such groups from 2^k registers.
    """

    def __init__(self, shape: SearchShape, width: int, *, renews: bool) -> None:
        self._k, self._Q, self._width, self._renews = shape.bits, shape.ends, width, renews
        self._lanes = lanes = _VECTOR_BYTES // width
        self._kind = v.vector(ir.IntType(8 * width), lanes)
        self._choices = [shape.place(j * shape.ends) for j in range(1 << shape.bits)]
        self._groups = [shape.place(g * lanes) for g in range(shape.ends // lanes)]
        self._vectors = 1 << shape.index_bits
        self._permute = _PERMUTATIONS[width]

    def generate(self, b: Any, sums: Any, costs: Any, new_sums: Any, least: Any, table: Any) -> Any:
        """Emit the code for these addresses and the least sum; the least new one."""
        lanes, kind = self._lanes, self._kind
        slot = cgutils.alloca_once(b, kind)
        b.store(_splat(kind, -1), slot)
        leasts = v.broadcast(b, b.trunc(least, kind.element), [0] * lanes)
        if self._vectors >= len(self._choices) * len(self._groups):  # each vector of costs is used once, or not at all
            base = [self._base(b, costs, v.I64(_VECTOR_BYTES * h), leasts) for h in range(self._vectors // lanes)]
            for group, place in enumerate(self._groups):
                vectors = [_permuted(b, base[(place ^ choice) // lanes], place ^ choice) for choice in self._choices]
                self._group(b, v.I64(group), vectors, sums, new_sums, leasts, slot)
        else:
            vectors_of = self._from_base if self._permute[0] in v.chip_features() else self._from_table
            self._turns(b, vectors_of(b, costs, leasts, table), sums, new_sums, leasts, slot)
        return b.zext(b.extract_element(_least_lane(b, b.load(slot)), v.I32(0)), v.I64) if self._renews else v.I64(0)

    def _turns(self, b: Any, vectors_at: Any, sums: Any, new_sums: Any, leasts: Any, slot: Any) -> None:
        """The loop over classes of groups; vectors_at: what gives a turn's vectors of costs for the place of its first group."""
        alike = {group: self._choices.index(place) for group, place in enumerate(self._groups) if place in self._choices}
        firsts: list[int] = []
        served: set[int] = set()
        for group in range(len(self._groups)):
            if group not in served:
                firsts.append(group)
                served.update(group ^ other for other in alike)
        numbers = [number for first in firsts for number in (first, self._groups[first])]
        constants = _constants(b, "trellis_groups", v.I64, numbers)
        with cgutils.for_range(b, v.I64(len(firsts))) as loop:
            at = b.add(constants, b.mul(loop.index, v.I64(16)))
            first, place = (b.load(b.inttoptr(b.add(at, v.I64(8 * i)), v.I64.as_pointer())) for i in range(2))
            vectors = vectors_at(place)
            for other, moved in alike.items():
                swapped = [vectors[j ^ moved] for j in range(len(vectors))]
                self._group(b, b.xor(first, v.I64(other)), swapped, sums, new_sums, leasts, slot)

    def _from_base(self, b: Any, costs: Any, leasts: Any, table: Any) -> Any:
        """`vectors_at` that permutes base vectors by an instruction of the chip whose lanes are no constants."""
        lanes, kind, name = self._lanes, self._kind, self._permute[1]
        if not self._renews and self._width == 2:
            for h in range(self._vectors // lanes):
                v.store(b, self._base(b, costs, v.I64(_VECTOR_BYTES * h), leasts), b.add(table, v.I64(_VECTOR_BYTES * h)))
            costs = table
        orders = _constants(b, f"trellis_orders_{lanes}", kind.element, [lane ^ place for place in range(lanes) for lane in range(lanes)])

        def vectors_at(place: Any) -> list[Any]:
            vectors = []
            for choice in self._choices:
                number = b.xor(place, v.I64(choice))
                base = v.load(b, b.add(costs, b.mul(b.and_(number, v.I64(-lanes)), v.I64(self._width))), kind)
                order = v.load(b, b.add(orders, b.mul(b.and_(number, v.I64(lanes - 1)), v.I64(_VECTOR_BYTES))), kind)
                vectors.append(v.x86(b, name, kind, base, order))
            return vectors

        return vectors_at

    def _from_table(self, b: Any, costs: Any, leasts: Any, table: Any) -> Any:
        """`vectors_at` that reads a table of all permuted vectors, which it fills before the loop."""
        lanes, kind = self._lanes, self._kind
        with cgutils.for_range(b, v.I64(self._vectors // lanes)) as loop:
            base_vector = self._base(b, costs, b.mul(loop.index, v.I64(_VECTOR_BYTES)), leasts)
            rows = b.add(table, b.mul(loop.index, v.I64(_VECTOR_BYTES * lanes)))
            for lane in range(lanes):
                v.store(b, _permuted(b, base_vector, lane), b.add(rows, v.I64(_VECTOR_BYTES * lane)))
        return lambda place: [
            v.load(b, b.add(table, b.mul(b.xor(place, v.I64(choice)), v.I64(_VECTOR_BYTES))), kind) for choice in self._choices
        ]

    def _base(self, b: Any, costs: Any, offset: Any, leasts: Any) -> Any:
        """A base vector of costs. Words have the least sum subtracted here: cost - least + sum is no less than 0 in 16 bits."""
        base_vector = v.load(b, b.add(costs, offset), self._kind)
        return base_vector if self._renews or self._width == 1 else b.sub(base_vector, leasts)

    def _group(self, b: Any, group: Any, vectors: list[Any], sums: Any, new_sums: Any, leasts: Any, slot: Any) -> None:
        """The new sums of a group of ends; vectors: the costs by choice; slot: the least of each lane so far."""
        sums_at, new_at = b.add(sums, b.mul(group, v.I64(_VECTOR_BYTES >> self._k))), b.add(new_sums, b.mul(group, v.I64(_VECTOR_BYTES)))
        winner = self._least(b, vectors, 0, sums_at, leasts)
        if self._renews:
            if self._width == 2:
                winner = _on_lanes(b, "umin", winner, _splat(self._kind, most_word(self._k) >> self._k))
            b.store(_on_lanes(b, "umin", b.load(slot), winner), slot)
        v.store(b, winner, new_at)

    def _least(self, b: Any, vectors: list[Any], first: int, sums_at: Any, leasts: Any) -> Any:
        """The least total of the choices from `first` on that `vectors` has the costs of."""
        count, lanes = len(vectors), self._lanes
        if count > 1:
            half = count // 2
            parts = (self._least(b, vectors[i * half : (i + 1) * half], first + i * half, sums_at, leasts) for i in range(2))
            return _on_lanes(b, "umin", *parts)
        few = lanes >> self._k
        before = v.load(b, b.add(sums_at, v.I64(self._width * first * (self._Q >> self._k))), v.vector(self._kind.element, few))
        if self._width == 1 and not self._renews:
            before = b.sub(before, v.broadcast(b, leasts, list(range(few))))
        expanded = v.broadcast(b, before, [lane >> self._k for lane in range(lanes)])
        return b.add(expanded, vectors[0]) if self._width == 2 else _on_lanes(b, "uadd.sat", expanded, vectors[0])


def _least_lane(b: Any, least: Any) -> Any:
    """The least lane of a vector, in all lanes."""
    distance = least.type.count // 2
    while distance:
        least = _on_lanes(b, "umin", least, v.broadcast(b, least, [lane ^ distance for lane in range(least.type.count)]))
        distance //= 2
    return least


def _constants(b: Any, name: str, element: Any, numbers: list[int]) -> Any:
    """The address of constant numbers."""
    constants = cgutils.global_constant(b, name, ir.Constant(ir.ArrayType(element, len(numbers)), numbers))
    constants.align = _VECTOR_BYTES
    return b.ptrtoint(constants, v.I64)


def _permuted(b: Any, base_vector: Any, place: int) -> Any:
    """A vector of costs from its base vector."""
    lanes = base_vector.type.count
    return v.broadcast(b, base_vector, [lane ^ place % lanes for lane in range(lanes)])


def _splat(kind: Any, value: int) -> Any:
    return v.constant(kind, [value] * kind.count)


def _smaller(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def _smaller_whole(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.icmp_unsigned("<", x, y), x, y)


def _floats(b: Any, name: str, value: Any) -> Any:
    kind = ir.FunctionType(v.V16F, [v.V16F])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v16f32"), [value])


def _on_lanes(b: Any, name: str, x: Any, y: Any) -> Any:
    """LLVM's function of that name on two vectors of whole numbers."""
    kind = ir.FunctionType(x.type, [x.type] * 2)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{x.type.count}i{x.type.element.width}"), [x, y])
