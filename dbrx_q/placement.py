"""What a model takes in memory, from its configuration alone: no weight is read, none need be downloaded.

Dimension letters: `B` sequences, `L` tokens of context, `T` tokens that run together, `D` d_model, `F` ffn hidden, `A` active experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .config import DbrxConfig
from .kernels.kv import allocate_kv
from .layout import TensorFormat, dense_tensors, kind_of, parts_of

__all__ = ["MemoryPlan", "plan_memory"]

_INTERPRETER_BYTES = 400 << 20  # Python, torch, numba and their compiled code: 350 to 390 MB resident, seen on Linux
_PREFILL_TOKENS = 512  # as in `decoding.py`, on the CPU


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of host memory by kind. budget: what may be used, None where none was given."""

    dense: int
    experts: int
    kv_cache: int
    workspace: int
    interpreter: int
    budget: int | None

    @property
    def total(self) -> int:
        """Everything."""
        return self.dense + self.experts + self.kv_cache + self.workspace + self.interpreter

    @property
    def fits(self) -> bool:
        """Whether the budget holds everything."""
        return self.budget is None or self.total <= self.budget


def plan_memory(
    config: DbrxConfig,
    formats: Mapping[str, TensorFormat],
    *,
    context: int,
    batch: int = 1,
    budget: int | None = None,
    kv_format: str = "plain",
) -> MemoryPlan:
    """The host memory of a model whose tensors are packed as `formats` says, with room for `batch` sequences of `context` tokens.

    `kv_format` is that of the KV cache: "plain" in the model's dtype, "int8" or "int4".
    """
    dtype = getattr(torch, config.torch_dtype or "bfloat16")
    sizes = {True: 0, False: 0}
    for tensor in dense_tensors(config):
        fmt = formats.get(tensor.name)
        if fmt is None:
            size = math.prod(tensor.shape) * dtype.itemsize
        else:
            size = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts_of(tensor, fmt.in_memory))
        sizes[kind_of(tensor.name) == "experts"] += size
    shape = batch, config.attn_config.kv_n_heads, context, config.head_dim
    kv = config.n_layers * allocate_kv(kv_format, *shape, dtype, torch.device("meta")).nbytes
    T, A = min(_PREFILL_TOKENS, batch * context), config.ffn_config.moe_top_k
    # Residual stream, norms, q/k/v and the routed sum in float32, and gate and up of every active pair.
    workspace = T * 4 * (8 * config.d_model + A * (config.d_model + 2 * config.ffn_config.ffn_hidden_size))
    workspace += 4 * batch * config.vocab_size
    return MemoryPlan(sizes[False], sizes[True], kv, workspace, _INTERPRETER_BYTES, budget)
