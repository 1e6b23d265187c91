"""Jobs: the matrices of a checkpoint in the order in which they are read, rounded and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import DenseTensor, Part, TensorFormat, kind_of, oriented, parts_of

__all__ = ["Job", "read_rows", "shards_of"]

_STEP_BYTES = 64 << 20  # of a matrix outside the experts, read together


@dataclass(frozen=True)
class Job:
    """One matrix and the stored tensors that it becomes."""

    tensor: DenseTensor
    """The matrix, or the stack of which it is one."""
    expert: int
    """-1 where the tensor is not a stack."""
    fmt: TensorFormat | None
    """None copies the tensor."""
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
        """As in `TensorRecord.format`."""
        return str(self.parts[0].dtype).removeprefix("torch.") if self.fmt is None else str(self.fmt)


def shards_of(checkpoint: Checkpoint, formats: Mapping[str, TensorFormat], limit: int) -> list[list[Job]]:
    """The jobs of every shard, in the order of the model; a shard is closed before it grows past `limit` bytes.

    The three matrices of an expert are in one shard, so that an expert is one range of one file.
    """
    shards: list[list[Job]] = [[]]
    size = 0
    for jobs in _unsplit_jobs(checkpoint, formats):
        nbytes = sum(job.nbytes for job in jobs)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1] += jobs
        size += nbytes
    return shards


def read_rows(checkpoint: Checkpoint, job: Job) -> Iterator[torch.Tensor]:
    """The matrix [N, K] of a job: whole for an expert, otherwise some rows at a time."""
    name, (N, K) = job.tensor.name, job.tensor.matrix
    step = max(1, _STEP_BYTES // (2 * K))
    if job.expert < 0:
        for first in range(0, N, step):
            yield checkpoint.read_rows(name, first, min(step, N - first))
    else:
        rows = job.tensor.shape[0] // job.tensor.experts
        yield oriented(checkpoint.read_rows(name, job.expert * rows, rows), job.tensor)[0]


def _unsplit_jobs(checkpoint: Checkpoint, formats: Mapping[str, TensorFormat]) -> Iterator[list[Job]]:
    """All jobs in order, as lists that must be in one shard each."""
    experts: list[Job] = []
    for tensor in checkpoint.tensors.values():
        fmt = formats.get(tensor.name)
        if fmt is None:
            copy = Part(tensor.name, checkpoint.infos[tensor.name].dtype, tensor.shape)
            yield [Job(tensor, -1, None, (copy,))]
        elif not tensor.experts:
            yield [Job(tensor, -1, fmt, tuple(parts_of(tensor, fmt)))]
        else:
            parts = tuple(parts_of(tensor, fmt))
            step = len(parts) // tensor.experts
            experts += [Job(tensor, e, fmt, parts[e * step : (e + 1) * step]) for e in range(tensor.experts)]
            if tensor.role == "w2":
                for e in range(tensor.experts):
                    yield [job for job in experts if job.expert == e]
                experts = []
