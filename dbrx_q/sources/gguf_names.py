"""Names and shapes of the tensors of a DBRX in a GGUF file, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Iterable

from dbrx_q.checkpoint.layout import DenseTensor, layer_of, role_of
from dbrx_q.errors import CheckpointError

from .gguf_file import GgufParts
from .gguf_header import can_dequantize

__all__ = ["check_tensors", "gguf_name", "gguf_shape"]

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


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of a plain checkpoint."""
    layer, theirs = layer_of(name), _NAMES[role_of(name)]
    return f"blk.{layer}.{theirs}.weight" if layer >= 0 else f"{theirs}.weight"


def gguf_shape(tensor: DenseTensor) -> tuple[int, ...]:
    """A tensor's shape in GGUF, outermost first: every matrix has its reduction axis last, and experts are stacked."""
    return (tensor.experts, *tensor.matrix) if tensor.experts else tensor.shape


def check_tensors(parts: GgufParts, tensors: Iterable[DenseTensor]) -> None:
    """Refuse a file that lacks a tensor, or holds one of another name, shape or type than a DBRX of its metadata.

    Raises:
        CheckpointError: names the file and the tensor.
    """
    expected = {gguf_name(tensor.name): gguf_shape(tensor) for tensor in tensors}
    missing = [name for name in expected if name not in parts.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{parts.path}: tensor {missing[0]}{more} is missing; its metadata calls for it. Fetch the file again")
    for name, stored in parts.tensors.items():
        path, shape = stored.path, stored.shape
        if name not in expected:
            raise CheckpointError(f"{path}: tensor {name} is in no DBRX of its metadata; is it of another model?")
        if shape != expected[name]:
            raise CheckpointError(f"{path}: tensor {name} must have the shape {list(expected[name])} by its metadata; found {list(shape)}")
        if not can_dequantize(stored.kind):
            raise CheckpointError(
                f"{path}: tensor {name} must be of a type that the gguf package can dequantize; found {stored.kind.name}. "
                "Quantize the model to another type, or install a newer gguf"
            )
