"""Writes DBRX checkpoints of any size with random weights, shard by shard, for benchmarks and for tests of memory limits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from dbrx_q.checkpoint.folder import INDEX_NAME
from dbrx_q.checkpoint.layout import DenseTensor, dense_tensors
from dbrx_q.checkpoint.safetensors_file import SafetensorsWriter
from dbrx_q.checkpoint.staging import staged_folder
from dbrx_q.config import DbrxConfig
from dbrx_q.config_values import shortened
from dbrx_q.errors import RequestError

__all__ = ["dbrx_layer_config", "write_checkpoint"]

_STEP_ELEMENTS = 1 << 24


def dbrx_layer_config(n_layers: int = 1, vocab_size: int = 4096) -> DbrxConfig:
    """DBRX's own dimensions (d_model 6144, 48 heads, 16 experts of 10752) with few layers and a small vocabulary."""
    return DbrxConfig(
        d_model=6144,
        n_heads=48,
        n_layers=n_layers,
        max_seq_len=32768,
        vocab_size=vocab_size,
        attn_config={"clip_qkv": 8.0, "kv_n_heads": 8, "rope_theta": 500000.0},
        ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        torch_dtype="bfloat16",
    )


def write_checkpoint(config: DbrxConfig, folder: Path, *, seed: int = 0) -> None:
    """Write a bfloat16 checkpoint of `config` into `folder`: normally distributed weights, norm weights of one.

    The same seed gives the same bytes. The checkpoint has no tokenizer: prompts are token ids.

    Raises:
        RequestError: `folder` is not empty or not writable, or its disk has too little free space.
    """
    if not 0 <= seed < 1 << 63:
        raise RequestError(f"the seed of a synthetic checkpoint must be from 0 to 2^63 - 1; found {shortened(seed)}")
    with staged_folder(folder, sum(2 * math.prod(tensor.shape) for tensor in dense_tensors(config))) as partial:
        _write(config, partial, seed)


def _write(config: DbrxConfig, folder: Path, seed: int) -> None:
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    layers = [-1, *range(config.n_layers)]
    weight_map: dict[str, str] = {}
    for number, layer in enumerate(layers, 1):
        tensors = [tensor for tensor in dense_tensors(config) if tensor.layer == layer]
        name = f"model-{number:05d}-of-{len(layers):05d}.safetensors"
        writer = SafetensorsWriter(folder / name, [(tensor.name, torch.bfloat16, tensor.shape) for tensor in tensors])
        for tensor in tensors:
            writer.write(tensor.name, _values(tensor, config.initializer_range, generator))
            weight_map[tensor.name] = name
        writer.close()
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def _values(tensor: DenseTensor, std: float, generator: torch.Generator) -> torch.Tensor:
    out = torch.ones(tensor.shape, dtype=torch.bfloat16)
    if out.ndim == 2:
        for piece in out.view(-1).split(_STEP_ELEMENTS):
            piece.copy_(torch.empty(piece.shape).normal_(0.0, std, generator=generator))
    return out
