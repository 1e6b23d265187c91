"""The guard of a run: each matrix rounded to nearest beside the quantization method, and both measured on held-out tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from dbrx_q.checkpoint.layout import TensorFormat, part_name
from dbrx_q.kernels.cpu.format_kernels import dequantize_rows
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import FORMATS
from dbrx_q.kernels.formats.weights import dequantize, gather_rows
from dbrx_q.quantize.calibration.forward import ORIGINAL, QUANTIZED
from dbrx_q.quantize.calibration.held_out import NEAREST, HeldOutForward, SourceDivergence
from dbrx_q.quantize.methods.rtn import rtn, rtn_whole
from dbrx_q.quantize.methods.workers import Workers

from .jobs import Job

__all__ = ["TASK_ROWS", "Guard", "PartsAndSums", "dequantized", "loaded", "place", "rounded_whole", "task_rows"]

TASK_ROWS = 512
"""Rows that one thread rounds at a time; of a trellis format one tile of 128 (`task_rows`)."""

PartsAndSums = tuple[list[torch.Tensor], list[float]]
"""The stored parts of a matrix, and the sums of error, square, output_error and output_square of `Rounded` over its rows."""

_OWN_HEAD = "quantized, its head rounded to nearest"


class Guard:
    """Compares the quantized model with the one that is rounded to nearest.

    Args:
        forward: the held-out tokens.
        workers: threads that dequantize.
        nearest: whether matrices are rounded to nearest; not where the quantization method does that already.
        falls_back: whether a matrix that errs more than the one that is rounded to nearest is replaced by that one.
    """

    def __init__(self, forward: HeldOutForward, workers: Workers, *, nearest: bool, falls_back: bool) -> None:
        assert nearest or not falls_back
        self.forward, self._workers, self._nearest, self.falls_back = forward, workers, nearest, falls_back

    @property
    def compares(self) -> bool:
        """Whether there is a model that is rounded to nearest beside the quantized one."""
        return self._nearest

    @staticmethod
    def nearest_format(job: Job) -> TensorFormat:
        """The format in which the matrix of a job is rounded to nearest for comparison.

        That is its own format, but for experts in a trellis format, whose search would take all its time twice: they are compared in the
        `fast` format of the same layout.
        """
        assert job.fmt is not None
        return job.fmt.fast if job.expert >= 0 else job.fmt

    def nearest(self, job: Job, blocks: list[torch.Tensor]) -> PartsAndSums | None:
        """The matrix of a job, rounded to nearest in `nearest_format`; None where the quantization method does that already."""
        return self._rounded(job, blocks, self.nearest_format(job)) if self._nearest else None

    def to_store(self, job: Job, blocks: list[torch.Tensor], nearest: PartsAndSums) -> PartsAndSums:
        """The matrix of a job, rounded to nearest in its own format.

        Args:
            job: of the matrix.
            blocks: its rows.
            nearest: these, rounded to nearest in `nearest_format`.
        """
        assert job.fmt is not None
        return nearest if self.nearest_format(job) == job.fmt else self._rounded(job, blocks, job.fmt)

    def _rounded(self, job: Job, blocks: list[torch.Tensor], fmt: TensorFormat) -> PartsAndSums:
        if fmt.record.stored is not None:
            return rounded_whole(job, blocks)
        parts = [torch.empty(part.shape, dtype=part.dtype) for part in job.parts]
        sums, first = [0.0] * 4, 0
        for rows in blocks:
            pieces = rows.split(task_rows(fmt)) if fmt.record.trellis is not None else [rows]
            for packed, error, square in self._workers.map(lambda piece: rtn(piece, fmt), pieces):
                place(job, parts, packed, first)
                sums[0], sums[1], first = sums[0] + error, sums[1] + square, first + packed.shape[0]
        return parts, sums

    def prefers_nearest(self, job: Job, blocks: list[torch.Tensor], parts: list[torch.Tensor], nearest: list[torch.Tensor]) -> bool:
        """Whether a matrix rounded to nearest errs less on held-out tokens than the quantized one; for the head see `divergence`.

        Args:
            job: of the matrix.
            blocks: its rows.
            parts: of the quantized matrix.
            nearest: of the one that is rounded to nearest, in `nearest_format`.
        """
        packed = [loaded(job, parts), loaded(job, nearest, self.nearest_format(job))]
        if job.kind == "embedding":
            ids = self.forward.deciding_ids
            return self.forward.prefers_nearest_embedding(
                _rows_of(blocks, ids).float(), [gather_rows(candidate, ids, torch.float32) for candidate in packed]
            )
        candidates = [dequantized(candidate, self._workers) for candidate in packed]
        return self.forward.prefers_nearest(job.tensor, job.expert, torch.cat(blocks), candidates)

    def divergence(
        self, job: Job, blocks: list[torch.Tensor], parts: list[torch.Tensor], nearest: list[torch.Tensor] | None
    ) -> tuple[list[SourceDivergence], bool]:
        """(divergences by source, whether the head that is rounded to nearest is to replace the quantized one, and is measured instead).

        Args:
            job: of the head.
            blocks: its rows.
            parts: of the quantized head; the head itself if it stays plain.
            nearest: of the head that is rounded to nearest; None if the head stays plain, or is rounded to nearest itself.
        """
        packed = {} if job.fmt is None else {QUANTIZED: loaded(job, parts)}
        if nearest is not None:
            packed[NEAREST] = loaded(job, nearest)
            if self.falls_back:
                packed[_OWN_HEAD] = packed[NEAREST]
        names = [ORIGINAL, QUANTIZED, *([NEAREST] if self._nearest else []), *([_OWN_HEAD] if _OWN_HEAD in packed else [])]
        divergence = self.forward.divergence(names, self._rows(blocks, names, packed))
        replaced = _OWN_HEAD in divergence and self.forward.prefers_nearest_head(divergence[QUANTIZED], divergence[_OWN_HEAD])
        if replaced:
            divergence[QUANTIZED] = divergence[_OWN_HEAD]
        return self.forward.by_source(divergence), replaced

    def _rows(
        self, blocks: list[torch.Tensor], names: list[str], packed: Mapping[str, QuantizedWeight]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The rows of every model's head, block by block."""
        first = 0
        for rows in blocks:
            last = first + len(rows)
            yield {name: dequantized(packed[name].rows(first, last), self._workers) if name in packed else rows for name in names}
            first = last


def _rows_of(blocks: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """[n, K]: some rows, int64 [n], ascending, of a matrix in blocks."""
    parts, first = [], 0
    for block in blocks:
        parts.append(block[rows[(rows >= first) & (rows < first + len(block))] - first])
        first += len(block)
    return torch.cat(parts)


def task_rows(fmt: TensorFormat) -> int:
    """Rows that one thread rounds at a time, a multiple of the format's `row_unit`.

    A tile of a trellis format takes long to search, so tiles are shared out singly.
    """
    return TASK_ROWS if fmt.record.trellis is None else fmt.record.weight.row_unit()


def loaded(job: Job, parts: list[torch.Tensor], fmt: TensorFormat | None = None) -> QuantizedWeight:
    """The packed matrix of a job from its stored parts, in its own format or in another one of the same layout."""
    fmt = fmt or job.fmt
    assert fmt is not None
    return fmt.load({part_name(part): tensor for part, tensor in zip(job.parts, parts, strict=True)})


def dequantized(packed: QuantizedWeight, workers: Workers) -> torch.Tensor:
    """float32 [N, K]."""
    if FORMATS[packed.format].trellis is not None:
        return dequantize_rows(packed, torch.float32)  # compiled, with threads of its own: a thirtieth of the time
    out = torch.empty(packed.shape)

    def fill(first: int) -> None:
        out[first : first + TASK_ROWS] = dequantize(packed.rows(first, min(first + TASK_ROWS, len(out))))

    workers.map(fill, range(0, len(out), TASK_ROWS))
    return out


def place(job: Job, parts: list[torch.Tensor], packed: QuantizedWeight, first: int) -> None:
    """Copy packed rows to rows first .. of the parts; `first` is a multiple of the format's `row_unit`."""
    end = first + packed.shape[0]
    for part, stored in zip(job.parts, parts, strict=True):
        name = part_name(part)
        stored[packed.entries(name, first, end)] = packed.parts[name]


def rounded_whole(job: Job, blocks: list[torch.Tensor]) -> PartsAndSums:
    """A matrix rounded to nearest in a format whose rows depend on each other, which only rtn makes."""
    assert job.fmt is not None
    stored, error, square = rtn_whole(blocks, job.fmt)
    return [stored[part_name(part)] for part in job.parts], [error, square, 0.0, 0.0]
