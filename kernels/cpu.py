"""The `cpu` backend: which of three regimes serves an op, and how.

Few tokens: dot products straight on the packed codes, at the speed of memory (`_cpu_int4.py`, `_cpu_int8.py`). Many tokens of bfloat16
on a chip with AMX: decoding and multiplication in one kernel (`_cpu_amx.py`). Many tokens elsewhere, and any number with NF4, which
bitsandbytes decodes: tiles of the weight are decoded into a small buffer that stays in cache and go through torch's matmul. A packed
weight is never decoded whole.

Dimension letters: `T` tokens, `P` pairs of a token and one of its experts, `E` experts, `A` active experts, `D` d_model, `F` ffn hidden,
`N` output features, `K` input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cache

import numba
import numpy as np
import torch

from . import _cpu_amx, _cpu_int4, _cpu_int8
from ._cpu_activations import Activations, quantize_activations
from ._cpu_vector import has_bfloat16
from .int4 import Int4Weight
from .int8 import Int8Weight
from .linear import PackedFormat, dequantize
from .nf4 import Nf4Weight, dequantize_on_cpu

__all__ = ["CpuChoice", "Dotted", "Regime", "choice_for", "choose", "has_matrix_unit", "linear", "matvec", "quantized", "warm_up"]

Dotted = Int4Weight | Int8Weight
"""The formats that dot products on codes serve."""

_BLOCK = 128  # the compiled kernels want a multiple of it along the reduction axis


class Regime(Enum):
    """How a product with a packed weight is computed."""

    MATVEC = "matvec"
    """dot products on packed codes"""
    AMX = "amx"
    """decoded and multiplied tile by tile, in one kernel"""
    TILES = "tiles"
    """some rows decoded at a time, for torch's matmul"""


@dataclass(frozen=True)
class CpuChoice:
    """How an op runs. tile_rows and tile_dtype: rows that TILES decodes at a time, and to what."""

    regime: Regime
    tile_rows: int
    tile_dtype: torch.dtype


def choose(tokens: int, K: int, dtype: torch.dtype, *, bfloat16_matmul: bool, amx: bool, nf4: bool = False) -> CpuChoice:
    """The regime for `tokens` rows of `K` activations in `dtype`, on a chip with or without bfloat16 matrix instructions and AMX tiles.

    nf4: whether the weight is NF4, for which there are neither dot products nor AMX code.
    """
    tile_dtype = torch.bfloat16 if dtype == torch.bfloat16 and bfloat16_matmul else torch.float32
    if nf4 or K % _BLOCK:
        return CpuChoice(Regime.TILES, _TILE_ROWS, tile_dtype)
    if amx and dtype == torch.bfloat16:
        limit, many = _MATVEC_TOKENS_AMX, Regime.AMX
    else:
        limit, many = _MATVEC_TOKENS_FLOAT32 if tile_dtype == torch.float32 else _MATVEC_TOKENS_BFLOAT16, Regime.TILES
    return CpuChoice(Regime.MATVEC if tokens <= limit else many, _TILE_ROWS, tile_dtype)


# Waking a second thread costs 5 to 10 us in which one core reads 100 KB; where other programs hold the cores it costs a scheduler's
# time slice, so small models stay on one.
_THREAD_BYTES = 1 << 19
# Tokens at which dot products lose, ms for int4 [10752, 6144] on a 2-core Xeon (Sapphire Rapids): 5: 8.2 against 8.3, 6: 9.9 against 8.4.
_MATVEC_TOKENS_AMX = 5
# 12: 18.3 against 22.3, 14: 23.0 against 22.7 with bfloat16 tiles.
_MATVEC_TOKENS_BFLOAT16 = 12
# 20: 29.7 against 50.5, 32: 59.1 against 59.3 with float32 tiles.
_MATVEC_TOKENS_FLOAT32 = 24
# 256, 512, 1024, 2048 rows: 55.6, 51.7, 47.9, 51.3 ms for 128 tokens in bfloat16 and 131, 133, 138, 158 in float32; 59, 94, 68, 97 for 32.
_TILE_ROWS = 1024


def linear(x: torch.Tensor, weight: PackedFormat) -> torch.Tensor:
    """y [T, N] = x [T, K] @ weight [N, K].T; float32 from MATVEC, bfloat16 from AMX, the tile's dtype from TILES."""
    weight = weight.contiguous()
    choice = choice_for(x.shape[0], x, weight)
    if isinstance(weight, Nf4Weight):
        with _threads_of_torch(weight.shape.numel() * (1 + x.shape[0] // 16)):
            return _tiled(x.to(choice.tile_dtype), weight, choice)
    if choice.regime is Regime.TILES:
        return _tiled(_tile_order(x.to(choice.tile_dtype), weight), weight, choice)
    if choice.regime is Regime.AMX:
        _use_threads(weight.shape.numel())
        return _cpu_amx.matmul(x, weight)
    return matvec(quantized(x, weight), weight, np.zeros(1, np.int64), np.array([0, x.shape[0]]))


def warm_up(weight: PackedFormat, dtype: torch.dtype) -> None:
    """Compile or load from a cache or import what products with weights like this [N, K] need: the first token should not wait for it."""
    few = weight.rows(0, 1)
    for tokens in (1, 64):
        linear(torch.zeros(tokens, weight.shape[-1], dtype=dtype), few)


def has_matrix_unit() -> bool:
    """Whether this chip multiplies matrices of bfloat16 in tiles."""
    return _cpu_amx.available()


def choice_for(tokens: int, x: torch.Tensor, weight: PackedFormat) -> CpuChoice:
    """`choose` on this chip, for `tokens` rows like those of `x`."""
    chip = {"bfloat16_matmul": has_bfloat16(), "amx": has_matrix_unit()}
    return choose(tokens, weight.shape[-1], x.dtype, **chip, nf4=isinstance(weight, Nf4Weight))


def quantized(x: torch.Tensor, weight: Dotted) -> Activations:
    """`x` [T, K] as dot products with `weight` take it."""
    _use_threads(x.numel() * 4)
    return quantize_activations(x, sums_of=weight.group_size if isinstance(weight, Int4Weight) else 0)


def matvec(x: Activations, weight: Dotted, experts: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
    """float32 [P, N]; rows offsets[i] to offsets[i+1] of `x` go through weight[experts[i]]; `weight` is [E, N, K] or [N, K]."""
    N, groups = weight.shape[-2], weight.scales.shape[-1]
    out = torch.empty(x.codes.shape[0], N)
    _use_threads(len(experts) * N * groups * weight.group_size)
    weight = weight.contiguous()
    tensors = [weight.qweight, weight.scales]
    if isinstance(weight, Int4Weight):
        tensors.append(weight.zeros)
        addresses = [t.data_ptr() for t in (*tensors, x.codes, x.scales, x.sums)]
        w, s, z, codes, scales, sums = addresses
        _cpu_int4.matvec(w, s, z, experts, offsets, codes, scales, sums, N, groups, x.sums.shape[1], out.data_ptr(), weight.group_size)
    else:
        w, s, codes, scales = (t.data_ptr() for t in (*tensors, x.codes, x.scales))
        _cpu_int8.matvec(w, s, experts, offsets, codes, scales, N, groups, out.data_ptr(), weight.group_size)
    return out


def _tiled(x: torch.Tensor, weight: PackedFormat, choice: CpuChoice) -> torch.Tensor:
    """[T, N] in the dtype of `x` [T, K], which is in the tile's order."""
    N, K = weight.shape
    out = torch.empty(x.shape[0], N, dtype=x.dtype)
    buffer = torch.empty(0 if isinstance(weight, Nf4Weight) else min(N, choice.tile_rows), K, dtype=choice.tile_dtype)
    for first in range(0, N, choice.tile_rows):
        some = weight.rows(first, min(first + choice.tile_rows, N))
        if isinstance(some, Nf4Weight):
            tile = dequantize_on_cpu(some, choice.tile_dtype)
        else:
            tile = buffer[: some.shape[0]]
            _decode(some, tile)
        out[:, first : first + len(tile)] = x @ tile.T
    return out


def _tile_order(x: torch.Tensor, weight: PackedFormat) -> torch.Tensor:
    """`x` [T, K] with its columns in the order in which `_decode` writes them."""
    if isinstance(weight, Int4Weight) and x.shape[-1] % _BLOCK == 0:
        return x.unflatten(-1, (-1, 16, 8)).transpose(-1, -2).reshape(x.shape)
    return x


def _decode(some: Dotted, tile: torch.Tensor) -> None:
    """Decode into `tile` [rows, K], bfloat16 or float32."""
    rows, K = tile.shape
    if K % _BLOCK:
        tile.copy_(dequantize(some))
        return
    _use_threads(rows * K)
    w, s, to = (t.data_ptr() for t in (some.qweight, some.scales, tile))
    shape = rows, some.scales.shape[-1], to, some.group_size, int(tile.dtype == torch.bfloat16)
    if isinstance(some, Int4Weight):
        _cpu_int4.decode_rows(w, s, some.zeros.data_ptr(), *shape)
    else:
        _cpu_int8.decode_rows(w, s, *shape)


@cache
def _most_threads() -> int:
    """How many threads numba has; torch's stay as many as they were, though numba's first start sets those that the two share."""
    threads = torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(threads)
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined] # numba sets it when it is imported


@contextmanager
def _threads_of_torch(nbytes: int) -> Iterator[None]:
    """Within it torch, and bitsandbytes, which shares its threads, take no more of them than pay; see `_THREAD_BYTES`."""
    threads = torch.get_num_threads()
    few = min(threads, 1 + nbytes // _THREAD_BYTES)
    if few == threads:
        yield
        return
    torch.set_num_threads(few)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _use_threads(nbytes: int) -> None:
    """One thread for each share of the bytes to be read that pays for waking it, at most torch.get_num_threads()."""
    most = _most_threads()
    numba.set_num_threads(min(1 + nbytes // _THREAD_BYTES, torch.get_num_threads(), most))
