"""One job: a matrix is read, fitted, rounded and packed, and the calibration advances past it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat, expert_name, part_name
from dbrx_q.errors import FormatError
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.quantize.calibration.calibrated import Calibration, Fit
from dbrx_q.quantize.calibration.forward import ORIGINAL, QUANTIZED, LayerwiseForward
from dbrx_q.quantize.methods.awq import column_scales, fold_v1, fold_w2
from dbrx_q.quantize.methods.choose import Method, Rounded
from dbrx_q.quantize.methods.moments import Moments
from dbrx_q.quantize.methods.rtn import rtn_whole
from dbrx_q.quantize.methods.workers import Workers

from .accelerator import Accelerator
from .jobs import Job, read_blocks, read_rows
from .records import TensorRecord

__all__ = ["TASK_ROWS", "Quantizer"]

TASK_ROWS = 512
"""Rows that one thread rounds at a time."""

_PartsAndSums = tuple[list[torch.Tensor], list[float]]
"""The stored parts of a matrix, and the sums of error, square, output_error and output_square of `Rounded` over its rows."""


class Quantizer:
    """Quantizes one matrix after the other, in the order of the files.

    Args:
        checkpoint: the plain one.
        formats: of the tensors that are packed.
        method: the quantization method.
        calibration: the data that a calibrated method fits matrices to; None for the other methods.
        workers: threads that round some rows each; None for a method that has threads of its own.
        accelerator: a GPU that rounds the matrices that fit into its memory; None for the CPU alone.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Mapping[str, TensorFormat],
        method: Method,
        calibration: Calibration | None,
        workers: Workers | None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self._checkpoint, self._formats, self._method = checkpoint, formats, method
        self._calibration, self._workers, self._accelerator = calibration, workers, accelerator
        self._forwards: list[LayerwiseForward] = [] if calibration is None else [calibration]
        self._layer = -1
        self._scales: torch.Tensor | None = None

    def read(self, job: Job) -> list[torch.Tensor]:
        """The matrix of a job in blocks of rows; a tensor that is copied, whole."""
        return read_blocks(self._checkpoint, job)

    def run(self, job: Job, blocks: list[torch.Tensor]) -> tuple[TensorRecord, Mapping[str, Any], list[torch.Tensor]]:
        """Quantize the matrix that `read` returned: (its record, notes for the journal, its parts).

        Raises:
            FormatError: with the file and the tensor.
        """
        started = time.perf_counter()
        notes = self._begin(job)
        if job.fmt is None:
            self._advance_plain(job, blocks[0], notes)
            square = float(blocks[0].float().square().mean(dtype=torch.float64))
            return self._record(job, math.sqrt(square), started), notes, blocks
        blocks = self._folded(job, blocks)
        try:
            fit, parts, sums, device = self._quantize_matrix(job, blocks)
        except FormatError as problem:
            raise FormatError(f"{self._checkpoint.path_of(job.tensor.name)}: tensor {job.tensor.name}: {problem}") from None
        self._advance_calibration(job, blocks, parts)
        error, square, output_error, output_square = sums
        figures = {
            "relative_error": math.sqrt(error / square) if square else 0.0,
            "output_error": math.sqrt(output_error / output_square) if output_square else None,
            "tokens": fit.tokens if fit.by else None,
            "calibrated_by": fit.by,
            "device": device,
        }
        return self._record(job, math.sqrt(square / job.parameters), started, **figures), notes, parts

    def replay(self, job: Job, blocks: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        """Advance the calibration past a matrix that an earlier run has quantized into `parts`."""
        notes = self._begin(job)
        if job.fmt is None:
            self._advance_plain(job, blocks[0], notes)
        else:
            self._advance_calibration(job, self._folded(job, blocks), parts)

    def restore(self, layer: int) -> int:
        """Load the latest calibration snapshot of a layer up to this one; returns that layer, -1 for the beginning of the model."""
        for before in range(layer, 0, -1):
            if all(forward.has_snapshot(before) for forward in self._forwards):
                for forward in self._forwards:
                    forward.load_snapshot(before)
                return before
        return -1

    def layer_of(self, job: Job) -> int:
        """The layer of a job: -1 before the first layer, n_layers after the last."""
        return job.tensor.layer if job.tensor.layer >= 0 or job.kind == "embedding" else self._checkpoint.config.n_layers

    def _begin(self, job: Job) -> dict[str, Any]:
        """Begin the layer of a job if it is a new one; returns the job's notes for the journal."""
        layer = self.layer_of(job)
        if layer == self._layer:
            return {}
        self._layer = layer
        if layer < 0:
            return {}
        for forward in self._forwards:
            forward.check_finite(layer)
            forward.save_snapshot(layer)
        for forward in self._forwards:  # once all have a newer snapshot
            forward.remove_snapshot(layer - 1)
        error = None if self._calibration is None or not layer else self._calibration.stream_error()
        return {} if error is None else {"stream_error": [layer - 1, error]}

    def _advance_plain(self, job: Job, values: torch.Tensor, notes: dict[str, Any]) -> None:
        for forward in self._forwards:
            forward.advance_plain(job.tensor, values)
        if job.kind == "router" and self._calibration is not None:
            notes["expert_tokens"] = [job.tensor.layer, self._calibration.expert_tokens[job.tensor.layer]]
            by_source = self._calibration.expert_tokens_by_source[job.tensor.layer]
            if len(by_source) > 1:
                notes["expert_tokens_by_source"] = [job.tensor.layer, by_source]

    def _folded(self, job: Job, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
        """The matrix to round; a method that folds scales v1 and w2 of an expert."""
        if not self._method.folds or self._calibration is None or job.expert < 0 or job.tensor.role == "w1":
            return blocks
        if job.tensor.role == "v1":
            self._scales = self._column_scales(job, torch.cat(blocks))
        if self._scales is None:
            return blocks
        fold = fold_w2 if job.tensor.role == "w2" else fold_v1
        return [fold(torch.cat(blocks), self._scales)]

    def _column_scales(self, job: Job, v1: torch.Tensor) -> torch.Tensor | None:
        """Scales of the columns of w2, which follows v1; None where the expert has too few tokens."""
        assert self._calibration is not None
        w2 = self._checkpoint.tensors[expert_name(job.tensor.layer, "w2")]
        fmt = self._formats[w2.name]
        importance = self._calibration.hidden_importance(job.expert, v1)
        if importance is None:
            return None
        (weight,) = read_rows(self._checkpoint, Job(w2, job.expert, fmt, ()))
        return column_scales(weight, importance, fmt)

    def _advance_calibration(self, job: Job, blocks: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        """Run the calibration tokens through a packed matrix."""
        assert job.fmt is not None
        if self._calibration is None or job.kind == "head":
            return
        packed = job.fmt.load({part_name(part): tensor for part, tensor in zip(job.parts, parts, strict=True)})
        if job.kind != "embedding":
            weights = {ORIGINAL: torch.cat(blocks), QUANTIZED: self._dequantized(packed)}
            self._calibration.advance(job.tensor, job.expert, weights)
            return
        first = 0
        for rows in blocks:
            self._calibration.embed(first, {ORIGINAL: rows, QUANTIZED: dequantize(packed.rows(first, first + len(rows)))})
            first += len(rows)

    def _dequantized(self, packed: QuantizedWeight) -> torch.Tensor:
        """float32 [N, K]."""
        assert self._workers is not None, "what is calibrated is rounded in pieces"
        out = torch.empty(packed.shape)

        def fill(first: int) -> None:
            out[first : first + TASK_ROWS] = dequantize(packed.rows(first, min(first + TASK_ROWS, len(out))))

        self._workers.map(fill, range(0, len(out), TASK_ROWS))
        return out

    def _quantize_matrix(self, job: Job, blocks: list[torch.Tensor]) -> tuple[Fit, list[torch.Tensor], list[float], str]:
        """(data that the matrix is fitted to, its parts, sums as in `_PartsAndSums`, the device that rounded it)."""
        accelerator, device = self._accelerator, "cpu"
        where: AbstractContextManager[None] = nullcontext()
        if accelerator is not None and self._method.in_pieces:
            rows = accelerator.rows(job, self._method, models=self._calibration.model_count if self._calibration else 1)
            if rows:
                try:
                    fit = self._fit(job)
                    return fit, *self._rounded(job, blocks, fit.moments, rows), str(accelerator.device)
                except torch.OutOfMemoryError:
                    device = f"cpu: {accelerator.device} ran out of memory"
            else:
                device = f"cpu: {accelerator.device} has too little memory"
            fit = Fit(None, 0, "")  # frees the moments on the GPU
            torch.cuda.empty_cache()  # does nothing where torch has not used a GPU
            if self._calibration is not None:
                where = self._calibration.on_cpu()
        with where:
            fit = self._fit(job)
            if job.fmt is not None and job.fmt.record.stored is not None:
                return fit, *_rounded_whole(job, blocks), device
            return fit, *self._rounded(job, blocks, fit.moments, 0), device

    def _fit(self, job: Job) -> Fit:
        return Fit(None, 0, "") if self._calibration is None else self._calibration.fit(job.tensor, job.expert)

    def _rounded(self, job: Job, blocks: list[torch.Tensor], moments: Moments | None, on_accelerator: int) -> _PartsAndSums:
        """`on_accelerator`: how many rows the GPU rounds at a time, 0 for the CPU."""
        assert job.fmt is not None
        parts = [torch.empty(part.shape, dtype=part.dtype) for part in job.parts]
        sums = [0.0] * 4
        first = 0
        for rows in blocks:
            for piece in self._round(rows, job.fmt, moments, on_accelerator):
                _place(job, parts, piece.packed, first)
                first += piece.packed.shape[0]
                figures = piece.error, piece.square, piece.output_error, piece.output_square
                sums = [total + figure for total, figure in zip(sums, figures, strict=True)]
        return parts, sums

    def _round(self, rows: torch.Tensor, fmt: TensorFormat, moments: Moments | None, on_accelerator: int) -> Iterable[Rounded]:
        """The rows, rounded some at a time; they are independent of each other."""
        if on_accelerator and self._accelerator is not None:
            device = self._accelerator.device
            return (self._method.run(piece.to(device), fmt, moments) for piece in rows.split(on_accelerator))
        if self._workers is None:
            return [self._method.run(rows, fmt, moments)]
        if moments is not None:
            moments.prepare()
        return self._workers.map(lambda piece: self._method.run(piece, fmt, moments), rows.split(TASK_ROWS))

    def _record(self, job: Job, root_mean_square: float, started: float, **figures: Any) -> TensorRecord:
        name, layer = job.tensor.name, job.tensor.layer
        sizes = job.parameters, job.nbytes
        seconds = time.perf_counter() - started
        return TensorRecord(name, job.expert, layer, job.kind, job.format_name, *sizes, root_mean_square, **figures, seconds=seconds)


def _rounded_whole(job: Job, blocks: list[torch.Tensor]) -> _PartsAndSums:
    """As `Quantizer._rounded`, in a format whose rows depend on each other, which only rtn makes."""
    assert job.fmt is not None
    stored, error, square = rtn_whole(blocks, job.fmt)
    return [stored[part_name(part)] for part in job.parts], [error, square, 0.0, 0.0]


def _place(job: Job, parts: list[torch.Tensor], packed: QuantizedWeight, first: int) -> None:
    """Copy packed rows to rows first .. of the parts."""
    for part, stored in zip(job.parts, parts, strict=True):
        packed_rows = packed.parts[part_name(part)]
        stored[first : first + len(packed_rows)] = packed_rows
