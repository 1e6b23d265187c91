"""MLX's quantized layers: affine codes of 2 to 8 bits, and the small floats mxfp4, mxfp8 and nvfp4, packed along the reduction axis.

Dimension letters: `N` output features, `K` input features (the reduction axis), `G` group size, `n` = K/G groups of a row.

| part | affine | mxfp4, mxfp8, nvfp4 |
|---|---|---|
| `weight` | uint32 [N, K * bits / 32] | the same |
| `scales` | bfloat16, float16 or float32 [N, n] | uint8 [N, n] |
| `biases` | as scales | absent |

A row of `weight` is a stream of bits, lowest first: code k is bits k * bits .. (k + 1) * bits - 1, so codes of 3, 5 and 6 bits straddle
words. The first word of 4-bit codes, the highest nibble drawn first:

    | k7 k6 k5 k4 k3 k2 k1 k0 |

| mode | bits | G | value |
|---|---|---|---|
| affine | 2, 3, 4, 5, 6, 8 | 32, 64, 128 | scale * code + bias |
| mxfp4 | 4 | 32 | E2M1(code) * 2^(scale - 127) |
| nvfp4 | 4 | 16 | E2M1(code) * E4M3(scale) |
| mxfp8 | 8 | 32 | E4M3(code) * 2^(scale - 127) |

E2M1 and E4M3 are the elements of the OCP Microscaling Formats (MX) Specification 1.0. Bits and groups of each layer are told from its
shapes, which hold for layers with settings of their own in config.json too. Affine codes of up to 4 bits are those of our affine4, wider
ones those of affine8; mxfp4 is affine too, in 9 bits instead of 4.25. MLX's scales may be negative; the products of `scale * code`
are exact in float32 for bfloat16 and float16 scales, the sum is rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.kernels.cpu.repack_codes import unpack_codes, unpack_nibbles
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

from .base import Encoding, Parts, StoredLinear
from .exact_groups import exact_group
from .plain import FLOATS

__all__ = ["Mlx"]

_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUPS = (32, 64, 128)
_SMALL_FLOATS = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}  # (bits, G) of the modes without biases
# The element of code 8 is -0; that of an affine format is 0.
_E2M1 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0))
_MOST = 12  # twice the largest element; elements are multiples of 1/2
_E8M0 = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [torch.nan])


class Mlx(Encoding):
    """The quantized layers of a checkpoint that mlx-lm wrote."""

    suffixes = frozenset({"weight", "scales"})
    optional = frozenset({"biases"})

    def check(self, linear: StoredLinear) -> None:
        (N, K), words, groups = linear.shape, linear.parts["weight"].shape, linear.parts["scales"].shape
        affine = "biases" in linear.parts
        widths = _AFFINE_BITS if affine else sorted({bits for bits, _ in _SMALL_FLOATS})
        if K % 32 or words not in [(N, K * bits // 32) for bits in widths]:
            raise linear.wrong(f"weight must be uint32 [{N}, {K} * bits / 32] with bits one of {', '.join(map(str, widths))}", list(words))
        linear.expect("weight", words, torch.uint32)
        sizes = _AFFINE_GROUPS if affine else [size for bits, size in _SMALL_FLOATS if bits == _bits(linear)]
        if groups not in [(N, K // size) for size in sizes if K % size == 0]:
            raise linear.wrong(f"scales must be [{N}, {K} / group size] with groups of {' or '.join(map(str, sizes))}", list(groups))
        if affine:
            linear.expect("scales", groups, *FLOATS)
            linear.expect("biases", groups, linear.parts["scales"].dtype)
        else:
            linear.expect("scales", groups, torch.uint8)

    def label(self, linear: StoredLinear) -> str:
        bits, G = _bits(linear), _group(linear)
        return f"MLX affine{bits}:{G}" if "biases" in linear.parts else f"MLX {_SMALL_FLOATS[bits, G]}"

    def dtype(self, linear: StoredLinear) -> torch.dtype:
        return torch.float32

    def exact_format(self, linear: StoredLinear) -> TensorFormat | None:
        scales = linear.parts["scales"]
        if self.label(linear) == "MLX mxfp4":
            return TensorFormat("affine8-bf16", _group(linear))
        if not scales.has_dtype(torch.float16, torch.bfloat16):
            return None
        name = "affine4" if _bits(linear) <= 4 else "affine8"
        return exact_group(f"{name}-bf16" if scales.has_dtype(torch.bfloat16) else name, linear.shape[1], _group(linear))

    def dequantize(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        bits, G = _bits(linear), _group(linear)
        codes = unpack_codes(parts["weight"].view(torch.uint8), bits)
        if "biases" in parts:
            scales, biases = _affine(linear, parts)
            values = codes.float().unflatten(-1, (-1, G))
            values *= scales.float().unsqueeze(-1)
            values += biases.float().unsqueeze(-1)
            return values.flatten(-2)
        values, scales = _small_floats(_SMALL_FLOATS[bits, G], codes, parts["scales"])
        linear.check_finite("weight", values)
        linear.check_finite("scales", scales)
        values = values.unflatten(-1, (-1, G))
        values *= scales.unsqueeze(-1)
        return values.flatten(-2)

    def read_rows(self, linear: StoredLinear, parts: Parts, first: int, count: int) -> torch.Tensor:
        return self.dequantize(linear, {suffix: parts.rows(suffix, first, count) for suffix in linear.parts})

    def repack(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        fmt, bits = self.exact_format(linear), _bits(linear)
        assert fmt is not None
        if "biases" not in parts:
            return fmt.load(_affine_of_mxfp4(linear, parts))
        scales, biases = _affine(linear, parts)
        stream = parts["weight"].view(torch.uint8)
        codes = stream if bits == 4 else unpack_nibbles(stream, bits) if bits < 4 else unpack_codes(stream, bits)
        return fmt.load({"qweight": codes, "scales": scales, "offsets": biases})


def _small_floats(mode: str, codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements [N, K] and scales [N, n] in float32, from their codes."""
    elements = codes.view(torch.float8_e4m3fn).float() if mode == "mxfp8" else _E2M1[codes.int()]
    return elements, scales.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else _E8M0[scales.int()]


def _affine_of_mxfp4(linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts of affine8-bf16 with the same values: elements in halves, plus 12, so that codes are 0 to 24.

    A scale is a power of two and the offset -12 of it, which bfloat16 holds up to 2^127; all products and sums are exact.
    """
    table = (_E2M1 * 2 + _MOST).to(torch.uint8)
    scales = (_E8M0[parts["scales"].int()] / 2).bfloat16()
    offsets = scales * -_MOST
    linear.check_finite("scales", offsets)
    return {"qweight": table[unpack_codes(parts["weight"].view(torch.uint8), 4).int()], "scales": scales, "offsets": offsets}


def _affine(linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and biases, which are finite."""
    for suffix in ("scales", "biases"):
        linear.check_finite(suffix, parts[suffix])
    return parts["scales"], parts["biases"]


def _bits(linear: StoredLinear) -> int:
    return linear.parts["weight"].shape[1] * 32 // linear.shape[1]


def _group(linear: StoredLinear) -> int:
    return linear.shape[1] // linear.parts["scales"].shape[1]
