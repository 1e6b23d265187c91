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

from .launch import launch

__all__ = ["code_constant", "level_table", "rotate_kernel", "rotated", "rotation_of", "trellis_code", "trellis_tile"]

_ROTATE_BLOCKS = 16  # Hadamard matrices of one program


def trellis_code(weight: Weight) -> TrellisCode | None:
    """The code of a weight in a trellis format, None for all others."""
    return None if isinstance(weight, torch.Tensor) else FORMATS[weight.format].trellis


def rotation_of(weight: Weight) -> int:
    """G, the inputs that are rotated together; 0 where the activations are taken as they are."""
    return 0 if isinstance(weight, torch.Tensor) or trellis_code(weight) is None else weight.group_size


@cache
def code_constant(code: TrellisCode) -> tuple[int | tuple[int, ...], ...]:
    """The compile-time constant CODE: k, then for each of the eight turns (word, shift to the right, mask) of the parts of its indices.

    Words are bytes of the lane's stream, the next lane's after its own. An index is the sum without carry of the shifted, masked words.
    """
    return code.bits, *(_parts_of_indices(code, turn) for turn in range(8))


def _parts_of_indices(code: TrellisCode, turn: int) -> tuple[int, ...]:
    parts: dict[tuple[int, int], int] = {}
    for bit, column in enumerate(code.columns()):  # a bit of the state, and the bits of the index that it changes
        word, place = divmod(code.bits * turn + bit, 8)
        for target in range(code.index_bits):
            if column >> target & 1:
                key = word, place - target
                parts[key] = parts.get(key, 0) | 1 << target
    return tuple(number for (word, right), mask in sorted(parts.items()) for number in (word, right, mask * 0x01010101))


@cache
def level_table(code: TrellisCode, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[2^i]: the levels in the dtype of the activations, which holds whole numbers up to 127 exactly."""
    return torch.tensor(code.levels, dtype=dtype, device=device)  # never freed: captured graphs hold its address


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
    return signs(K).to(device, torch.int8)  # never freed: captured graphs hold its address


@triton.jit
def rotate_kernel(
    x,  # [T, K]
    sign,  # int8 [K]
    y,  # [T, K]
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """y = the rotation of `formats/rotation.py` in float32; program (t, j) rotates BLOCKS blocks of token t."""
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
def trellis_tile(q, table, rows, k, N, K: tl.constexpr, BK: tl.constexpr, CODE: tl.constexpr):
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
    octets = (indices[:, :, None] >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :]) & 255
    return tl.load(table + tl.reshape(octets, (BN, BK)))


@triton.jit
def _words(q, tile, first, N, WIDTH: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, BITS: tl.constexpr):
    """BITS tensors uint32 [BM, BQ, 16]: byte j of every lane, of four inputs each."""
    tiles = (tile + tl.arange(0, BM))[:, None, None]
    words = (first + tl.arange(0, BQ))[None, :, None]
    address = q + (tiles * WIDTH + words) * (16 * BITS) + tl.arange(0, 16)[None, None, :]
    inside = (tiles * 128 < N) & (words < WIDTH)
    w0 = tl.load(address, mask=inside, other=0).to(tl.uint32, bitcast=True)
    w1 = tl.load(address + 16, mask=inside, other=0).to(tl.uint32, bitcast=True)
    if BITS == 2:
        return w0, w1
    w2 = tl.load(address + 32, mask=inside, other=0).to(tl.uint32, bitcast=True)
    if BITS == 3:
        return w0, w1, w2
    return w0, w1, w2, tl.load(address + 48, mask=inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _indices(words, TURN: tl.constexpr, CODE: tl.constexpr):
    """uint32 of four bytes: the indices of the states of a turn, for four inputs."""
    parts: tl.constexpr = CODE[1 + TURN]
    indices = (words[parts[0]] >> parts[1] if parts[1] > 0 else words[parts[0]] << -parts[1]) & parts[2]
    for part in tl.static_range(3, len(parts), 3):
        indices ^= (words[parts[part]] >> parts[part + 1] if parts[part + 1] > 0 else words[parts[part]] << -parts[part + 1]) & parts[
            part + 2
        ]
    return indices
