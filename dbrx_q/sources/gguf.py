"""GGUF files of DBRX, as llama.cpp's converter and quantizer write them; the gguf package dequantizes their tensors.

Dimension letters: `E` experts, `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dbrx_q.checkpoint.folder import check_finite
from dbrx_q.checkpoint.layout import DenseTensor, dense_tensors, layer_of, role_of
from dbrx_q.checkpoint.weights_hash import weights_sha256
from dbrx_q.config import NORM_EPS, DbrxConfig
from dbrx_q.errors import CheckpointError, ConfigError
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .gguf_file import GgufParts, can_dequantize, open_parts
from .gguf_keys import check_keys, rope_scaling_of
from .gguf_tokenizer import eos_ids_of, tokenizer_of
from .streamed import DequantizedSource, Reader

__all__ = ["GgufSource", "gguf_name"]

_NAMES = {
    "embedding": "token_embd",
    "norm_f": "output_norm",
    "head": "output",
    "norm_1": "attn_norm",
    "Wqkv": "attn_qkv",
    "out_proj": "attn_output",
    "norm_2": "attn_output_norm",
    "router": "ffn_gate_inp",
    "w1": "ffn_gate_exps",
    "v1": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
"""The role of a tensor (`layout.role_of`) to GGUF's name of it."""

_GUESSED = 1024  # flag in general.file_type: the writer guessed the type


class GgufSource(DequantizedSource):
    """A GGUF file, or all parts of a split one.

    Raises:
        CheckpointError: the file is no GGUF file, is damaged or of another architecture, or holds a tensor that the gguf package cannot
            dequantize.
        ConfigError: the metadata has a value that no DBRX can have.
        UnsupportedError: the gguf package is not installed.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._parts = open_parts(path)
        self.config = _config(self._parts)
        self.eos_token_ids = eos_ids_of(self._parts)
        self.stored_dtype = torch.float32
        tensors = dense_tensors(self.config)
        _check_tensors(self._parts, tensors)
        self.nbytes = sum(tensor.n_bytes for tensor in self._parts.tensors.values())
        self.parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        self.format = f"GGUF {_file_type(self._parts)}"

    def sha256(self) -> str:
        return weights_sha256(self._parts.paths)

    def tokenizer(self) -> DbrxTokenizer:
        return tokenizer_of(self._parts)

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        yield self._read

    def _read(self, tensor: DenseTensor) -> torch.Tensor:
        from gguf import dequantize

        stored = self._parts.tensors[gguf_name(tensor.name)]
        out = torch.empty(tensor.shape, dtype=torch.float32)
        if tensor.experts:
            experts = out.view(tensor.experts, -1, tensor.shape[1]).numpy()  # [E, F, D]
            for expert, matrix in zip(experts, stored.data, strict=True):  # one by one: memory holds one dequantized copy beside the stack
                values = dequantize(matrix, stored.tensor_type)
                expert[:] = values.T if tensor.transposed else values  # DBRX stores w2 as [F, D], GGUF as [D, F]
        else:
            out.numpy()[:] = dequantize(stored.data, stored.tensor_type)
        check_finite(out, stored.name, self._parts.path_of[stored.name])
        return out


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of a plain checkpoint."""
    layer, theirs = layer_of(name), _NAMES[role_of(name)]
    return f"blk.{layer}.{theirs}.weight" if layer >= 0 else f"{theirs}.weight"


def _config(parts: GgufParts) -> DbrxConfig:
    architecture = parts.text("general.architecture")
    if architecture != "dbrx":
        raise CheckpointError(f"{parts.path}: general.architecture must be 'dbrx'; found {architecture!r}. Give a GGUF file of DBRX")
    layers = parts.count("dbrx.block_count")
    if layers > len(parts.tensors):  # before a damaged number takes all memory
        raise CheckpointError(f"{parts.path}: dbrx.block_count says {layers} layers; found {len(parts.tensors)} tensors. Fetch it again")
    epsilon = parts.number("dbrx.attention.layer_norm_epsilon")
    if not math.isclose(epsilon, NORM_EPS, rel_tol=1e-6):
        raise CheckpointError(
            f"{parts.path}: dbrx.attention.layer_norm_epsilon must be DBRX's {NORM_EPS}; found {epsilon}. Convert it again"
        )
    try:
        config = DbrxConfig(
            d_model=parts.count("dbrx.embedding_length"),
            n_heads=parts.count("dbrx.attention.head_count"),
            n_layers=layers,
            max_seq_len=parts.count("dbrx.context_length"),
            vocab_size=len(parts.strings("tokenizer.ggml.tokens")),
            attn_config={
                "clip_qkv": parts.number("dbrx.attention.clamp_kqv"),
                "kv_n_heads": parts.count("dbrx.attention.head_count_kv"),
                "rope_theta": parts.number("dbrx.rope.freq_base"),
            },
            ffn_config={
                "ffn_hidden_size": parts.count("dbrx.feed_forward_length"),
                "moe_num_experts": parts.count("dbrx.expert_count"),
                "moe_top_k": parts.count("dbrx.expert_used_count"),
            },
            torch_dtype="float32",
            rope_scaling=rope_scaling_of(parts),
        )
        check_keys(parts, config.head_dim)
        return config
    except ConfigError as error:
        raise ConfigError(f"{parts.path}: {error}") from None


def _check_tensors(parts: GgufParts, tensors: list[DenseTensor]) -> None:
    expected = {gguf_name(tensor.name): _shape(tensor) for tensor in tensors}
    missing = [name for name in expected if name not in parts.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{parts.path}: tensor {missing[0]}{more} is missing; its metadata calls for it. Fetch the file again")
    for name, stored in parts.tensors.items():
        path = parts.path_of[name]
        if name not in expected:
            raise CheckpointError(f"{path}: tensor {name} is in no DBRX of its metadata; is it of another model?")
        shape = tuple(reversed(stored.shape.tolist()))
        if shape != expected[name]:
            raise CheckpointError(f"{path}: tensor {name} must have the shape {list(expected[name])} by its metadata; found {list(shape)}")
        if not can_dequantize(stored.tensor_type):
            raise CheckpointError(
                f"{path}: tensor {name} must be of a type that the gguf package can dequantize; found {stored.tensor_type.name}. "
                "Quantize the model to another type, or install a newer gguf"
            )


def _shape(tensor: DenseTensor) -> tuple[int, ...]:
    """The tensor's shape in GGUF, outermost first: every matrix has its reduction axis last, and experts are stacked."""
    return (tensor.experts, *tensor.matrix) if tensor.experts else tensor.shape


def _file_type(parts: GgufParts) -> str:
    """llama.cpp's name of the mixture of types; where the file names none, the type that most parameters have."""
    from gguf import LlamaFileType

    value = parts.metadata.get("general.file_type")
    labels = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    if isinstance(value, int) and value & ~_GUESSED in labels and value != _GUESSED:
        return labels[value & ~_GUESSED]
    counts: dict[str, int] = {}
    for tensor in parts.tensors.values():
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(counts, key=lambda kind: counts[kind])
