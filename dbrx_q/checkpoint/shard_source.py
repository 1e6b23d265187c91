"""What a checkpoint is read from: shards, and what fetches them when they are read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import torch

from .safetensors_file import TensorInfo

__all__ = ["Shard", "ShardSource"]


class Shard(Protocol):
    """A safetensors file of which the header is known, such as a `SafetensorsFile`; the file may be fetched when a tensor is read."""

    path: Path
    """The file, which need not exist yet."""
    size: int
    """Bytes of the file."""
    tensors: dict[str, TensorInfo]
    """The tensors by name, in the order of their bytes."""

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor `name`."""

    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows first .. first+count-1 of the tensor `name`."""

    def close(self) -> None:
        """Close the file."""


class ShardSource(Protocol):
    """A checkpoint whose shards are fetched when they are read, such as a hub repository."""

    folder: Path
    """Holds the small files, config.json and the index among them."""
    commit: str
    """Identifies the version of the files."""
    storage: Path
    """The folder that shards are fetched to; it need not exist."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a file of this name."""

    def open_all(self, names: Sequence[str]) -> Sequence[Shard]:
        """Open the shards of these file names: fetch their headers, not their tensors."""

    def expect(self, names: Sequence[Collection[str]]) -> None:
        """Announce the shards that each of the next pieces of work reads, in order."""

    def done(self) -> None:
        """End the first of the announced pieces of work; shards that no later one reads may be deleted."""

    def to_fetch(self, names: Sequence[Collection[str]]) -> tuple[int, int]:
        """(bytes to fetch for work that reads these shards in this order, bytes of disk that fetched shards take at most meanwhile).

        Shards that are on this machine already are not counted.
        """

    def stop(self) -> None:
        """Start no more downloads and end all waits for them, until shards are opened again."""

    def close(self, *, keep: bool) -> None:
        """Stop, and delete the shards that are deleted after use, unless a later run shall find them (`keep`)."""
