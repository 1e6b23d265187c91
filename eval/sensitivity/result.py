"""The results of a sensitivity run, as in the JSON of `dbrx-q sensitivity`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Sensitivity", "UnitResult", "Unmeasured"]


@dataclass(frozen=True)
class UnitResult:
    """The figures of one unit in one format."""

    name: str
    """Of the `measure.Unit`."""
    tensors: list[str]
    """Of the `measure.Unit`."""
    format: str
    """Of the `TensorFormat`."""
    group_size: int
    """Of the `TensorFormat`."""
    bits_per_weight: float
    """Of these tensors, scales and zero-points included."""
    parameters: int
    """Of these tensors."""
    saved_bytes: int
    """Compared with 16 bits per weight."""
    weight_error: float
    """Root of the sum of squared errors of the weights over their sum of squares."""
    mean_kl: float
    """KL(model || model with these tensors quantized), mean over tokens, in nats."""
    mean_kl_stderr: float
    """Standard error of `mean_kl`."""
    delta_ln_ppl: float
    """Mean change of the negative log-likelihood, in nats."""
    delta_ln_ppl_stderr: float
    """Standard error of that paired difference."""
    kl_per_saved_byte: float
    """mean_kl / saved_bytes."""


@dataclass(frozen=True)
class Unmeasured:
    """A unit and a format without figures."""

    name: str
    """Of the `measure.Unit`."""
    format: str
    """Of the `TensorFormat`."""
    group_size: int
    """Of the `TensorFormat`."""
    reason: str
    """Why it was not measured, as an error says it."""


@dataclass(frozen=True)
class Sensitivity:
    """The JSON object of `dbrx-q sensitivity`, for programs that assign formats to tensors. Later versions may add fields only."""

    checkpoint: str
    """Path or hub id, as given."""
    sha256: str
    """Of the weights."""
    text: str
    """Path or name, as given."""
    text_sha256: str
    """Of the text's UTF-8 bytes."""
    by: str
    """How the model is divided into units; one of `measure.BY`."""
    dtype: str
    """Of activations and dequantized weights."""
    protocol: str
    """One of `windows.PROTOCOLS`."""
    context: int
    """Tokens of a window."""
    windows: int
    """Windows of every measurement."""
    tokens: int
    """Predicted tokens of every measurement."""
    perplexity: float
    """Of the unquantized model."""
    complete: bool
    """False if the run was interrupted; the units listed are measured completely."""
    units: list[UnitResult]
    """In the model's order; for each unit in the order of the requested formats."""
    provenance: dict[str, Any]
    """Versions, device, command line."""
    skipped: list[Unmeasured] = field(default_factory=list)
    """Units that a checkpoint may not have in that format."""
    failed: list[Unmeasured] = field(default_factory=list)
    """Units with weights that the format cannot represent."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; None for a figure that is not finite, such as the perplexity of a model that overflows."""
        data = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        assert isinstance(data, dict)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sensitivity:
        """The inverse of `to_dict`; NaN for a figure that is None."""
        units = [UnitResult(**_figures(unit)) for unit in data["units"]]
        unmeasured = {name: [Unmeasured(**part) for part in data.get(name, [])] for name in ("skipped", "failed")}
        return cls(**(_figures(data) | {"units": units} | unmeasured))


def _figures(data: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in data.items()}
