"""The formats of a KV cache: plain, int8 and int4, one scale per token and head.

Dimension letters: `B` sequences, `G` key/value heads, `L` capacity in tokens, `C` channels of a head; `...` is any leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import FormatError

__all__ = ["KV_FORMATS", "KVLayer", "allocate_kv", "dequantize_kv", "quantize_kv"]

KV_FORMATS = ("plain", "int8", "int4")

_LARGEST = 65504.0  # in float16
# Elements of a sequence that the CPU dequantizes at a time. ms for keys and values of 16,384 tokens of 8 heads on one thread, int8 / int4:
# all at a time 178 / 258, 2^20 44 / 74, 2^19 44 / 53, 2^17 53 / 58.
_PIECE_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class KVLayer:
    """Keys (after the rotary embedding) and values of one layer, with room for L tokens in each of B sequences. All parts are contiguous.

    plain  keys, values in the model's dtype [B, G, L, C]; no scales.
    int8   value = step * code, code -127..127:

        keys, values  | e0 | e1 | ... | e(C-1) |     int8 [B, G, L, C]
        scales        | step |                       float16 [B, G, L]

    int4   value = step * code + minimum, code 0..15. The two halves of a head share bytes, so that dequantization needs no interleaving
           (byte addresses grow to the right, the high nibble is drawn first):

        keys, values  | e(C/2) e0 | e(C/2+1) e1 | ... | e(C-1) e(C/2-1) |     uint8 [B, G, L, C/2]
        scales        | step | minimum |                                      float16 [B, G, L, 2]
    """

    format: str
    """One of `KV_FORMATS`."""
    keys: torch.Tensor
    """Codes of the keys, or in a plain cache the keys themselves, after the rotary embedding."""
    values: torch.Tensor
    """The values, in the same layout."""
    key_scales: torch.Tensor | None = None
    """Scales of the keys; None in a plain cache."""
    value_scales: torch.Tensor | None = None
    """Scales of the values; None in a plain cache."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(part.nbytes for part in (self.keys, self.values, self.key_scales, self.value_scales) if part is not None)

    def row(self, index: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [G, tokens, C] of the first `tokens` tokens of one sequence; a view if the cache is plain and has `dtype`."""
        keys, values = self.keys[index, :, :tokens], self.values[index, :, :tokens]
        if self.key_scales is None or self.value_scales is None:
            return keys.to(dtype), values.to(dtype)
        key_scales, value_scales = self.key_scales[index, :, :tokens], self.value_scales[index, :, :tokens]
        return _dequantized_row(keys, key_scales, self.format, dtype), _dequantized_row(values, value_scales, self.format, dtype)


def allocate_kv(format: str, B: int, G: int, L: int, C: int, dtype: torch.dtype, device: torch.device) -> KVLayer:
    """A cache of zeros; `dtype` is the dtype of plain keys and values.

    Raises:
        FormatError: an unknown format, or an odd C where two elements share a byte.
    """
    _check(format, C)
    if format == "plain":
        keys, values = (torch.zeros(B, G, L, C, dtype=dtype, device=device) for _ in range(2))
        return KVLayer(format, keys, values)
    width, code = (C, torch.int8) if format == "int8" else (C // 2, torch.uint8)
    shape = (B, G, L) if format == "int8" else (B, G, L, 2)
    keys, values = (torch.zeros(B, G, L, width, dtype=code, device=device) for _ in range(2))
    key_scales, value_scales = (torch.zeros(shape, dtype=torch.float16, device=device) for _ in range(2))
    return KVLayer(format, keys, values, key_scales, value_scales)


def quantize_kv(x: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of `x` [..., C] in the format "int8" or "int4", rounded to nearest, ties to even.

    The step is rounded to float16 first. The codes are computed with the rounded step, in float32 and in the order of the Triton kernel,
    which stores the same bytes. A step of 0 gives codes of 0. Values beyond the range of float16 steps saturate.

    Raises:
        FormatError: a format without codes.
    """
    _check(format, x.shape[-1])
    x = x.float()
    if format == "int8":
        steps = _divided(x.abs().amax(-1), 127).clamp(max=_LARGEST).half()  # [...]
        codes = _codes(x, steps).clamp(-127, 127).round()
        return codes.to(torch.int8), steps
    if format != "int4":
        raise FormatError(f"the format must be 'int8' or 'int4'; found {format!r}. Plain keys and values are stored as they are")
    minimum = x.amin(-1).clamp(-_LARGEST, _LARGEST).half()  # [...]
    steps = _divided(x.amax(-1) - minimum.float(), 15).clamp(0, _LARGEST).half()
    codes = _codes(x - minimum.float().unsqueeze(-1), steps).clamp(0, 15).round().to(torch.uint8)
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4), torch.stack((steps, minimum), dim=-1)


def dequantize_kv(codes: torch.Tensor, scales: torch.Tensor, format: str, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized values [..., C], computed in float32 and rounded to `dtype`; `codes` and `scales` as `quantize_kv` returns them.

    Raises:
        FormatError: a format without codes.
    """
    if format == "int8":
        return (codes.float() * scales.float().unsqueeze(-1)).to(dtype)
    if format != "int4":
        raise FormatError(f"the format must be 'int8' or 'int4'; found {format!r}. Plain keys and values are stored as they are")
    step, minimum = scales.float().unsqueeze(-1).unbind(-2)  # [..., 1]
    return (torch.cat((codes & 15, codes >> 4), dim=-1).float() * step + minimum).to(dtype)


def _dequantized_row(codes: torch.Tensor, scales: torch.Tensor, format: str, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize_kv` for one sequence [G, tokens, ...]; on the CPU some tokens at a time, so that float32 temporaries stay in cache."""
    G, tokens, width = codes.shape
    step = max(1, _PIECE_ELEMENTS // (G * width))
    if codes.device.type != "cpu" or tokens <= step:
        return dequantize_kv(codes, scales, format, dtype)
    values = torch.empty(G, tokens, width * (2 if format == "int4" else 1), dtype=dtype)
    for first in range(0, tokens, step):
        piece = slice(first, first + step)
        values[:, piece] = dequantize_kv(codes[:, piece], scales[:, piece], format, dtype)
    return values


def _divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """x / by, rounded once: torch multiplies by the reciprocal of a plain number on a GPU."""
    return x / torch.full_like(x, by)


def _codes(x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """x / steps, 0 where the step is 0."""
    steps = steps.float().unsqueeze(-1)
    return torch.where(steps > 0, x / torch.where(steps > 0, steps, 1.0), 0.0)


def _check(format: str, C: int) -> None:
    if format not in KV_FORMATS:
        raise FormatError(f"the format of a KV cache must be one of {', '.join(KV_FORMATS)}; found {format!r}")
    if format == "int4" and C % 2:
        raise FormatError(f"two int4 elements share a byte, so heads must have an even number of channels; found {C}")
