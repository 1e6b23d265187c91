"""Upper bounds on a model's speed: bandwidth and matmul rate measured in the same minute, and what a token needs of both.

Dimension letters: `E` experts, `A` active experts, `H`/`G` query and key/value heads, `C` channels of a head, `B` sequences, `D` tokens
in the cache of each sequence, `P` tokens of a prompt, `N` tokens to decode.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch

from dbrx_q.checkpoint.layout import KINDS, dense_tensors, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.kernels.formats.kv import allocate_kv
from dbrx_q.model.modeling import DbrxForCausalLM

from .device_timing import turns

__all__ = ["MATMUL_ON_GPU", "CeilingMeter", "ModelWork", "Need", "Rates", "ceiling", "decode_need", "prefill_need", "touched_experts"]

_BYTES = 1 << 30
# 17 GFLOP: 0.60 TFLOP/s in bfloat16 and 0.21 in float32 on 2 cores with AMX, where twice the size gave 0.66 and 0.13 in 8 times the time.
_MATMUL_ON_CPU = 2048
MATMUL_ON_GPU = 8192
"""Rows and columns of the matrices that measure a GPU's matmul rate."""


@dataclass(frozen=True)
class Rates:
    """Measured rates of the device."""

    bandwidth: float
    """bytes/s: on the CPU, of a sum over one GiB; on a GPU, of a copy of one GiB, bytes read and written."""
    matmul: float
    """Floating-point operations/s of a product of two large matrices in the dtype of activations."""


@dataclass(frozen=True)
class Need:
    """What one token needs at least."""

    nbytes: float
    """Bytes to read from memory."""
    flops: float
    """Floating-point operations, two for a multiplication and its addition."""


class CeilingMeter:
    """Measures `Rates`. Its buffers are kept from one measurement to the next.

    Attributes:
        nbytes: of these buffers.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._on_gpu = device.type == "cuda"
        n = MATMUL_ON_GPU if self._on_gpu else _MATMUL_ON_CPU
        left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        source = torch.ones(_BYTES // 8, dtype=torch.int64, device=device)
        if self._on_gpu:
            source.random_()
        target = torch.empty_like(source) if self._on_gpu else None
        self._moved = _BYTES if target is None else 2 * _BYTES
        self._operations = 2 * n**3
        self._move: Callable[[], object] = source.sum if target is None else lambda: target.copy_(source)
        self._multiply: Callable[[], object] = lambda: torch.mm(left, right, out=out)
        self.nbytes = 3 * out.nbytes + source.nbytes + (0 if target is None else target.nbytes)

    def measure(self, repeats: int = 1) -> Rates:
        """Medians of `repeats` turns. On a GPU, whose clock has to rise first, an additional first turn is not counted."""
        if self._on_gpu:
            times = turns({"move": [self._move], "multiply": [self._multiply]}, repeats=repeats)
            move, multiply = times["move"].seconds, times["multiply"].seconds
        else:
            move = statistics.median(_seconds(self._move) for _ in range(repeats))
            multiply = statistics.median(_seconds(self._multiply) for _ in range(repeats))
        return Rates(self._moved / move, self._operations / multiply)


@dataclass(frozen=True)
class ModelWork:
    """The sizes of a model that determine its speed."""

    config: DbrxConfig
    """Of the model."""
    nbytes: dict[str, int]
    """Bytes in memory by kind of tensor; of all experts, even if only a part of them is resident."""
    parameters: dict[str, int]
    """Parameters by kind of tensor."""
    kv_bytes: float
    """Bytes of one token in the KV cache of all layers."""

    @classmethod
    def of(cls, model: DbrxForCausalLM, kv_format: str) -> ModelWork:
        """The sizes of a loaded model whose KV cache has `kv_format`."""
        config = model.config
        nbytes, parameters = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            nbytes[kind_of(name)] += 0 if tensor.is_meta else tensor.nbytes
        if model.placement is not None:
            nbytes["experts"] = model.placement.expert_bytes
        for dense in dense_tensors(config):
            parameters[kind_of(dense.name)] += math.prod(dense.shape)
        layer = allocate_kv(kv_format, 1, config.attn_config.kv_n_heads, 1, config.head_dim, model.dtype, torch.device("meta"))
        return cls(config, nbytes, parameters, config.n_layers * layer.nbytes)


def touched_experts(experts: int, active: int, tokens: int) -> float:
    """Expected number of a layer's E experts that T tokens use: E (1 - (1 - A / E)^T).

    A token does not use an expert with probability 1 - A / E if all experts are used equally, which training aims at.
    """
    return experts * (1 - (1 - active / experts) ** tokens)


def decode_need(work: ModelWork, *, batch: int, depth: int, tokens: int) -> Need:
    """What each token needs when B sequences of D tokens decode N tokens each, together.

    A step reads every weight except the embedding once, only the experts that some sequence uses, and each sequence's keys and values:
    those of D + (N + 1) / 2 tokens in the mean over the steps, the new token included.
    """
    attended = depth + (tokens + 1) / 2
    step = _weight_bytes(work, batch) + batch * attended * work.kv_bytes
    return Need(step / batch, 2 * (_layer_parameters(work) + work.parameters["head"]) + _attention_flops(work, attended))


def prefill_need(work: ModelWork, *, batch: int, depth: int, tokens: int) -> Need:
    """What each token needs in the prefill of B prompts of P tokens, each after D tokens.

    Every weight except the embedding, and all keys and values, are read at least once for all prompts. Each active parameter takes two
    operations; the head runs for the last token of a prompt only. A token attends to D + (P + 1) / 2 tokens in the mean, itself included.
    """
    nbytes = _weight_bytes(work, batch * tokens) + batch * (depth + tokens) * work.kv_bytes
    flops = 2 * (_layer_parameters(work) + work.parameters["head"] / tokens)
    return Need(nbytes / (batch * tokens), flops + _attention_flops(work, depth + (tokens + 1) / 2))


def ceiling(need: Need, rates: Rates) -> tuple[float, str]:
    """(tokens/s that `rates` allow, which rate limits them: "bandwidth" or "matmul"); the roofline of Williams et al. 2009.

    A token takes at least the longer of the time to read its bytes and the time to compute its operations.
    """
    read, compute = need.nbytes / rates.bandwidth, need.flops / rates.matmul
    return (1 / read, "bandwidth") if read >= compute else (1 / compute, "matmul")


def _weight_bytes(work: ModelWork, tokens: int) -> float:
    """Bytes of the weights that `tokens` tokens read together."""
    ffn = work.config.ffn_config
    share = touched_experts(ffn.moe_num_experts, ffn.moe_top_k, tokens) / ffn.moe_num_experts
    others = sum(size for kind, size in work.nbytes.items() if kind not in ("embedding", "experts"))
    return others + work.nbytes["experts"] * share


def _layer_parameters(work: ModelWork) -> float:
    """Parameters of the matrices in all layers that one token is multiplied by."""
    ffn = work.config.ffn_config
    sizes = work.parameters
    return sizes["attention"] + sizes["router"] + sizes["experts"] * ffn.moe_top_k / ffn.moe_num_experts


def _attention_flops(work: ModelWork, attended: float) -> float:
    """Operations of one token's attention to `attended` tokens in all layers: 2 * 2 H C for each."""
    config = work.config
    return 4 * config.n_layers * config.n_heads * config.head_dim * attended


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
