"""Jobs: the matrices of a checkpoint in the order in which they are read, rounded and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat, oriented
from dbrx_q.checkpoint.shards import StoredMatrix, in_shards, stored_matrices

__all__ = ["STEP_BYTES", "Job", "read_blocks", "read_rows", "shards_of"]

STEP_BYTES = 64 << 20
"""Of a matrix outside the experts, read together."""

Job = StoredMatrix
"""One matrix to read, round and write; a matrix without a format is copied."""


def shards_of(checkpoint: Checkpoint, formats: Mapping[str, TensorFormat], limit: int) -> list[list[Job]]:
    """The jobs of every shard, in the order of the model; a shard is closed before it grows past `limit` bytes.

    The three matrices of an expert are in one shard, so that an expert is one range of one file.
    """
    return in_shards(stored_matrices(checkpoint.tensors.values(), formats, lambda tensor: checkpoint.infos[tensor.name].dtype), limit)


def read_rows(checkpoint: Checkpoint, job: Job) -> Iterator[torch.Tensor]:
    """The matrix [N, K] of a job: whole for an expert, otherwise some rows at a time."""
    name, (N, K) = job.tensor.name, job.tensor.matrix
    step = max(1, STEP_BYTES // (2 * K))
    if job.expert < 0:
        for first in range(0, N, step):
            yield checkpoint.read_rows(name, first, min(step, N - first))
    else:
        rows = job.tensor.shape[0] // job.tensor.experts
        yield oriented(checkpoint.read_rows(name, job.expert * rows, rows), job.tensor)[0]


def read_blocks(checkpoint: Checkpoint, job: Job) -> list[torch.Tensor]:
    """The matrix of a job in blocks of rows; a tensor that is copied, whole."""
    return [checkpoint.read(job.tensor.name)] if job.fmt is None else list(read_rows(checkpoint, job))
