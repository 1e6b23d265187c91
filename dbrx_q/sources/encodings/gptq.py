"""GPTQ, as AutoGPTQ and GPTQModel store it: codes of 2, 3, 4 or 8 bits that are packed along the reduction axis.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", is how they are chosen; this
module reads what is stored. Dimension letters: `N` output features, `K` input features (the reduction axis), `G` group size, `n` groups.

    value[j, k] = scales[g, j] * (code[k, j] - zero[g, j]),  g = g_idx[k], or k // G where g_idx is absent

| part | dtype | shape | holds |
|---|---|---|---|
| `qweight` | int32 | [K * bits / 32, N] | codes; those of output j are column j, read from top to bottom, lowest bits first |
| `qzeros` | int32 | [n, N * bits / 32] | zero-points; those of group g are row g, read from left to right, lowest bits first |
| `scales` | float16 (or another float) | [n, N] | the scale of each group |
| `g_idx` | int32 | [K] | the group of each input; optional |
| `bias` | a float | [N] | optional; zeros, since no layer of DBRX has a bias |

A column of qweight for 4 bits, the highest nibble of a word drawn first; the column's bytes are the row j of our int4, which is its
transpose:

    word 0 | k7 k6 k5 k4 k3 k2 k1 k0 |
    word 1 | k15 ...              k8 |

Codes of 3 bits straddle words: 32 of them take three words.

Zero-points: `gptq` (the first version of the format) stores zero - 1, `gptq_v2` the zero itself. For the first version AutoGPTQ's kernels
compute (stored + 1) modulo 2^bits. GPTQModel subtracts and adds 1 in all fields of a word at once (0x11111111 for 4 bits) so that a
zero-point 0 borrows from the field above it; its files are read in the same way. The two differ only where a stored field is all ones.

Groups are told from the shapes, because GPTQModel's `dynamic` gives modules their own bits and groups. With desc_act ("act-order")
columns are quantized in the order of their importance and g_idx is arbitrary; no format of ours has that. With static_groups it is k // G
nevertheless. `Gptq` decides by config.json, and `repack` checks g_idx.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.config_values import shortened
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.cpu.repack_codes import unpack_codes, unpack_nibbles
from dbrx_q.kernels.formats import int4
from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.kernels.formats.int8 import Int8Weight
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

from .base import NO_KEEP, Encoding, Parts, StoredLinear
from .exact_groups import exact_group, group_index
from .plain import FLOATS

__all__ = ["Gptq", "named_layout"]

_BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in every field of a word
_FORMATS = ("gptq", "gptq_v2")
_AGAIN = "Quantize the original weights again in a number of bits that is read, or leave this layer out"


class Gptq(Encoding):
    """The GPTQ layers of a checkpoint.

    Args:
        config: `quantization_config` of config.json, or quantize_config.json.
        source: the file that it is from, for messages.

    Raises:
        CheckpointError: a layout that dbrx_q does not read, such as Marlin's.
    """

    suffixes = frozenset({"qweight", "qzeros", "scales"})
    optional = frozenset({"g_idx", "bias"})

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        layout = named_layout(config) or "gptq"
        if layout not in _FORMATS:
            raise CheckpointError(
                f"{source}: a GPTQ checkpoint must have the checkpoint_format {' or '.join(_FORMATS)}; found {shortened(layout)}. "
                "Quantize the original weights again and save them with GPTQModel's format=gptq"
            )
        dynamic = config.get("dynamic")
        overrides = [value for value in dynamic.values() if isinstance(value, Mapping)] if isinstance(dynamic, Mapping) else []
        self._group_size = config.get("group_size", -1)
        self._minus_one = layout == "gptq"
        self._by_words = self._minus_one and _quantizer(config).startswith("gptqmodel")
        settings = [{**config, **override} for override in [{}, *overrides]]
        self._in_order = not any(setting.get("desc_act", False) and not setting.get("static_groups", False) for setting in settings)
        self._symmetric = all(setting.get("sym", False) is True for setting in settings)

    def check(self, linear: StoredLinear) -> None:
        N, K = linear.shape
        words = linear.parts["qweight"].shape
        bits = next((bits for bits in _BITS if words == (K * bits // 32, N)), 0)
        if not bits or K % 32:
            shapes = " or ".join(str([K * bits // 32, N]) for bits in _BITS)
            raise linear.wrong(f"qweight must be {shapes} for a weight {[N, K]} in {', '.join(map(str, _BITS))} bits", list(words), _AGAIN)
        if N * bits % 32:
            raise linear.wrong(f"outputs must be a multiple of {32 // math.gcd(32, bits)}, so that zero-points fill whole words", N, _AGAIN)
        linear.expect("qweight", words, torch.int32)
        groups = linear.parts["scales"].shape[0] if linear.parts["scales"].shape else 0
        if not 0 < groups <= K or self._group(linear) == 0:
            raise linear.wrong(f"scales must have a row for each group of the {K} inputs", list(linear.parts["scales"].shape))
        linear.expect("scales", (groups, N), *FLOATS)
        linear.expect("qzeros", (groups, N * bits // 32), torch.int32)
        if not self._in_order and groups > 1 and "g_idx" not in linear.parts:
            raise linear.wrong("act-order (desc_act) must have g_idx, which says the group of each input", "none")
        if "g_idx" in linear.parts:
            linear.expect("g_idx", (K,), torch.int32, torch.int64)
        if "bias" in linear.parts:
            linear.expect("bias", (N,), *FLOATS)

    def check_statistics(self, linear: StoredLinear, parts: Parts) -> None:
        if "bias" in linear.parts:
            _check_bias(linear, {"bias": parts.whole("bias")})

    def label(self, linear: StoredLinear) -> str:
        order = "" if self._in_order else " act-order"
        return f"GPTQ int{_bits(linear)}:{self._group(linear)}{order}"

    def dtype(self, linear: StoredLinear) -> torch.dtype:
        return torch.float32

    def exact_format(self, linear: StoredLinear) -> TensorFormat | None:
        bits = _bits(linear)
        if not self._in_order or not linear.parts["scales"].has_dtype(torch.float16) or (bits == 8 and not self._symmetric):
            return None
        return exact_group("int8" if bits == 8 else "int4", linear.shape[1], self._group(linear))

    def dequantize(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._rows(linear, parts, 0, linear.shape[0])

    def read_rows(self, linear: StoredLinear, parts: Parts, first: int, count: int) -> torch.Tensor:
        return self._rows(linear, {suffix: parts.whole(suffix) for suffix in linear.parts}, first, count)

    def repack(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        fmt, bits, G = self.exact_format(linear), _bits(linear), self._group(linear)
        assert fmt is not None
        _check_bias(linear, parts)
        if "g_idx" in parts and not torch.equal(parts["g_idx"].long(), torch.arange(linear.shape[1]) // G):
            raise linear.wrong(
                "inputs must be in groups of neighbours, because desc_act is false in the configuration", "another g_idx", NO_KEEP
            )
        linear.check_finite("scales", parts["scales"])
        index = group_index(linear.shape[1], G, fmt.group_size)
        scales = parts["scales"].T[:, index].contiguous()
        zeros = self._zeros(linear, parts["qzeros"])
        stream = _stream(parts["qweight"])
        if bits == 8:
            if not (zeros == 128).all():
                raise linear.wrong(
                    "8-bit zero-points must be 128, because sym is true in the configuration", int(zeros[zeros != 128][0]), NO_KEEP
                )
            return Int8Weight(stream.bitwise_xor_(128).view(torch.int8), scales, fmt.group_size)
        return Int4Weight(
            stream if bits == 4 else unpack_nibbles(stream, bits), scales, int4.pack(zeros.T[:, index].contiguous()), fmt.group_size
        )

    def _rows(self, linear: StoredLinear, parts: Mapping[str, torch.Tensor], first: int, count: int) -> torch.Tensor:
        """Rows first .. first+count-1 in float32; every operation is exact where the scales are float16 or bfloat16."""
        _check_bias(linear, parts)
        K, G, end, bits = linear.shape[1], self._group(linear), first + count, _bits(linear)
        groups = linear.parts["scales"].shape[0]
        scales = parts["scales"][:, first:end].T.float()  # [count, n]
        linear.check_finite("scales", scales)
        zeros = self._zeros(linear, parts["qzeros"])[:, first:end].T.float()
        values = unpack_codes(_stream(parts["qweight"][:, first:end]), bits).float()
        in_order = torch.arange(K) // G
        index = parts["g_idx"].long() if "g_idx" in parts else in_order
        if K % G == 0 and torch.equal(index, in_order):
            grouped = values.unflatten(-1, (-1, G))
            grouped -= zeros.unsqueeze(-1)
            grouped *= scales.unsqueeze(-1)
            return values
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise linear.wrong(f"g_idx must be from 0 to {groups - 1}", [int(index.min()), int(index.max())])
        values -= zeros[:, index]
        values *= scales[:, index]
        return values

    def _zeros(self, linear: StoredLinear, words: torch.Tensor) -> torch.Tensor:
        """The zero-points, uint8 [n, N]."""
        bits = _bits(linear)
        if self._by_words and bits in _ONES:
            return unpack_codes((words + _ONES[bits]).view(torch.uint8), bits)
        zeros = unpack_codes(words.view(torch.uint8), bits)
        return (zeros + 1) & ((1 << bits) - 1) if self._minus_one else zeros

    def _group(self, linear: StoredLinear) -> int:
        """G: the configuration's where the number of groups agrees, otherwise K/n; 0 where n does not divide K."""
        K, groups = linear.shape[1], linear.parts["scales"].shape[0]
        size = self._group_size
        if isinstance(size, int) and size > 0 and -(-K // size) == groups:
            return min(size, K)
        return 0 if K % groups else K // groups


def named_layout(config: Mapping[str, Any]) -> object:
    """The layout that a configuration names, such as "gptq_v2"; None where it names none."""
    return "marlin" if config.get("is_marlin_format") else config.get("checkpoint_format") or config.get("format")


def _bits(linear: StoredLinear) -> int:
    return linear.parts["qweight"].shape[0] * 32 // linear.shape[1]


def _stream(words: torch.Tensor) -> torch.Tensor:
    """The codes of each output as bytes: uint8 [N, K * bits / 8], from int32 [K * bits / 32, N]."""
    return words.T.contiguous().view(torch.uint8)


def _check_bias(linear: StoredLinear, parts: Mapping[str, torch.Tensor]) -> None:
    if "bias" in parts and parts["bias"].any():
        raise linear.wrong("bias must be zero in a DBRX", parts["bias"][parts["bias"] != 0][0].item(), "Is it a DBRX checkpoint?")


def _quantizer(config: Mapping[str, Any]) -> str:
    """The program that wrote the checkpoint, such as "gptqmodel:7.7.0"; "" where it is not said."""
    meta = config.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = quantizer if isinstance(quantizer, list) else [quantizer]
    return next((name.lower() for name in names if isinstance(name, str)), "")
