"""The GPU that a run may use, within a limit on its memory.

Dimension letters: `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_q.errors import RequestError
from dbrx_q.model.devices import check_device
from dbrx_q.quantize.methods.choose import Method

from .jobs import Job

__all__ = ["Accelerator", "open_accelerator"]

_DEFAULT_SHARE = 0.9
_TEMPORARIES = 16  # float32 copies of the rows that are rounded together
_ROTATED = 8  # bytes per element of a Hessian for itself and the cross term in the rotated basis
_SEARCH = 2048  # bytes per row of what the search of a trellis format keeps for a column (`search_bytes` of `kernels/triton/viterbi.py`)
_FEWEST_ROWS = 512  # rows from which the GPU is faster
_SQUARES = 36  # bytes per element of a Hessian: itself, cross term and factor, and three times the factor in float64 while it is computed


@dataclass(frozen=True)
class Accelerator:
    """A GPU and its limit."""

    device: torch.device
    """The GPU."""
    memory: int
    """Bytes of its memory that tensors may take."""
    name: str
    """The product name of the GPU."""

    @property
    def peak_bytes(self) -> int:
        """The most bytes that tensors have taken on it."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def rows(self, job: Job, method: Method, *, models: int) -> int:
        """How many rows of a matrix are rounded at a time, beside its Hessian and the weights for the activations.

        0 where the memory suffices for too few rows, and for a method that keeps up with the disk on the CPU.
        """
        if job.fmt is None or not method.takes_pieces(job.fmt):
            return 0
        N, K = job.tensor.matrix
        taken = 0
        if method.calibrated:
            rotated = 0 if job.fmt.record.trellis is None else _ROTATED
            taken = (0 if method.squares else (_SQUARES + rotated) * K * K) + 4 * models * 3 * N * K
        searched = 0 if job.fmt.record.trellis is None else _SEARCH
        rows = (self.memory - taken) // (4 * _TEMPORARIES * K + searched)
        unit = job.fmt.record.weight.row_unit()
        rows = min(N, rows - rows % unit)
        return rows if rows >= min(N, _FEWEST_ROWS) else 0


def open_accelerator(device: str, memory: int | None) -> Accelerator | None:
    """The device of this name; None for "cpu". From now on torch takes no more of its memory than the limit.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        memory: bytes; 90 % of the device's memory unless given.

    Raises:
        RequestError: no such device, a limit above its memory, or a limit for the CPU.
    """
    place = check_device(device)
    if place.type == "cpu":
        if memory is not None:
            raise RequestError("--device-memory limits a GPU's memory; found it with --device cpu. Name a GPU, or leave it out")
        return None
    properties = torch.cuda.get_device_properties(place)
    total = properties.total_memory
    limit = int(_DEFAULT_SHARE * total) if memory is None else memory
    if not 0 < limit <= total:
        raise RequestError(f"--device-memory must be at most the {total:,} bytes of {place}; found {limit:,}. Give less, or leave it out")
    torch.cuda.set_per_process_memory_fraction(limit / total, place)
    torch.cuda.reset_peak_memory_stats(place)
    return Accelerator(place, limit, properties.name)
