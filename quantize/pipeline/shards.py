"""The shards of a quantized checkpoint: written tensor by tensor, and reopened where an earlier run stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.manifest import Manifest
from dbrx_q.checkpoint.safetensors_file import SafetensorsWriter, safetensors_header
from dbrx_q.checkpoint.shards import shard_name

from .jobs import Job
from .journal import Entry, Journal

__all__ = ["ShardFiles", "part_locations"]


class ShardFiles:
    """Writes the shards in order, one tensor after the other, and keeps the tensors that an earlier run has finished.

    Args:
        shards: the jobs of each shard.
        journal: lists the finished tensors.
        folder: holds the shards.
        manifest: gets the size and digest of each shard and the statistics of each tensor.
    """

    def __init__(self, shards: list[list[Job]], journal: Journal, folder: Path, manifest: Manifest) -> None:
        self._shards, self._journal, self._folder, self._manifest = shards, journal, folder, manifest
        self._opened = 0
        self._pending: list[Job] = []
        self._writer: SafetensorsWriter | None = None

    def keep_finished(self) -> int:
        """Keep the tensors whose bytes are as the journal says and drop the rest; returns how many are kept."""
        entries, kept = list(self._journal.entries), 0
        while kept < len(entries):
            job = self._next()
            assert self._writer is not None
            if not self._writer.keep([part.name for part in job.parts], entries[kept].digest):
                break
            self._pending.pop(0)
            self._manifest.tensors[job.label] = entries[kept].record.statistics
            kept += 1
        self._journal.cut(kept)
        return kept

    def add(self, job: Job, entry: Entry, parts: list[torch.Tensor]) -> None:
        """Write the parts of the next tensor, then its journal entry."""
        expected = self._next()
        assert expected is job, f"{job.label} was given where {expected.label} is next"
        assert self._writer is not None
        for part, tensor in zip(job.parts, parts, strict=True):
            self._writer.write(part.name, tensor)
        self._pending.pop(0)
        self._journal.add(replace(entry, digest=self._writer.digest))
        self._manifest.tensors[job.label] = entry.record.statistics

    def close(self) -> None:
        """Close the last shard, after all tensors were added."""
        assert not self._pending
        assert self._opened == len(self._shards)
        self._close_shard()

    def abandon(self) -> None:
        """Release an unfinished shard; what it holds stays on the disk."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None

    def _next(self) -> Job:
        if not self._pending:
            self._close_shard()
            self._pending = list(self._shards[self._opened])
            path = self._folder / shard_name(self._opened, len(self._shards))
            self._writer = SafetensorsWriter(path, _tensors_of(self._pending), reopened=True)
            self._opened += 1
        return self._pending[0]

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._manifest.shards[self._writer.path.name] = {"bytes": self._writer.nbytes, "sha256": self._writer.close()}
            self._writer = None


def part_locations(shards: list[list[Job]], folder: Path) -> dict[str, Any]:
    """(file, tensor info in its header) of every stored tensor, by name."""
    return {
        name: (folder / shard_name(number, len(shards)), info)
        for number, jobs in enumerate(shards)
        for name, info in safetensors_header(_tensors_of(jobs))[1].items()
    }


def _tensors_of(jobs: list[Job]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(part.name, part.dtype, part.shape) for job in jobs for part in job.parts]
