"""One matrix after the other, in the order of the file: read, rounded, and told to the calibration."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat, part_name
from dbrx_q.errors import FormatError
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.quantize.calibration.calibrated import Calibration, Fit
from dbrx_q.quantize.methods.awq import column_scales
from dbrx_q.quantize.methods.choose import Method, Rounded
from dbrx_q.quantize.methods.moments import Moments
from dbrx_q.quantize.methods.rtn import rtn_whole
from dbrx_q.quantize.methods.workers import Workers

from .accelerator import Accelerator
from .jobs import Job, read_rows
from .records import TensorRecord

__all__ = ["TASK_ROWS", "Quantizer"]

TASK_ROWS = 512
"""That one thread rounds at a time."""

_Made = tuple[list[torch.Tensor], list[float]]


class Quantizer:
    """Makes the parts of one matrix after the other, in the order of the file.

    Args:
        checkpoint: the plain one.
        formats: of the tensors that are packed.
        method: that rounds.
        calibration: what a calibrated method is fitted to; None without.
        workers: that round pieces; None for a method that has threads of its own.
        accelerator: that rounds what fits into its memory; None for the CPU alone.
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
        self._layer = -1
        self._scales: torch.Tensor | None = None

    def read(self, job: Job) -> list[torch.Tensor]:
        """The matrix of a job, in blocks of rows; a tensor that is kept, whole."""
        return [self._checkpoint.read(job.tensor.name)] if job.fmt is None else list(read_rows(self._checkpoint, job))

    def run(self, job: Job, blocks: list[torch.Tensor]) -> tuple[TensorRecord, Mapping[str, Any], list[torch.Tensor]]:
        """(what is said of it, what else a later run must know of it, the parts) of the matrix that `read` gave.

        Raises:
            FormatError: with the file and the tensor.
        """
        started = time.perf_counter()
        notes = self._begin(job)
        if job.fmt is None:
            self._keep(job, blocks[0], notes)
            square = float(blocks[0].float().square().mean(dtype=torch.float64))
            return self._record(job, math.sqrt(square), started), notes, blocks
        blocks = self._folded(job, blocks)
        try:
            fit, parts, sums, device = self._quantize_matrix(job, blocks)
        except FormatError as problem:
            raise FormatError(f"{self._checkpoint.path_of(job.tensor.name)}: tensor {job.tensor.name}: {problem}") from None
        self._advance_calibration(job, blocks, parts)
        error, square, output_error, output_square = sums
        found = {
            "relative_error": math.sqrt(error / square) if square else 0.0,
            "output_error": math.sqrt(output_error / output_square) if output_square else None,
            "tokens": fit.tokens if fit.by else None,
            "calibrated_by": fit.by,
            "device": device,
        }
        return self._record(job, math.sqrt(square / job.parameters), started, **found), notes, parts

    def replay(self, job: Job, blocks: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        """Go on past a matrix that an earlier run has rounded."""
        notes = self._begin(job)
        if job.fmt is None:
            self._keep(job, blocks[0], notes)
        else:
            self._advance_calibration(job, self._folded(job, blocks), parts)

    def restore(self, layer: int) -> int:
        """Go back to the latest snapshot of what enters a layer up to this one; which layer that is, -1 for the beginning of the model."""
        assert self._calibration is not None
        return self._calibration.restore(layer) or -1

    def layer_of(self, job: Job) -> int:
        """-1 for what comes before the layers, their number for what comes after them."""
        return job.tensor.layer if job.tensor.layer >= 0 or job.kind == "embedding" else self._checkpoint.config.n_layers

    def _begin(self, job: Job) -> dict[str, Any]:
        """Notes of a tensor, the first of a layer's among them."""
        layer = self.layer_of(job)
        if self._calibration is None or layer == self._layer:
            return {}
        self._layer = layer
        error = self._calibration.begin_layer(layer)
        return {} if error is None or layer < 1 else {"stream_error": [layer - 1, error]}

    def _keep(self, job: Job, values: torch.Tensor, notes: dict[str, Any]) -> None:
        if self._calibration is None:
            return
        self._calibration.advance_plain(job.tensor, values)
        if job.kind == "router":
            notes["expert_tokens"] = [job.tensor.layer, self._calibration.expert_tokens[job.tensor.layer]]

    def _folded(self, job: Job, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
        """The matrix to round: for a method that folds, an expert's v1 and w2 scaled."""
        if not self._method.folds or self._calibration is None or job.expert < 0 or job.tensor.name.endswith(".w1"):
            return blocks
        if job.tensor.name.endswith(".v1"):
            self._scales = self._column_scales(job, torch.cat(blocks))
        if self._scales is None:
            return blocks
        down = job.tensor.name.endswith(".w2")
        return [torch.cat(blocks).float() * self._scales if down else torch.cat(blocks).float() / self._scales[:, None]]

    def _column_scales(self, job: Job, v1: torch.Tensor) -> torch.Tensor | None:
        """Of w2, whose turn comes after v1."""
        assert self._calibration is not None
        w2 = self._checkpoint.tensors[job.tensor.name.removesuffix("v1") + "w2"]
        fmt = self._formats[w2.name]
        importance = self._calibration.hidden_importance(job.expert, v1)
        if importance is None:
            return None
        (weight,) = read_rows(self._checkpoint, Job(w2, job.expert, fmt, ()))
        return column_scales(weight, importance, fmt)

    def _advance_calibration(self, job: Job, blocks: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        """Let the calibration go on past a packed matrix."""
        assert job.fmt is not None
        if self._calibration is None or job.kind == "head":
            return
        packed = job.fmt.load({part_name(part): tensor for part, tensor in zip(job.parts, parts, strict=True)})
        if job.kind != "embedding":
            self._calibration.advance(job.tensor, job.expert, torch.cat(blocks), self._dequantized(packed))
            return
        first = 0
        for rows in blocks:
            self._calibration.embed(first, rows, dequantize(packed.rows(first, first + len(rows))))
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
        """(what it is fitted to, the parts, sums of what `Rounded` says of rows, where that was done)."""
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
            fit = Fit(None, 0, "")  # lets go of what lies there
            torch.cuda.empty_cache()  # nothing where torch has begun nothing there
            if self._calibration is not None:
                where = self._calibration.on_cpu()
        with where:
            fit = self._fit(job)
            if job.fmt is not None and job.fmt.record.stored is not None:
                return fit, *_rounded_whole(job, blocks), device
            return fit, *self._rounded(job, blocks, fit.moments, 0), device

    def _fit(self, job: Job) -> Fit:
        return Fit(None, 0, "") if self._calibration is None else self._calibration.fit(job.tensor, job.expert)

    def _rounded(self, job: Job, blocks: list[torch.Tensor], moments: Moments | None, on_accelerator: int) -> _Made:
        """The parts, and the sums of what `Rounded` says of rows; on_accelerator: how many rows that gets at a time, 0 for the CPU."""
        assert job.fmt is not None
        parts = [torch.empty(part.shape, dtype=part.dtype) for part in job.parts]
        sums = [0.0] * 4
        first = 0
        for rows in blocks:
            for piece in self._round(rows, job.fmt, moments, on_accelerator):
                _place(job, parts, piece.packed, first)
                first += piece.packed.shape[0]
                more = piece.error, piece.square, piece.output_error, piece.output_square
                sums = [a + b for a, b in zip(sums, more, strict=True)]
        return parts, sums

    def _round(self, rows: torch.Tensor, fmt: TensorFormat, moments: Moments | None, on_accelerator: int) -> Iterable[Rounded]:
        """Some rows at a time, which are independent of each other."""
        if on_accelerator and self._accelerator is not None:
            place = self._accelerator.device
            return (self._method.run(some.to(place), fmt, moments) for some in rows.split(on_accelerator))
        if self._workers is None:
            return [self._method.run(rows, fmt, moments)]
        if moments is not None:
            moments.prepare()
        return self._workers.map(lambda some: self._method.run(some, fmt, moments), rows.split(TASK_ROWS))

    def _record(self, job: Job, root_mean_square: float, started: float, **found: Any) -> TensorRecord:
        name, layer = job.tensor.name, job.tensor.layer
        sizes = job.parameters, job.nbytes
        seconds = time.perf_counter() - started
        return TensorRecord(name, job.expert, layer, job.kind, job.format_name, *sizes, root_mean_square, **found, seconds=seconds)


def _rounded_whole(job: Job, blocks: list[torch.Tensor]) -> _Made:
    """As `Quantizer._rounded`, in a format whose rows depend on each other, which only rtn makes."""
    assert job.fmt is not None
    stored, error, square = rtn_whole(blocks, job.fmt)
    return [stored[part_name(part)] for part in job.parts], [error, square, 0.0, 0.0]


def _place(job: Job, parts: list[torch.Tensor], packed: QuantizedWeight, first: int) -> None:
    """Rows first .. of the parts."""
    for part, whole in zip(job.parts, parts, strict=True):
        rows = packed.parts[part_name(part)]
        whole[first : first + len(rows)] = rows
