"""4-bit tensors as bitsandbytes saves them: packed values under the tensor's own name, and statistics under names that begin with it.

| stored tensor | holds |
|---|---|
| `X` | two values a byte, flat, in any dtype |
| `X.quant_map` | the 16 values that 4 bits stand for, float32 |
| `X.absmax` | the scale of every block: float32, or 8 bits with double quantization |
| `X.nested_absmax`, `X.nested_quant_map` | with double quantization, what dequantizes `X.absmax` |
| `X.quant_state.bitsandbytes__nf4` (or `fp4`) | JSON in bytes: block size, shape and dtype |

bitsandbytes.functional.QuantState.as_dict(packed=True) writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import cast

import torch

from dbrx_q.checkpoint.layout import DenseTensor
from dbrx_q.checkpoint.safetensors_file import SafetensorsFile
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.nf4 import bitsandbytes_functional

__all__ = ["PARTS", "QUANT_STATE", "check_packed", "dequantize"]

QUANT_STATE = "quant_state.bitsandbytes__"
_NESTED = ("nested_absmax", "nested_quant_map")
PARTS = ("absmax", "quant_map", *_NESTED, f"{QUANT_STATE}nf4", f"{QUANT_STATE}fp4")
"""Suffixes of the tensors beside a packed one. `nested_absmax` also ends in `absmax`, but not in `.absmax`."""


def dequantize(packed: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The values of a packed tensor, in its recorded shape and dtype; bitsandbytes itself dequantizes them.

    Args:
        packed: the stored values; `check_packed` has accepted them.
        parts: the statistics by their suffixes.
    """
    functional = bitsandbytes_functional()
    state = functional.QuantState.from_dict(dict(parts), device=torch.device("cpu"))
    return cast(torch.Tensor, functional.dequantize_4bit(packed.view(torch.uint8).view(-1, 1), state))


def check_packed(tensor: DenseTensor, parts: Collection[str], file_of: Mapping[str, SafetensorsFile]) -> None:
    """Refuse packed values whose statistics are incomplete or belong to another tensor.

    Raises:
        CheckpointError: names the file, the tensor and the offending value.
    """
    file = file_of[tensor.name]

    def wrong(rule: str, found: object) -> CheckpointError:
        return CheckpointError(f"{file.path}: tensor {tensor.name}: {rule}; found {found}. Fetch the checkpoint again")

    states = [part for part in parts if part.startswith(QUANT_STATE)]
    nested = any(part in parts for part in _NESTED)
    required = {"absmax", "quant_map", *states, *(_NESTED if nested else ())}
    if len(states) != 1 or set(parts) != required:
        raise wrong(f"4-bit values must have absmax, quant_map and one of {QUANT_STATE}nf4 and fp4 beside them", sorted(parts))
    infos = {part: file_of[f"{tensor.name}.{part}"].tensors[f"{tensor.name}.{part}"] for part in parts}
    values = file.tensors[tensor.name]
    count = math.prod(tensor.shape)
    stored = file_of[f"{tensor.name}.{states[0]}"].read(f"{tensor.name}.{states[0]}")
    if stored.dtype != torch.uint8 or stored.ndim != 1:
        raise wrong("the quantization state must be bitsandbytes' JSON in bytes", f"{stored.dtype} {list(stored.shape)}")
    try:
        state = json.loads(bytes(stored.tolist()))
        blocks = -(-count // int(state["blocksize"]))
        shape, kind, dtype = list(state["shape"]), state["quant_type"], getattr(torch, state["dtype"])
        nested_blocks = -(-blocks // int(state["nested_blocksize"])) if nested else 0
        if nested:
            float(state["nested_offset"])
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise wrong("the quantization state must be bitsandbytes' JSON", f"{type(error).__name__}: {error}") from None
    if (
        shape != list(tensor.shape)
        or kind != states[0].removeprefix(QUANT_STATE)
        or dtype not in (torch.bfloat16, torch.float16, torch.float32)
    ):
        raise wrong(f"its quantization state must have the shape {list(tensor.shape)}, a float dtype and the type of its name", state)
    if values.nbytes != (count + 1) // 2:
        raise wrong(f"4-bit values must take {(count + 1) // 2} bytes by config.json", values.nbytes)
    rows = tensor.shape[0]
    if not nested and infos["absmax"].shape == (blocks // rows, rows) and infos["absmax"].has_dtype(torch.bfloat16):
        raise CheckpointError(
            f"{file.path}: tensor {tensor.name}: absmax must be float32 [{blocks}]; found bfloat16 {list(infos['absmax'].shape)}. "
            "bitsandbytes saved the model after it had run on a CPU with AVX512-BF16, for which it transposes and rounds the scales, and "
            "does not undo that. Load the original again and save it before the first forward pass"
        )
    absmax = (torch.uint8 if nested else torch.float32, (blocks,))
    expected = {"absmax": absmax, "quant_map": (torch.float32, (16,))}
    if nested:
        expected |= {"nested_absmax": (torch.float32, (nested_blocks,)), "nested_quant_map": (torch.float32, (256,))}
    for part, (part_dtype, part_shape) in expected.items():
        if not infos[part].has_dtype(part_dtype) or infos[part].shape != part_shape:
            raise wrong(f"{part} must be {part_dtype} {list(part_shape)}", f"{infos[part].dtype_label} {list(infos[part].shape)}")
