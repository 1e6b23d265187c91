"""Writes a plain bfloat16 DBRX checkpoint as a GGUF file in bfloat16, from which llama-quantize quantizes: `gguf_copy.py SRC DST`.

Tensors are read and written one by one. The file has no tokenizer: llama.cpp's benchmarks take random token ids.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import DenseTensor, dense_tensors, kind_of, oriented
from dbrx_q.config import NORM_EPS, DbrxConfig
from dbrx_q.sources.gguf_names import gguf_name

__all__ = ["write_gguf"]

_FLOAT32_KINDS = ("norms", "router")  # llama.cpp's converter stores them in float32


def write_gguf(source: Path, destination: Path) -> None:
    """Write a plain checkpoint with the names and orientations of llama.cpp's converter.

    Args:
        source: folder of the checkpoint.
        destination: the GGUF file; it is complete or absent.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    partial = destination.with_suffix(".partial")
    with Checkpoint(source) as checkpoint:
        tensors = dense_tensors(checkpoint.config)
        writer = GGUFWriter(partial, "dbrx")
        _add_metadata(writer, checkpoint.config)
        for tensor in tensors:
            shape = (tensor.experts, *tensor.matrix) if tensor.experts else tensor.shape
            name, elements = gguf_name(tensor.name), math.prod(shape)
            if kind_of(tensor.name) in _FLOAT32_KINDS:
                writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * elements)
            else:
                writer.add_tensor_info(name, shape, np.dtype(np.uint16), 2 * elements, GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_values(checkpoint.read(tensor.name), tensor))
        writer.close()
    partial.rename(destination)


def _values(weight: torch.Tensor, tensor: DenseTensor) -> np.ndarray[Any, Any]:
    """The tensor as GGUF stores it, bfloat16 as 16-bit words."""
    if kind_of(tensor.name) in _FLOAT32_KINDS:
        return weight.float().numpy()
    if tensor.experts:
        weight = oriented(weight, tensor)  # experts, rows, reduction axis
    return weight.contiguous().view(torch.uint16).numpy()


def _add_metadata(writer: Any, config: DbrxConfig) -> None:
    """The configuration, under llama.cpp's keys."""
    from gguf import LlamaFileType

    attention, ffn = config.attn_config, config.ffn_config
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(ffn.ffn_hidden_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(attention.kv_n_heads)
    writer.add_clamp_kqv(attention.clip_qkv)
    writer.add_layer_norm_eps(NORM_EPS)
    writer.add_rope_freq_base(attention.rope_theta)
    writer.add_expert_count(ffn.moe_num_experts)
    writer.add_expert_used_count(ffn.moe_top_k)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
