"""Blocks of GGUF's quantized types as weights of our formats: the same codes in another order, nothing rounded.

| type | block of 32 elements | value | format |
|---|---|---|---|
| Q4_0 | float16 d, nibbles | d * (q - 8) | q4_0:32, which is int4 with zero-points 8 |
| Q4_1 | float16 d, float16 m, nibbles | d * q + m | affine4:32 |
| Q5_0 | float16 d, high bits, nibbles | d * (q - 16) | int8:32 |
| Q5_1 | float16 d, float16 m, high bits, nibbles | d * q + m | affine8:32 |
| Q8_0 | float16 d, 32 int8 | d * q | int8:32 |
| IQ4_NL | float16 d, nibbles | d * table[q] | int8:32 |
| MXFP4 | exponent e in a byte, nibbles | 2^(e - 128) * table[q] | affine8-bf16:32 |

Byte i of the 16 bytes of nibbles holds element i in its low half and element i + 16 in its high half; high bit i of 32 belongs to element
i, least significant bit first. d may be negative. Source: ggml-common.h and ggml-quants.c of llama.cpp.

MXFP4's scales reach beyond float16 at both ends, so that only bfloat16 holds all of them. The codes are the table's entries plus 12, the
offset is -12 scales: every product and sum is exact.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dbrx_q.kernels.formats.affine import Affine4Weight, Affine8Bf16Weight, Affine8Weight
from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.kernels.formats.int8 import Int8Weight
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import TensorFormat

from .addresses import integer, store_integer
from .compiled import compiled

__all__ = ["REPACKED", "repack"]

_BLOCK = 32  # elements of a block
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of e2m1
# A byte of every lane of eight; pairs of nibbles; bytes, pairs of bytes and fours of bytes to keep.
_LOW, _EVEN_1, _EVEN_2, _EVEN_4 = 0x0F0F0F0F0F0F0F0F, 0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF


@dataclass(frozen=True)
class _Blocks:
    """The blocks of a matrix [N, K]."""

    data: torch.Tensor
    """uint8, contiguous, one row of blocks for each row of the matrix."""
    nbytes: int
    """Bytes of a block."""
    N: int
    """Rows of the matrix."""
    K: int
    """Elements of a row."""

    @property
    def count(self) -> int:
        """All blocks."""
        return self.N * self.K // _BLOCK

    def halves(self, first: int) -> torch.Tensor:
        """The float16 [N, K/32] at byte `first` of each block."""
        out = torch.empty(self.N, self.K // _BLOCK, dtype=torch.float16)
        _copy_halves(self.data.view(-1).numpy(), self.nbytes, first, out.view(-1).view(torch.int16).numpy())
        return out

    def nibbles(self, first: int) -> torch.Tensor:
        """uint8 [N, K/2]: the nibbles at byte `first` of each block, packed as `int4.pack` packs them."""
        out = torch.empty(self.N, self.K // 2, dtype=torch.uint8)
        _pack_nibbles(self.data.data_ptr() + first, self.nbytes, self.count, out.data_ptr())
        return out

    def looked_up(self, first: int, table: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """int8 or uint8 [N, K]: the entries of a table of 16 for the nibbles at byte `first` of each block."""
        out = torch.empty(self.N, self.K, dtype=dtype)
        entries = np.array(table) & 255
        pairs = (entries[None, :] | entries[:, None] << 8).reshape(-1)  # [256], by two nibbles, the first in the low half
        _look_up(self.data.data_ptr() + first, self.nbytes, self.count, pairs, out.data_ptr())
        return out

    def five_bits(self, first: int, zero: int, dtype: torch.dtype) -> torch.Tensor:
        """int8 or uint8 [N, K]: codes of 5 bits minus `zero`, which is 0 or 16.

        From byte `first` on, each block has 4 bytes of high bits, then the nibbles.
        """
        out = torch.empty(self.N, self.K, dtype=dtype)
        bits = np.arange(256)[:, None] >> np.arange(8) & 1  # [256, 8], least significant first
        # The bytes of 0, 16 and -16 have no bit in the low half, so that adding a nibble is an or.
        spread = (bits * 16 - zero).astype(np.uint8).view(np.int64)[:, 0]
        _join_bits(self.data.data_ptr() + first, self.nbytes, self.count, spread, out.data_ptr())
        return out

    def int8(self, first: int) -> torch.Tensor:
        """int8 [N, K]: the 32 bytes at byte `first` of each block."""
        out = torch.empty(self.N, self.K, dtype=torch.int8)
        _copy_codes(self.data.data_ptr() + first, self.nbytes, self.count, out.data_ptr())
        return out


def _q4_0(blocks: _Blocks) -> QuantizedWeight:
    groups = blocks.K // _BLOCK
    zeros = torch.full((blocks.N, (groups + 1) // 2), 0x88, dtype=torch.uint8)
    if groups % 2:
        zeros[:, -1] = 8  # the odd last nibble is 0
    return Int4Weight(blocks.nibbles(2), blocks.halves(0), zeros, _BLOCK)


def _q4_1(blocks: _Blocks) -> QuantizedWeight:
    return Affine4Weight(blocks.nibbles(4), blocks.halves(0), blocks.halves(2), _BLOCK)


def _q5_0(blocks: _Blocks) -> QuantizedWeight:
    return Int8Weight(blocks.five_bits(2, 16, torch.int8), blocks.halves(0), _BLOCK)


def _q5_1(blocks: _Blocks) -> QuantizedWeight:
    return Affine8Weight(blocks.five_bits(4, 0, torch.uint8), blocks.halves(0), blocks.halves(2), _BLOCK)


def _q8_0(blocks: _Blocks) -> QuantizedWeight:
    return Int8Weight(blocks.int8(2), blocks.halves(0), _BLOCK)


def _iq4_nl(blocks: _Blocks) -> QuantizedWeight:
    return Int8Weight(blocks.looked_up(2, _IQ4_NL, torch.int8), blocks.halves(0), _BLOCK)


def _mxfp4(blocks: _Blocks) -> QuantizedWeight:
    largest = max(_MXFP4)
    codes = blocks.looked_up(1, tuple(largest + value for value in _MXFP4), torch.uint8)
    exponents = blocks.data.view(blocks.N, -1, blocks.nbytes)[..., 0]
    scales = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 128).to(torch.bfloat16)[exponents.int()]
    return Affine8Bf16Weight(codes, scales, -largest * scales, _BLOCK)


_Repack = Callable[[_Blocks], QuantizedWeight]
_REPACKED: dict[str, tuple[str, _Repack]] = {
    "Q4_0": ("q4_0", _q4_0),
    "Q4_1": ("affine4", _q4_1),
    "Q5_0": ("int8", _q5_0),
    "Q5_1": ("affine8", _q5_1),
    "Q8_0": ("int8", _q8_0),
    "IQ4_NL": ("int8", _iq4_nl),
    "MXFP4": ("affine8-bf16", _mxfp4),
}
REPACKED = {kind: TensorFormat(name, _BLOCK) for kind, (name, _) in _REPACKED.items()}
"""The format that holds the values of a GGUF type exactly, by GGUF's name of the type."""


def repack(data: torch.Tensor, kind: str, K: int) -> QuantizedWeight:
    """A matrix in the format of `REPACKED`; its float32 values have the bits that llama.cpp's formula gives.

    Args:
        data: the blocks, uint8 [N, bytes of a row], contiguous, on the CPU.
        kind: GGUF's name of their type.
        K: elements of a row.
    """
    N, row_bytes = data.shape
    return _REPACKED[kind][1](_Blocks(data, row_bytes * _BLOCK // K, N, K))


@compiled()
def _copy_halves(data, block_bytes, first, out):
    for block in range(len(out)):
        at = block * block_bytes + first
        out[block] = np.int16(np.uint16(data[at]) | np.uint16(data[at + 1]) << np.uint16(8))


@compiled()
def _pack_nibbles(source, block_bytes, blocks, out):
    for block in range(blocks):
        first, second = integer(source + block * block_bytes, 0), integer(source + block * block_bytes, 1)
        at = out + block * (_BLOCK // 2)
        store_integer(_neighbours(first & _LOW) | _neighbours(second & _LOW) << 32, at)
        store_integer(_neighbours(first >> 4 & _LOW) | _neighbours(second >> 4 & _LOW) << 32, at + 8)


@compiled()
def _neighbours(codes):
    """Eight bytes with a nibble in each as four bytes with two in each, the first in the low half; int64, of which the low half is used."""
    pairs = (codes | codes >> 4) & _EVEN_1
    fours = (pairs | pairs >> 8) & _EVEN_2
    return (fours | fours >> 16) & _EVEN_4


@compiled()
def _look_up(source, block_bytes, blocks, pairs, out):
    """pairs: int64 [256], the two bytes that two nibbles become."""
    for block in range(blocks):
        first, second = integer(source + block * block_bytes, 0), integer(source + block * block_bytes, 1)
        to = out + block * _BLOCK
        store_integer(_four_pairs(_neighbours(first & _LOW), pairs), to)
        store_integer(_four_pairs(_neighbours(second & _LOW), pairs), to + 8)
        store_integer(_four_pairs(_neighbours(first >> 4 & _LOW), pairs), to + 16)
        store_integer(_four_pairs(_neighbours(second >> 4 & _LOW), pairs), to + 24)


@compiled()
def _four_pairs(codes, pairs):
    """Eight bytes for eight nibbles."""
    return pairs[codes & 255] | pairs[codes >> 8 & 255] << 16 | pairs[codes >> 16 & 255] << 32 | pairs[codes >> 24 & 255] << 48


@compiled()
def _join_bits(source, block_bytes, blocks, spread, out):
    """spread: int64 [256], what eight high bits add to the nibbles of eight elements."""
    for block in range(blocks):
        at, to = source + block * block_bytes, out + block * _BLOCK
        bits = integer(at, 0)  # of which 32 are used
        first, second = integer(at + _BLOCK // 8, 0), integer(at + _BLOCK // 8, 1)
        store_integer(first & _LOW | spread[bits & 255], to)
        store_integer(second & _LOW | spread[bits >> 8 & 255], to + 8)
        store_integer(first >> 4 & _LOW | spread[bits >> 16 & 255], to + 16)
        store_integer(second >> 4 & _LOW | spread[bits >> 24 & 255], to + 24)


@compiled()
def _copy_codes(source, block_bytes, blocks, out):
    for block in range(blocks):
        for word in range(_BLOCK // 8):
            store_integer(integer(source + block * block_bytes, word), out + block * _BLOCK + word * 8)
