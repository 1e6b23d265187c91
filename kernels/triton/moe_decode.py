"""`moe_experts` in Triton for a few tokens: two kernels with fixed grids, whose programs find their expert on the device.

The packed bytes of every active expert are read once. Nothing is sorted, and the host never waits for the device, so a CUDA graph can
capture the kernels.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `D` d_model, `F` ffn hidden, `S` slots; letters of tiles as in
`triton/weights.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.weights import Weight

from .arrival import arrive, counters
from .codes import INT8, PLAIN, TRELLIS
from .dependent_launch import start_next, wait_for_previous
from .group_dot import group_sums, span_groups
from .launch import Chip, chip_of, launch
from .tiles import Problem, choose
from .trellis import rotated, rotation_of
from .weights import bits_of, constants_of, dot_step, group_of, pointers_of, row_unit_of, scaled

__all__ = ["activations", "decode", "down_decode_kernel", "gate_up_decode_kernel", "matrices", "matrix_of", "packed", "problems", "slot_of"]


def decode(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, missing: torch.Tensor | None
) -> torch.Tensor:
    """y [T, D] in the dtype of `x`, T at most `tiles.MATVEC_TOKENS`; see `dbrx_q.kernels.moe.moe_experts`."""
    (T, D), A, F, E = x.shape, experts.shape[1], layer.w1.shape[-2], layer.n_experts
    active = min(E, T * A)  # the most experts that can have tokens
    chip = chip_of(x.device)
    of_gate_up, of_down = problems(layer, T, A, chip, x.dtype)
    gate_up, down = choose(of_gate_up, chip), choose(of_down, chip)
    slots = experts if layer.slots is None else layer.slots
    experts, weights = experts.contiguous(), weights.contiguous()
    shape: dict[str, Any] = {
        "D": D,
        "F": F,
        "A": A,
        "E": E,
        "A_PAD": triton.next_power_of_2(A),
        "E_PAD": triton.next_power_of_2(E),
        "SLOTS": layer.slots is not None,
    }

    x1, x2 = activations(_aligned(x.contiguous()), layer)
    h = torch.empty(T * A, F, dtype=x.dtype, device=x.device)
    gate = matrices({"1": layer.w1, "2": layer.v1}, chip, gate_up.warps)
    launch(
        gate_up_decode_kernel,
        (triton.cdiv(F, gate_up.rows), active),
        x1,
        x2,
        experts,
        slots,
        experts if missing is None else missing,
        *pointers_of(packed(layer.w1), x.dtype),
        *pointers_of(packed(layer.v1), x.dtype),
        h,
        T,
        MISSING=missing is not None,
        GROUPED=of_gate_up.run_groups > 0,
        BN=gate_up.rows,
        BT=gate_up.tokens,
        BK=gate_up.depth,
        warps=gate_up.warps,
        stages=gate_up.stages,
        **shape,
        **gate,
    )

    y = torch.empty(T, D, dtype=x.dtype, device=x.device)
    row_tiles, programs = triton.cdiv(D, down.rows), active * down.splits
    launch(
        down_decode_kernel,
        (row_tiles, programs),
        rotated(h, rotation_of(layer.w2)),
        experts,
        weights,
        slots,
        *pointers_of(packed(layer.w2), x.dtype),
        y,
        torch.empty(down.splits, T * A, D, dtype=torch.float32, device=x.device),
        counters(x.device, row_tiles),
        T,
        PROGRAMS=programs,
        SPLITS=down.splits,
        GROUPED=of_down.run_groups > 0,
        BN=down.rows,
        BT=down.tokens,
        BK=down.depth,
        warps=down.warps,
        stages=down.stages,
        **shape,
        **matrices({"": layer.w2}, chip, down.warps),
    )
    return y


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy if its address is no multiple of the 8 bytes that `group_sums` reads at a time."""
    return x if x.data_ptr() % 8 == 0 else x.clone()


def problems(layer: ExpertWeights, tokens: int, A: int, chip: Chip, dtype: torch.dtype = torch.bfloat16) -> tuple[Problem, Problem]:
    """The two products that tiles are chosen for; `tokens` as in `Problem`, `dtype` of the activations."""
    F, D = layer.w1.shape[-2:]
    parallel = min(layer.n_experts, tokens * A)
    bits = max(bits_of(layer.w1), bits_of(layer.v1))
    group = max(group_of(layer.w1), group_of(layer.v1))
    unit = max(row_unit_of(layer.w1), row_unit_of(layer.v1))
    gate_up = bits, group, parallel, unit, span_groups((layer.w1, layer.v1), tokens, chip, dtype)
    down = bits_of(layer.w2), group_of(layer.w2), parallel, row_unit_of(layer.w2), span_groups((layer.w2,), tokens, chip, dtype)
    return Problem("gate_up", tokens, F, D, *gate_up), Problem("down", tokens, D, F, *down)


def activations(x: torch.Tensor, layer: ExpertWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """What w1 and v1 are multiplied by: `x` [T, D], or its rotation, which they share where both have the same."""
    G1, G2 = rotation_of(layer.w1), rotation_of(layer.v1)
    x1 = rotated(x, G1)
    return x1, x1 if G1 == G2 else rotated(x, G2)


def matrices(weights: dict[str, Weight], chip: Chip, warps: int) -> dict[str, Any]:
    """`constants_of` every weight [S, N, K] with its suffix appended to each name, and STRIDE_S, the stride of a plain weight's slots."""
    return {
        name + suffix: value
        for suffix, weight in weights.items()
        for name, value in {
            **constants_of(weight, chip, warps),
            "STRIDE_S": weight.stride(0) if isinstance(weight, torch.Tensor) else 0,
        }.items()
    }


def packed(weight: Weight) -> Weight:
    """The weight as the kernels take it: all parts of a packed one contiguous."""
    return weight if isinstance(weight, torch.Tensor) else weight.contiguous()


@triton.jit(do_not_specialize=["T"])
def gate_up_decode_kernel(
    x1,  # [T, D], of the gate
    x2,  # [T, D], of up; the same unless one of the formats is a trellis
    experts,  # int64 [T, A]
    slots,  # int32 [E]
    missing,  # int32 [E]
    q1,  # gate [S, F, D]
    s1,
    z1,
    q2,  # up [S, F, D]
    s2,
    z2,
    h,  # [T * A, F]
    T,
    D: tl.constexpr,
    F: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    A_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    MISSING: tl.constexpr,
    GROUPED: tl.constexpr,
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
    PDL: tl.constexpr,
):
    """h = silu(gate) * up of every pair whose expert has a slot; program (i, j) takes row tile i of the j-th active expert."""
    start_next(PDL)
    wait_for_previous(PDL)
    rank = tl.program_id(1)
    expert, active, mine = _expert_of(experts, rank, T, A, E, A_PAD, E_PAD, BT)
    chose, pair = _pairs_of(mine, A)
    slot = slot_of(slots, expert, SLOTS)
    if MISSING:
        first = (tl.program_id(0) == 0) & (rank < active) & (slot < 0)
        tl.atomic_add(missing + expert, tl.sum(chose.to(tl.int32), 0), mask=first)
    if (rank >= active) | (slot < 0):
        return
    q1, s1, z1 = matrix_of(q1, s1, z1, slot, F, D, FORMAT1, GROUP1, STRIDE_S1, CODE1)
    q2, s2, z2 = matrix_of(q2, s2, z2, slot, F, D, FORMAT2, GROUP2, STRIDE_S2, CODE2)

    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.arange(0, BT)
    # Tokens of other experts are not read: if 8 tokens choose among 16 experts, those are three quarters of the activations.
    if GROUPED:
        even: tl.constexpr = F % BN == 0 and D % BK == 0
        steps: tl.constexpr = (D + BK - 1) // BK
        gate, up = group_sums(x1, tokens * D, chose, q1, s1, z1, rows, q2, s2, z2, rows, 0, steps, F, D, BK, GROUP1, even, FAST1)
    elif (FORMAT1 == TRELLIS) | (FORMAT2 == TRELLIS):
        # One matrix after the other: levels of both at a time would take more registers and shared memory than fit.
        gate = tl.zeros((BN, BT), tl.float32)
        for step in range((D + BK - 1) // BK):
            k = step * BK
            columns = k + tl.arange(0, BK)
            tile = tl.load(x1 + tokens[:, None] * D + columns[None, :], mask=chose[:, None] & (columns < D)[None, :], other=0.0)
            gate = dot_step(gate, tile, q1, s1, z1, rows, k, F, D, BK, FORMAT1, GROUP1, STRIDE_N1, STRIDE_K1, FAST1, WARPGROUP1, CODE1)
        up = tl.zeros((BN, BT), tl.float32)
        for step in range((D + BK - 1) // BK):
            k = step * BK
            columns = k + tl.arange(0, BK)
            tile = tl.load(x2 + tokens[:, None] * D + columns[None, :], mask=chose[:, None] & (columns < D)[None, :], other=0.0)
            up = dot_step(up, tile, q2, s2, z2, rows, k, F, D, BK, FORMAT2, GROUP2, STRIDE_N2, STRIDE_K2, FAST2, WARPGROUP2, CODE2)
        gate, up = scaled(gate, s1, rows, F, FORMAT1), scaled(up, s2, rows, F, FORMAT2)
    else:
        gate = tl.zeros((BN, BT), tl.float32)
        up = tl.zeros((BN, BT), tl.float32)
        for step in range((D + BK - 1) // BK):
            k = step * BK
            columns = k + tl.arange(0, BK)
            tile = tl.load(x1 + tokens[:, None] * D + columns[None, :], mask=chose[:, None] & (columns < D)[None, :], other=0.0)
            gate = dot_step(gate, tile, q1, s1, z1, rows, k, F, D, BK, FORMAT1, GROUP1, STRIDE_N1, STRIDE_K1, FAST1, WARPGROUP1, CODE1)
            up = dot_step(up, tile, q2, s2, z2, rows, k, F, D, BK, FORMAT2, GROUP2, STRIDE_N2, STRIDE_K2, FAST2, WARPGROUP2, CODE2)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(h + pair[None, :] * F + rows[:, None], value.to(h.dtype.element_ty), mask=(rows < F)[:, None] & chose[None, :])


@triton.jit(do_not_specialize=["T"])
def down_decode_kernel(
    h,  # [T * A, F]; rows of experts without a slot were never written
    experts,  # int64 [T, A]
    weights,  # float32 [T, A]
    slots,  # int32 [E]
    q,  # down [S, D, F]
    s,
    z,
    y,  # [T, D]
    partial,  # float32 [SPLITS, T * A, D]
    arrived,  # int32 [row tiles], zeros
    T,
    D: tl.constexpr,
    F: tl.constexpr,
    A: tl.constexpr,
    E: tl.constexpr,
    A_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPED: tl.constexpr,
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
    PDL: tl.constexpr,
):
    """y = the sum over a token's experts of weight * down @ h; the last program of a row tile adds up in a fixed order."""
    start_next(PDL)
    wait_for_previous(PDL)
    rank, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    expert, active, mine = _expert_of(experts, rank, T, A, E, A_PAD, E_PAD, BT)
    chose, pair = _pairs_of(mine, A)
    share = _shares_of(weights, mine, T, A)
    slot = slot_of(slots, expert, SLOTS)
    works = (rank < active) & (slot >= 0)
    chose = tl.where(works, chose, False)
    q, s, z = matrix_of(q, s, z, tl.maximum(slot, 0), D, F, FORMAT, GROUP, STRIDE_S, CODE)

    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.arange(0, BT)
    steps: tl.constexpr = (F + BK - 1) // BK
    steps_per_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    first = split * steps_per_split
    end = tl.where(works, min(first + steps_per_split, steps), first)
    if GROUPED:
        even: tl.constexpr = D % BN == 0 and F % BK == 0
        half = tl.program_id(0) * BN + tl.arange(0, BN // 2)
        other = half + BN // 2
        upper, lower = group_sums(h, pair * F, chose, q, s, z, half, q, s, z, other, first, end, D, F, BK, GROUP, even, FAST)
        acc = tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 1)), (BN, BT))
    else:
        acc = tl.zeros((BN, BT), tl.float32)
        for step in range(first, end):
            k = step * BK
            columns = k + tl.arange(0, BK)
            tile = tl.load(h + pair[:, None] * F + columns[None, :], mask=chose[:, None] & (columns < F)[None, :], other=0.0)
            acc = dot_step(acc, tile, q, s, z, rows, k, D, F, BK, FORMAT, GROUP, STRIDE_N, STRIDE_K, FAST, WARPGROUP, CODE)
    acc = scaled(acc, s, rows, D, FORMAT)
    acc *= share[None, :]
    place = (split * T * A + pair)[None, :] * D + rows[:, None]
    tl.store(partial + place, acc, mask=(rows < D)[:, None] & chose[None, :])

    if not arrive(arrived + tl.program_id(0), PROGRAMS - 1):
        return
    total = tl.zeros((BN, BT), tl.float32)
    for other in range(SPLITS):
        for a in tl.static_range(A):
            present = tokens < T
            if SLOTS:
                chosen = tl.load(experts + tokens * A + a, mask=present, other=0)
                present = present & (tl.load(slots + chosen, mask=present, other=-1) >= 0)
            place = ((other * T + tokens) * A + a)[None, :] * D + rows[:, None]
            total += tl.load(partial + place, mask=(rows < D)[:, None] & present[None, :], other=0.0, cache_modifier=".cg")
    inside = (rows < D)[:, None] & (tokens < T)[None, :]
    tl.store(y + tokens[None, :] * D + rows[:, None], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def slot_of(slots, expert, SLOTS: tl.constexpr):
    """The slot of an expert, -1 if it has none; int64, because a buffer of slots may exceed 2^31 bytes."""
    if SLOTS:
        return tl.load(slots + expert).to(tl.int64)
    else:
        return expert.to(tl.int64)


@triton.jit
def matrix_of(
    q, s, z, slot, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, STRIDE_S: tl.constexpr, CODE: tl.constexpr
):
    """(q, s, z) of the matrix [N, K] in `slot` of a stack."""
    if FORMAT == PLAIN:
        return q + slot * STRIDE_S, s, z
    if FORMAT == TRELLIS:
        return q + slot * ((N + 127) // 128 * (K // 4) * (16 * CODE[0])), s + slot * N, z
    groups: tl.constexpr = K // GROUP
    if FORMAT == INT8:
        return q + slot * (N * K), s + slot * (N * groups), z
    return q + slot * (N * (K // 2)), s + slot * (N * groups), z + slot * (N * ((groups + 1) // 2))


@triton.jit
def _expert_of(experts, rank, T, A: tl.constexpr, E: tl.constexpr, A_PAD: tl.constexpr, E_PAD: tl.constexpr, BT: tl.constexpr):
    """(active expert of the given rank by index, number of active experts, which of the pairs [BT, A_PAD] are its own)."""
    place = tl.arange(0, BT * A_PAD)
    t, a = place // A_PAD, place % A_PAD
    chosen = tl.load(experts + t * A + a, mask=(t < T) & (a < A), other=-1).to(tl.int32)
    e = tl.arange(0, E_PAD)
    is_active = tl.max((chosen[None, :] == e[:, None]).to(tl.int32), 1)  # [E_PAD]
    upto = tl.cumsum(is_active, 0)
    expert = tl.sum(tl.where((upto == rank + 1) & (is_active == 1), e, 0), 0)
    return expert, tl.sum(is_active, 0), tl.reshape(chosen, (BT, A_PAD)) == expert


@triton.jit
def _pairs_of(mine, A: tl.constexpr):
    """(whether each token chose the expert, its pair t * A + a), both [BT]."""
    chose = tl.max(mine.to(tl.int32), 1) == 1
    return chose, tl.arange(0, mine.shape[0]) * A + tl.sum(tl.where(mine, tl.arange(0, mine.shape[1])[None, :], 0), 1)


@triton.jit
def _shares_of(weights, mine, T, A: tl.constexpr):
    """float32 [BT] routing weight of each token's pair with the expert, 0 for tokens that did not choose it."""
    t, a = tl.arange(0, mine.shape[0])[:, None], tl.arange(0, mine.shape[1])[None, :]
    shares = tl.load(weights + t * A + a, mask=(t < T) & (a < A), other=0.0)
    return tl.sum(tl.where(mine, shares, 0.0), 1)
