"""`linear` on the CPU: the product with a quantized weight, in one of three regimes, which `choice.py` picks.

- INTEGER, for few tokens on every chip and for more on those that multiply bytes: exact integer products (`integer.py`).
- AMX, for many tokens of bfloat16 on a chip with AMX: dequantization and multiplication in one kernel (`amx.py`).
- TILES, for many tokens otherwise, and for any number of tokens in a format without integer products: some rows of the weight at a time
  are dequantized into a small buffer that stays in cache, and multiplied by torch's matmul.

A quantized weight is never dequantized whole.

Dimension letters: `T` tokens, `N` output features, `K` input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numba
import numpy as np
import torch

from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import Weight

from . import amx, choice, trellis
from .activations import QuantizedActivations, quantize_activations, quantize_gated
from .choice import BLOCK, CpuChoice, Product, Regime, activation_bytes, activation_unit, choose, padded
from .float32 import product
from .format_kernels import TILE_KERNELS, dequantize_rows
from .integer import Job, multiply
from .rotation import quantize_rotated, rotate
from .row_codes import FORMATS
from .trellis_decode import warn_of_slow_decoding
from .vector import chip_features, has_bfloat16, has_byte_products

__all__ = [
    "arithmetic",
    "choice_for",
    "has_matrix_unit",
    "independent_rows",
    "linear",
    "quantized",
    "quantized_gated",
    "use_threads",
    "warm_up",
]

# Waking a second thread takes 5 to 10 us, in which one core reads 100 KB. While other programs hold the cores it takes a time slice of the
# scheduler, so small models stay on one thread.
_THREAD_BYTES = 1 << 19
_SUMS = 1 << 22  # float32 sums of integer products that are in memory at a time ...
_LEAST_TOKENS = 32  # ... unless they would be of fewer tokens: the weight is decoded once for each part


def linear(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """y [T, N] = x [T, K] @ weight [N, K].T, in the dtype of the tile by TILES, otherwise in the dtype of `x`."""
    weight = weight.contiguous()
    chosen = choice_for(x.shape[0], x, weight)
    if chosen.regime is Regime.INTEGER:
        return _integer(x, weight, activation_bytes(Product.OTHER, chosen))
    if weight.format not in TILE_KERNELS:
        with _threads_of_torch(weight.shape.numel() * (1 + x.shape[0] // 16)):
            return _tiled(x.to(chosen.tile_dtype), weight, chosen)
    if chosen.regime is Regime.TILES:
        return _tiled(_tile_order(x.to(chosen.tile_dtype), weight), weight, chosen)
    use_threads(weight.shape.numel())
    return amx.matmul(x, weight)


def warm_up(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Compile, load from a cache or import the code for products with weights like `weight` [N, K], before the first token needs it."""
    if weight.format in trellis.KINDS:
        warn_of_slow_decoding()
    few = weight.rows(0, 1)
    for tokens in (1, 64):
        x = torch.zeros(tokens, weight.shape[-1], dtype=dtype)
        linear(x, few)
        chosen = choice_for(tokens, x, few)
        if chosen.regime is Regime.INTEGER:
            for product_kind in Product:
                _integer_product(x, few, product_kind, activation_bytes(product_kind, chosen))


def has_matrix_unit() -> bool:
    """Whether this chip multiplies matrices of bfloat16 in tiles."""
    return amx.available()


def choice_for(tokens: int, x: torch.Tensor, weight: QuantizedWeight) -> CpuChoice:
    """`choose` on this chip, for `tokens` rows like those of `x`."""
    kernels = TILE_KERNELS.get(weight.format)
    return choose(
        tokens,
        weight.shape[-1],
        x.dtype,
        bfloat16_matmul=has_bfloat16(),
        amx=kernels is not None and kernels.amx and has_matrix_unit(),
        byte_products=has_byte_products(),
        wide_byte_products="avx512vnni" in chip_features(),
        packed=_has_integer_products(weight),
        block=_block(weight),
    )


def independent_rows(weight: Weight, dtype: torch.dtype) -> int:
    """Most rows of activations in `dtype` whose products with `weight` [..., N, K] have the bits that each row gets alone."""
    if isinstance(weight, torch.Tensor):
        return 1
    kernels = TILE_KERNELS.get(weight.format)
    amx_serves = kernels is not None and kernels.amx and has_matrix_unit()
    packed = _has_integer_products(weight)
    return choice.independent_rows(weight.shape[-1], dtype, amx=amx_serves, packed=packed, block=_block(weight))


def _has_integer_products(weight: QuantizedWeight) -> bool:
    return weight.format in FORMATS or (weight.format in trellis.KINDS and weight.shape[-1] <= trellis.LARGEST_K)


def _block(weight: QuantizedWeight) -> int:
    """What the compiled code for the weight's format needs K to be a multiple of."""
    return weight.group_size if weight.format in trellis.KINDS else BLOCK


def quantized(x: torch.Tensor, weight: QuantizedWeight, product: Product, code_bytes: int) -> QuantizedActivations:
    """`x` [T, K], quantized for integer products with `weight`; `code_bytes`: bytes of an integer."""
    use_threads(x.numel() * 4)
    if weight.format in trellis.KINDS:
        return quantize_rotated(x, group_size=weight.group_size, code_bytes=code_bytes)
    unit = activation_unit(product, code_bytes, weight.group_size)
    return quantize_activations(x, unit=unit, code_bytes=code_bytes, interleaved=FORMATS[weight.format].nibbles)


def quantized_gated(gate: torch.Tensor, up: torch.Tensor, weight: QuantizedWeight, code_bytes: int) -> QuantizedActivations:
    """silu(gate) * up, both float32 [T, K] and contiguous, quantized for integer products with an expert's w2."""
    use_threads(gate.numel() * 4)
    if weight.format in trellis.KINDS:
        return quantize_rotated(gate, up, group_size=weight.group_size, code_bytes=code_bytes)
    unit = activation_unit(Product.DOWN, code_bytes, weight.group_size)
    return quantize_gated(gate, up, unit=unit, code_bytes=code_bytes, interleaved=FORMATS[weight.format].nibbles)


def arithmetic() -> str:
    """What decides the bits of products on this chip beside the weights and the numbers of tokens."""
    return choice.arithmetic(byte_products=has_byte_products(), amx=has_matrix_unit())


def _integer_product(x: torch.Tensor, weight: QuantizedWeight, product: Product, code_bytes: int) -> torch.Tensor:
    """float32 [T, N] for `x` [T, K]."""
    rows, sums = np.arange(len(x)), torch.empty(len(x), weight.shape[0])
    if len(x):
        activations = quantized(x, weight, product, code_bytes)
        use_threads(weight.shape.numel())
        multiply(activations, [Job(weight, (0,), sums)], (0, len(x)), rows, rows)
    return sums


def _integer(x: torch.Tensor, weight: QuantizedWeight, code_bytes: int) -> torch.Tensor:
    """[T, N] in the dtype of `x` [T, K], some tokens at a time: the float32 sums of all could be as large as the logits of a prompt."""
    T, N = len(x), weight.shape[0]
    step = max(_LEAST_TOKENS, _SUMS // N)
    out = torch.empty(T, N, dtype=x.dtype) if step < T else None
    for first in range(0, max(T, 1), step):
        sums = _integer_product(x[first : first + step], weight, Product.OTHER, code_bytes)
        if out is None:
            return sums.to(x.dtype)
        out[first : first + step] = sums
    assert out is not None
    return out


def _tiled(x: torch.Tensor, weight: QuantizedWeight, chosen: CpuChoice) -> torch.Tensor:
    """[T, N] in the dtype of `x` [T, K], whose columns are in the order of the tile."""
    N, K = weight.shape
    T = len(x)
    x, by = padded(x, N)
    out = torch.empty(len(x), N, dtype=x.dtype)
    kernels = None if K % _block(weight) else TILE_KERNELS.get(weight.format)
    buffer = torch.empty(0 if kernels is None else min(N, chosen.tile_rows), K, dtype=chosen.tile_dtype)
    for first in range(0, N, chosen.tile_rows):
        rows = weight.rows(first, min(first + chosen.tile_rows, N))
        if kernels is None:
            tile = dequantize_rows(rows, chosen.tile_dtype)
        else:
            tile = buffer[: rows.shape[0]]
            use_threads(tile.numel())
            kernels.dequantize_rows(rows, tile)
        out[:, first : first + len(tile)] = product(x, tile, by)
    return out[:T]


def _tile_order(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """`x` [T, K] with its columns in the order, or in the basis, in which rows of the weight are dequantized."""
    if TILE_KERNELS[weight.format].rotated:
        return rotate(x, weight.group_size).to(x.dtype)
    if TILE_KERNELS[weight.format].interleaved and x.shape[-1] % BLOCK == 0:
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


def use_threads(nbytes: int) -> None:
    """Set numba to one thread for each `_THREAD_BYTES` of the bytes to be read, and to at most torch.get_num_threads()."""
    most = _most_threads()
    numba.set_num_threads(min(1 + nbytes // _THREAD_BYTES, torch.get_num_threads(), most))
