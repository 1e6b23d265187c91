"""What a model takes, by what it is for: bytes from its configuration alone.

Dimension letters: `L` layers, `T` tokens that run together, `D` d_model, `F` ffn hidden, `A` active experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dbrx_q.checkpoint.layout import TensorFormat, dense_tensors, parts_of
from dbrx_q.config import DbrxConfig
from dbrx_q.kernels.cpu.choice import tile_bytes
from dbrx_q.kernels.formats.kv import allocate_kv

from .expert_kinds import ExpertKind, expert_kinds

__all__ = ["PREFILL_TOKENS", "Footprint", "MemoryRequest", "step_tokens"]

PREFILL_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens that a prefill step brings at most: enough to keep matrix units busy, few enough to bound memory."""

_FEW_ROWS = 4  # that every chip multiplies without decoding a weight, see `kernels/cpu/choice.py`


@dataclass(frozen=True)
class MemoryRequest:
    """What memory is to be kept for. context: tokens of a sequence. batch: sequences together. kv_format: "plain", "int8" or "int4".
    step_tokens: tokens that one forward pass brings at most; None for a prefill step. logit_rows: of how many tokens logits are held at
    once; None for one of each sequence. dtype: of activations; None for the checkpoint's. fallback: formats of a fallback copy of the
    experts, which answers for those on disk; None without one."""

    context: int
    batch: int = 1
    kv_format: str = "plain"
    step_tokens: int | None = None
    logit_rows: int | None = None
    dtype: torch.dtype | None = None
    fallback: Mapping[str, TensorFormat] | None = None


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model by what they are for. kinds, dense, kv: by layer; fallback: the kinds of a fallback copy, none without.
    workspace: of
    activations on the host, on a GPU, and on a host that computes experts for GPUs."""

    kinds: list[ExpertKind]
    fallback: list[ExpertKind]
    n_experts: int
    top_k: int
    dense: list[int]
    embedding: int
    head: int
    kv: int
    host_workspace: int
    gpu_workspace: int
    helper_workspace: int

    @classmethod
    def of(cls, config: DbrxConfig, formats: Mapping[str, TensorFormat], request: MemoryRequest) -> Footprint:
        """Of a model whose tensors are packed as `formats` says, for what is asked of it."""
        dtype = request.dtype or getattr(torch, config.torch_dtype or "bfloat16")
        dense, embedding, head = [0] * config.n_layers, 0, 0
        for tensor in dense_tensors(config):
            if tensor.experts:
                continue
            fmt = formats.get(tensor.name)
            if fmt is None:
                size = math.prod(tensor.shape) * dtype.itemsize
            else:
                size = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts_of(tensor, fmt.in_memory))
            if tensor.layer >= 0:
                dense[tensor.layer] += size
            elif ".wte." in tensor.name:
                embedding += size
            else:
                head += size
        shape = request.batch, config.attn_config.kv_n_heads, request.context, config.head_dim
        kv = allocate_kv(request.kv_format, *shape, dtype, torch.device("meta")).nbytes
        tokens = {kind: step_tokens(config, request, kind) for kind in PREFILL_TOKENS}
        rows = request.batch if request.logit_rows is None else request.logit_rows
        host, gpu = (_workspace(config, tokens[kind], rows, width) for kind, width in (("cpu", 4), ("cuda", dtype.itemsize)))
        ffn = config.ffn_config
        stored = getattr(torch, config.torch_dtype or "bfloat16")
        plain = {tensor.name: stored for tensor in dense_tensors(config) if tensor.experts and tensor.name not in formats}
        kinds = expert_kinds(config, formats, dtype, plain)
        fallback = expert_kinds(config, request.fallback, dtype) if request.fallback else []
        decoded = _decoded_rows(config, formats, rows)
        helper = _helper_workspace(config, tokens["cuda"]) + decoded
        return cls(kinds, fallback, ffn.moe_num_experts, ffn.moe_top_k, dense, embedding, head, kv, host + decoded, gpu, helper)


def step_tokens(config: DbrxConfig, request: MemoryRequest, kind: str) -> int:
    """Tokens of one forward pass that memory is kept for on a "cpu" or "cuda" device."""
    return min(request.step_tokens or PREFILL_TOKENS[kind], request.batch * min(request.context, config.max_seq_len))


def _workspace(config: DbrxConfig, T: int, logit_rows: int, width: int) -> int:
    """Residual stream, norms, q/k/v and the routed sum, gate and up of every active pair, and the logits."""
    D, F, A = config.d_model, config.ffn_config.ffn_hidden_size, config.ffn_config.moe_top_k
    return T * width * (8 * D + A * (D + 2 * F)) + 4 * logit_rows * config.vocab_size


def _helper_workspace(config: DbrxConfig, T: int) -> int:
    """Tokens that came from a GPU and the sum that goes back, a row of every pair before and after, and one expert with all tokens."""
    D, F, A = config.d_model, config.ffn_config.ffn_hidden_size, config.ffn_config.moe_top_k
    return 4 * T * (2 * D + 2 * A * D + D + 2 * F)


def _decoded_rows(config: DbrxConfig, formats: Mapping[str, TensorFormat], logit_rows: int) -> int:
    """What the CPU decodes at a time of the packed weight of which that is most; few rows take dot products on its codes instead."""
    D, F = config.d_model, config.ffn_config.ffn_hidden_size
    sizes = [0]
    for tensor in dense_tensors(config):
        if tensor.name not in formats or ".wte." in tensor.name or ("lm_head" in tensor.name and logit_rows <= _FEW_ROWS):
            continue
        sizes += [tile_bytes(F, D), tile_bytes(D, F)] if tensor.experts else [tile_bytes(tensor.shape[0], tensor.shape[1])]
    return max(sizes)
