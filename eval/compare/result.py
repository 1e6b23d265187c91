"""The results of a comparison with a reference, as `dbrx-q compare --json` and reports contain them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Comparison", "QuantResult", "WorstToken"]


@dataclass(frozen=True)
class WorstToken:
    """One of the predicted tokens on which the reference and a checkpoint disagree most."""

    position: int
    """Index of the token in the text."""
    before: str
    """The text of its window that precedes it."""
    token: str
    """Text of the token itself."""
    kl: float
    """KL(reference || checkpoint) of its prediction, in nats."""
    reference_top: str
    """Text of the reference's likeliest token."""
    quant_top: str
    """Text of the checkpoint's likeliest token."""
    reference_probability: float
    """The reference's probability of the token itself."""
    quant_probability: float
    """The checkpoint's probability of the token itself."""


@dataclass(frozen=True)
class QuantResult:
    """The figures of one checkpoint. Divergences are KL(reference || checkpoint) per predicted token, in nats."""

    path: str
    """As given."""
    format: str
    """Such as "int4:64 + int8:64" or "GGUF Q4_0"."""
    bits_per_weight: float
    """Stored bits over parameters, scales included."""
    bytes: int
    """Of all tensors as stored."""
    perplexity: float
    """Of the checkpoint on the same tokens."""
    perplexity_stderr: float
    """Standard error of `perplexity`, as if tokens were independent."""
    mean_kl: float
    """Mean divergence."""
    mean_kl_stderr: float
    """Standard error of `mean_kl`."""
    median_kl: float
    """Median divergence."""
    p90_kl: float
    """90 % quantile of the divergences, linear between ranks, as the other quantiles."""
    p99_kl: float
    """99 % quantile of the divergences."""
    p999_kl: float
    """99.9 % quantile of the divergences."""
    max_kl: float
    """Largest divergence."""
    delta_ln_ppl: float
    """Mean of the checkpoint's negative log-likelihood minus the reference's."""
    delta_ln_ppl_stderr: float
    """Standard error of that paired difference."""
    top1_agreement: float
    """Share of tokens for which both have the same likeliest token."""
    top5_agreement: float
    """Mean share of the reference's five likeliest tokens that are among the checkpoint's five."""
    rms_dp: float
    """Root mean square of the difference between both models' probability of the actual token."""
    router_agreement: list[float]
    """Per layer, share of tokens for which both choose the same set of experts."""
    router_jaccard: list[float]
    """Per layer, mean of |A and B| / |A or B| of both sets of experts."""
    hidden_error: list[float]
    """After every block, |h - h_ref| / |h_ref| over `hidden_tokens` tokens: root of summed squares over root of summed squares."""
    tokens: int
    """Tokens predicted."""
    sha256: str
    """Of the checkpoint."""
    hidden_tokens: int = 0
    """Tokens that `hidden_error` samples."""
    worst_tokens: list[WorstToken] = field(default_factory=list)
    """The tokens of the largest divergences, largest first."""
    quantize_seconds: float | None = None
    """Duration of the quantization, if the checkpoint records it."""
    fallback_share: float = 0.0
    """Share of the requests for experts that a fallback copy answered."""


@dataclass(frozen=True)
class Comparison:
    """Several checkpoints measured against one reference on the same tokens."""

    reference: str
    """The reference's path or hub id, as given."""
    reference_format: str
    """Such as "bfloat16"."""
    reference_bits_per_weight: float
    """Stored bits over parameters."""
    reference_bytes: int
    """Of all tensors as stored."""
    reference_perplexity: float
    """Of the reference on the same tokens."""
    reference_perplexity_stderr: float
    """Standard error of `reference_perplexity`."""
    text: str
    """Path or name of the text, as given."""
    context: int
    """Tokens of a window."""
    stride: int
    """Tokens between the starts of two windows."""
    protocol: str
    """One of `windows.PROTOCOLS`."""
    tokens: int
    """Tokens that all checkpoints have predicted."""
    total_tokens: int
    """Tokens that a complete run predicts."""
    complete: bool
    """False if the run was interrupted; the figures of a checkpoint are then those of its first `tokens` tokens."""
    approximation: str
    """What is not exact, such as divergences over the reference's top k; empty if all is exact."""
    results: list[QuantResult]
    """In the order in which the checkpoints were named."""
    provenance: dict[str, Any]
    """What is needed to repeat the run: hashes, versions, device, command line."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `dbrx-q compare --json`; None for a figure that is not finite, such as a model's that overflows."""
        data = _finite(asdict(self))
        assert isinstance(data, dict)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Comparison:
        """The inverse of `to_dict`, except that None stays None."""
        results = [
            QuantResult(**(row | {"worst_tokens": [WorstToken(**token) for token in row["worst_tokens"]]})) for row in data["results"]
        ]
        return cls(**(data | {"results": results}))


def _finite(value: Any) -> Any:
    """A copy of JSON data with None for every float that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
