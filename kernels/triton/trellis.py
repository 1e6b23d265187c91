"""Trellis-coded weights in Triton: their levels in registers, and the rotation of activations.

A word of 32 bits holds one byte of a lane for four neighbouring inputs, so shifts and masks compute the indices of four states at once.
Dimension letters: `K` input features, `G` inputs of one Hadamard matrix; letters of tiles as in `triton/weights.py`, and `BM` tiles of 128
rows, `BQ` words of four inputs in BK.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.registry import FORMATS
from dbrx_q.kernels.formats.rotation import signs
from dbrx_q.kernels.formats.trellis_codes import TrellisCode
from dbrx_q.kernels.formats.weights import Weight

from .dependent_launch import start_next, wait_for_previous
from .launch import launch

__all__ = ["code_constant", "level_table", "rotate_kernel", "rotated", "rotation_of", "table_alignment", "trellis_code", "trellis_tile"]

_ROTATE_BLOCKS = 4  # Hadamard matrices of one program


def trellis_code(weight: Weight) -> TrellisCode | None:
    """The code of a weight in a trellis format, None for all others."""
    return None if isinstance(weight, torch.Tensor) else FORMATS[weight.format].trellis


def rotation_of(weight: Weight) -> int:
    """G, the inputs that are rotated together; 0 where the activations are taken as they are."""
    return 0 if isinstance(weight, torch.Tensor) or trellis_code(weight) is None else weight.group_size


@cache
def code_constant(code: TrellisCode) -> tuple[int | tuple[int, ...], ...]:
    """The compile-time constant CODE: k, SCALED, then for each of the eight turns (word, shift to the right, mask) of the parts.

    Words are bytes of the lane's stream, the next lane's after its own. The sum without carry of the shifted, masked words is an index
    times SCALED, which is 2 where that fits a byte: the place of a level of two bytes in the table.
    """
    scaled = 2 if code.index_bits < 8 else 1
    return code.bits, scaled, *(_parts_of_indices(code, turn, scaled.bit_length() - 1) for turn in range(8))


def _parts_of_indices(code: TrellisCode, turn: int, up: int) -> tuple[int, ...]:
    parts: dict[tuple[int, int], int] = {}
    for bit, column in enumerate(code.columns()):  # a bit of the state, and the bits of the index that it changes
        word, place = divmod(code.bits * turn + bit, 8)
        for target in range(code.index_bits):
            if column >> target & 1:
                key = word, place - target - up
                parts[key] = parts.get(key, 0) | 1 << target + up
    return tuple(number for (word, right), mask in sorted(parts.items()) for number in (word, right, mask * 0x01010101))


@cache
def level_table(code: TrellisCode, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[2^i]: the levels in the dtype of the activations, which holds whole numbers up to 127 exactly."""
    table = torch.tensor(code.levels, dtype=dtype, device=device)  # never freed: captured graphs hold its address
    assert device.type != "cuda" or table.data_ptr() % table_alignment(code) == 0, "`_lookup` takes aligned tables"
    return table


def table_alignment(code: TrellisCode) -> int:
    """What the address of a table of 16-bit levels must be a multiple of: `_lookup` replaces its lowest byte, or adds to two bytes."""
    return max(256, 2 << code.index_bits)


def rotated(x: torch.Tensor, G: int) -> torch.Tensor:
    """[T, K] in the dtype of `x`: the activations that a weight with the rotation G is multiplied by; G = 0 returns `x`."""
    if not G:
        return x
    T, K = x.shape
    y = torch.empty_like(x)
    blocks = triton.cdiv(K // G, _ROTATE_BLOCKS)
    launch(rotate_kernel, (T, blocks), x.contiguous(), _signs(K, x.device), y, K=K, G=G, BLOCKS=_ROTATE_BLOCKS, warps=4, stages=1)
    return y


@cache
def _signs(K: int, device: torch.device) -> torch.Tensor:
    return signs(K).to(device, torch.float16)  # never freed: captured graphs hold its address


@triton.jit
def rotate_kernel(
    x,  # [T, K]
    sign,  # float16 [K], 1 and -1
    y,  # [T, K]
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = the rotation of `formats/rotation.py` in float32; program (t, j) rotates BLOCKS blocks of token t."""
    start_next(PDL)
    wait_for_previous(PDL)
    columns = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[:, None] * G + tl.arange(0, G)[None, :]
    place = tl.program_id(0).to(tl.int64) * K + columns
    value = tl.load(x + place, mask=columns < K, other=0.0).to(tl.float32) * tl.load(sign + columns, mask=columns < K, other=0)
    tl.store(y + place, hadamard(value, G).to(y.dtype.element_ty), mask=columns < K)


@triton.jit
def hadamard(x, G: tl.constexpr):
    """float32 [R, G]: every row times the symmetric Hadamard matrix over sqrt(G), in the order of sums of `formats/rotation.py`."""
    R: tl.constexpr = x.shape[0]
    tl.static_assert((G == 128) | (G == 64), "a rotation has blocks of 128 or 64")
    x = _butterflies(_butterflies(_butterflies(x, R, G, 1), R, G, 2), R, G, 4)
    x = _butterflies(_butterflies(_butterflies(x, R, G, 8), R, G, 16), R, G, 32)
    return _butterflies(x, R, G, 64) * 0.08838834764831845 if G == 128 else x * 0.125


@triton.jit
def _butterflies(x, R: tl.constexpr, G: tl.constexpr, DISTANCE: tl.constexpr):
    """Sums and differences of elements DISTANCE apart."""
    pairs = tl.permute(tl.reshape(x, (R, G // (2 * DISTANCE), 2, DISTANCE)), (0, 1, 3, 2))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (R, G))


@triton.jit
def trellis_tile(q, table, rows, k, N, K: tl.constexpr, BK: tl.constexpr, CODE: tl.constexpr, FAST: tl.constexpr):
    """The levels [BN, BK] of whole tiles of 128 rows, in the dtype of `table`; past N or K any of the levels.

    Args:
        q: int32 pointer to the streams of a matrix.
        table: pointer to the levels.
        rows: [BN], neighbours from a multiple of 128 on.
        k: first input.
        N: rows of the matrix.
        K: its inputs.
        BK: inputs of the tile.
        CODE: of `code_constant`.
        FAST: whether inline PTX may look up levels of 16 bits.
    """
    BN: tl.constexpr = rows.shape[0]
    tl.static_assert(BN % 128 == 0, "a trellis weight is read in tiles of 128 rows")
    BM: tl.constexpr = BN // 128
    BQ: tl.constexpr = BK // 4
    BITS: tl.constexpr = CODE[0]
    words = _words(q, tl.min(rows, 0) // 128, k // 4, N, K // 4, BM, BQ, BITS)
    lane = tl.broadcast_to(((tl.arange(0, 16) + 1) % 16)[None, None, :], (BM, BQ, 16))
    words = words + (tl.gather(words[0], lane, 2), tl.gather(words[1], lane, 2))  # noqa: RUF005 # triton unpacks no tuples
    low = tl.join(tl.join(_indices(words, 0, CODE), _indices(words, 1, CODE)), tl.join(_indices(words, 2, CODE), _indices(words, 3, CODE)))
    high = tl.join(tl.join(_indices(words, 4, CODE), _indices(words, 5, CODE)), tl.join(_indices(words, 6, CODE), _indices(words, 7, CODE)))
    # [BM, BQ, 16 lanes, 2, 2, 2 of a turn, lowest bit first] to [BM, turns, lanes, BQ]
    indices = tl.reshape(tl.permute(tl.join(low, high), (0, 5, 4, 3, 2, 1)), (BN, BQ))
    if FAST:
        c0, c1, c2, c3 = _lookup(indices, table, CODE[1])
        return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (BN, BK))
    octets = (indices[:, :, None] >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :]) & 255
    return tl.load(table + tl.reshape(octets // CODE[1], (BN, BK)))


@triton.jit
def _words(q, tile, first, N, WIDTH: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, BITS: tl.constexpr):
    """BITS tensors uint32 [BM, BQ, 16]: byte j of every lane, of four inputs each."""
    # One load of all lines gives each thread of four warps 16 bytes of a tile 64 deep. Three lines are loaded as four, one of them masked.
    LINES: tl.constexpr = 2 if BITS == 2 else 4
    tiles = (tile + tl.arange(0, BM))[:, None, None]
    words = (first + tl.arange(0, BQ))[None, :, None]
    place = tl.arange(0, 16 * LINES)[None, None, :]
    inside = (tiles * 128 < N) & (words < WIDTH) & (place < 16 * BITS)
    loaded = tl.load(q + (tiles * WIDTH + words) * (16 * BITS) + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    if BITS == 2:
        w0, w1 = tl.split(tl.permute(tl.reshape(loaded, (BM, BQ, 2, 16)), (0, 1, 3, 2)))
        return w0, w1
    else:
        low, high = tl.split(tl.permute(tl.reshape(loaded, (BM, BQ, 2, 2, 16)), (0, 1, 3, 4, 2)))
        w0, w1 = tl.split(tl.permute(low, (0, 1, 3, 2)))
        w2, w3 = tl.split(tl.permute(high, (0, 1, 3, 2)))
        if BITS == 3:
            return w0, w1, w2
        else:
            return w0, w1, w2, w3


@triton.jit
def _lookup(indices, table, SCALED: tl.constexpr):
    """The levels of bytes 0, 1, 2 and 3 of `indices`, in the dtype of `table`, of 16 bits.

    Tables are aligned (`table_alignment`), so that an address is the table's with an index in its low bits.
    """
    address = table.to(tl.int64)
    low, high = address.to(tl.int32), (address >> 32).to(tl.int32)
    element = table.dtype.element_ty
    if SCALED == 2:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d;
            .reg .b64 p, q, r, s;
            prmt.b32 a, $4, $5, 0x7650;
            prmt.b32 b, $4, $5, 0x7651;
            prmt.b32 c, $4, $5, 0x7652;
            prmt.b32 d, $4, $5, 0x7653;
            mov.b64 p, {a, $6};
            mov.b64 q, {b, $6};
            mov.b64 r, {c, $6};
            mov.b64 s, {d, $6};
            ld.global.nc.b16 $0, [p];
            ld.global.nc.b16 $1, [q];
            ld.global.nc.b16 $2, [r];
            ld.global.nc.b16 $3, [s];
            }
            """,
            "=&h,=&h,=&h,=&h,r,r,r",
            [indices, low, high],
            dtype=(element, element, element, element),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d;
            .reg .b64 p, q, r, s;
            prmt.b32 a, $4, 0, 0x4440;
            prmt.b32 b, $4, 0, 0x4441;
            prmt.b32 c, $4, 0, 0x4442;
            prmt.b32 d, $4, 0, 0x4443;
            mad.lo.u32 a, a, 2, $5;
            mad.lo.u32 b, b, 2, $5;
            mad.lo.u32 c, c, 2, $5;
            mad.lo.u32 d, d, 2, $5;
            mov.b64 p, {a, $6};
            mov.b64 q, {b, $6};
            mov.b64 r, {c, $6};
            mov.b64 s, {d, $6};
            ld.global.nc.b16 $0, [p];
            ld.global.nc.b16 $1, [q];
            ld.global.nc.b16 $2, [r];
            ld.global.nc.b16 $3, [s];
            }
            """,
            "=&h,=&h,=&h,=&h,r,r,r",
            [indices, low, high],
            dtype=(element, element, element, element),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _indices(words, TURN: tl.constexpr, CODE: tl.constexpr):
    """uint32 of four bytes: the indices of the states of a turn times SCALED, for four inputs."""
    parts: tl.constexpr = CODE[2 + TURN]
    first = words[parts[0]] >> parts[1] if parts[1] > 0 else words[parts[0]] << -parts[1]
    indices = first & parts[2]
    for part in tl.static_range(3, len(parts), 3):
        shifted = words[parts[part]] >> parts[part + 1] if parts[part + 1] > 0 else words[parts[part]] << -parts[part + 1]
        indices ^= shifted & parts[part + 2]
    return indices
