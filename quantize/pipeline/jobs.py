"""The tensors of a checkpoint one after the other, as they are read, rounded and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import DenseTensor, Part, TensorFormat, kind_of, oriented, parts_of

__all__ = ["Job", "read_rows", "shards_of"]

_STEP_BYTES = 64 << 20  # of weights that are read together, where a matrix is not an expert's


@dataclass(frozen=True)
class Job:
    """Stored tensors that come from one matrix. expert: -1 where the tensor is not a stack. fmt: None keeps it as it is."""

    tensor: DenseTensor
    expert: int
    fmt: TensorFormat | None
    parts: tuple[Part, ...]

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
        """The tensor's name, with the expert's number for one of a stack."""
        return self.tensor.name if self.expert < 0 else f"{self.tensor.name}.{self.expert}"

    @property
    def format_name(self) -> str:
        """As in `TensorRecord.format`."""
        return str(self.parts[0].dtype).removeprefix("torch.") if self.fmt is None else f"{self.fmt.format} g{self.fmt.group_size}"


def shards_of(checkpoint: Checkpoint, formats: Mapping[str, TensorFormat], limit: int) -> list[list[Job]]:
    """The jobs of every shard, in the order of the model; a shard is closed before it grows past `limit` bytes.

    The matrices of an expert are never split between shards, so that one expert is one range of one file.
    """
    shards: list[list[Job]] = [[]]
    size = 0
    for together in _jobs(checkpoint, formats):
        more = sum(job.nbytes for job in together)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1] += together
        size += more
    return shards


def read_rows(checkpoint: Checkpoint, job: Job) -> Iterator[torch.Tensor]:
    """The matrix [N, K] of a job: an expert's whole, any other some rows at a time."""
    name, (N, K) = job.tensor.name, job.tensor.matrix
    step = max(1, _STEP_BYTES // (2 * K))
    if job.expert < 0:
        for first in range(0, N, step):
            yield checkpoint.read_rows(name, first, min(step, N - first))
    else:
        rows = job.tensor.shape[0] // job.tensor.experts
        yield oriented(checkpoint.read_rows(name, job.expert * rows, rows), job.tensor)[0]


def _jobs(checkpoint: Checkpoint, formats: Mapping[str, TensorFormat]) -> Iterator[list[Job]]:
    """Lists that must lie in one shard."""
    experts: list[Job] = []
    for tensor in checkpoint.tensors.values():
        fmt = formats.get(tensor.name)
        if fmt is None:
            kept = Part(tensor.name, checkpoint.infos[tensor.name].dtype, tensor.shape)
            yield [Job(tensor, -1, None, (kept,))]
        elif not tensor.experts:
            yield [Job(tensor, -1, fmt, tuple(parts_of(tensor, fmt)))]
        else:
            parts = tuple(parts_of(tensor, fmt))
            each = len(parts) // tensor.experts
            experts += [Job(tensor, e, fmt, parts[e * each : (e + 1) * each]) for e in range(tensor.experts)]
            if tensor.name.endswith(".w2"):
                for e in range(tensor.experts):
                    yield [job for job in experts if job.expert == e]
                experts = []
