"""4-bit tensors as bitsandbytes saves them: packed values under the tensor's own name, and statistics under names that begin with it.

Dimension letters: `N` rows, `K` the reduction axis of a layer, the last axis of a published stack of experts; `B` = N K / 64 blocks.

| part of `X.weight` | dtype | shape | holds |
|---|---|---|---|
| `weight` | any | N K / 2 bytes | two codes a byte, the even element in the high nibble, row after row without a gap |
| `weight.quant_map` | float32 | [16] | the values that codes stand for |
| `weight.absmax` | float32, or uint8 with double quantization | [B] | the scale of every block |
| `weight.nested_absmax`, `weight.nested_quant_map` | float32 | [B / 256], [256] | with double quantization, what dequantizes absmax |
| `weight.quant_state.bitsandbytes__nf4` (or `fp4`) | uint8 | bytes | JSON: block size, shape and dtype |

    value = quant_map[code] * absmax[block]
    absmax = nested_quant_map[absmax] * nested_absmax[block of 256] + nested_offset

Blocks are neighbouring elements, of any rows; bitsandbytes' default is 64. `bitsandbytes.functional.QuantState.as_dict(packed=True)` writes
the parts; bitsandbytes itself dequantizes them here, to the dtype that the state records. NF4 in blocks of 64 is our `nf4` where a block
lies within a row; its float32 scales, nested ones dequantized, are those of bitsandbytes to the last bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.nf4 import NESTED_BLOCK, VALUES, Nf4Weight, bitsandbytes_functional, dequantize_absmax, dynamic_map
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

from .base import NO_KEEP, Encoding, LoadedParts, Parts, StoredLinear
from .plain import FLOATS

__all__ = ["Bitsandbytes"]

_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = frozenset({"weight.nested_absmax", "weight.nested_quant_map"})
_TYPES = ("nf4", "fp4")
_BLOCK = 64


class Bitsandbytes(Encoding):
    """The 4-bit tensors of a checkpoint that transformers saved with bitsandbytes.

    Args:
        config: `quantization_config` of config.json.
        source: the file that it is from, for messages.

    Raises:
        CheckpointError: the weights have 8 bits.
    """

    suffixes = frozenset({"weight", "weight.absmax", "weight.quant_map"})
    optional = _NESTED | {f"{_STATE}{kind}" for kind in _TYPES}

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            raise CheckpointError(f"{source}: bitsandbytes' 4-bit formats are read; found load_in_8bit. Save the model with load_in_4bit")

    def check(self, linear: StoredLinear) -> None:
        stored, count = linear.parts, math.prod(linear.shape)
        nested = bool(_NESTED & stored.keys())
        states = [suffix for suffix in stored if suffix.startswith(_STATE)]
        if len(states) != 1 or (nested and not stored.keys() >= _NESTED):
            raise linear.wrong(
                "4-bit values must have absmax, quant_map and one of quant_state.bitsandbytes__nf4 and fp4 beside them", sorted(stored)
            )
        if stored["weight"].nbytes != (count + 1) // 2:
            raise linear.wrong(f"4-bit values must take {(count + 1) // 2} bytes by config.json", stored["weight"].nbytes)
        if stored["weight.absmax"].has_dtype(torch.bfloat16) and len(stored["weight.absmax"].shape) == 2:
            raise linear.wrong(
                "absmax must be float32 with one axis",
                f"bfloat16 {list(stored['weight.absmax'].shape)}",
                "bitsandbytes saved the model after it had run on a CPU with AVX512-BF16, for which it transposes and rounds the scales "
                "and does not undo that. Load the original again and save it before the first forward pass",
            )
        blocks = math.prod(stored["weight.absmax"].shape)
        if not 0 < blocks <= count:
            raise linear.wrong("absmax must have one scale for each block", list(stored["weight.absmax"].shape))
        linear.expect("weight.absmax", (blocks,), torch.uint8 if nested else torch.float32)
        linear.expect("weight.quant_map", (16,), torch.float32)
        if nested:
            linear.expect("weight.nested_absmax", stored["weight.nested_absmax"].shape[:1], torch.float32)
            linear.expect("weight.nested_quant_map", (256,), torch.float32)
        linear.expect(states[0], (stored[states[0]].nbytes,), torch.uint8)

    def check_statistics(self, linear: StoredLinear, parts: Parts) -> None:
        _state(linear, parts)

    def label(self, linear: StoredLinear) -> str:
        return f"bitsandbytes {_type(linear)}{'-double' if _is_nested(linear) else ''}"

    def dtype(self, linear: StoredLinear) -> torch.dtype:
        return torch.float32

    def exact_format(self, linear: StoredLinear) -> TensorFormat | None:
        N, K = linear.shape
        if _type(linear) != "nf4" or K % _BLOCK or linear.parts["weight.absmax"].shape[0] != N * K // _BLOCK:
            return None
        return TensorFormat("nf4", _BLOCK)

    def dequantize(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.read_rows(linear, LoadedParts(parts), 0, linear.shape[0])

    def read_rows(self, linear: StoredLinear, parts: Parts, first: int, count: int) -> torch.Tensor:
        """See `Encoding.read_rows`. The values are those of the recorded dtype, in float32.

        Whole blocks are read, with double quantization whole blocks of blocks, and the elements around the rows are cut off.
        """
        stored, K = _suffixed(linear), linear.shape[1]
        state = _state(linear, parts)
        block, unit = state["blocksize"], state["blocksize"] * (state["nested_blocksize"] if _is_nested(linear) else 1)
        start, end = first * K // unit * unit, min(-(-(first + count) * K // unit) * unit, math.prod(linear.shape))
        first_block, blocks = start // block, -(-(end - start) // block)
        statistics = {"quant_map": parts.whole("weight.quant_map"), stored: parts.whole(f"weight.{stored}")}
        statistics["absmax"] = parts.rows("weight.absmax", first_block, blocks)
        if _is_nested(linear):
            statistics["nested_quant_map"] = parts.whole("weight.nested_quant_map")
            first_nested, nested = start // unit, -(-(end - start) // unit)
            statistics["nested_absmax"] = parts.rows("weight.nested_absmax", first_nested, nested)
        functional = bitsandbytes_functional()
        quant_state = functional.QuantState.from_dict(statistics, device=torch.device("cpu"))
        # A single row: for others bitsandbytes 0.50 reads wrong scales on some CPUs where a row is no whole number of blocks.
        quant_state.shape = torch.Size((1, end - start))
        values = functional.dequantize_4bit(_bytes(linear, parts, start // 2, (end + 1) // 2).view(-1, 1), quant_state)
        return cast(torch.Tensor, values).view(-1)[first * K - start :][: count * K].view(count, K).float()

    def repack(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """See `Encoding.repack`. Its values, rounded to the dtype that the state records, have the bits of `dequantize`."""
        N, K = linear.shape
        state = _state(linear, LoadedParts(parts))
        if not torch.equal(parts["weight.quant_map"], torch.tensor(VALUES)):
            raise linear.wrong("quant_map must hold NF4's values", parts["weight.quant_map"].tolist(), NO_KEEP)
        absmax = parts["weight.absmax"].view(N, K // _BLOCK)
        if _is_nested(linear):
            if state["nested_blocksize"] != NESTED_BLOCK or not torch.equal(parts["weight.nested_quant_map"], dynamic_map()):
                raise linear.wrong(
                    f"double quantization must have blocks of {NESTED_BLOCK} and bitsandbytes' dynamic map",
                    f"blocks of {state['nested_blocksize']}, or another map",
                    NO_KEEP,
                )
            absmax = dequantize_absmax(absmax, parts["weight.nested_absmax"], torch.tensor([state["nested_offset"]], dtype=torch.float32))
        linear.check_finite("absmax", absmax)
        return Nf4Weight(parts["weight"].contiguous().view(-1).view(torch.uint8).view(N, K // 2), absmax, _BLOCK)


def _type(linear: StoredLinear) -> str:
    return _suffixed(linear).removeprefix(_STATE.removeprefix("weight."))


def _suffixed(linear: StoredLinear) -> str:
    """The name of the state, after "weight."."""
    return next(suffix for suffix in linear.parts if suffix.startswith(_STATE)).removeprefix("weight.")


def _is_nested(linear: StoredLinear) -> bool:
    return "weight.nested_absmax" in linear.parts


def _bytes(linear: StoredLinear, parts: Parts, first: int, end: int) -> torch.Tensor:
    """Bytes first .. end-1 of the packed values."""
    info = linear.parts["weight"]
    row = info.nbytes // info.shape[0]
    rows = parts.rows("weight", first // row, -(-end // row) - first // row)
    return rows.view(-1).view(torch.uint8)[first % row :][: end - first]


def _state(linear: StoredLinear, parts: Parts) -> dict[str, Any]:
    """The JSON of the quantization state, checked against the headers."""
    suffix = f"weight.{_suffixed(linear)}"
    nested, kind = _is_nested(linear), _type(linear)
    try:
        state = json.loads(bytes(parts.whole(suffix).tolist()))
        blocks = -(-math.prod(linear.shape) // _block_size(state, "blocksize"))
        shape, dtype = list(state["shape"]), getattr(torch, state["dtype"])
        nested_blocks = -(-blocks // _block_size(state, "nested_blocksize")) if nested else 0
        if nested:
            float(state["nested_offset"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise linear.wrong("the quantization state must be bitsandbytes' JSON", f"{type(error).__name__}: {error}") from None
    if shape != list(linear.shape) or state.get("quant_type") != kind or dtype not in FLOATS:
        raise linear.wrong(
            f"its quantization state must have the shape {list(linear.shape)}, a float dtype and the type of its name", state
        )
    linear.expect("weight.absmax", (blocks,), torch.uint8 if nested else torch.float32)
    if nested:
        linear.expect("weight.nested_absmax", (nested_blocks,), torch.float32)
    return cast(dict[str, Any], state)


def _block_size(state: Mapping[str, Any], name: str) -> int:
    size = state[name]
    if not isinstance(size, int) or size < 2 or size % 2:
        raise ValueError(f"{name} {size}")
    return size
