"""The rotation of a weight's inputs: random signs, then Hadamard matrices of 64 or 128. It is orthogonal and needs no stored numbers.

A rotated weight has no outliers along its inputs, and its elements are close to normal, as codes for normal values want. The product stays
the same where the activations are rotated as well: W x = (W V^T) (V x) with V = blockdiag(Hadamard / sqrt(G)) diag(signs). QuIP# (Tseng et
al. 2024, section 3) has this rotation over all inputs at once.

Dimension letters: `K` input features, `G` inputs of one Hadamard matrix.
"""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["rotate", "rotate_back", "signs"]


_CPU = torch.device("cpu")


@cache
def signs(K: int, device: torch.device = _CPU) -> torch.Tensor:
    """float32 [K] of 1 and -1 on `device`: input j has -1 where the lowest bit of its 32-bit hash is set.

    The hash is Chris Wellons' `lowbias32`: j ^= j >> 16; j *= 0x7feb352d; j ^= j >> 15; j *= 0x846ca68b; j ^= j >> 16.
    """
    j = torch.arange(K, dtype=torch.int64)
    j ^= j >> 16
    j = j * 0x7FEB352D & 0xFFFFFFFF
    j ^= j >> 15
    j = j * 0x846CA68B & 0xFFFFFFFF
    j ^= j >> 16
    return (1.0 - 2.0 * (j & 1).float()).to(device)


def rotate(x: torch.Tensor, G: int) -> torch.Tensor:
    """float32 [..., K]: V x of activations [..., K], or W V^T of a weight [..., N, K]; G divides K."""
    return _hadamard(x.float() * signs(x.shape[-1], x.device), G)


def rotate_back(x: torch.Tensor, G: int) -> torch.Tensor:
    """The inverse of `rotate`, float32 [..., K]."""
    return _hadamard(x.float(), G) * signs(x.shape[-1], x.device)


def _hadamard(x: torch.Tensor, G: int) -> torch.Tensor:
    """The product of each G neighbours with the symmetric Hadamard matrix of Sylvester's construction over sqrt(G).

    Sums and differences of neighbours come first, then those at a distance of 2, 4 and so on, all rounded to float32.
    """
    distance, y = 1, x.unflatten(-1, (-1, G))
    while distance < G:
        pairs = y.unflatten(-1, (-1, 2, distance))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        distance *= 2
    return (y * G**-0.5).flatten(-2)
