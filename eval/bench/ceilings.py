"""How fast a model could be at most: what memory and matrix units give in the same minute, and what a token needs of both.

Dimension letters: `E` experts, `A` active experts, `H`/`G` query and key/value heads, `C` channels of a head, `B` sequences, `D` tokens
that a sequence holds already, `P` tokens of a prompt, `N` tokens to decode.
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


@dataclass(frozen=True)
class Rates:
    """What the device was seen to do.

    bandwidth: bytes/s; on the CPU of a plain sum over one GiB, on a GPU of a copy of one GiB, read and written. matmul: floating-point
    operations/s of a product of two large matrices in the dtype of activations.
    """

    bandwidth: float
    matmul: float


@dataclass(frozen=True)
class Need:
    """Of one token. nbytes: that must be read. flops: floating-point operations, two for a multiplication and its addition."""

    nbytes: float
    flops: float


class CeilingMeter:
    """Measures `Rates`, with its matrices and its GiB kept from one measurement to the next.

    Attributes:
        nbytes: that it keeps.
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
        """Medians of `repeats` turns after one that does not count on a GPU, where the clock rises first."""
        if self._on_gpu:
            times = turns({"move": [self._move], "multiply": [self._multiply]}, repeats=repeats)
            move, multiply = times["move"].seconds, times["multiply"].seconds
        else:
            move = statistics.median(_seconds(self._move) for _ in range(repeats))
            multiply = statistics.median(_seconds(self._multiply) for _ in range(repeats))
        return Rates(self._moved / move, self._operations / multiply)


@dataclass(frozen=True)
class ModelWork:
    """What a model is made of, as far as speed goes.

    nbytes, parameters: by kind of tensor; bytes as they lie in memory, of all experts even where it holds a part of them. kv_bytes: of one
    token in the KV cache of all layers.
    """

    config: DbrxConfig
    nbytes: dict[str, int]
    parameters: dict[str, int]
    kv_bytes: float

    @classmethod
    def of(cls, model: DbrxForCausalLM, kv_format: str) -> ModelWork:
        """Of a loaded model, with its cache in `kv_format`."""
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
    """How many of a layer's E experts T tokens go to, in expectation: E (1 - (1 - A / E)^T).

    A token leaves an expert out with probability 1 - A / E where all are asked for equally, which is what their training aims at.
    """
    return experts * (1 - (1 - active / experts) ** tokens)


def decode_need(footprint: ModelWork, *, batch: int, depth: int, tokens: int) -> Need:
    """What each of N tokens needs that B sequences of D tokens are continued by together.

    A step reads every weight but the embedding once, of the experts those that some sequence is sent to, and each sequence's keys and
    values: D + (N + 1) / 2 tokens of them in the mean over the steps, the new one included.
    """
    seen = depth + (tokens + 1) / 2
    step = _weight_bytes(footprint, batch) + batch * seen * footprint.kv_bytes
    return Need(step / batch, 2 * (_layer_parameters(footprint) + footprint.parameters["head"]) + _attention_flops(footprint, seen))


def prefill_need(footprint: ModelWork, *, batch: int, depth: int, tokens: int) -> Need:
    """What each token of B prompts of P tokens needs that follow D tokens each.

    Every weight but the embedding is read at least once for all prompts, and so are keys and values. Operations are two per active
    parameter; the head serves the last token of a prompt alone. A token sees D + (P + 1) / 2 others and itself in the mean.
    """
    nbytes = _weight_bytes(footprint, batch * tokens) + batch * (depth + tokens) * footprint.kv_bytes
    flops = 2 * (_layer_parameters(footprint) + footprint.parameters["head"] / tokens)
    return Need(nbytes / (batch * tokens), flops + _attention_flops(footprint, depth + (tokens + 1) / 2))


def ceiling(need: Need, rates: Rates) -> tuple[float, str]:
    """(tokens/s that `rates` allow, what bounds them: "bandwidth" or "matmul"); the roofline of Williams et al. 2009.

    A token takes at least the longer of reading its bytes and computing its operations.
    """
    read, compute = need.nbytes / rates.bandwidth, need.flops / rates.matmul
    return (1 / read, "bandwidth") if read >= compute else (1 / compute, "matmul")


def _weight_bytes(footprint: ModelWork, tokens: int) -> float:
    """Of the weights that `tokens` tokens read together."""
    ffn = footprint.config.ffn_config
    share = touched_experts(ffn.moe_num_experts, ffn.moe_top_k, tokens) / ffn.moe_num_experts
    others = sum(size for kind, size in footprint.nbytes.items() if kind not in ("embedding", "experts"))
    return others + footprint.nbytes["experts"] * share


def _layer_parameters(footprint: ModelWork) -> float:
    """Of the matrices in all layers that one token is multiplied by."""
    ffn = footprint.config.ffn_config
    sizes = footprint.parameters
    return sizes["attention"] + sizes["router"] + sizes["experts"] * ffn.moe_top_k / ffn.moe_num_experts


def _attention_flops(footprint: ModelWork, seen: float) -> float:
    """Of one token's scores and sums over `seen` tokens in all layers: 2 * 2 H C each."""
    config = footprint.config
    return 4 * config.n_layers * config.n_heads * config.head_dim * seen


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
