"""Codes of 1 to 8 bits that follow each other without gaps, and the groups of ours that stored groups are divided into."""

from __future__ import annotations

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.kernels.formats.registry import FORMATS

__all__ = ["exact_group", "group_index", "unpack"]


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes uint8 [N, n] of rows of packed codes, uint8 [N, n * bits / 8]; n is a multiple of 8.

    Code k of a row is bits k * bits .. (k + 1) * bits - 1 of its bytes, counted from the lowest bit of the first byte: code 0 lies in
    the lowest bits. Words of 32 bits are such bytes on a machine that stores the lowest byte first, also where codes straddle words.
    """
    if bits == 8:
        return packed
    eights = packed.unflatten(-1, (-1, bits))  # 8 codes take `bits` bytes
    mask = (1 << bits) - 1
    codes = torch.empty((*eights.shape[:-1], 8), dtype=torch.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = eights[..., byte] >> shift
        if shift + bits > 8:
            code |= eights[..., byte + 1] << (8 - shift)
        codes[..., i] = code & mask
    return codes.flatten(-2)


def exact_group(name: str, K: int, group_size: int) -> TensorFormat | None:
    """The format `name` with the largest groups that stored groups of `group_size` can be divided into; None where there are none."""
    sizes = [size for size in FORMATS[name].group_sizes if group_size % size == 0 and K % size == 0] if name in FORMATS else []
    return TensorFormat(name, max(sizes)) if sizes else None


def group_index(K: int, group_size: int, exact: int) -> torch.Tensor:
    """int64 [K/exact]: the stored group, of `group_size` columns, that each group of `exact` columns is a part of."""
    return torch.arange(0, K, exact) // group_size
