"""One job: a matrix is read, fitted, rounded and packed, and the calibration advances past it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dbrx_q.checkpoint.layout import TensorFormat, expert_name
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.errors import FormatError
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.quantize.calibration.calibrated import Calibration, Fit
from dbrx_q.quantize.calibration.forward import ORIGINAL, QUANTIZED, LayerwiseForward
from dbrx_q.quantize.calibration.held_out import NEAREST, SourceDivergence
from dbrx_q.quantize.methods.awq import column_scales, fold_v1, fold_w2
from dbrx_q.quantize.methods.choose import Method, Rounded
from dbrx_q.quantize.methods.moments import Moments
from dbrx_q.quantize.methods.workers import Workers

from .accelerator import Accelerator
from .guard import Guard, PartsAndSums, dequantized, loaded, place, rounded_whole, task_rows
from .jobs import Job, read_blocks, read_rows
from .records import TensorRecord

__all__ = ["Quantizer"]


class Quantizer:
    """Quantizes one matrix after the other, in the order of the files.

    Args:
        checkpoint: the source.
        formats: of the tensors that are packed.
        method: the quantization method.
        calibration: the data that a calibrated method fits matrices to; None for the other methods.
        workers: threads that round some rows each; None for a method that has threads of its own, unless there is a calibration or a
            guard, which they serve then.
        accelerator: a GPU that rounds the matrices that fit into its memory; None for the CPU alone.
        guard: compares with rounding to nearest on held-out tokens; None where there are none.
    """

    def __init__(
        self,
        checkpoint: StoredWeights,
        formats: Mapping[str, TensorFormat],
        method: Method,
        calibration: Calibration | None,
        workers: Workers | None,
        accelerator: Accelerator | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._checkpoint, self._formats, self._method = checkpoint, formats, method
        self._calibration, self._workers, self._accelerator = calibration, workers, accelerator
        self._guard = guard
        self._forwards: list[LayerwiseForward] = [] if calibration is None else [calibration]
        self._forwards += [] if guard is None else [guard.forward]
        self._models = tuple(dict.fromkeys(name for forward in self._forwards for name in forward.models))
        self._layer = -1
        self._scales: torch.Tensor | None = None

    def read(self, job: Job) -> list[torch.Tensor]:
        """As `jobs.read_blocks`."""
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
        if job.kept:
            return self._keep(job, blocks, notes, started), notes, blocks
        to_round = self._folded(job, blocks)
        try:
            fit, parts, sums, device = self._quantize_matrix(job, to_round)
            nearest = None if self._guard is None else self._guard.nearest(job, blocks)
            replacement = self._replacement(job, blocks, to_round, parts, nearest)
        except FormatError as problem:
            raise FormatError(f"{self._checkpoint.path_of(job.tensor.name)}: tensor {job.tensor.name}: {problem}") from None
        replaced = replacement is not None
        if replacement is not None:
            parts, sums = replacement
        if job.kind == "head":
            parts, sums, replaced = self._measured_head(job, blocks, (parts, sums), nearest, notes)
        self._advance(job, to_round, parts, nearest)
        error, square, output_error, output_square = sums
        figures = {
            "relative_error": math.sqrt(error / square) if square else 0.0,
            "output_error": math.sqrt(output_error / output_square) if output_square else None,
            "tokens": fit.tokens if fit.by else None,
            "calibrated_by": fit.by,
            "nearest_instead": replaced,
            "damping": None if fit.shrinkage is None else fit.shrinkage.damping,
            "source_weights": None if fit.shrinkage is None else list(fit.shrinkage.weights),
            "device": device,
        }
        return self._record(job, math.sqrt(square / job.parameters), started, **figures), notes, parts

    def _keep(self, job: Job, parts: list[torch.Tensor], notes: dict[str, Any], started: float) -> TensorRecord:
        """Run the tokens through a matrix whose parts are kept; returns its record."""
        root_mean_square = None
        if self._forwards:
            weight = dequantize(loaded(job, parts))
            root_mean_square = math.sqrt(float(weight.square().mean(dtype=torch.float64)))
            self._advance_kept(job, [weight], parts)
            if job.kind == "head" and self._guard is not None:
                self._note_divergence(notes, self._guard.divergence(job, [weight], parts, (parts if self._guard.compares else None))[0])
        return self._record(job, root_mean_square, started, kept=True)

    def _advance_kept(self, job: Job, blocks: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        nearest = (parts, [0.0] * 4) if self._guard is not None and self._guard.compares else None
        self._advance(job, blocks, parts, nearest)

    def replay(self, job: Job, blocks: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        """Run the tokens through a matrix that an earlier run has quantized into `parts`."""
        notes = self._begin(job)
        if job.fmt is None:
            self._advance_plain(job, blocks[0], notes)
        elif job.kept:
            self._advance_kept(job, [dequantize(loaded(job, parts))], parts)
        else:
            nearest = None if self._guard is None else self._guard.nearest(job, blocks)
            self._advance(job, self._folded(job, blocks), parts, nearest)

    @property
    def runs_tokens(self) -> bool:
        """Whether tokens run through the matrices: those that calibrate, or those that are held out."""
        return bool(self._forwards)

    def restore(self, layer: int) -> int:
        """Load the latest snapshot of the activations at a layer up to this one; returns that layer, -1 for the beginning of the model."""
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
        notes: dict[str, Any] = {}
        if layer and self._calibration is not None and (error := self._calibration.stream_error()) is not None:
            notes["stream_error"] = [layer - 1, error]
        if layer and self._guard is not None:
            notes["held_out_errors"] = [layer - 1, self._guard.forward.stream_errors()]
        return notes

    def _advance_plain(self, job: Job, values: torch.Tensor, notes: dict[str, Any]) -> None:
        for forward in self._forwards:
            forward.advance_plain(job.tensor, values)
        if job.kind == "head" and self._guard is not None:
            self._note_divergence(notes, self._guard.divergence(job, [values], [values], None)[0])
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

    def _replacement(
        self, job: Job, blocks: list[torch.Tensor], to_round: list[torch.Tensor], parts: list[torch.Tensor], nearest: PartsAndSums | None
    ) -> PartsAndSums | None:
        """The matrix that was rounded to nearest, where it is to replace `parts`; the head is decided by `_measured_head`.

        Args:
            job: of the matrix.
            blocks: its rows.
            to_round: the rows that were quantized, with folded scales.
            parts: of the quantized matrix.
            nearest: `blocks`, rounded to nearest.
        """
        if self._guard is None or not self._guard.falls_back or job.kind == "head":
            return None
        candidate = nearest if to_round is blocks else self._guard.nearest(job, to_round)
        assert candidate is not None
        if not self._guard.prefers_nearest(job, to_round, parts, candidate[0]):
            return None
        return self._guard.to_store(job, to_round, candidate)

    def _measured_head(
        self, job: Job, blocks: list[torch.Tensor], quantized: PartsAndSums, nearest: PartsAndSums | None, notes: dict[str, Any]
    ) -> tuple[list[torch.Tensor], list[float], bool]:
        """(parts and sums of the head to store, whether it is the one that was rounded to nearest); notes the divergences."""
        if self._guard is None:
            return *quantized, False
        divergences, replaced = self._guard.divergence(job, blocks, quantized[0], None if nearest is None else nearest[0])
        self._note_divergence(notes, divergences)
        return *(nearest if replaced and nearest is not None else quantized), replaced

    def _note_divergence(self, notes: dict[str, Any], divergences: Sequence[SourceDivergence]) -> None:
        notes["held_out_divergence"] = [self._checkpoint.config.n_layers, [divergence.figures for divergence in divergences]]

    def _advance(self, job: Job, blocks: list[torch.Tensor], parts: list[torch.Tensor], nearest: PartsAndSums | None) -> None:
        """Run the tokens of calibration and guard through a packed matrix.

        Args:
            job: of the matrix.
            blocks: the rows that were quantized.
            parts: of the packed matrix.
            nearest: the matrix rounded to nearest; None where no model has it.
        """
        if not self._forwards or job.kind == "head":
            return
        packed = {QUANTIZED: loaded(job, parts)}
        if nearest is not None:
            packed[NEAREST] = loaded(job, nearest[0], Guard.nearest_format(job))
        if job.kind != "embedding":
            assert self._workers is not None
            weights = {name: dequantized(matrix, self._workers) for name, matrix in packed.items()}
            weights[ORIGINAL] = torch.cat(blocks)
            weights = {name: self._forwards[0].products.prepared(weights[name]) for name in self._models}  # once for all forwards
            for forward in self._forwards:
                forward.advance(job.tensor, job.expert, weights)
            return
        first = 0
        for rows in blocks:
            last = first + len(rows)
            embeddings = {ORIGINAL: rows} | {name: dequantize(matrix.rows(first, last)) for name, matrix in packed.items()}
            for forward in self._forwards:
                forward.embed(first, embeddings)
            first = last

    def _quantize_matrix(self, job: Job, blocks: list[torch.Tensor]) -> tuple[Fit, list[torch.Tensor], list[float], str]:
        """(data that the matrix is fitted to, its parts, sums as in `PartsAndSums`, the device that rounded it)."""
        accelerator, device = self._accelerator, "cpu"
        where: AbstractContextManager[None] = nullcontext()
        if accelerator is not None and job.fmt is not None and self._method.takes_pieces(job.fmt):
            rows = accelerator.rows(job, self._method, models=max(1, len(self._models)))
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
                return fit, *rounded_whole(job, blocks), device
            return fit, *self._rounded(job, blocks, fit.moments, 0), device

    def _fit(self, job: Job) -> Fit:
        return Fit(None, 0, "") if self._calibration is None else self._calibration.fit(job.tensor, job.expert)

    def _rounded(self, job: Job, blocks: list[torch.Tensor], moments: Moments | None, on_accelerator: int) -> PartsAndSums:
        """`on_accelerator`: how many rows the GPU rounds at a time, 0 for the CPU."""
        assert job.fmt is not None
        parts = [torch.empty(part.shape, dtype=part.dtype) for part in job.parts]
        sums = [0.0] * 4
        first = 0
        for rows in blocks:
            for piece in self._round(rows, job.fmt, moments, on_accelerator):
                place(job, parts, piece.packed, first)
                first += piece.packed.shape[0]
                figures = piece.error, piece.square, piece.output_error, piece.output_square
                sums = [total + figure for total, figure in zip(sums, figures, strict=True)]
        return parts, sums

    def _round(self, rows: torch.Tensor, fmt: TensorFormat, moments: Moments | None, on_accelerator: int) -> Iterable[Rounded]:
        """The rows, rounded some at a time; they are independent of each other."""
        if on_accelerator and self._accelerator is not None:
            device = self._accelerator.device
            return (self._method.run(piece.to(device), fmt, moments) for piece in rows.split(on_accelerator))
        if self._workers is None or not self._method.takes_pieces(fmt):
            return [self._method.run(rows, fmt, moments)]
        if moments is not None:
            moments.prepare(None if fmt.record.trellis is None else fmt.group_size)
        return self._workers.map(lambda piece: self._method.run(piece, fmt, moments), rows.split(task_rows(fmt)))

    def _record(self, job: Job, root_mean_square: float | None, started: float, **figures: Any) -> TensorRecord:
        name, layer = job.tensor.name, job.tensor.layer
        sizes = job.parameters, job.nbytes
        seconds = time.perf_counter() - started
        return TensorRecord(name, job.expert, layer, job.kind, job.format_name, *sizes, root_mean_square, **figures, seconds=seconds)
