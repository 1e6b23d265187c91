"""Checkpoints in trellis formats whose streams are random: every pattern of bits is a stream, so that no search is needed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, oriented
from dbrx_q.config import DbrxConfig
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.kernels.formats.format import Part
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.kernels.quantize import quantize
from dbrx_q.model.loading import model_of_weights
from dbrx_q.quantize.pipeline.format_assignment import override

__all__ = ["SMALL", "mixed", "random_streams", "write_plain"]

SMALL = DbrxConfig(
    d_model=128,
    n_heads=2,
    n_layers=2,
    max_seq_len=128,
    vocab_size=4096,
    attn_config={"kv_n_heads": 1, "rope_theta": 500000.0, "clip_qkv": 8.0},
    ffn_config={"ffn_hidden_size": 192, "moe_num_experts": 16, "moe_top_k": 2},
    initializer_range=0.1,
    torch_dtype="bfloat16",
)
"""Two layers: 128 divides the inputs of w1 and v1, only 64 those of w2, and no row count but d_model is a multiple of 128."""


def write_plain(folder: Path, tokenizer: Path) -> Path:
    """A plain checkpoint of `SMALL` with random weights and the tokenizer of the checkpoint in another folder."""
    write_checkpoint(SMALL, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def random_streams(plain: Path, folder: Path, formats: Mapping[str, TensorFormat]) -> Path:
    """A quantized copy of a plain checkpoint: random streams in trellis formats, other formats rounded to nearest."""
    with Checkpoint(plain) as source:
        tensors = {name: {"format": fmt.format, "group_size": fmt.group_size} for name, fmt in formats.items()}
        config = DbrxConfig.from_pretrained(plain)
        config.quantization_config = {"quant_method": "dbrx_q", "format_version": 1, "tensors": tensors}
        generator = torch.Generator().manual_seed(0)

        def read(tensor: DenseTensor) -> Weight:
            fmt = formats.get(tensor.name)
            weight = source.read(tensor.name)
            if fmt is None:
                return weight
            matrices = oriented(weight, tensor) if tensor.experts else weight[None]
            packed = [
                fmt.load({part.name: _random(part, generator) for part in fmt.parts(*tensor.matrix)})
                if fmt.record.trellis
                else quantize(matrix.contiguous(), fmt)
                for matrix in matrices
            ]
            if not tensor.experts:
                return packed[0]
            stacks = {name: torch.stack([one.parts[name] for one in packed]) for name in packed[0].part_names}
            return type(packed[0]).of(stacks, fmt.group_size)

        model_of_weights(config, read, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(plain / name, folder / name)
    return folder


def mixed(*rules: str) -> dict[str, TensorFormat]:
    """The formats of `SMALL` by the rules of `--tensor`; tensors that none names stay plain."""
    return override({}, SMALL, rules)


def _random(part: Part, generator: torch.Generator) -> torch.Tensor:
    if part.dtype == torch.uint8:
        return torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator)
    return (torch.rand(part.shape, generator=generator) * 0.002 + 0.001).to(part.dtype)
