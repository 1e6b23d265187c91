"""A tensor in pieces that bound the memory of an export: one expert of a stack, or some rows of another tensor.

Dimension letters: `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dbrx_q.checkpoint.folder import converted
from dbrx_q.checkpoint.layout import DenseTensor
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.weights import dequantize, dequantize_range
from dbrx_q.planning.host_memory import resident_bytes
from dbrx_q.planning.sizes import format_size

__all__ = ["Piece", "check_memory", "matrix_of", "pieces_of", "published_rows", "working_bytes"]

_ROWS = 8192  # of a piece of the embedding or the head: 100 MB of a DBRX in bfloat16
# Bytes that a piece takes for each of its elements, at most: 17 were measured of GPTQ with act-order, whose codes, values, zero-points and
# transposed copy are there together.
_BYTES_PER_ELEMENT = 20
_MARGIN_BYTES = 48 << 20  # the gguf package, the tokenizer, compiled code


class Piece(NamedTuple):
    """A part of a tensor."""

    expert: int
    """Of a stack; -1 for a tensor that is none."""
    first: int
    """The first row [N] of the matrix."""
    rows: int
    """How many rows."""


def pieces_of(tensor: DenseTensor) -> Iterator[Piece]:
    """The pieces of a tensor, in order: each expert of a stack, and a limited number of rows of another tensor."""
    if tensor.experts:
        rows = tensor.matrix[0]
        yield from (Piece(expert, 0, rows) for expert in range(tensor.experts))
        return
    rows = tensor.shape[0]
    yield from (Piece(-1, first, min(_ROWS, rows - first)) for first in range(0, rows, _ROWS))


def published_rows(weights: StoredWeights, tensor: DenseTensor, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    """The rows of a piece as a plain checkpoint has them, of an expert [F, D], in a dtype.

    Packed weights are dequantized in float32 for it: `read_rows` of a checkpoint of ours rounds them to the dtype of the model.

    Raises:
        CheckpointError: a value that `dtype` cannot hold, or as `StoredWeights.read_rows`.
    """
    name, count = tensor.name, tensor.shape[0] // max(1, tensor.experts)
    first, rows = (piece.first, piece.rows) if piece.expert < 0 else (piece.expert * count, count)
    if weights.exact_format(name) is None or weights.dtype_of(name) in (dtype, torch.float32):
        values = weights.read_rows(name, first, rows)
    else:
        weight = weights.packed(name, piece.expert)
        values = dequantize(weight) if piece.expert >= 0 else dequantize_range(weight, first, first + rows)
        values = values.T if tensor.transposed else values
    return converted(values.contiguous(), dtype, name, weights.path_of(name))


def matrix_of(weights: StoredWeights, tensor: DenseTensor, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    """The rows of a piece as [N, K], the reduction axis last, in a dtype.

    Raises:
        CheckpointError: a value that `dtype` cannot hold, or as `StoredWeights.read_rows`.
    """
    rows = published_rows(weights, tensor, piece, dtype)
    return rows.T.contiguous() if tensor.transposed else rows


def check_memory(weights: StoredWeights, memory: int | None) -> None:
    """Refuse a memory limit that the largest piece would exceed.

    Args:
        weights: to export.
        memory: bytes that this process may take; None for no limit.

    Raises:
        RequestError: with the bytes that it takes.
    """
    if memory is None:
        return
    needed = resident_bytes() + working_bytes(weights)
    if needed > memory:
        raise RequestError(
            f"the export takes {format_size(needed)} of memory, for one expert or some rows of the embedding at a time; found a limit of "
            f"{format_size(memory)}. Give a larger --memory"
        )


def working_bytes(weights: StoredWeights) -> int:
    """Bytes that an export takes beside what the process holds already."""
    largest = max(_elements(tensor) for tensor in weights.tensors.values()) * _BYTES_PER_ELEMENT
    whole = max((weights.nbytes_of(tensor.name) for tensor in weights.tensors.values() if not tensor.experts), default=0)
    return largest + whole + _MARGIN_BYTES


def _elements(tensor: DenseTensor) -> int:
    """Elements of the largest piece of a tensor."""
    width = tensor.shape[1] if len(tensor.shape) > 1 else 1
    return width * (tensor.shape[0] // tensor.experts if tensor.experts else min(_ROWS, tensor.shape[0]))
