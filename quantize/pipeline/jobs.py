"""Jobs: the matrices of a checkpoint in the order in which they are read, rounded or kept, and written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from dbrx_q.checkpoint.layout import TensorFormat, oriented, part_name
from dbrx_q.checkpoint.shards import StoredMatrix, in_shards, stored_matrices
from dbrx_q.checkpoint.stored_weights import StoredWeights

__all__ = ["STEP_BYTES", "Job", "read_blocks", "read_rows", "shards_of"]

STEP_BYTES = 64 << 20
"""Of a matrix outside the experts, read together."""


@dataclass(frozen=True)
class Job(StoredMatrix):
    """One matrix to read, round and write; a matrix without a format is copied."""

    kept: bool = False
    """Whether the source's codes are repacked in the format, without rounding."""


def shards_of(checkpoint: StoredWeights, formats: Mapping[str, TensorFormat], limit: int, kept: Collection[str] = ()) -> list[list[Job]]:
    """The jobs of every shard, in the order of the model; a shard is closed before it grows past `limit` bytes.

    The three matrices of an expert are in one shard, so that an expert is one range of one file. The tensors in `kept` are repacked.
    """
    shards = in_shards(stored_matrices(checkpoint.tensors.values(), formats, lambda tensor: checkpoint.dtype_of(tensor.name)), limit)
    return [[Job(m.tensor, m.expert, m.fmt, m.parts, m.tensor.name in kept) for m in shard] for shard in shards]


def read_rows(checkpoint: StoredWeights, job: Job) -> Iterator[torch.Tensor]:
    """The matrix [N, K] of a job: whole for an expert, otherwise some rows at a time."""
    name, (N, K) = job.tensor.name, job.tensor.matrix
    unit = 1 if job.fmt is None else job.fmt.record.weight.row_unit()
    step = max(1, STEP_BYTES // (2 * K * unit)) * unit
    if job.expert < 0:
        for first in range(0, N, step):
            yield checkpoint.read_rows(name, first, min(step, N - first))
    else:
        rows = job.tensor.shape[0] // job.tensor.experts
        yield oriented(checkpoint.read_rows(name, job.expert * rows, rows), job.tensor)[0]


def read_blocks(checkpoint: StoredWeights, job: Job) -> list[torch.Tensor]:
    """The matrix of a job in blocks of rows; a tensor that is copied, whole; of one that is kept, the parts to store."""
    if job.kept:
        parts = checkpoint.packed(job.tensor.name, job.expert).parts
        return [parts[part_name(part)] for part in job.parts]
    return [checkpoint.read(job.tensor.name)] if job.fmt is None else list(read_rows(checkpoint, job))
