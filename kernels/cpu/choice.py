"""The choice of the regime of a product on the CPU, and of its tile rows: pure functions of shapes, dtypes and the chip.

Dimension letters: `T` tokens, `N` output features, `K` input features.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F

from dbrx_q.kernels.formats.errors import DbrxError

from .float32 import Library, library_for, product

__all__ = [
    "BLOCK",
    "CpuChoice",
    "Product",
    "Regime",
    "activation_bytes",
    "activation_unit",
    "choose",
    "matmul",
    "padded",
    "padded_rows",
    "tile_bytes",
]

BLOCK = 128
"""The compiled kernels need a multiple of it along the reduction axis."""


class Regime(Enum):
    """How a product with a packed weight is computed."""

    INTEGER = "integer"
    """Exact integer products of packed codes and quantized activations."""
    AMX = "amx"
    """Dequantized and multiplied tile by tile, in one kernel."""
    TILES = "tiles"
    """Some rows at a time dequantized, then multiplied by torch's matmul."""


@dataclass(frozen=True)
class CpuChoice:
    """How a product runs."""

    regime: Regime
    """The way to compute it."""
    tile_rows: int
    """Rows of the weight that TILES dequantizes at a time."""
    tile_dtype: torch.dtype
    """The dtype that TILES dequantizes them to."""
    may_narrow: bool = False
    """Whether INTEGER may make 8-bit integers of activations; see `activation_bytes`."""
    wide: bool = False
    """Whether INTEGER makes 24-bit integers of activations, whose products err as those of float32 do."""


def choose(
    tokens: int,
    K: int,
    dtype: torch.dtype,
    *,
    bfloat16_matmul: bool,
    amx: bool,
    byte_products: bool = False,
    wide_byte_products: bool = False,
    packed: bool = True,
    block: int = BLOCK,
) -> CpuChoice:
    """The regime for `tokens` rows of `K` activations in `dtype`.

    Args:
        bfloat16_matmul: whether the chip has bfloat16 matrix instructions.
        amx: whether it has AMX tiles, and the weight's format has code for them.
        byte_products: whether it has instructions that multiply and add bytes (`vector.has_byte_products`).
        wide_byte_products: whether these have 512 bits, so that three of them take less time than a float32 product.
        packed: whether the weight's format has integer products (`row_codes.FORMATS`, `trellis.KINDS`).
        block: what they need `K` to be a multiple of.
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    tile_dtype = torch.bfloat16 if dtype == torch.bfloat16 and bfloat16_matmul else torch.float32
    if not packed or K % block:
        return CpuChoice(Regime.TILES, _TILE_ROWS, tile_dtype)
    if amx and dtype == torch.bfloat16:
        return CpuChoice(Regime.INTEGER if tokens <= _TOKENS_AMX else Regime.AMX, _TILE_ROWS, tile_dtype)
    if tokens <= FEW_TOKENS:
        return CpuChoice(Regime.INTEGER, _TILE_ROWS, tile_dtype)
    if narrow and byte_products:
        return CpuChoice(Regime.INTEGER, _TILE_ROWS, tile_dtype, may_narrow=True)
    if dtype == torch.float32 and wide_byte_products:
        return CpuChoice(Regime.INTEGER, _TILE_ROWS, tile_dtype, wide=True)
    return CpuChoice(Regime.TILES, _TILE_ROWS, tile_dtype)


def independent_rows(K: int, dtype: torch.dtype, *, amx: bool, packed: bool, block: int = BLOCK) -> int:
    """Most rows of `K` activations in `dtype` of which each gets the bits that it gets alone; arguments as for `choose`."""
    if not packed or K % block:
        return 1
    return _TOKENS_AMX if amx and dtype == torch.bfloat16 else FEW_TOKENS


class Product(Enum):
    """What a product is for."""

    GATE_AND_UP = "gate and up"
    """The experts' w1 and v1."""
    DOWN = "down"
    """The experts' w2."""
    OTHER = "other"
    """Attention and the head."""


def activation_bytes(product: Product, choice: CpuChoice) -> int:
    """Bytes, 1 to 3, of the integers that INTEGER makes of activations.

    Three for many tokens of float32. For many tokens of 16-bit types by default one in `GATE_AND_UP`, whose error is small beside that of
    4-bit weights (docs/cpu.md has the divergences); DBRX_Q_ACTIVATION_BITS in the environment sets 8 or 16 for all products.

    Raises:
        DbrxError: another value of DBRX_Q_ACTIVATION_BITS.
    """
    bits = os.environ.get("DBRX_Q_ACTIVATION_BITS", "auto")
    if bits not in ("auto", "8", "16"):
        raise DbrxError(f"DBRX_Q_ACTIVATION_BITS must be 8, 16 or auto; found {bits!r}. Set one of them, or unset it")
    if choice.wide:
        return 3
    return 1 if choice.may_narrow and (bits == "8" or (bits == "auto" and product is Product.GATE_AND_UP)) else 2


def arithmetic(*, byte_products: bool, amx: bool) -> str:
    """What decides the bits of products on this chip beside the weights and the numbers of tokens."""
    bits = os.environ.get("DBRX_Q_ACTIVATION_BITS", "auto")
    return f"integers of {bits} bits, {'byte' if byte_products else 'no byte'} products, {'AMX' if amx else 'no AMX'}"


def activation_unit(product: Product, code_bytes: int, group_size: int) -> int:
    """Activations that share a scale: those of a group; with 8 bits at most 64, or 32 where magnitudes differ more."""
    return group_size if code_bytes > 1 else min(group_size, 64 if product is Product.GATE_AND_UP else 32)


# Most tokens for which integer products win over AMX. ms for int4 [10752, 6144] on a 2-core Xeon (Sapphire Rapids), with the loop before
# `integer.py`: 5 tokens 8.2 against 8.3, 6 tokens 9.9 against 8.4.
_TOKENS_AMX = 5
FEW_TOKENS = 16
"""Most tokens on a chip without products of bytes, and most whose integers always have 16 bits: so many sequences decode together with the
bits that each gets alone."""
# 256, 512, 1024, 2048 rows: 55.6, 51.7, 47.9, 51.3 ms for 128 tokens in bfloat16 and 131, 133, 138, 158 in float32; 59, 94, 68, 97 for 32.
_TILE_ROWS = 1024


def tile_bytes(N: int, K: int) -> int:
    """The most bytes that a product with a packed weight [N, K] takes for dequantized rows."""
    return min(N, _TILE_ROWS) * K * torch.float32.itemsize


def padded_rows(T: int) -> int:
    """T rounded up to one of a few numbers of rows: by less than 16 rows, or by less than an eighth."""
    if T <= 1:
        return T
    power = 1 << (T - 1).bit_length()  # the next power of two
    step = max(16, power // 16)
    return power if T <= 16 else -(-T // step) * step


def padded(x: torch.Tensor, N: int) -> tuple[torch.Tensor, Library]:
    """(`x` [T, K] with rows of zeros appended where oneDNN multiplies it by a weight [N, K], what multiplies it if it is float32).

    oneDNN compiles code for every number of rows and keeps the last 1,024 of them, 0.1 MB each. Padding to a few numbers of rows keeps
    memory from growing with the prompts. For 16-bit types torch calls oneDNN, for float32 `float32.py` chooses.
    """
    T, K = x.shape
    by = library_for(T, N, K) if x.dtype == torch.float32 else Library.TORCH
    if x.dtype == torch.float32 and by is Library.TORCH:
        return x, by
    missing = padded_rows(T) - T
    return F.pad(x, (0, 0, 0, missing)) if missing else x, by


def matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, N] = x [T, K] @ weight [N, K].T, both plain and of one dtype."""
    with_zeros, by = padded(x, len(weight))
    y = product(with_zeros, weight, by)
    return y if with_zeros is x else y[: len(x)]
