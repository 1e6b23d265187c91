"""NF4 weights, as bitsandbytes stores them: 4-bit codes of a table of normal quantiles, one float32 scale per block of 64.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3 and appendix E. Its double quantization stores the scales
of a matrix in 8 bits. Kernels do not take that form: loading a checkpoint dequantizes the scales to float32.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` block size, `S` blocks of 256 scales of a
matrix, the last of which may be smaller; `...` is any number of leading axes, such as the experts of a layer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import ClassVar, cast

import torch

from .errors import FormatError
from .format import Format, Part, StoredForm
from .groups import check_group_size, check_weight, grouped
from .quantized_weight import QuantizedWeight

__all__ = [
    "DOUBLE_FORMAT",
    "FORMAT",
    "GROUP_SIZES",
    "NESTED_BLOCK",
    "VALUES",
    "Nf4DoubleWeight",
    "Nf4Weight",
    "bitsandbytes_functional",
    "compress_absmax",
    "dequantize",
    "dequantize_absmax",
    "dequantize_on_cpu",
    "dynamic_map",
    "pack",
    "quantize",
    "unpack",
]

GROUP_SIZES = (64,)
# The 16 values of the data type, in float32.
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NESTED_BLOCK = 256
"""Scales that share a scale of their own in double quantization."""


@dataclass(frozen=True)
class Nf4Weight(QuantizedWeight):
    """A weight [..., N, K] in 4 + 32/G bits per element; value = VALUES[code] * absmax.

    Bit layout of one row (byte addresses grow to the right, the high nibble is drawn first). The even element has the high nibble, as in
    bitsandbytes and unlike int4:

        qweight  | e0 e1 | e2 e3 | e4 e5 | ...    uint8 [..., N, K/2]     codes 0..15 of elements 0..K-1
        absmax   |  m0   |  m1   | ...            float32 [..., N, K/G]   largest magnitude of G neighbouring elements
    """

    format: ClassVar[str] = "nf4"
    part_names: ClassVar[tuple[str, ...]] = ("qweight", "absmax")

    qweight: torch.Tensor
    """Codes, two per byte."""
    absmax: torch.Tensor
    """The scales, one per block."""
    group_size: int
    """G, elements that share a scale."""

    @property
    def shape(self) -> torch.Size:
        """[..., N, K] of the weight that the parts represent."""
        return torch.Size((*self.qweight.shape[:-1], self.qweight.shape[-1] * 2))


@dataclass(frozen=True)
class Nf4DoubleWeight:
    """A weight [..., N, K] with double quantization, as it is stored: 4 + 8/G + 32/(256 G) bits per element and 32 bits a matrix.

    The scales of a matrix, row after row, are cut into blocks of 256; scale = dynamic_map()[absmax] * nested_absmax of its block + offset.

        qweight         uint8 [..., N, K/2]      as in `Nf4Weight`
        absmax          uint8 [..., N, K/G]      codes of the scales
        nested_absmax   float32 [..., S]         largest magnitude of (scale - offset) in a block of scales
        offset          float32 [..., 1]         the scales' mean
    """

    qweight: torch.Tensor
    """Codes, two per byte."""
    absmax: torch.Tensor
    """Codes of the scales."""
    nested_absmax: torch.Tensor
    """The scales of the scales, one per block of 256."""
    offset: torch.Tensor
    """The mean of the scales."""
    group_size: int
    """G, elements that share a scale."""

    @classmethod
    def compress(cls, weight: Nf4Weight) -> Nf4DoubleWeight:
        """A whole matrix with its scales quantized; errors as for `compress_absmax`."""
        return cls(weight.qweight, *compress_absmax(weight.absmax), weight.group_size)

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors by their names."""
        return {"qweight": self.qweight, "absmax": self.absmax, "nested_absmax": self.nested_absmax, "offset": self.offset}

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.nbytes for part in self.parts.values())

    def expand(self) -> Nf4Weight:
        """The weight as kernels take it, with float32 scales."""
        return Nf4Weight(self.qweight, dequantize_absmax(self.absmax, self.nested_absmax, self.offset), self.group_size)


def quantize(weight: torch.Tensor, group_size: int = 64) -> Nf4Weight:
    """`weight` with every element rounded to its nearest code, by bitsandbytes.

    Args:
        weight: [..., N, K], bfloat16, float16 or float32.
        group_size: 64; divides K.

    Raises:
        FormatError: a group size that is not offered or does not divide K, NaN or infinity.
    """
    check_group_size(weight.shape[-1], group_size, GROUP_SIZES)
    wide = check_weight(weight).contiguous()
    codes, state = bitsandbytes_functional().quantize_4bit(wide, blocksize=group_size, quant_type="nf4", compress_statistics=False)
    shape = (*weight.shape[:-1], -1)
    return Nf4Weight(codes.view(shape), state.absmax.view(shape), group_size)


def dequantize(weight: Nf4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The plain weight [..., N, K]: VALUES[code] * absmax in float32, then rounded to `dtype`."""
    table = torch.tensor(VALUES, device=weight.device)
    values = grouped(table[unpack(weight.qweight, weight.shape[-1]).int()], weight.group_size)
    return (values * weight.absmax.unsqueeze(-1)).flatten(-2).to(dtype)


def dequantize_on_cpu(weight: Nf4Weight, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize` by bitsandbytes: the same bits, in one pass over memory. The parts of `weight` [N, K] are contiguous and on the CPU.

    bfloat16 results below 2^-126 may be zero: chips that convert to bfloat16 in hardware flush them.
    """
    functional = bitsandbytes_functional()
    state = functional.QuantState(absmax=weight.absmax, shape=weight.shape, dtype=dtype, blocksize=weight.group_size, quant_type="nf4")
    return cast(torch.Tensor, functional.dequantize_4bit(weight.qweight.view(-1, 1), state))


def compress_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts `absmax`, `nested_absmax` and `offset` of an `Nf4DoubleWeight`, by bitsandbytes.

    Their bits are those of bitsandbytes' `compress_statistics` on one thread, for any number of threads.

    Args:
        absmax: float32 [N, K/G] on the CPU, the scales of a whole matrix.

    Raises:
        FormatError: scales too large for float32 to hold their sum.
    """
    flat = absmax.reshape(-1)
    offset = flat.expand(2, -1).mean(1)[:1]  # torch splits the sum of a single row by threads, which changes its last bits
    if not torch.isfinite(offset).all():
        raise FormatError("the sum of a matrix's scales must stay below 3.4e38, float32's largest value; found a larger one. Choose nf4")
    codes, state = bitsandbytes_functional().quantize_blockwise(flat - offset, code=dynamic_map(), blocksize=NESTED_BLOCK)
    return codes.view(absmax.shape), state.absmax, offset


def dequantize_absmax(absmax: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The float32 scales [..., N, K/G] from the parts of an `Nf4DoubleWeight`, on their device; bit for bit those of bitsandbytes."""
    table = dynamic_map().to(absmax.device)
    out = torch.empty(absmax.shape, dtype=torch.float32, device=absmax.device)
    scales = out.view(-1, absmax.shape[-2] * absmax.shape[-1])
    for row, codes, nested, mean in zip(
        scales, absmax.reshape(scales.shape), nested_absmax.view(len(scales), -1), offset.view(-1), strict=True
    ):
        torch.mul(table[codes.int()], nested.repeat_interleave(NESTED_BLOCK)[: len(codes)], out=row)
        row += mean
    return out


@cache
def dynamic_map() -> torch.Tensor:
    """float32 [256], ascending: the signed 8-bit type of Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning".

    The values are 0, 1 and, for e = 0..6 and both signs, 10^(e-6) times the midpoints of 2^e equal parts of [0.1, 1]. They equal the
    `create_dynamic_map()` of bitsandbytes on x86-64 to the last bit, which rounds the ends of a part to float32, then their mean, then its
    product. Every step here is exact or rounds once, so the bits are the same on every chip.
    """
    low = torch.tensor(0.1)
    width = (1 - low).double()
    magnitudes = []
    for e in range(7):
        parts = 2**e
        i = torch.arange(parts + 1, dtype=torch.float64)
        below = i < (parts + 1) // 2
        ends = torch.where(below, low.double() + width / parts * i, 1 - width / parts * (parts - i)).float()
        magnitudes.append((ends[:-1] + ends[1:]) / 2 * torch.tensor(10.0 ** (e - 6)))
    positive = torch.cat(magnitudes)
    return torch.cat((positive, -positive, torch.tensor([0.0, 1.0]))).sort().values


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack two codes per byte, the even element in the high nibble: uint8 [..., n] with values 0..15 and even n to uint8 [..., n/2]."""
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [..., n/2] to uint8 [..., n]."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)[..., :n]


def _parts(N: int, K: int, group_size: int) -> tuple[Part, ...]:
    return Part("qweight", torch.uint8, (N, K // 2)), Part("absmax", torch.float32, (N, K // group_size))


def _double_parts(N: int, K: int, group_size: int) -> tuple[Part, ...]:
    groups = K // group_size
    return (
        Part("qweight", torch.uint8, (N, K // 2)),
        Part("absmax", torch.uint8, (N, groups)),
        Part("nested_absmax", torch.float32, (-(-N * groups // NESTED_BLOCK),)),
        Part("offset", torch.float32, (1,)),
    )


def _store(weight: Nf4Weight) -> dict[str, torch.Tensor]:
    return Nf4DoubleWeight.compress(weight).parts


def _load(parts: Mapping[str, torch.Tensor], group_size: int) -> Nf4Weight:
    return Nf4DoubleWeight(parts["qweight"], parts["absmax"], parts["nested_absmax"], parts["offset"], group_size).expand()


FORMAT = Format(name="nf4", bits=4, group_sizes=GROUP_SIZES, weight=Nf4Weight, parts=_parts, quantize=quantize, dequantize=dequantize)
DOUBLE_FORMAT = replace(FORMAT, name="nf4-double", parts=_double_parts, stored=StoredForm(_store, _load))


@cache
def bitsandbytes_functional() -> ModuleType:
    """`bitsandbytes.functional`; importing it takes a second, so only code for NF4 on the CPU does."""
    with _without_hub_kernels():
        import bitsandbytes.functional
    return bitsandbytes.functional


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """Keep bitsandbytes from downloading a kernel while it is imported.

    On chips with bfloat16 instructions its import fetches a product kernel from the hub through the package `kernels`, and logs a warning
    if it cannot. The project does not use that kernel, so the import here neither downloads it nor warns that it is missing.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    modules = cast(dict[str, ModuleType | None], sys.modules)  # None makes an import fail as if the package were not installed
    absent = "kernels" not in modules
    level, before = log.level, modules.get("kernels")
    log.setLevel(logging.ERROR)
    modules["kernels"] = None
    try:
        yield
    finally:
        log.setLevel(level)
        if absent:
            del modules["kernels"]
        else:
            modules["kernels"] = before
