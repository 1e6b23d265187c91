"""The groups of ours that stored groups are divided into where they are larger."""

from __future__ import annotations

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.kernels.formats.registry import FORMATS

__all__ = ["exact_group", "group_index"]


def exact_group(name: str, K: int, group_size: int) -> TensorFormat | None:
    """The format `name` with the largest groups that stored groups of `group_size` can be divided into; None where there are none."""
    sizes = [size for size in FORMATS[name].group_sizes if group_size % size == 0 and K % size == 0] if name in FORMATS else []
    return TensorFormat(name, max(sizes)) if sizes else None


def group_index(K: int, group_size: int, exact: int) -> torch.Tensor:
    """int64 [K/exact]: the stored group, of `group_size` columns, that each group of `exact` columns is a part of."""
    return torch.arange(0, K, exact) // group_size
