"""The `cpu` backend: products in one of three regimes (`cpu_choice.py`).

Few tokens: dot products straight on the packed codes, at the speed of memory (`int4.py`, `int8.py`). Many tokens of bfloat16
on a chip with AMX: decoding and multiplication in one kernel (`amx.py`). Many tokens elsewhere, and any number with NF4, which
bitsandbytes decodes: tiles of the weight are decoded into a small buffer that stays in cache and go through torch's matmul. A packed
weight is never decoded whole.

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

from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.kernels.formats.int8 import Int8Weight
from dbrx_q.kernels.formats.nf4 import Nf4Weight, dequantize_on_cpu
from dbrx_q.kernels.formats.weights import PackedFormat, dequantize

from . import amx
from . import int4 as _cpu_int4
from . import int8 as _cpu_int8
from .activations import QuantizedActivations, quantize_activations
from .choice import BLOCK, CpuChoice, Regime, choose, padded
from .vector import has_bfloat16

__all__ = ["Dotted", "choice_for", "has_matrix_unit", "linear", "matvec", "quantized", "warm_up"]

Dotted = Int4Weight | Int8Weight
"""The formats that dot products on codes serve."""

# Waking a second thread costs 5 to 10 us in which one core reads 100 KB; where other programs hold the cores it costs a scheduler's
# time slice, so small models stay on one.
_THREAD_BYTES = 1 << 19


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
        return amx.matmul(x, weight)
    return matvec(quantized(x, weight), weight, np.zeros(1, np.int64), np.array([0, x.shape[0]]))


def warm_up(weight: PackedFormat, dtype: torch.dtype) -> None:
    """Compile or load from a cache or import what products with weights like this [N, K] need: the first token should not wait for it."""
    few = weight.rows(0, 1)
    for tokens in (1, 64):
        linear(torch.zeros(tokens, weight.shape[-1], dtype=dtype), few)


def has_matrix_unit() -> bool:
    """Whether this chip multiplies matrices of bfloat16 in tiles."""
    return amx.available()


def choice_for(tokens: int, x: torch.Tensor, weight: PackedFormat) -> CpuChoice:
    """`choose` on this chip, for `tokens` rows like those of `x`."""
    chip = {"bfloat16_matmul": has_bfloat16(), "amx": has_matrix_unit()}
    return choose(tokens, weight.shape[-1], x.dtype, **chip, nf4=isinstance(weight, Nf4Weight))


def quantized(x: torch.Tensor, weight: Dotted) -> QuantizedActivations:
    """`x` [T, K] as dot products with `weight` take it."""
    _use_threads(x.numel() * 4)
    return quantize_activations(x, sums_of=weight.group_size if isinstance(weight, Int4Weight) else 0)


def matvec(x: QuantizedActivations, weight: Dotted, experts: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
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
    T, x = len(x), padded(x)
    out = torch.empty(len(x), N, dtype=x.dtype)
    buffer = torch.empty(0 if isinstance(weight, Nf4Weight) else min(N, choice.tile_rows), K, dtype=choice.tile_dtype)
    for first in range(0, N, choice.tile_rows):
        some = weight.rows(first, min(first + choice.tile_rows, N))
        if isinstance(some, Nf4Weight):
            tile = dequantize_on_cpu(some, choice.tile_dtype)
        else:
            tile = buffer[: some.shape[0]]
            _decode(some, tile)
        out[:, first : first + len(tile)] = x @ tile.T
    return out[:T]


def _tile_order(x: torch.Tensor, weight: PackedFormat) -> torch.Tensor:
    """`x` [T, K] with its columns in the order in which `_decode` writes them."""
    if isinstance(weight, Int4Weight) and x.shape[-1] % BLOCK == 0:
        return x.unflatten(-1, (-1, 16, 8)).transpose(-1, -2).reshape(x.shape)
    return x


def _decode(some: Dotted, tile: torch.Tensor) -> None:
    """Decode into `tile` [rows, K], bfloat16 or float32."""
    rows, K = tile.shape
    if K % BLOCK:
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
