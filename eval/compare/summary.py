"""Computes the figures of a comparison from the scores of all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dbrx_q.eval.divergence import TokenScores, mean_and_stderr
from dbrx_q.eval.windows import Protocol
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .measure import Pair
from .reference import Reference
from .result import Comparison, QuantResult, WorstToken

__all__ = ["summary"]

_WORST = 10
_CONTEXT_TOKENS = 40  # shown before each of the worst tokens


def summary(
    reference: Reference,
    pairs: Sequence[Pair],
    ids: Sequence[int],
    protocol: Protocol,
    tokenizer: DbrxTokenizer,
    *,
    text: str,
    provenance: Mapping[str, Any],
) -> Comparison:
    """The figures of all pairs that have measured at least one window."""
    windows = protocol.windows(len(ids))
    measured = [pair for pair in pairs if pair.windows]
    longest = max(measured, key=lambda pair: pair.tokens).scores
    mean, error = mean_and_stderr(longest.nll_reference)
    positions = np.concatenate([np.arange(window.scored, window.end) for window in windows])
    firsts = np.concatenate([np.full(window.tokens, window.first) for window in windows])
    return Comparison(
        reference=reference.name,
        reference_format=reference.format,
        reference_bits_per_weight=reference.bits_per_weight,
        reference_bytes=reference.nbytes,
        reference_perplexity=float(np.exp(mean)),
        reference_perplexity_stderr=float(np.exp(mean)) * error,
        text=text,
        context=protocol.context,
        stride=protocol.stride,
        protocol=protocol.name,
        tokens=min(pair.tokens for pair in measured),
        total_tokens=len(positions),
        complete=all(pair.windows == len(windows) for pair in pairs),
        approximation=reference.approximation,
        results=[_result(pair, ids, positions, firsts, tokenizer) for pair in measured],
        provenance=dict(provenance),
    )


def _result(pair: Pair, ids: Sequence[int], positions: np.ndarray, firsts: np.ndarray, tokenizer: DbrxTokenizer) -> QuantResult:
    scored = pair.scores
    tokens, layers, sums = len(scored.kl), pair.source.config.n_layers, pair.layers
    mean, error = mean_and_stderr(scored.nll)
    kl, kl_error = mean_and_stderr(scored.kl)
    change, change_error = mean_and_stderr(scored.nll - scored.nll_reference)
    median, p90, p99, p999 = (float(np.quantile(scored.kl, share)) for share in (0.5, 0.9, 0.99, 0.999))
    fallback_share = pair.requests.fallback_share
    worst = np.argsort(-np.nan_to_num(scored.kl, nan=np.inf), kind="stable")[:_WORST]
    return QuantResult(
        path=pair.source.name,
        format=pair.source.format + (f", {fallback_share:.1%} of requests answered by the fallback copy" if fallback_share else ""),
        fallback_share=fallback_share,
        bits_per_weight=pair.source.bits_per_weight,
        bytes=pair.source.nbytes,
        perplexity=float(np.exp(mean)),
        perplexity_stderr=float(np.exp(mean)) * error,
        mean_kl=kl,
        mean_kl_stderr=kl_error,
        median_kl=median,
        p90_kl=p90,
        p99_kl=p99,
        p999_kl=p999,
        max_kl=float(scored.kl.max()),
        delta_ln_ppl=change,
        delta_ln_ppl_stderr=change_error,
        top1_agreement=float((scored.top == scored.reference_top).mean()),
        top5_agreement=float(scored.top5.mean(dtype=np.float64)),
        rms_dp=float(np.sqrt(np.square(np.exp(-scored.nll) - np.exp(-scored.nll_reference)).mean())),
        router_agreement=(sums.same_experts / tokens).tolist(),
        router_jaccard=(sums.jaccard / tokens).tolist(),
        hidden_error=[float(np.sqrt(sums.error[i] / sums.norm[i])) if sums.norm[i] else 0.0 for i in range(layers)],
        hidden_tokens=int(sums.sampled[0]),
        tokens=tokens,
        sha256=pair.source.sha256(),
        worst_tokens=[_worst(scored, int(row), ids, int(firsts[row]), int(positions[row]), tokenizer) for row in worst],
        quantize_seconds=pair.source.quantize_seconds,
    )


def _worst(scored: TokenScores, row: int, ids: Sequence[int], first: int, position: int, tokenizer: DbrxTokenizer) -> WorstToken:
    def spelled(token: int) -> str:
        return tokenizer.decode([token]) if tokenizer.has_token(token) else f"<{token}>"

    return WorstToken(
        position=position,
        before=tokenizer.decode(ids[max(first, position - _CONTEXT_TOKENS) : position]),
        token=spelled(ids[position]),
        kl=float(scored.kl[row]),
        reference_top=spelled(int(scored.reference_top[row])),
        quant_top=spelled(int(scored.top[row])),
        reference_probability=float(np.exp(-scored.nll_reference[row])),
        quant_probability=float(np.exp(-scored.nll[row])),
    )
