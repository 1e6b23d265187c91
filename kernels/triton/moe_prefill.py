"""`moe_experts` in Triton for many tokens: pairs of a token and an expert are sorted by expert on the device, then multiplied in two
grouped products.

On Hopper, activations for 4-bit weights are stored as even elements followed by odd ones, as the weights are dequantized: the matrix
instructions read both directly from shared memory. With many tokens, even and odd elements go into one product, and rows of gate and
up into one tile.

The grid is large enough for the worst case, one partly filled tile per expert. A program finds its expert from the sorted pairs; surplus
programs return at once. The host never waits for the device.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `P` pairs T * A, `D` d_model, `F` ffn hidden, `S` slots; letters
of tiles as in `triton/weights.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.weights import Weight

from .codes import INT4, NF4, TRELLIS, code_of
from .launch import Chip, chip_of, launch
from .moe_decode import activations, matrices, matrix_of, packed, problems, slot_of
from .tiles import Tiles, choose
from .trellis import rotated, rotation_of
from .weights import _halves, dot_step, group_of, pointers_of, scaled

__all__ = ["combine_kernel", "down_prefill_kernel", "gate_up_prefill_kernel", "prefill"]

# Bounds the memory between the kernels: 0.55 GB for 4096 tokens of DBRX, enough tokens for every expert to be bound by arithmetic.
_CHUNK = 4096
_TOKEN_TILES_TOGETHER = tl.constexpr(16)
_COLUMNS = 1024


def prefill(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, missing: torch.Tensor | None
) -> torch.Tensor:
    """y [T, D] in the dtype of `x`; see `dbrx_q.kernels.moe.moe_experts`."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for first in range(0, x.shape[0], _CHUNK):
        part = slice(first, first + _CHUNK)
        _prefill(x[part].contiguous(), experts[part].contiguous(), weights[part].contiguous(), layer, missing, y[part])
    return y


def _prefill(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    layer: ExpertWeights,
    missing: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    (T, D), A, F, E = x.shape, experts.shape[1], layer.w1.shape[-2], layer.n_experts
    P = T * A
    chip = chip_of(x.device)
    gate_up, down = (choose(problem, chip) for problem in problems(layer, P, A, chip))
    by_expert, order = experts.flatten().sort(stable=True)  # [P]
    bounds = torch.searchsorted(by_expert, torch.arange(E + 1, device=x.device), out_int32=True)  # [E + 1]
    slots = bounds if layer.slots is None else layer.slots
    if missing is not None and layer.slots is not None:
        missing += torch.where(layer.slots < 0, bounds.diff(), 0).to(missing.dtype)
    shape: dict[str, Any] = {"D": D, "F": F, "A": A, "E": E, "SLOTS": layer.slots is not None}
    e_pad = triton.next_power_of_2(E)
    in_halves = _halves_serve(chip)
    four_bits, c1, c2, c = (INT4.value, NF4.value), code_of(layer.w1), code_of(layer.v1), code_of(layer.w2)
    x_halves = in_halves and c1 in four_bits and c2 in four_bits
    h_halves = in_halves and c in four_bits and TRELLIS.value not in (c1, c2)  # rows of a trellis format are not reordered
    stacked = x_halves and _one_product(gate_up) and _stack(packed(layer.w1), packed(layer.v1))
    if stacked and gate_up.tokens == 128 and P // E * 5 // 4 > 128:
        gate_up = replace(gate_up, rows=gate_up.rows // 2, tokens=256)
    x1, x2 = activations(x, layer)
    if x_halves:
        x1 = x2 = x.unflatten(1, (-1, 2)).transpose(1, 2).contiguous()  # [T, 2, D / 2]

    h = torch.empty(P, F, dtype=x.dtype, device=x.device)
    launch(
        gate_up_prefill_kernel,
        ((triton.cdiv(P, gate_up.tokens) + E) * triton.cdiv(F, gate_up.rows),),
        x1,
        x2,
        order,
        bounds,
        slots,
        *pointers_of(packed(layer.w1), x.dtype),
        *pointers_of(packed(layer.v1), x.dtype),
        h,
        SHARED=x1 is x2,
        X_HALVES=x_halves,
        H_HALVES=h_halves,
        STACKED=stacked,
        E_PAD=e_pad,
        BN=gate_up.rows,
        BT=gate_up.tokens,
        BK=gate_up.depth,
        warps=gate_up.warps,
        stages=gate_up.stages,
        **shape,
        **matrices({"1": layer.w1, "2": layer.v1}, chip, gate_up.warps),
    )

    pairs = torch.empty(P, D, dtype=x.dtype, device=x.device)
    launch(
        down_prefill_kernel,
        ((triton.cdiv(P, down.tokens) + E) * triton.cdiv(D, down.rows),),
        rotated(h, rotation_of(layer.w2)),
        order,
        bounds,
        weights,
        slots,
        *pointers_of(packed(layer.w2), x.dtype),
        pairs,
        H_HALVES=h_halves,
        ONE_PRODUCT=_one_product(down),
        E_PAD=e_pad,
        BN=down.rows,
        BT=down.tokens,
        BK=down.depth,
        warps=down.warps,
        stages=down.stages,
        **shape,
        **matrices({"": layer.w2}, chip, down.warps),
    )

    launch(combine_kernel, (T, triton.cdiv(D, _COLUMNS)), pairs, experts, slots, y, BLOCK=_COLUMNS, warps=4, stages=1, **shape)


def _halves_serve(chip: Chip) -> bool:
    """Whether activations stored in halves are faster.

    Hopper's warpgroups read them from shared memory and take 5.3 instead of 6.3 instructions per weight. Elsewhere they pass through
    registers and take 8.3 instead of 7.5 (counted in the compiled loop of int4, group 64).
    """
    return chip.name == "sm_90"


def _one_product(tiles: Tiles) -> bool:
    """Whether even and odd elements go into one matrix product, which then overlaps with dequantizing the next tile.

    With fewer tokens or warps a tile is dequantized for few products, and joining the halves costs more than the wait that it saves: 408
    instead of 341 instructions of 4 warps with 64 tokens.
    """
    return tiles.tokens >= 128 and tiles.warps >= 8


def _stack(gate: Weight, up: Weight) -> bool:
    """Whether one tile can have rows of both matrices, of which a thread loads 16 bytes at a time. NF4 would spill 8 bytes a thread."""
    aligned = all(pointers_of(weight, torch.bfloat16)[0].data_ptr() % 16 == 0 for weight in (gate, up))
    return aligned and code_of(gate) == code_of(up) == INT4.value and group_of(gate) == group_of(up)


@triton.jit
def gate_up_prefill_kernel(
    x1,  # [T, D], of the gate; [T, 2, D / 2] for X_HALVES
    x2,  # the same, of up; unused if SHARED
    order,  # int64 [P], the pairs t * A + a by expert
    bounds,  # int32 [E + 1], where every expert's pairs begin in that order
    slots,  # int32 [E]
    q1,  # gate [S, F, D]
    s1,
    z1,
    q2,  # up [S, F, D]
    s2,
    z2,
    h,  # [P, F], or [P, 2, F / 2] for H_HALVES, in that order
    D: tl.constexpr,
    F: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    X_HALVES: tl.constexpr,
    H_HALVES: tl.constexpr,
    STACKED: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    FORMAT1: tl.constexpr,
    GROUP1: tl.constexpr,
    STRIDE_S1: tl.constexpr,
    STRIDE_N1: tl.constexpr,
    STRIDE_K1: tl.constexpr,
    FAST1: tl.constexpr,
    WARPGROUP1: tl.constexpr,
    CODE1: tl.constexpr,
    FORMAT2: tl.constexpr,
    GROUP2: tl.constexpr,
    STRIDE_S2: tl.constexpr,
    STRIDE_N2: tl.constexpr,
    STRIDE_K2: tl.constexpr,
    FAST2: tl.constexpr,
    WARPGROUP2: tl.constexpr,
    CODE2: tl.constexpr,
):
    """h = silu(gate) * up of every pair whose expert has a slot."""
    expert, row, first, end = _tile_of(bounds, slots, (F + BN - 1) // BN, E, E_PAD, BT, SLOTS)
    if expert == E_PAD:
        return
    slot = slot_of(slots, expert, SLOTS)
    q1, s1, z1 = matrix_of(q1, s1, z1, slot, F, D, FORMAT1, GROUP1, STRIDE_S1, CODE1)
    q2, s2, z2 = matrix_of(q2, s2, z2, slot, F, D, FORMAT2, GROUP2, STRIDE_S2, CODE2)

    h_columns = row * BN + tl.arange(0, BN)
    places = first + tl.arange(0, BT)
    inside = places < end
    tokens = tl.load(order + places, mask=inside, other=0) // A  # int64 [BT]
    gate = tl.zeros((BN, BT), tl.float32)
    up = tl.zeros((BN, BT), tl.float32)
    rows = _rows_of(h_columns, F, H_HALVES)
    if STACKED:
        # Gate and up are one tile of eight rows of either in turn: a thread then has both sums of an element of h.
        stacked = tl.arange(0, 2 * BN)
        of_up = (stacked // 8 % 2 == 1)[:, None]
        q, s, z = tl.multiple_of(tl.where(of_up, q2, q1), (1, 16)), tl.where(of_up, s2, s1), tl.where(of_up, z2, z1)
        both_rows = _rows_of(row * BN + stacked // 16 * 8 + stacked % 8, F, H_HALVES)
        both = tl.zeros((2 * BN, BT), tl.float32)
        for step in range((D + BK - 1) // BK):
            k = step * BK
            tile = _load_both_halves(x1 + tokens * D, inside, k, D, BK)
            both = _joined_step(both, tile, q, s, z, both_rows, k, F, D, BK, FORMAT1, GROUP1, FAST1, WARPGROUP1)
        gate, up = tl.split(tl.permute(tl.reshape(both, (BN // 8, 2, 8, BT)), (0, 2, 3, 1)))
        gate, up = tl.reshape(gate, (BN, BT)), tl.reshape(up, (BN, BT))
    else:
        for step in range((D + BK - 1) // BK):
            k = step * BK
            if X_HALVES:
                even, odd = _load_halves(x1 + tokens * D, inside, k, D, BK)
                gate = _halves_step(gate, even, odd, q1, s1, z1, rows, k, F, D, BK, FORMAT1, GROUP1, FAST1, WARPGROUP1)
                up = _halves_step(up, even, odd, q2, s2, z2, rows, k, F, D, BK, FORMAT2, GROUP2, FAST2, WARPGROUP2)
            else:
                columns = k + tl.arange(0, BK)
                place, wanted = tokens[:, None] * D + columns[None, :], inside[:, None] & (columns < D)[None, :]
                tile = tl.load(x1 + place, mask=wanted, other=0.0)
                gate = dot_step(gate, tile, q1, s1, z1, rows, k, F, D, BK, FORMAT1, GROUP1, STRIDE_N1, STRIDE_K1, FAST1, WARPGROUP1, CODE1)
                tile = tile if SHARED else tl.load(x2 + place, mask=wanted, other=0.0)
                up = dot_step(up, tile, q2, s2, z2, rows, k, F, D, BK, FORMAT2, GROUP2, STRIDE_N2, STRIDE_K2, FAST2, WARPGROUP2, CODE2)
    gate, up = scaled(gate, s1, rows, F, FORMAT1), scaled(up, s2, rows, F, FORMAT2)
    value = gate / (1.0 + tl.exp(-gate)) * up
    place = places.to(tl.int64)[None, :] * F + h_columns[:, None]
    tl.store(h + place, value.to(h.dtype.element_ty), mask=(h_columns < F)[:, None] & inside[None, :])


@triton.jit
def down_prefill_kernel(
    h,  # [P, F], or [P, 2, F / 2] for H_HALVES, in the order of `order`
    order,  # int64 [P], the pairs t * A + a by expert
    bounds,  # int32 [E + 1], where every expert's pairs begin in that order
    weights,  # float32 [P], by pair
    slots,  # int32 [E]
    q,  # down [S, D, F]
    s,
    z,
    pairs,  # [P, D], by pair
    D: tl.constexpr,
    F: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    H_HALVES: tl.constexpr,
    ONE_PRODUCT: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    STRIDE_S: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    FAST: tl.constexpr,
    WARPGROUP: tl.constexpr,
    CODE: tl.constexpr,
):
    """weight * down @ h of every pair whose expert has a slot."""
    expert, row, first, end = _tile_of(bounds, slots, (D + BN - 1) // BN, E, E_PAD, BT, SLOTS)
    if expert == E_PAD:
        return
    q, s, z = matrix_of(q, s, z, slot_of(slots, expert, SLOTS), D, F, FORMAT, GROUP, STRIDE_S, CODE)

    rows = row * BN + tl.arange(0, BN)
    places = first + tl.arange(0, BT)
    inside = places < end
    acc = tl.zeros((BN, BT), tl.float32)
    for step in range((F + BK - 1) // BK):
        k = step * BK
        if H_HALVES:
            if ONE_PRODUCT:
                tile = _load_both_halves(h + places.to(tl.int64) * F, inside, k, F, BK)
                acc = _joined_step(acc, tile, q, s, z, rows, k, D, F, BK, FORMAT, GROUP, FAST, WARPGROUP)
            else:
                even, odd = _load_halves(h + places.to(tl.int64) * F, inside, k, F, BK)
                acc = _halves_step(acc, even, odd, q, s, z, rows, k, D, F, BK, FORMAT, GROUP, FAST, WARPGROUP)
        else:
            columns = k + tl.arange(0, BK)
            address = h + places.to(tl.int64)[:, None] * F + columns[None, :]
            tile = tl.load(address, mask=inside[:, None] & (columns < F)[None, :], other=0.0)
            acc = dot_step(acc, tile, q, s, z, rows, k, D, F, BK, FORMAT, GROUP, STRIDE_N, STRIDE_K, FAST, WARPGROUP, CODE)
    pair = tl.load(order + places, mask=inside, other=0)  # int64 [BT]
    acc = scaled(acc, s, rows, D, FORMAT)
    acc *= tl.load(weights + pair, mask=inside, other=0.0)[None, :]
    place = pair[None, :] * D + rows[:, None]
    tl.store(pairs + place, acc.to(pairs.dtype.element_ty), mask=(rows < D)[:, None] & inside[None, :])


@triton.jit
def combine_kernel(
    pairs,  # [T * A, D]; rows of experts without a slot were never written
    experts,  # int64 [T, A]
    slots,  # int32 [E]
    y,  # [T, D]
    D: tl.constexpr,
    F: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = the sum of every token's pairs, in the order of its experts."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range(A):
        present = columns < D
        if SLOTS:
            present = tl.where(tl.load(slots + tl.load(experts + token * A + a)) >= 0, present, False)
        total += tl.load(pairs + (token * A + a) * D + columns, mask=present, other=0.0).to(tl.float32)
    tl.store(y + token * D + columns, total.to(y.dtype.element_ty), mask=columns < D)


@triton.jit
def _rows_of(h_columns, F: tl.constexpr, H_HALVES: tl.constexpr):
    """The rows of gate and up that compute columns of h as it is stored."""
    return h_columns % (F // 2) * 2 + h_columns // (F // 2) if H_HALVES else h_columns


@triton.jit
def _load_halves(vectors, inside, k, K: tl.constexpr, BK: tl.constexpr):
    """Even and odd elements k .. k + BK - 1, [BT, BK / 2] each, of the vectors [2, K / 2] at the addresses `vectors` [BT]."""
    columns = k // 2 + tl.arange(0, BK // 2)
    address = vectors[:, None] + columns[None, :]
    mask = inside[:, None] & (columns < K // 2)[None, :]
    return tl.load(address, mask=mask, other=0.0), tl.load(address + K // 2, mask=mask, other=0.0)


@triton.jit
def _load_both_halves(vectors, inside, k, K: tl.constexpr, BK: tl.constexpr):
    """The same elements as one tile [BT, BK]: even ones, then odd ones."""
    within = tl.arange(0, BK)
    columns = k // 2 + within % (BK // 2)
    address = vectors[:, None] + (columns + within // (BK // 2) * (K // 2))[None, :]
    return tl.load(address, mask=inside[:, None] & (columns < K // 2)[None, :], other=0.0)


@triton.jit
def _halves_step(
    acc,  # float32 [BN, BT]
    even,  # [BT, BK / 2]
    odd,
    q,
    s,
    z,
    rows,  # [BN]
    k,
    N,
    K: tl.constexpr,
    BK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FAST: tl.constexpr,
    WARPGROUP: tl.constexpr,
):
    """`dot_step` for a 4-bit weight, with the activations in halves."""
    w_even, w_odd = _halves(q, s, z, rows, k, N, K, BK, FORMAT, GROUP, even.dtype, FAST, WARPGROUP)
    acc = tl.dot(w_even, tl.trans(even), acc, input_precision="ieee")
    return tl.dot(w_odd, tl.trans(odd), acc, input_precision="ieee")


@triton.jit
def _joined_step(
    acc,  # float32 [BN, BT]
    x,  # [BT, BK], from `_load_both_halves`
    q,  # first code of the matrix, or [BN, 1], of every row's; the same for scales and zero-points
    s,
    z,
    rows,  # [BN]
    k,
    N,
    K: tl.constexpr,
    BK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FAST: tl.constexpr,
    WARPGROUP: tl.constexpr,
):
    """`_halves_step` by one product over even and odd elements."""
    even, odd = _halves(q, s, z, rows, k, N, K, BK, FORMAT, GROUP, x.dtype, FAST, WARPGROUP)
    w = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (acc.shape[0], BK))
    return tl.dot(w, tl.trans(x), acc, input_precision="ieee")


@triton.jit
def _tile_of(bounds, slots, row_tiles, E: tl.constexpr, E_PAD: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr):
    """This program's (expert, row tile, first place among the sorted pairs, end of the expert's pairs); E_PAD as expert of a surplus one.

    Within an expert, programs that share rows of the weight or tokens run close in time, so that both stay in L2.
    """
    program = tl.program_id(0)
    e = tl.arange(0, E_PAD)
    begin = tl.load(bounds + e, mask=e < E, other=0)
    end = tl.load(bounds + e + 1, mask=e < E, other=0)
    token_tiles = (end - begin + BT - 1) // BT  # [E_PAD]
    if SLOTS:
        token_tiles = tl.where(tl.load(slots + e, mask=e < E, other=-1) >= 0, token_tiles, 0)
    programs = tl.cumsum(token_tiles, 0) * row_tiles  # [E_PAD], of every expert and those before it
    expert = tl.sum((program >= programs).to(tl.int32), 0)
    mine = program - tl.max(tl.where(program >= programs, programs, 0), 0)
    tiles_t = tl.sum(tl.where(e == expert, token_tiles, 0), 0)
    together = _TOKEN_TILES_TOGETHER * row_tiles
    first_t = mine // together * _TOKEN_TILES_TOGETHER
    tiles_together = tl.maximum(tl.minimum(tiles_t - first_t, _TOKEN_TILES_TOGETHER), 1)  # a surplus program has none
    row = mine % together // tiles_together
    tile_t = first_t + mine % together % tiles_together
    first = tl.sum(tl.where(e == expert, begin, 0), 0) + tile_t * BT
    return expert, row, first, tl.sum(tl.where(e == expert, end, 0), 0)
