"""The records of a run: one for each written matrix, and one for the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dbrx_q.quantize.calibration.held_out import SourceDivergence

__all__ = ["HeldOutRecord", "RunRecord", "TensorRecord"]


@dataclass(frozen=True)
class TensorRecord:
    """One matrix, of one expert where the tensor stacks several, or a tensor that was copied."""

    name: str
    """Of the tensor, as in the plain checkpoint."""
    expert: int
    """-1 where the tensor is not a stack."""
    layer: int
    """-1 outside the blocks."""
    kind: str
    """One of `layout.KINDS`."""
    format: str
    """As "int4:64"; the dtype of a tensor that was copied."""
    parameters: int
    """Weights of the matrix."""
    nbytes: int
    """Bytes written."""
    root_mean_square: float | None
    """Of the original weights; None where they were repacked without being dequantized."""
    relative_error: float | None = None
    """Root of the sum of squared errors over the sum of squares; None for a tensor that was copied or kept."""
    kept: bool = False
    """Whether the source's codes were repacked without rounding."""
    output_error: float | None = None
    """The same for the outputs of a sample of rows on the calibration tokens; None without calibration."""
    tokens: int | None = None
    """Number of tokens that calibrated the matrix; None without calibration."""
    calibrated_by: str = ""
    """By "tokens": those that reach the matrix. By "layer": all tokens of the layer, weighted by the router's probability. By "none": no
    tokens, as even the layer has too few. "" without calibration."""
    nearest_instead: bool = False
    """Whether the matrix is stored as rounded to nearest, which errs less on held-out tokens than the method's result."""
    damping: float | None = None
    """The damping of its Hessian, relative to the mean of the diagonal; None for a method that does not choose it."""
    source_weights: list[float] | None = None
    """For each calibration source, the factor that its tokens' weights got; None for a method that does not choose them."""
    device: str = "cpu"
    """The device that rounded it, with the reason where a GPU did not."""
    seconds: float = 0.0
    """The time that it took."""

    @property
    def label(self) -> str:
        """The name, with the expert's number if the tensor is a stack."""
        return self.name if self.expert < 0 else f"{self.name}.{self.expert}"

    @property
    def statistics(self) -> dict[str, float]:
        """The figures that the manifest holds: those that do not depend on the machine or the time."""
        figures = {} if self.root_mean_square is None else {"root_mean_square": self.root_mean_square}
        return figures if self.relative_error is None else figures | {"relative_error": self.relative_error}


@dataclass(frozen=True)
class HeldOutRecord:
    """What the tokens of one source, to which nothing is fitted, say of the quantized model."""

    name: str
    """Of the source, as given."""
    kind: str
    """`HELD_OUT`, `LEFT_OUT` or `CHECKED` of `calibration.held_out`."""
    sequences: int
    """Number of its sequences."""
    tokens: int
    """Number of tokens that were predicted."""
    divergence: SourceDivergence
    """KL divergence of the quantized model and of rounding to nearest from the original."""
    hurts: bool
    """Whether the quantized model is further from the original than rounding to nearest, by more than two standard errors."""
    layer_errors: dict[int, tuple[float, float]]
    """For each layer, the relative error of its output, |x - original| / |original|, of the quantized model and of rounding to nearest."""


@dataclass(frozen=True)
class RunRecord:
    """A whole run."""

    source: str
    """The folder or hub id as it was given."""
    method: str
    """The quantization method."""
    options: Mapping[str, Any]
    """The quantization_config of the result."""
    bytes_in: int
    """Bytes of the source's tensors, without headers."""
    bytes_out: int
    """Bytes of the written tensors, without headers."""
    parameters: int
    """Of the model."""
    shards: int
    """Number of files with weights."""
    records: list[TensorRecord]
    """One for each matrix, in the order of the files."""
    seconds: float
    """The time of this run."""
    resumed_seconds: float
    """The time of the tensors that earlier runs had finished."""
    peak_memory_bytes: int
    """The most memory that was resident in this process."""
    device: str = "cpu"
    """Either "cpu" or the name of the GPU that was used beside it."""
    peak_device_bytes: int = 0
    """The most memory that tensors took on that GPU."""
    stream_errors: dict[int, float] = field(default_factory=dict)
    """For each layer, the relative error of its output, |quantized - original| / |original| on the calibration tokens; empty where only one
    of the models was run."""
    expert_tokens: dict[int, list[int]] = field(default_factory=dict)
    """For each layer, the number of calibration tokens that reach each expert."""
    expert_tokens_by_source: dict[int, list[list[int]]] = field(default_factory=dict)
    """For each layer, a list for each source: how many of its tokens reach each expert; empty where there is only one source."""
    source_names: list[str] = field(default_factory=list)
    """The calibration sources, in the order of `expert_tokens_by_source`."""
    held_out: list[HeldOutRecord] = field(default_factory=list)
    """One for each source of which tokens were held out, then one for each check text."""
    falls_back: bool = False
    """Whether a matrix that errs more on held-out tokens than one that is rounded to nearest is stored as the latter."""
    rounded_again: dict[str, int] = field(default_factory=dict)
    """How many matrices were rounded that the source stores in each of its quantized formats, such as "GGUF Q6_K"."""

    @property
    def kept(self) -> int:
        """How many matrices were repacked without rounding."""
        return sum(record.kept for record in self.records)

    @property
    def nearest_instead(self) -> list[str]:
        """The labels of the matrices that are stored as rounded to nearest."""
        return [record.label for record in self.records if record.nearest_instead]

    @property
    def undersampled(self) -> list[TensorRecord]:
        """Matrices of experts that too few tokens reach to calibrate them."""
        return [record for record in self.records if record.calibrated_by in ("layer", "none")]

    @property
    def unreached_experts(self) -> dict[str, list[tuple[int, int]]]:
        """For each of several calibration sources with sequences, the layers and experts that none of its tokens reach."""
        unreached: dict[str, list[tuple[int, int]]] = {}
        for n, name in enumerate(self.source_names if self.expert_tokens_by_source else []):
            counts = {layer: by_source[n] for layer, by_source in sorted(self.expert_tokens_by_source.items())}
            if any(map(any, counts.values())):
                unreached[name] = [(layer, expert) for layer, row in counts.items() for expert, count in enumerate(row) if not count]
        return unreached

    @property
    def relative_error(self) -> dict[str, float]:
        """The relative error of each packed matrix, by its label."""
        return {record.label: record.relative_error for record in self.records if record.relative_error is not None}
