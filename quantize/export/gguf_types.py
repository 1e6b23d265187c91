"""The types of GGUF that are written: the blocks of each, and the formats of ours whose values it holds exactly.

A block has 32 neighbouring elements of a row. The blocks of the quantized types, low addresses first:

    Q4_0   | d | q16 q0 | q17 q1 | ... | q31 q15 |        value = d * (q - 8)     float16 d, codes 0..15, the high nibble is drawn first
    Q4_1   | d | m | q16 q0 | ... | q31 q15 |             value = d * q + m       float16 d and m, codes 0..15
    Q8_0   | d | q0 | q1 | ... | q31 |                    value = d * q           float16 d, codes -128..127

A group of 64 or 128 elements becomes several blocks with the same scale, so that the values stay the same.

Dimension letters: `N` rows, `K` the reduction axis, `G` group size, `n` = K/G groups of a row, `b` = K/32 blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.kernels.formats.int4 import unpack
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

__all__ = ["BLOCK", "GGUF_TYPES", "PLAIN_TYPES", "GgufType", "holds", "type_of_dtype"]

BLOCK = 32
"""Elements of a block of every quantized type here."""
_Q4_0_ZERO_POINTS = (7, 8)


@dataclass(frozen=True)
class GgufType:
    """A type of GGUF that is written."""

    name: str
    """As the gguf package and llama.cpp spell it."""
    file_type: str
    """The name in `gguf.LlamaFileType` of a file whose tensors mostly have the type."""
    block_bytes: int
    """Bytes of 32 elements."""
    dtype: torch.dtype | None = None
    """Of a plain type."""
    rounded: TensorFormat | None = None
    """The format into which weights are rounded for the type."""
    formats: tuple[str, ...] = ()
    """Names of the formats whose weights the type holds exactly, at least some of them (`holds`)."""
    blocks: Callable[[QuantizedWeight], npt.NDArray[np.uint8]] | None = None
    """Takes a weight [N, K] that the type holds and returns the bytes [N, b * block_bytes]."""

    def nbytes(self, elements: int) -> int:
        """Bytes of a tensor."""
        return elements * self.block_bytes // BLOCK


def holds(kind: GgufType, fmt: TensorFormat, weight: QuantizedWeight) -> bool:
    """Whether a type holds the values of a weight exactly.

    Args:
        kind: the type.
        fmt: the weight's format.
        weight: [N, K]. Its zero-points decide where the format is int4.
    """
    if fmt.format not in kind.formats:
        return False
    if fmt.format != "int4":
        return True
    zeros = unpack(weight.parts["zeros"], weight.shape[-1] // weight.group_size)
    return bool(((zeros == _Q4_0_ZERO_POINTS[0]) | (zeros == _Q4_0_ZERO_POINTS[1])).all())


def type_of_dtype(dtype: torch.dtype) -> str:
    """The name in `GGUF_TYPES` of the plain type of a dtype."""
    return next(name for name, kind in PLAIN_TYPES.items() if kind.dtype == dtype)


def _q4_0(weight: QuantizedWeight) -> npt.NDArray[np.uint8]:
    """A group with zero-point 8 keeps scale and codes; with zero-point 7, scale * (q - 7) is -scale * (15 - q - 8)."""
    parts, groups = weight.parts, weight.shape[-1] // weight.group_size
    mirrored = unpack(parts["zeros"], groups) == _Q4_0_ZERO_POINTS[0]  # [N, n]
    codes = unpack(parts["qweight"], weight.shape[-1]).unflatten(-1, (groups, -1))  # [N, n, G]
    codes = torch.where(mirrored.unsqueeze(-1), 15 - codes, codes)
    scales = torch.where(mirrored, -parts["scales"], parts["scales"])
    return _joined([_of_blocks(scales, weight), _nibbles(codes.flatten(-2))])


def _q4_1(weight: QuantizedWeight) -> npt.NDArray[np.uint8]:
    parts = weight.parts
    codes = unpack(parts["qweight"], weight.shape[-1])
    return _joined([_of_blocks(parts["scales"], weight), _of_blocks(parts["offsets"], weight), _nibbles(codes)])


def _q8_0(weight: QuantizedWeight) -> npt.NDArray[np.uint8]:
    codes = weight.parts["qweight"].contiguous().view(torch.uint8).unflatten(-1, (-1, BLOCK))
    return _joined([_of_blocks(weight.parts["scales"], weight), codes])


def _of_blocks(values: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """float16 values of groups [N, n] as the bytes of the values of blocks, uint8 [N, b, 2]."""
    repeated = values.repeat_interleave(weight.group_size // BLOCK, dim=-1)
    return repeated.contiguous().view(torch.uint8).unflatten(-1, (-1, 2))


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K] as uint8 [N, b, 16]: element i of a block in the low nibble of byte i, element i + 16 in the high one."""
    halves = codes.unflatten(-1, (-1, 2, BLOCK // 2))
    return halves[..., 0, :] | halves[..., 1, :] << 4


def _joined(parts: list[torch.Tensor]) -> npt.NDArray[np.uint8]:
    """The bytes of blocks, uint8 [N, b, any] each, as [N, bytes]."""
    joined: npt.NDArray[np.uint8] = torch.cat(parts, -1).flatten(-2).numpy()
    return joined


PLAIN_TYPES: dict[str, GgufType] = {
    "f32": GgufType("F32", "ALL_F32", 128, torch.float32),
    "f16": GgufType("F16", "MOSTLY_F16", 64, torch.float16),
    "bf16": GgufType("BF16", "MOSTLY_BF16", 64, torch.bfloat16),
}
"""The types without blocks, by their names on the command line."""
GGUF_TYPES: dict[str, GgufType] = {
    "q4_0": GgufType("Q4_0", "MOSTLY_Q4_0", 18, rounded=TensorFormat("q4_0", 32), formats=("q4_0", "int4"), blocks=_q4_0),
    "q4_1": GgufType("Q4_1", "MOSTLY_Q4_1", 20, rounded=TensorFormat("affine4", 32), formats=("affine4",), blocks=_q4_1),
    "q8_0": GgufType("Q8_0", "MOSTLY_Q8_0", 34, rounded=TensorFormat("int8", 32), formats=("int8",), blocks=_q8_0),
    **PLAIN_TYPES,
}
"""The types, by their names on the command line."""
