"""AWQ in the order of AutoAWQ's GEMM kernel: 4-bit codes that are packed along the output axis.

Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", is how they are chosen; this module reads
what is stored. Dimension letters: `N` output features, `K` input features (the reduction axis), `G` group size, `n` = K/G groups.

    value[j, k] = scales[k // G, j] * (code[k, j] - zero[k // G, j])

| part | dtype | shape | holds |
|---|---|---|---|
| `qweight` | int32 | [K, N/8] | codes; a word holds those of 8 neighbouring outputs of one input |
| `qzeros` | int32 | [n, N/8] | zero-points, in the same order |
| `scales` | float16 | [n, N] | the scale of each group |

The word of outputs 8i .. 8i+7, the highest nibble drawn first; the number is the output minus 8i:

    | 7 5 3 1 6 4 2 0 |

GPTQ's zero - 1 is not used here. Group sizes are told from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.config_values import shortened
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.cpu.repack_codes import rows_of_awq, unpack_codes
from dbrx_q.kernels.formats import int4
from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

from .base import Encoding, Parts, StoredLinear
from .exact_groups import exact_group, group_index
from .plain import FLOATS

__all__ = ["Awq"]

_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble, from the lowest, that holds output 8i + j


class Awq(Encoding):
    """The AWQ layers of a checkpoint.

    Args:
        config: `quantization_config` of config.json.
        source: the file that it is from, for messages.

    Raises:
        CheckpointError: another version than GEMM, or other bits than 4.
    """

    suffixes = frozenset({"qweight", "qzeros", "scales"})

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        version = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
        if config.get("backend") == "llm-awq":
            version = "llm-awq"
        bits = config.get("bits", config.get("w_bit", 4))
        again = "Quantize the original weights again with AutoAWQ's version GEMM, 4 bits and zero_point"
        if str(version).lower() != "gemm":
            raise CheckpointError(f"{source}: an AWQ checkpoint must have the version gemm; found {shortened(version)}. {again}")
        if bits != 4:
            raise CheckpointError(f"{source}: an AWQ checkpoint must have 4 bits; found {shortened(bits)}. {again}")
        if config.get("zero_point", True) is not True:
            raise CheckpointError(f"{source}: an AWQ checkpoint must have zero_point; found {config['zero_point']!r}. {again}")

    def check(self, linear: StoredLinear) -> None:
        N, K = linear.shape
        groups = linear.parts["scales"].shape[0] if linear.parts["scales"].shape else 0
        if N % 8:
            raise linear.wrong("a layer in AWQ's order must have a multiple of 8 outputs", N)
        if K % 8:
            raise linear.wrong("a layer in AWQ's order must have a multiple of 8 inputs", K)
        if groups == 0 or K % groups:
            raise linear.wrong(f"scales must have a row for each group of the {K} inputs", list(linear.parts["scales"].shape))
        linear.expect("qweight", (K, N // 8), torch.int32)
        linear.expect("qzeros", (groups, N // 8), torch.int32)
        linear.expect("scales", (groups, N), *FLOATS)

    def label(self, linear: StoredLinear) -> str:
        return f"AWQ int4:{_group(linear)}"

    def dtype(self, linear: StoredLinear) -> torch.dtype:
        return torch.float32

    def exact_format(self, linear: StoredLinear) -> TensorFormat | None:
        if not linear.parts["scales"].has_dtype(torch.float16):
            return None
        return exact_group("int4", linear.shape[1], _group(linear))

    def dequantize(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return _rows(linear, parts, 0, linear.shape[0])

    def read_rows(self, linear: StoredLinear, parts: Parts, first: int, count: int) -> torch.Tensor:
        return _rows(linear, {suffix: parts.whole(suffix) for suffix in linear.parts}, first, count)

    def repack(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        fmt = self.exact_format(linear)
        assert fmt is not None
        linear.check_finite("scales", parts["scales"])
        index = group_index(linear.shape[1], _group(linear), fmt.group_size)
        return Int4Weight(
            rows_of_awq(parts["qweight"]),
            parts["scales"].T[:, index].contiguous(),
            int4.pack(_zeros(parts["qzeros"]).T[:, index].contiguous()),
            fmt.group_size,
        )


def _rows(linear: StoredLinear, parts: Mapping[str, torch.Tensor], first: int, count: int) -> torch.Tensor:
    """Rows first .. first+count-1 in float32; every operation is exact where the scales are float16 or bfloat16."""
    G, end = _group(linear), first + count
    words = slice(first // 8, -(-end // 8))
    within = slice(first % 8, first % 8 + count)
    scales = parts["scales"][:, first:end].T.float()
    linear.check_finite("scales", scales)
    codes = unpack_codes(rows_of_awq(parts["qweight"][:, words])[within], 4)
    values = codes.float().unflatten(-1, (-1, G))
    values -= _zeros(parts["qzeros"][:, words])[:, within].T.float().unsqueeze(-1)
    values *= scales.unsqueeze(-1)
    return values.flatten(-2)


def _zeros(words: torch.Tensor) -> torch.Tensor:
    """The zero-points uint8 [n, N] of words int32 [n, N/8]."""
    nibbles = unpack_codes(words.contiguous().view(torch.uint8), 4)
    return nibbles.unflatten(-1, (-1, 8))[..., _NIBBLE_OF].flatten(-2)


def _group(linear: StoredLinear) -> int:
    return linear.shape[1] // linear.parts["scales"].shape[0]
