"""From a plain checkpoint to a quantized one, tensor by tensor: the memory it takes does not depend on the size of the model.

What is written lies in `DST.partial` until it is complete, and gets its final name in one step.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint import INDEX_NAME, Checkpoint
from dbrx_q.errors import CheckpointError, FormatError, RequestError
from dbrx_q.kernels.linear import PackedFormat, dequantize
from dbrx_q.layout import DenseTensor, Part, TensorFormat, kind_of, oriented, parts_of, unpacked_experts
from dbrx_q.manifest import MANIFEST_NAME, Manifest, sha256_of
from dbrx_q.safetensors_file import SafetensorsWriter
from dbrx_q.staging import check_destination, staged_folder

from .calibrated import Calibration
from .methods import METHODS, Method, Rounded
from .moments import Moments
from .workers import Workers

__all__ = ["QuantizeReport", "quantize_checkpoint"]

_SHARD_BYTES = 4 << 30
_TASK_ROWS = 2048  # that one thread rounds at a time
_STEP_BYTES = 64 << 20  # of weights that are read together, where a matrix is not an expert's


@dataclass(frozen=True)
class QuantizeReport:
    """What was read and written. bytes_in, bytes_out: of tensors, without headers."""

    bytes_in: int
    bytes_out: int
    parameters: int
    shards: int
    relative_error: dict[str, float]
    """Root of the summed squared errors over the summed squares, by packed tensor (by expert: name.index)."""
    fallbacks: list[tuple[int, int]]
    """(layer, expert) that too few tokens reached to be calibrated by them alone."""


@dataclass(frozen=True)
class _Job:
    """Stored tensors that come from one matrix. expert: -1 where the tensor is not a stack. fmt: None keeps it as it is."""

    tensor: DenseTensor
    expert: int
    fmt: TensorFormat | None
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in self.parts)


def quantize_checkpoint(
    source: Path,
    destination: Path,
    recipe: Callable[[Checkpoint], Mapping[str, TensorFormat]],
    *,
    method: str = "rtn",
    sequences: torch.Tensor | None = None,
    about: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = _SHARD_BYTES,
) -> QuantizeReport:
    """Quantize the plain checkpoint in `source`.

    Args:
        source: a folder with a plain checkpoint; read lazily.
        destination: a folder that does not exist or is empty.
        recipe: the formats of the tensors to pack, chosen when the source has been opened; the others are copied.
        method: one of `methods.METHODS`.
        sequences: int64 [B, S], the tokens that a calibrated method fits to; the others need none.
        about: what quantization_config shall say of them.
        on_bytes: called with (bytes of weights read so far, in all).
        shard_bytes: a shard is closed before it grows past this, unless one expert alone is larger.

    Raises:
        CheckpointError: the source is damaged, or already quantized.
        FormatError: a recipe without a format for some experts, a tensor that its format cannot hold, or a format that the method does
            not make.
        RequestError: a calibrated method without sequences, tokens that the model does not know, a destination that is not empty, cannot
            be written, or has too little room.
    """
    check_destination(destination)
    _check_places(source, destination)
    with Checkpoint(source) as checkpoint, ExitStack() as stack:
        if checkpoint.formats:
            raise CheckpointError(f"{source}: the source must be a plain checkpoint; this one is quantized. Give the original")
        try:
            formats = dict(recipe(checkpoint))
        except FormatError as error:
            raise FormatError(f"{source}: {error}") from None
        left = unpacked_experts(checkpoint.config, formats)
        if left:
            raise FormatError(f"{source}: a recipe must pack the experts of every layer; {left[0]} and {len(left) - 1} more have no format")
        chosen = _method(method, formats)
        workers = stack.enter_context(Workers()) if chosen.in_pieces else None
        calibration = _calibration(checkpoint, chosen, method, sequences, workers)
        shards = _shards(_jobs(checkpoint, formats), shard_bytes)
        with staged_folder(destination, sum(job.nbytes for shard in shards for job in shard)) as partial:
            rounding = {"rounding": "nearest" if method == "rtn" else method} | ({"calibration": dict(about)} if about else {})
            return _write(checkpoint, formats, rounding, _Quantizer(checkpoint, chosen, calibration, workers), shards, partial, on_bytes)


def _method(name: str, formats: Mapping[str, TensorFormat]) -> Method:
    if name not in METHODS:
        raise RequestError(f"the method must be one of {', '.join(METHODS)}; found {name!r}")
    for fmt in formats.values():
        METHODS[name].check(name, fmt)
    return METHODS[name]


def _calibration(
    checkpoint: Checkpoint, method: Method, name: str, sequences: torch.Tensor | None, workers: Workers | None
) -> Calibration | None:
    if not method.calibrated or workers is None:
        return None
    if sequences is None or not sequences.numel():
        raise RequestError(
            f"the method {name} must have a text to calibrate with; found none. Give --calibration, or choose rtn, clip or hqq"
        )
    config = checkpoint.config
    if int(sequences.max()) >= config.vocab_size or sequences.shape[1] > config.max_seq_len:
        raise RequestError(
            f"calibration sequences must fit the model: token ids below {config.vocab_size} and at most {config.max_seq_len} tokens; found "
            f"{int(sequences.max())} and {sequences.shape[1]}. Is the tokenizer this model's?"
        )
    return Calibration(config, sequences, workers)


def _check_places(source: Path, destination: Path) -> None:
    target = destination.resolve()
    if target.is_relative_to(source.resolve()):
        raise RequestError(f"{destination}: the destination must lie outside the source {source}. Give another name")
    partial = target.with_name(target.name + ".partial")
    if source.resolve().is_relative_to(partial):
        raise RequestError(f"{destination}: the result is built in {partial}, which must not hold the source {source}. Give another name")


def _jobs(checkpoint: Checkpoint, formats: Mapping[str, TensorFormat]) -> Iterator[list[_Job]]:
    """Jobs in the order of the file; one list is never split between shards, so that one expert is one range of one file."""
    experts: list[_Job] = []
    for tensor in checkpoint.tensors.values():
        fmt = formats.get(tensor.name)
        if fmt is None:
            kept = Part(tensor.name, checkpoint.infos[tensor.name].dtype, tensor.shape)
            yield [_Job(tensor, -1, None, (kept,))]
        elif not tensor.experts:
            yield [_Job(tensor, -1, fmt, tuple(parts_of(tensor, fmt)))]
        else:
            parts = tuple(parts_of(tensor, fmt))
            each = len(parts) // tensor.experts
            experts += [_Job(tensor, e, fmt, parts[e * each : (e + 1) * each]) for e in range(tensor.experts)]
            if tensor.name.endswith(".w2"):
                for e in range(tensor.experts):
                    yield [job for job in experts if job.expert == e]
                experts = []


def _shards(jobs: Iterator[list[_Job]], limit: int) -> list[list[_Job]]:
    shards: list[list[_Job]] = [[]]
    size = 0
    for together in jobs:
        more = sum(job.nbytes for job in together)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1] += together
        size += more
    return shards


def _write(
    checkpoint: Checkpoint,
    formats: Mapping[str, TensorFormat],
    rounding: Mapping[str, Any],
    quantizer: _Quantizer,
    shards: list[list[_Job]],
    partial: Path,
    on_bytes: Callable[[int, int], None],
) -> QuantizeReport:
    total = sum(info.nbytes for info in checkpoint.infos.values())
    done = 0
    manifest = Manifest()
    weight_map: dict[str, str] = {}
    for number, jobs in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        writer = SafetensorsWriter(partial / name, [(part.name, part.dtype, part.shape) for job in jobs for part in job.parts])
        try:
            for job in jobs:
                statistics, tensors = quantizer.run(job)
                manifest.tensors[job.tensor.name + (f".{job.expert}" if job.expert >= 0 else "")] = statistics
                for part, tensor in zip(job.parts, tensors, strict=True):
                    writer.write(part.name, tensor)
                    weight_map[part.name] = name
                done += checkpoint.infos[job.tensor.name].nbytes // (job.tensor.experts if job.expert >= 0 else 1)
                on_bytes(done, total)
            manifest.shards[name] = {"bytes": writer.nbytes, "sha256": writer.close()}
        except BaseException:
            writer.abandon()
            raise
    written = sum(job.nbytes for shard in shards for job in shard)
    _write_json(partial / INDEX_NAME, {"metadata": {"total_size": written}, "weight_map": weight_map})
    _write_json(partial / "config.json", checkpoint.raw_config | {"quantization_config": _quantization_config(formats, rounding)})
    _copy_other_files(checkpoint.folder, partial)
    for path in sorted(partial.iterdir()):
        if path.name not in manifest.shards and not path.name.startswith("."):
            manifest.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    _write_json(partial / MANIFEST_NAME, manifest.to_dict())
    errors = {name: s["relative_error"] for name, s in manifest.tensors.items() if "relative_error" in s}
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return QuantizeReport(total, written, parameters, len(shards), errors, quantizer.fallbacks)


class _Quantizer:
    """Makes the parts of one matrix after the other, in the order of the file."""

    def __init__(self, checkpoint: Checkpoint, method: Method, calibration: Calibration | None, workers: Workers | None) -> None:
        self._checkpoint, self._method, self._calibration, self._workers = checkpoint, method, calibration, workers

    @property
    def fallbacks(self) -> list[tuple[int, int]]:
        """(layer, expert) that fell back."""
        return [] if self._calibration is None else self._calibration.fallbacks

    def run(self, job: _Job) -> tuple[dict[str, float], list[torch.Tensor]]:
        """(statistics for the manifest, the parts) of one matrix.

        Raises:
            FormatError: with the file and the tensor.
        """
        name = job.tensor.name
        if job.fmt is None:
            values = self._checkpoint.read(name)
            if self._calibration is not None:
                self._calibration.keep(job.tensor, values)
            return {"root_mean_square": float(values.float().square().mean(dtype=torch.float64).sqrt())}, [values]
        moments = None if self._calibration is None else self._calibration.moments(job.tensor, job.expert)
        pieces: list[PackedFormat] = []
        error = square = 0.0
        first = 0
        follows = self._calibration is not None and (job.expert >= 0 or job.tensor.layer >= 0)
        originals: list[torch.Tensor] = []
        for rows in _row_blocks(self._checkpoint, job):
            begun = len(pieces)
            try:
                for packed, piece_error, piece_square in self._round(rows, job.fmt, moments):
                    pieces.append(packed)
                    error, square = error + piece_error, square + piece_square
            except FormatError as problem:
                raise FormatError(f"{self._checkpoint.path_of(name)}: tensor {name}: {problem}") from None
            if follows:
                originals.append(rows.float())
            elif self._calibration is not None and kind_of(name) == "embedding":
                self._calibration.embed(first, rows, torch.cat([dequantize(piece) for piece in pieces[begun:]]))
            first += len(rows)
        if self._calibration is not None and follows:
            self._calibration.packed(job.tensor, job.expert, torch.cat(originals), torch.cat([dequantize(piece) for piece in pieces]))
        parts = [torch.cat([getattr(piece, part.name.rsplit(".", 1)[1]) for piece in pieces]) for part in job.parts]
        N, K = job.tensor.matrix
        return {"root_mean_square": math.sqrt(square / (N * K)), "relative_error": math.sqrt(error / square) if square else 0.0}, parts

    def _round(self, rows: torch.Tensor, fmt: TensorFormat, moments: Moments | None) -> list[Rounded]:
        """Some rows at a time, which are independent of each other."""
        if self._workers is None:
            return [self._method.run(rows, fmt, moments)]
        first, *others = rows.split(_TASK_ROWS)
        begun = self._method.run(first, fmt, moments)  # alone: it factors the moments for all
        return [begun, *self._workers.map(lambda some: self._method.run(some, fmt, moments), others)]


def _row_blocks(checkpoint: Checkpoint, job: _Job) -> Iterator[torch.Tensor]:
    """The matrix [N, K] of a job: an expert's whole, any other some rows at a time."""
    name, (N, K) = job.tensor.name, job.tensor.matrix
    step = max(1, _STEP_BYTES // (2 * K))
    if job.expert < 0:
        for first in range(0, N, step):
            yield checkpoint.read_rows(name, first, min(step, N - first))
    else:
        rows = job.tensor.shape[0] // job.tensor.experts
        yield oriented(checkpoint.read_rows(name, job.expert * rows, rows), job.tensor)[0]


def _quantization_config(formats: Mapping[str, TensorFormat], rounding: Mapping[str, Any]) -> dict[str, Any]:
    tensors = {name: {"format": fmt.format, "group_size": fmt.group_size} for name, fmt in formats.items()}
    return {"quant_method": "dbrx_q", "format_version": 1, **rounding, "tensors": tensors}


def _copy_other_files(source: Path, partial: Path) -> None:
    """Tokenizer, generation settings and licence travel with the weights."""
    for path in sorted(source.iterdir()):
        travels = path.suffix in (".json", ".jinja", ".tiktoken") or path.name.startswith(("LICENSE", "NOTICE"))
        written = path.name.endswith(".index.json") or path.name == MANIFEST_NAME or (partial / path.name).exists()
        if path.is_file() and travels and not written:
            shutil.copyfile(path, partial / path.name)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
