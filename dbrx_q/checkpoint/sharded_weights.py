"""`ShardedWeights`: what all checkpoints in safetensors shards have in common, of whatever layout."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from .shard_source import Shard
from .stored_weights import StoredWeights

__all__ = ["ShardedWeights"]


class ShardedWeights(StoredWeights):
    """Weights in shards that are open, in a folder or fetched by a source."""

    _file_of: Mapping[str, Shard]
    """The shard of every stored tensor, by its stored name."""
    _open_files: ExitStack
    """Closes the shards."""

    @abstractmethod
    def _stored_names(self, name: str) -> list[str]:
        """The stored names of a tensor's parts."""

    def close(self) -> None:
        self._open_files.close()

    @property
    def shards(self) -> list[Path]:
        return sorted({file.path for file in self._file_of.values()})

    @property
    def sizes(self) -> dict[str, int]:
        return {file.path.name: file.size for file in self._file_of.values()}

    def expect(self, names: Sequence[str]) -> None:
        if self.source is not None:
            self.source.expect([self._shards_of(name) for name in names])

    def done(self) -> None:
        if self.source is not None:
            self.source.done()

    def to_fetch(self, names: Sequence[str]) -> tuple[int, int]:
        return (0, 0) if self.source is None else self.source.to_fetch([self._shards_of(name) for name in names])

    def _shards_of(self, name: str) -> set[str]:
        return {self._file_of[stored].path.name for stored in self._stored_names(name)}
