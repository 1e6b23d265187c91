"""`linear` on the CPU: the product with a quantized weight, in one of three regimes, which `choice.py` picks.

- MATVEC, for few tokens: dot products on the packed codes, at the speed of memory (`int4.py`, `int8.py`).
- AMX, for many tokens of bfloat16 on a chip with AMX: dequantization and multiplication in one kernel (`amx.py`).
- TILES, for many tokens on other chips, and for any number of tokens in a format without dot products: some rows of the weight at a time
  are dequantized into a small buffer that stays in cache, and multiplied by torch's matmul.

A quantized weight is never dequantized whole.

Dimension letters: `T` tokens, `P` pairs of a token and one of its experts, `E` experts, `A` active experts, `D` d_model, `F` ffn hidden,
`N` output features, `K` input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numba
import numpy as np
import torch

from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

from . import amx
from .activations import QuantizedActivations, quantize_activations
from .choice import BLOCK, CpuChoice, Regime, choose, padded
from .float32 import product
from .format_kernels import DOT_KERNELS, dequantize_rows
from .vector import has_bfloat16

__all__ = ["activation_group", "choice_for", "has_matrix_unit", "linear", "matvec", "quantized", "warm_up"]

# Waking a second thread takes 5 to 10 us, in which one core reads 100 KB. While other programs hold the cores it takes a time slice of the
# scheduler, so small models stay on one thread.
_THREAD_BYTES = 1 << 19


def linear(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """y [T, N] = x [T, K] @ weight [N, K].T; float32 by MATVEC, bfloat16 by AMX, in the dtype of the tile by TILES."""
    weight = weight.contiguous()
    choice = choice_for(x.shape[0], x, weight)
    if weight.format not in DOT_KERNELS:
        with _threads_of_torch(weight.shape.numel() * (1 + x.shape[0] // 16)):
            return _tiled(x.to(choice.tile_dtype), weight, choice)
    if choice.regime is Regime.TILES:
        return _tiled(_tile_order(x.to(choice.tile_dtype), weight), weight, choice)
    if choice.regime is Regime.AMX:
        _use_threads(weight.shape.numel())
        return amx.matmul(x, weight)
    return matvec(quantized(x, weight), weight, np.zeros(1, np.int64), np.array([0, x.shape[0]]))


def warm_up(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Compile, load from a cache or import the code for products with weights like `weight` [N, K], before the first token needs it."""
    few = weight.rows(0, 1)
    for tokens in (1, 64):
        linear(torch.zeros(tokens, weight.shape[-1], dtype=dtype), few)


def has_matrix_unit() -> bool:
    """Whether this chip multiplies matrices of bfloat16 in tiles."""
    return amx.available()


def choice_for(tokens: int, x: torch.Tensor, weight: QuantizedWeight) -> CpuChoice:
    """`choose` on this chip, for `tokens` rows like those of `x`."""
    kernels = DOT_KERNELS.get(weight.format)
    amx_serves = kernels is not None and kernels.amx and has_matrix_unit()
    return choose(tokens, weight.shape[-1], x.dtype, bfloat16_matmul=has_bfloat16(), amx=amx_serves, dots=kernels is not None)


def activation_group(weight: QuantizedWeight) -> int:
    """The group size of the sums of activations that dot products with `weight` need; 0 if they need none."""
    return weight.group_size if DOT_KERNELS[weight.format].zero_points else 0


def quantized(x: torch.Tensor, weight: QuantizedWeight) -> QuantizedActivations:
    """`x` [T, K], quantized for dot products with `weight`."""
    _use_threads(x.numel() * 4)
    return quantize_activations(x, sums_of=activation_group(weight))


def matvec(x: QuantizedActivations, weight: QuantizedWeight, experts: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
    """float32 [P, N]; rows offsets[i] to offsets[i+1] of `x` are multiplied by weight[experts[i]]; `weight` is [E, N, K] or [N, K]."""
    N, K = weight.shape[-2:]
    out = torch.empty(x.codes.shape[0], N)
    _use_threads(len(experts) * N * K)
    DOT_KERNELS[weight.format].matvec(x, weight.contiguous_matrices(), experts, offsets, out)
    return out


def _tiled(x: torch.Tensor, weight: QuantizedWeight, choice: CpuChoice) -> torch.Tensor:
    """[T, N] in the dtype of `x` [T, K], whose columns are in the order of the tile."""
    N, K = weight.shape
    T = len(x)
    x, by = padded(x, N)
    out = torch.empty(len(x), N, dtype=x.dtype)
    kernels = None if K % BLOCK else DOT_KERNELS.get(weight.format)
    buffer = torch.empty(0 if kernels is None else min(N, choice.tile_rows), K, dtype=choice.tile_dtype)
    for first in range(0, N, choice.tile_rows):
        rows = weight.rows(first, min(first + choice.tile_rows, N))
        if kernels is None:
            tile = dequantize_rows(rows, choice.tile_dtype)
        else:
            tile = buffer[: rows.shape[0]]
            _use_threads(tile.numel())
            kernels.dequantize_rows(rows, tile)
        out[:, first : first + len(tile)] = product(x, tile, by)
    return out[:T]


def _tile_order(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """`x` [T, K] with its columns in the order in which rows of the weight are dequantized."""
    if DOT_KERNELS[weight.format].interleaved and x.shape[-1] % BLOCK == 0:
        return x.unflatten(-1, (-1, 16, 8)).transpose(-1, -2).reshape(x.shape)
    return x


@cache
def _most_threads() -> int:
    """The number of threads that numba has. Its first start also sets torch's number, since the two share threads; that is restored."""
    threads = torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(threads)
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined] # numba sets it when it is imported


@contextmanager
def _threads_of_torch(nbytes: int) -> Iterator[None]:
    """Limit the threads of torch, and of bitsandbytes, which shares them, to as many as pay off for `nbytes`; see `_THREAD_BYTES`."""
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
    """Set numba to one thread for each `_THREAD_BYTES` of the bytes to be read, and to at most torch.get_num_threads()."""
    most = _most_threads()
    numba.set_num_threads(min(1 + nbytes // _THREAD_BYTES, torch.get_num_threads(), most))
