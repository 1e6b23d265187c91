"""The bytes that a model takes, by purpose, from its configuration alone.

Dimension letters: `L` layers, `T` tokens that run together, `D` d_model, `F` ffn hidden, `A` active experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dbrx_q.checkpoint.layout import TensorFormat, dense_tensors, kind_of, parts_of
from dbrx_q.config import DbrxConfig
from dbrx_q.config_values import shortened
from dbrx_q.errors import RequestError
from dbrx_q.kernels.cpu.choice import tile_bytes
from dbrx_q.kernels.formats.kv import allocate_kv

from .expert_kinds import ExpertKind, expert_kinds

__all__ = ["PREFILL_TOKENS", "Footprint", "MemoryRequest", "step_tokens"]

PREFILL_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens of one prefill step at most: enough to keep matrix units busy, few enough to bound memory."""

_MOST = {"batch": 1 << 16, "step_tokens": 1 << 24, "logit_rows": 1 << 24}
_FEW_ROWS = 4  # rows that every chip multiplies without dequantizing a weight, see `kernels/cpu/choice.py`


@dataclass(frozen=True)
class MemoryRequest:
    """The use that memory is reserved for."""

    context: int
    """Tokens of a sequence."""
    batch: int = 1
    """Sequences that run together."""
    kv_format: str = "plain"
    """Of keys and values: "plain", "int8" or "int4"."""
    step_tokens: int | None = None
    """Tokens of one forward pass at most; None for a prefill step."""
    logit_rows: int | None = None
    """Tokens whose logits are held at once; None for one of each sequence."""
    dtype: torch.dtype | None = None
    """Of activations; None for the checkpoint's."""
    fallback: Mapping[str, TensorFormat] | None = None
    """Formats of a fallback copy of the experts, which is used for experts on disk; None without one."""

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if isinstance(value, int) and value > most:
                raise RequestError(f"{name} must be at most {most:,}; found {shortened(value)}")


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model by purpose."""

    kinds: list[ExpertKind]
    """The kind of every layer's experts."""
    fallback: list[ExpertKind]
    """The kind of every layer's experts in the fallback copy; empty without one."""
    n_experts: int
    """Experts of each layer."""
    top_k: int
    """Active experts of a token."""
    dense: list[int]
    """Bytes of every layer's weights except experts."""
    embedding: int
    """Bytes of the embedding."""
    head: int
    """Bytes of the last norm and the head."""
    kv: int
    """Bytes of keys and values of one layer."""
    host_workspace: int
    """Bytes of activations where the host computes the model."""
    gpu_workspace: int
    """Bytes of activations on a GPU."""
    offload_workspace: int
    """Bytes of activations on a host that computes missed experts for GPUs."""

    @classmethod
    def of(cls, config: DbrxConfig, formats: Mapping[str, TensorFormat], request: MemoryRequest) -> Footprint:
        """The footprint of a model whose tensors are packed in `formats`, for a request."""
        dtype = request.dtype or config.dtype
        dense, embedding, head = _dense_bytes(config, formats, dtype)
        shape = request.batch, config.attn_config.kv_n_heads, request.context, config.head_dim
        kv = allocate_kv(request.kv_format, *shape, dtype, torch.device("meta")).nbytes
        tokens = {kind: step_tokens(config, request, kind) for kind in PREFILL_TOKENS}
        rows = request.batch if request.logit_rows is None else request.logit_rows
        host, gpu = (_workspace(config, tokens[kind], rows, width) for kind, width in (("cpu", 4), ("cuda", dtype.itemsize)))
        ffn = config.ffn_config
        stored = config.dtype
        plain = {tensor.name: stored for tensor in dense_tensors(config) if tensor.experts and tensor.name not in formats}
        kinds = expert_kinds(config, formats, dtype, plain)
        fallback = expert_kinds(config, request.fallback, dtype) if request.fallback else []
        dequantized = _dequantized_bytes(config, formats, rows)
        offload = _offload_workspace(config, tokens["cuda"]) + dequantized
        return cls(kinds, fallback, ffn.moe_num_experts, ffn.moe_top_k, dense, embedding, head, kv, host + dequantized, gpu, offload)


def step_tokens(config: DbrxConfig, request: MemoryRequest, kind: str) -> int:
    """Tokens of the largest forward pass that memory is reserved for on a device of type `kind`, "cpu" or "cuda"."""
    return min(request.step_tokens or PREFILL_TOKENS[kind], request.batch * min(request.context, config.max_seq_len))


def _dense_bytes(config: DbrxConfig, formats: Mapping[str, TensorFormat], dtype: torch.dtype) -> tuple[list[int], int, int]:
    """Bytes of all weights except experts: (of every layer, of the embedding, of the last norm and the head)."""
    layers, embedding, head = [0] * config.n_layers, 0, 0
    for tensor in dense_tensors(config):
        if tensor.experts:
            continue
        fmt = formats.get(tensor.name)
        if fmt is None:
            size = math.prod(tensor.shape) * dtype.itemsize
        else:
            size = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts_of(tensor, fmt.in_memory))
        if tensor.layer >= 0:
            layers[tensor.layer] += size
        elif kind_of(tensor.name) == "embedding":
            embedding += size
        else:
            head += size
    return layers, embedding, head


def _workspace(config: DbrxConfig, T: int, logit_rows: int, width: int) -> int:
    """Bytes of the residual stream, norms, q/k/v and routed sum, of gate and up of every active (token, expert) pair, and of the logits."""
    D, F, A = config.d_model, config.ffn_config.ffn_hidden_size, config.ffn_config.moe_top_k
    return T * width * (8 * D + A * (D + 2 * F)) + 4 * logit_rows * config.vocab_size


def _offload_workspace(config: DbrxConfig, T: int) -> int:
    """Bytes of a GPU's tokens and their sum, of the input and output row of every pair, and of one expert with all tokens."""
    D, F, A = config.d_model, config.ffn_config.ffn_hidden_size, config.ffn_config.moe_top_k
    return 4 * T * (2 * D + 2 * A * D + D + 2 * F)


def _dequantized_bytes(config: DbrxConfig, formats: Mapping[str, TensorFormat], logit_rows: int) -> int:
    """The largest piece of a packed weight that the CPU dequantizes at once. For few rows it multiplies the codes instead."""
    D, F = config.d_model, config.ffn_config.ffn_hidden_size
    sizes = [0]
    for tensor in dense_tensors(config):
        kind = kind_of(tensor.name)
        if tensor.name not in formats or kind == "embedding" or (kind == "head" and logit_rows <= _FEW_ROWS):
            continue
        sizes += [tile_bytes(F, D), tile_bytes(D, F)] if tensor.experts else [tile_bytes(tensor.shape[0], tensor.shape[1])]
    return max(sizes)
