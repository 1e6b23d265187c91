"""How a checkpoint's tensors are divided into shards, and the small files beside them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .folder import INDEX_NAME
from .layout import DenseTensor, Part, TensorFormat, kind_of, parts_of
from .manifest import MANIFEST_NAME, Manifest, sha256_of

__all__ = ["SHARD_BYTES", "StoredMatrix", "in_shards", "list_files", "shard_name", "stored_matrices", "write_index", "write_json"]

SHARD_BYTES = 4 << 30
"""Bytes after which a shard is closed unless the caller says otherwise."""


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix of a checkpoint, a norm included, and the tensors that are stored for it."""

    tensor: DenseTensor
    """The matrix, or the stack of which it is one."""
    expert: int
    """-1 where the tensor is not a stack, or is stored as one."""
    fmt: TensorFormat | None
    """None where it is stored plain."""
    parts: tuple[Part, ...]
    """The stored tensors."""

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in self.parts)

    @property
    def parameters(self) -> int:
        """Weights of the matrix."""
        return math.prod(self.tensor.shape) // max(1, self.tensor.experts)

    @property
    def kind(self) -> str:
        """One of `layout.KINDS`."""
        return kind_of(self.tensor.name)

    @property
    def label(self) -> str:
        """The tensor's name, with the expert's number if it is a stack."""
        return self.tensor.name if self.expert < 0 else f"{self.tensor.name}.{self.expert}"

    @property
    def format_name(self) -> str:
        """The format as `int4:64`; the dtype where it is stored plain."""
        return str(self.parts[0].dtype).removeprefix("torch.") if self.fmt is None else str(self.fmt)


def stored_matrices(
    tensors: Iterable[DenseTensor], formats: Mapping[str, TensorFormat], dtype_of: Callable[[DenseTensor], torch.dtype]
) -> Iterator[list[StoredMatrix]]:
    """All matrices in the order of the files, as lists that must be in one shard each: the three matrices of an expert are stored together.

    Args:
        tensors: of the checkpoint, in the order of the model.
        formats: of the packed ones, by name.
        dtype_of: the dtype in which a plain one is stored.
    """
    experts: list[StoredMatrix] = []
    for tensor in tensors:
        fmt = formats.get(tensor.name)
        if fmt is None:
            yield [StoredMatrix(tensor, -1, None, (Part(tensor.name, dtype_of(tensor), tensor.shape),))]
        elif not tensor.experts:
            yield [StoredMatrix(tensor, -1, fmt, tuple(parts_of(tensor, fmt)))]
        else:
            parts = tuple(parts_of(tensor, fmt))
            step = len(parts) // tensor.experts
            experts += [StoredMatrix(tensor, e, fmt, parts[e * step : (e + 1) * step]) for e in range(tensor.experts)]
            if tensor.role == "w2":
                for e in range(tensor.experts):
                    yield [matrix for matrix in experts if matrix.expert == e]
                experts = []


def in_shards(groups: Iterable[Sequence[StoredMatrix]], limit: int) -> list[list[StoredMatrix]]:
    """The matrices of every shard; a shard is closed before it grows past `limit` bytes.

    The packed experts of a layer are not divided where a shard can hold them all: only in one file are they at equal distances, and can be
    used where the file is mapped.

    Args:
        groups: as `stored_matrices` yields them.
        limit: bytes of tensors.
    """
    shards: list[list[StoredMatrix]] = [[]]
    size = 0
    for (_, packed_experts), neighbors in groupby(groups, key=lambda group: (group[0].tensor.layer, group[0].expert >= 0)):
        pieces = [list(group) for group in neighbors]
        whole = [matrix for group in pieces for matrix in group]
        if packed_experts and _nbytes(whole) <= limit:
            pieces = [whole]
        for piece in pieces:
            if shards[-1] and size + _nbytes(piece) > limit:
                shards.append([])
                size = 0
            shards[-1] += piece
            size += _nbytes(piece)
    return shards


def _nbytes(matrices: Sequence[StoredMatrix]) -> int:
    return sum(matrix.nbytes for matrix in matrices)


def shard_name(number: int, count: int) -> str:
    """The file name of shard `number` of `count`, as "model-00001-of-00002.safetensors" for number 0."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str], nbytes: int) -> None:
    """Write the index of the shards.

    Args:
        folder: of the shards.
        weight_map: the shard of each stored tensor, by name.
        nbytes: of all tensors.
    """
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": nbytes}, "weight_map": weight_map})


def list_files(folder: Path, manifest: Manifest, *, without: Callable[[str], bool] = lambda name: False) -> None:
    """Add the size and SHA-256 of every file beside the shards to `manifest`, and write it.

    Args:
        folder: of the checkpoint.
        manifest: lists the shards already.
        without: whether a file of this name is left out. Hidden files always are.
    """
    for path in sorted(folder.iterdir()):
        if path.name not in manifest.shards and not path.name.startswith(".") and path.name != MANIFEST_NAME and not without(path.name):
            manifest.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(folder / MANIFEST_NAME, manifest.to_dict())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file and flush it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
