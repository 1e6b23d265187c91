"""What is said of every tensor that was written, and of a whole run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RunRecord", "TensorRecord"]


@dataclass(frozen=True)
class TensorRecord:
    """One matrix (of one expert), or a tensor that was kept as it is.

    name: as the plain checkpoint has it. expert: -1 where the tensor is no stack. layer: -1 outside the blocks. kind: of `layout.KINDS`.
    format: as "int4 g64", or the dtype of one that was kept. parameters, nbytes: of the matrix, as written.
    root_mean_square: of the original. relative_error: root of the summed squared errors over the summed squares; None for one that was
    kept. output_error: the same of the outputs of a sample of rows on the calibration's tokens; None without calibration.
    tokens: that calibrated it; None without calibration. calibrated_by: "tokens" that reach it, "layer" for all tokens of the layer by
    the router's probability, "none" for too few even of those; "" without calibration. device: that rounded it. seconds: that took.
    """

    name: str
    expert: int
    layer: int
    kind: str
    format: str
    parameters: int
    nbytes: int
    root_mean_square: float
    relative_error: float | None = None
    output_error: float | None = None
    tokens: int | None = None
    calibrated_by: str = ""
    device: str = "cpu"
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """The name, with the expert's number for one of a stack."""
        return self.name if self.expert < 0 else f"{self.name}.{self.expert}"

    @property
    def statistics(self) -> dict[str, float]:
        """For the manifest: what does not depend on the machine or the moment."""
        found = {"root_mean_square": self.root_mean_square}
        return found if self.relative_error is None else found | {"relative_error": self.relative_error}


@dataclass(frozen=True)
class RunRecord:
    """A whole run.

    source: the folder or hub id as it was named. method, options: what decides the bytes. bytes_in, bytes_out: of tensors, without headers.
    parameters: of the model. shards: files of weights. records: in the order of the file. stream_errors: layer to the relative error
    of what leaves it, |quantized - original| / |original| on the calibration's tokens; empty where only one of the models was run.
    expert_tokens: layer to the number of the calibration's tokens that reach each expert. seconds: of this run. resumed_seconds: of
    tensors that earlier runs had finished. peak_memory_bytes: resident, of this process. device: "cpu" or the name of the GPU that
    was used beside it; peak_device_bytes: of tensors there.
    """

    source: str
    method: str
    options: Mapping[str, Any]
    bytes_in: int
    bytes_out: int
    parameters: int
    shards: int
    records: list[TensorRecord]
    seconds: float
    resumed_seconds: float
    peak_memory_bytes: int
    device: str = "cpu"
    peak_device_bytes: int = 0
    stream_errors: dict[int, float] = field(default_factory=dict)
    expert_tokens: dict[int, list[int]] = field(default_factory=dict)

    @property
    def undersampled(self) -> list[TensorRecord]:
        """Matrices that the tokens which reach them did not suffice to calibrate."""
        return [record for record in self.records if record.calibrated_by in ("layer", "none")]

    @property
    def relative_error(self) -> dict[str, float]:
        """By the labels of packed matrices."""
        return {record.label: record.relative_error for record in self.records if record.relative_error is not None}
