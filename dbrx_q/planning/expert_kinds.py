"""The parts of one expert of every layer, on disk and in memory.

Dimension letters: `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dbrx_q.checkpoint.layout import EXPERT_MATRICES, DenseTensor, Part, TensorFormat, dense_tensors
from dbrx_q.config import DbrxConfig

__all__ = ["ExpertKind", "ExpertPart", "expert_kinds"]


@dataclass(frozen=True)
class ExpertPart(Part):
    """One tensor of one expert: a part by the name in its format, or the plain matrix [F, D] by the name ""."""

    matrix: str
    """One of `EXPERT_MATRICES`."""


@dataclass(frozen=True)
class ExpertKind:
    """The parts of a layer's experts. Experts with the same parts in memory can use the same slots."""

    formats: tuple[TensorFormat | None, ...]
    """Of w1, v1 and w2 as stored, None for plain ones."""
    stored: tuple[ExpertPart, ...] = field(compare=False)
    """The parts on disk, in their order there."""
    parts: tuple[ExpertPart, ...]
    """The parts in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of one expert in memory."""
        return sum(part.nbytes for part in self.parts)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of one expert on disk."""
        return sum(part.nbytes for part in self.stored)

    @property
    def as_stored(self) -> bool:
        """Whether the bytes in memory are those on disk."""
        return self.stored == self.parts


def expert_kinds(
    config: DbrxConfig, formats: Mapping[str, TensorFormat], dtype: torch.dtype, stored_dtypes: Mapping[str, torch.dtype] | None = None
) -> list[ExpertKind]:
    """The kind of every layer's experts.

    Args:
        config: of the model.
        formats: of its packed tensors, by their plain names.
        dtype: of plain experts in memory.
        stored_dtypes: of plain expert tensors on disk, by name; None: `dtype`.
    """
    layers: list[dict[str, DenseTensor]] = [{} for _ in range(config.n_layers)]
    for tensor in dense_tensors(config):
        if tensor.experts:
            layers[tensor.layer][tensor.role] = tensor
    return [_kind(tensors, formats, dtype, stored_dtypes or {}) for tensors in layers]


def _kind(
    tensors: Mapping[str, DenseTensor], formats: Mapping[str, TensorFormat], dtype: torch.dtype, stored_dtypes: Mapping[str, torch.dtype]
) -> ExpertKind:
    """Of one layer, from its stacks of experts by their roles."""
    stored: list[ExpertPart] = []
    parts: list[ExpertPart] = []
    for matrix in EXPERT_MATRICES:
        tensor = tensors[matrix]
        fmt = formats.get(tensor.name)
        if fmt is None:
            shape = tensor.shape[0] // tensor.experts, tensor.shape[1]
            stored.append(ExpertPart("", stored_dtypes.get(tensor.name, dtype), shape, matrix))
            parts.append(ExpertPart("", dtype, shape, matrix))
        else:
            stored += [ExpertPart(part.name, part.dtype, part.shape, matrix) for part in fmt.parts(*tensor.matrix)]
            parts += [ExpertPart(part.name, part.dtype, part.shape, matrix) for part in fmt.in_memory.parts(*tensor.matrix)]
    return ExpertKind(tuple(formats.get(tensors[matrix].name) for matrix in EXPERT_MATRICES), tuple(stored), tuple(parts))
