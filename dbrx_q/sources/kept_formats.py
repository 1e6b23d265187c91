"""What can be said of the weights of any program before they are read: which stay packed, and how they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dbrx_q.checkpoint.layout import PLAIN_KINDS, TensorFormat, kind_of, may_have
from dbrx_q.checkpoint.stored_weights import StoredWeights

__all__ = ["exact_formats", "format_label", "is_packed_by_us", "kept_formats"]


def is_packed_by_us(raw_config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a checkpoint that dbrx_q quantized."""
    quantization = raw_config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "dbrx_q"


def exact_formats(weights: StoredWeights) -> dict[str, TensorFormat]:
    """The formats of the tensors whose values a format of ours holds exactly, by name."""
    exact = {name: weights.exact_format(name) for name in weights.tensors}
    return {name: fmt for name, fmt in exact.items() if fmt is not None and may_have(name, fmt)}


def kept_formats(weights: StoredWeights) -> dict[str, TensorFormat]:
    """Of `exact_formats` those of the tensors that stay packed in memory: experts only where all matrices of their layer have one, as
    kernels take the three of an expert together.

    bitsandbytes rounds nf4's values to the dtype that it records. They are measured and run as it computes them, dequantized.
    """
    formats = {name: fmt for name, fmt in exact_formats(weights).items() if fmt.format != "nf4"}
    rounded = {tensor.layer for tensor in weights.tensors.values() if tensor.experts and tensor.name not in formats}
    return {name: fmt for name, fmt in formats.items() if not (weights.tensors[name].experts and weights.tensors[name].layer in rounded)}


def format_label(weights: StoredWeights) -> str:
    """The formats of all matrices but the routers, those of most parameters first, as "GPTQ int4:128 + bfloat16".

    Plain experts among quantized weights are named, as in "bitsandbytes nf4 + bfloat16 experts"; other plain weights are then not.
    """
    plain: dict[str, int] = {}
    quantized: set[str] = set()
    plain_experts: dict[str, None] = {}
    for tensor in weights.tensors.values():
        if kind_of(tensor.name) in PLAIN_KINDS:
            continue
        label = weights.label_of(tensor.name)
        if not weights.is_plain(tensor.name):
            quantized.add(label)
            continue
        plain[label] = plain.get(label, 0) + math.prod(tensor.shape)
        if tensor.experts:
            plain_experts[f"{label} experts"] = None
    if not quantized:
        return " + ".join(sorted(plain, key=lambda label: -plain[label]))
    return " + ".join([*sorted(quantized), *plain_experts])
