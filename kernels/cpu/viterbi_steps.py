"""One position of the Viterbi search of a trellis code (`formats/viterbi.py`) as vector code that is generated for the code.

The words of 32 neighbouring ends fill a vector. Their states that have the same highest k bits are neighbours too: the predecessors are
32 / 2^k neighbouring ends, and since the index map is linear, the costs are those of 32 levels in the order of the lanes, but for an
exclusive or of the lanes with a constant. So a vector of costs is one of 2^i / 32 base vectors with its lanes permuted by a constant, and
no cost is gathered. A word's choice comes along in its lowest bits, so the least word names its predecessor, and the choices of 32 ends
are stored as k masks. A first pass in bytes has 64 ends in a vector and no room for choices: the states of an end compete in pairs, in
rounds, and each comparison leaves a mask.

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
from dbrx_q.kernels.formats.viterbi import NARROW_CAP, cost_cap, most_word

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
        if len(set(lanes)) != len(lanes):
            raise ValueError(f"the lowest six bits of a state must give 64 indices; found {len(set(lanes))}. Choose other shifts")
        rests: list[int] = []
        seen: set[int] = set()
        for rest in range(1 << self.index_bits):
            if rest not in seen:
                rests.append(rest)
                seen.update(rest ^ lane for lane in lanes)
        return tuple(lane ^ rest for rest in rests for lane in lanes)


@intrinsic(prefer_literal=True)
def level_costs(typing_context, x, unit, levels, to, bits, index_bits):
    """Write the costs of all levels for one element, times 2^k, as words at `to`.

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
            whole = b.shl(b.fptoui(_smaller(b, b.fsub(cost, least), cap), v.V16I), v.constant(v.V16I, [k] * 16))
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
def step(typing_context, words, costs, new_words, masks, table, width, keep, bits, state_bits, index_bits, low_columns, high_columns):
    """Go from one position to the one before: fill `new_words` and, where `keep` is not 0, the masks of all choices.

    The arguments from `width` on are literals, the last five a `SearchShape`; the others are addresses. words, new_words: [Q] of `width`
    bytes, 2 or, in a first pass in bytes, 1. costs: [n] of `width` bytes, in `SearchShape.level_order`. masks: 32-bit words [Q/32, k] by
    bits of the choice; in bytes 64-bit words [Q/64, 2^k - 1] by rounds, a bit set where the state with the lower number wins. table:
    scratch memory of n vectors.
    """
    numbers = (width, keep, bits, state_bits, index_bits, low_columns, high_columns)
    if not all(isinstance(number, types.IntegerLiteral) for number in numbers):
        return None
    element_bytes, kept, *members = (number.literal_value for number in numbers)
    code = _StepCode(SearchShape(*members), element_bytes, keeps=bool(kept))

    def codegen(context, b, signature, args):
        code.generate(b, *args[:5])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, *numbers), codegen


class _StepCode:
    """Generates `step`.

    The ends of a vector are a group g, the states that lead to them are [j, g] for each choice j of the highest k bits. Vectors of costs
    are numbered by `place`, which is linear in j and in g. So where place[0, g] = place[j, 0] for some j, groups g' and g' ^ g have the
    same vectors of costs in another order: a turn of the loop serves all such groups from 2^k registers.
    """

    def __init__(self, shape: SearchShape, width: int, *, keeps: bool) -> None:
        self._k, self._L, self._Q, self._width, self._keeps = shape.bits, shape.state_bits, shape.ends, width, keeps
        self._lanes = lanes = _VECTOR_BYTES // width
        self._kind = v.vector(ir.IntType(8 * width), lanes)
        order = {index: place for place, index in enumerate(shape.level_order)}
        self._choices = [order[shape.index(j * shape.ends)] for j in range(1 << shape.bits)]
        self._groups = [order[shape.index(g * lanes)] for g in range(shape.ends // lanes)]
        self._vectors = len(order)

    def generate(self, b: Any, *addresses: Any) -> None:
        """Emit the code for the addresses of words, costs, new words, masks and the table."""
        words, costs, new_words, masks, table = addresses
        lanes, kind = self._lanes, self._kind
        if self._vectors >= len(self._choices) * len(self._groups):  # each vector of costs is used once, or not at all
            base = [v.load(b, b.add(costs, v.I64(_VECTOR_BYTES * h)), kind) for h in range(self._vectors // lanes)]
            for group, place in enumerate(self._groups):
                vectors = [_permuted(b, base[(place ^ choice) // lanes], place ^ choice) for choice in self._choices]
                self._group(b, v.I64(group), self._next_choice(group), vectors, words, new_words, masks)
            return
        with cgutils.for_range(b, v.I64(self._vectors // lanes)) as loop:
            base_vector = v.load(b, b.add(costs, b.mul(loop.index, v.I64(_VECTOR_BYTES))), kind)
            rows = b.add(table, b.mul(loop.index, v.I64(_VECTOR_BYTES * lanes)))
            for lane in range(lanes):
                v.store(b, _permuted(b, base_vector, lane), b.add(rows, v.I64(_VECTOR_BYTES * lane)))
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
            vectors = [v.load(b, b.add(table, b.xor(place, v.I64(choice * _VECTOR_BYTES))), kind) for choice in self._choices]
            first_choice = b.lshr(first, v.I64(self._L - 2 * self._k - (lanes.bit_length() - 1)))
            first_choices = v.broadcast(b, b.trunc(first_choice, kind.element), [0] * lanes)
            for other, moved in alike.items():
                swapped = [vectors[j ^ moved] for j in range(len(vectors))]
                next_choice = b.xor(first_choices, self._next_choice(other))
                self._group(b, b.xor(first, v.I64(other)), next_choice, swapped, words, new_words, masks)

    def _next_choice(self, group: int) -> Any:
        """The choices with which the ends of a group go on, their highest k bits."""
        return v.constant(self._kind, [(group * self._lanes + lane) >> self._L - 2 * self._k for lane in range(self._lanes)])

    def _group(self, b: Any, group: Any, next_choice: Any, vectors: list[Any], words: Any, new_words: Any, masks: Any) -> None:
        """The new words of a group of ends and its masks; vectors: the costs by choice."""
        words_at, new_at = b.add(words, b.mul(group, v.I64(_VECTOR_BYTES >> self._k))), b.add(new_words, b.mul(group, v.I64(_VECTOR_BYTES)))
        masks_per_group = self._k if self._width == 2 else len(vectors) - 1
        masks_at = b.add(masks, b.mul(group, v.I64(masks_per_group * self._lanes // 8)))
        winner = self._least(b, vectors, 0, words_at, masks_at)
        if self._width == 1:
            v.store(b, winner, new_at)
            return
        winner = _on_lanes(b, "umin", winner, _splat(self._kind, most_word(self._k)))
        for bit in range(self._k if self._keeps else 0):
            chosen = b.icmp_unsigned("!=", b.and_(winner, _splat(self._kind, 1 << bit)), _splat(self._kind, 0))
            v.store(b, b.bitcast(chosen, v.I32), b.add(masks_at, v.I64(4 * bit)))
        v.store(b, b.or_(b.and_(winner, _splat(self._kind, -len(vectors))), next_choice), new_at)

    def _least(self, b: Any, vectors: list[Any], first: int, words_at: Any, masks_at: Any) -> Any:
        """The least total of the choices from `first` on that `vectors` has the costs of; in bytes, with the masks of the comparisons."""
        count, choices, lanes = len(vectors), 1 << self._k, self._lanes
        if count == 1:
            before = v.load(
                b, b.add(words_at, v.I64(self._width * first * (self._Q >> self._k))), v.vector(self._kind.element, lanes >> self._k)
            )
            expanded = v.broadcast(b, before, [lane >> self._k for lane in range(lanes)])
            return b.add(expanded, vectors[0]) if self._width == 2 else _on_lanes(b, "uadd.sat", expanded, vectors[0])
        half = count // 2
        low = self._least(b, vectors[:half], first, words_at, masks_at)
        high = self._least(b, vectors[half:], first + half, words_at, masks_at)
        least = _on_lanes(b, "umin", low, high)
        if self._width == 1 and self._keeps:
            mask = choices - choices // half + first // count
            v.store(b, b.bitcast(b.icmp_unsigned("==", least, low), v.I64), b.add(masks_at, v.I64(8 * mask)))
        return least


@intrinsic(prefer_literal=True)
def renew(typing_context, words, width, bits, state_bits):
    """Subtract the least of the Q sums from all of them; the arguments but `words` are literals, as for `step`."""
    if not all(isinstance(number, types.IntegerLiteral) for number in (width, bits, state_bits)):
        return None
    k, lanes = bits.literal_value, _VECTOR_BYTES // width.literal_value
    kind = v.vector(ir.IntType(8 * width.literal_value), lanes)
    vectors = v.I64((1 << state_bits.literal_value - k) // lanes)

    def codegen(context, b, signature, args):
        words = args[0]
        slot = cgutils.alloca_once(b, kind)
        b.store(_splat(kind, -1), slot)
        with cgutils.for_range(b, vectors) as loop:
            more = v.load(b, b.add(words, b.mul(loop.index, v.I64(_VECTOR_BYTES))), kind)
            b.store(_on_lanes(b, "umin", b.load(slot), more), slot)
        least, distance = b.load(slot), lanes // 2
        while distance:
            least = _on_lanes(b, "umin", least, v.broadcast(b, least, [lane ^ distance for lane in range(lanes)]))
            distance //= 2
        if width.literal_value == 2:
            least = b.and_(least, _splat(kind, -(1 << k)))
        with cgutils.for_range(b, vectors) as loop:
            at = b.add(words, b.mul(loop.index, v.I64(_VECTOR_BYTES)))
            v.store(b, b.sub(v.load(b, at, kind), least), at)
        return context.get_dummy_value()

    return types.void(types.int64, width, bits, state_bits), codegen


def _permuted(b: Any, base_vector: Any, place: int) -> Any:
    """A vector of costs from its base vector."""
    lanes = base_vector.type.count
    return v.broadcast(b, base_vector, [lane ^ place % lanes for lane in range(lanes)])


def _splat(kind: Any, value: int) -> Any:
    return v.constant(kind, [value] * kind.count)


def _smaller(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def _floats(b: Any, name: str, value: Any) -> Any:
    kind = ir.FunctionType(v.V16F, [v.V16F])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v16f32"), [value])


def _on_lanes(b: Any, name: str, x: Any, y: Any) -> Any:
    """LLVM's function of that name on two vectors of whole numbers."""
    kind = ir.FunctionType(x.type, [x.type] * 2)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{x.type.count}i{x.type.element.width}"), [x, y])
