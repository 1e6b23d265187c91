"""What a comparison with a reference gives, in the order in which it is printed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Comparison", "QuantResult", "WorstToken"]


@dataclass(frozen=True)
class WorstToken:
    """A predicted token of which the two models disagree most.

    position: in the text. before: text of its window that comes before it. token: its own text. kl: in nats. reference_top, quant_top: what
    each model held for the likeliest instead. reference_probability, quant_probability: that each gave to the token itself.
    """

    position: int
    before: str
    token: str
    kl: float
    reference_top: str
    quant_top: str
    reference_probability: float
    quant_probability: float


@dataclass(frozen=True)
class QuantResult:
    """One checkpoint beside the reference. Divergences are KL(reference || checkpoint) per predicted token, in nats.

    path: as given. format: such as "int4:64 + int8:64" or "GGUF Q4_0". bits_per_weight: stored bits over parameters, scales included.
    bytes: of all tensors as stored. sha256: of the checkpoint. tokens: predicted.
    perplexity, perplexity_stderr: of this checkpoint on the same tokens.
    delta_ln_ppl: mean of (its negative log-likelihood - the reference's), and the standard error of that paired difference.
    top1_agreement: share of tokens for which both hold the same token for the likeliest. top5_agreement: mean share of the reference's five
    likeliest that are among the checkpoint's five. rms_dp: root mean square of the difference of the probability of the token that came.
    router_agreement: per layer, share of tokens whose experts are the same set. router_jaccard: per layer, mean of |A and B| / |A or B|.
    hidden_error: after every block, |h - h_ref| / |h_ref| over a sample of `hidden_tokens` tokens (root of summed squares over root of
    summed squares).
    worst_tokens: largest divergence first. fallback_share: share of the requests for experts that a fallback copy answered.
    quantize_seconds: what quantizing took, where the checkpoint tells.
    """

    path: str
    format: str
    bits_per_weight: float
    bytes: int
    perplexity: float
    perplexity_stderr: float
    mean_kl: float
    mean_kl_stderr: float
    median_kl: float
    p90_kl: float
    p99_kl: float
    p999_kl: float
    max_kl: float
    delta_ln_ppl: float
    delta_ln_ppl_stderr: float
    top1_agreement: float
    top5_agreement: float
    rms_dp: float
    router_agreement: list[float]
    router_jaccard: list[float]
    hidden_error: list[float]
    tokens: int
    sha256: str
    hidden_tokens: int = 0
    worst_tokens: list[WorstToken] = field(default_factory=list)
    quantize_seconds: float | None = None
    fallback_share: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Several checkpoints beside one reference, on the same tokens.

    reference, text: paths or names as given. context, stride, protocol: how the text was cut (`windows.Protocol`). tokens: predicted.
    complete: False where the run was interrupted: the figures of a checkpoint are then of its `tokens` of `total_tokens` tokens alone.
    approximation: empty, or what is not exact, such as divergences over the reference's top k.
    provenance: everything that is needed to repeat it: hashes, versions, device, command line.
    """

    reference: str
    reference_format: str
    reference_bits_per_weight: float
    reference_bytes: int
    reference_perplexity: float
    reference_perplexity_stderr: float
    text: str
    context: int
    stride: int
    protocol: str
    tokens: int
    total_tokens: int
    complete: bool
    approximation: str
    results: list[QuantResult]
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `dbrx-q compare --json`; what is not finite, such as the divergence of a model that overflows, is None."""
        found = _finite(asdict(self))
        assert isinstance(found, dict)
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Comparison:
        """What `to_dict` gave."""
        results = [
            QuantResult(**(row | {"worst_tokens": [WorstToken(**token) for token in row["worst_tokens"]]})) for row in data["results"]
        ]
        return cls(**(data | {"results": results}))


def _finite(value: Any) -> Any:
    """The same JSON with null for every float that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
