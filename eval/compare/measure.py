"""Checkpoints beside a reference, on the same tokens: how far their predictions, routers and hidden states are from it.

The statistics of predictions are those of llama.cpp's `llama-perplexity --kl-divergence`, computed in float64.

Dimension letters: `P` predicted tokens of a step, `S` sampled ones of them, `L` layers, `A` active experts, `D` d_model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.eval.divergence import Distribution, TokenScores, mean_and_stderr, scores
from dbrx_q.eval.observe import Observation, batches, check_ids, chunks, observe, sample_interval, step_tokens
from dbrx_q.eval.resume import RunState, kept_requests, restored_requests
from dbrx_q.eval.windows import Protocol, Window
from dbrx_q.experts.stats import ExpertStats
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.sources.base import Source
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .reference import Reference, ReferenceStep
from .result import Comparison, QuantResult, WorstToken

__all__ = ["Pair", "check_same_shape", "compare", "summary"]

_SAVE_SECONDS = 30.0
_WORST = 10
_CONTEXT_TOKENS = 40  # that are shown before a token that suffered


@dataclass(frozen=True)
class _LayerSums:
    """Sums per layer, [L] each.

    same_experts: tokens whose experts are the same set. jaccard: of |A and B| / |A or B| over tokens. error, norm: of the squares of
    h - h_ref and of h_ref over `sampled` tokens.
    """

    same_experts: np.ndarray
    jaccard: np.ndarray
    error: np.ndarray
    norm: np.ndarray
    sampled: np.ndarray

    @classmethod
    def none(cls, layers: int) -> _LayerSums:
        """Of no token."""
        return cls(np.zeros(layers, np.int64), np.zeros(layers), np.zeros(layers), np.zeros(layers), np.zeros(layers, np.int64))

    @classmethod
    def of(cls, reference: ReferenceStep, seen: Observation) -> _LayerSums:
        """Of one step."""
        wanted = reference.states.double()  # [S, L, D]
        error = (seen.states.double() - wanted).square().sum((0, 2)).numpy()
        sampled = np.full(wanted.shape[1], len(wanted))
        return cls(*_expert_agreement(reference.experts, seen.experts), error, wanted.square().sum((0, 2)).numpy(), sampled)

    def plus(self, other: _LayerSums) -> _LayerSums:
        """Of the tokens of both."""
        return _LayerSums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class _Done:
    """What counts of a run, replaced as a whole."""

    windows: int
    tokens: int
    layers: _LayerSums
    served: ExpertStats


class Pair:
    """One checkpoint beside the reference, and what has been measured of it so far.

    Args:
        source: the checkpoint.
        state: where figures so far are kept, and found again; None for nowhere.
    """

    def __init__(self, source: Source, state: RunState | None = None) -> None:
        self.source = source
        self._state = state
        self._room = TokenScores.room(0)
        self._done = _Done(0, 0, _LayerSums.none(source.config.n_layers), ExpertStats())
        kept = None if state is None else state.load()
        if kept is not None:
            self._room = TokenScores(*(kept[field.name] for field in fields(TokenScores)))
            layers = _LayerSums(*(kept[field.name] for field in fields(_LayerSums)))
            self._done = _Done(int(kept["windows"]), len(self._room.kl), layers, restored_requests(kept))

    @property
    def windows(self) -> int:
        """Windows that are done."""
        return self._done.windows

    @property
    def tokens(self) -> int:
        """Predicted tokens that are done."""
        return self._done.tokens

    @property
    def layers(self) -> _LayerSums:
        """Sums over what is done."""
        return self._done.layers

    @property
    def scores(self) -> TokenScores:
        """Of all tokens that are done."""
        return self._room.first(self.tokens)

    def make_room(self, tokens: int) -> None:
        """For the scores of a whole run: small arrays that stay would keep the allocator from giving back the large ones between them."""
        room = TokenScores.room(tokens)
        room.put(0, self.scores)
        self._room = room  # in one step, as what follows: Ctrl-C may come at any

    def put(self, at: int, part: TokenScores) -> None:
        """Write scores from token `at` on; they count when `add` is called."""
        self._room.put(at, part)

    @property
    def served(self) -> ExpertStats:
        """What was asked of the experts for what is done."""
        return self._done.served

    def add(self, windows: int, tokens: int, layers: _LayerSums, served: ExpertStats) -> None:
        """Count one more batch of windows, whose scores have been put, and what its experts were asked for."""
        self._done = _Done(self.windows + windows, self.tokens + tokens, self.layers.plus(layers), self.served + served)

    def keep(self) -> None:
        """Write what is done to where it is found again."""
        if self._state is not None and self.windows:
            done = self._done
            arrays = {field.name: getattr(self._room.first(done.tokens), field.name) for field in fields(TokenScores)}
            layers = {field.name: getattr(done.layers, field.name) for field in fields(_LayerSums)}
            self._state.save(arrays | layers | {"windows": np.array(done.windows)} | kept_requests(done.served))

    def forget(self) -> None:
        """Remove what was kept."""
        if self._state is not None:
            self._state.clear()


def compare(
    reference: Reference,
    pairs: Sequence[Pair],
    ids: Sequence[int],
    protocol: Protocol,
    *,
    load: Callable[[Source], DbrxForCausalLM],
    together: Callable[[Sequence[Pair]], Sequence[Sequence[Pair]]] = lambda pairs: [pairs],
    kv_format: str = "plain",
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Fill `pairs` with what the text gives.

    The reference runs, or is read, batch by batch beside the checkpoints, so that logits are never held for more than one chunk. Ctrl-C
    ends it with the figures so far, once there are any.

    Args:
        reference: predictions to measure against.
        pairs: the checkpoints; what they hold already is not measured again.
        ids: the text's token ids.
        protocol: how the text is cut into windows, and which of their tokens are predicted.
        load: gives a source's model.
        together: groups of pairs whose models are in memory at the same time.
        kv_format: of the checkpoints' keys and values; the reference's are as they are.
        on_window: called with (windows done, windows in all), over all pairs.

    Returns:
        Whether every pair is complete.

    Raises:
        RequestError: a text shorter than one window, or a checkpoint of another shape than the reference.
    """
    for pair in pairs:
        check_same_shape(reference.name, reference.config, pair.source)
        protocol.check(len(ids), pair.source.config)
        check_ids(ids, pair.source.config.vocab_size)
    windows = protocol.windows(len(ids))
    text = torch.tensor(ids)

    def report() -> None:
        on_window(sum(pair.windows for pair in pairs), len(pairs) * len(windows))

    try:
        for group in together([pair for pair in pairs if pair.windows < len(windows)]):
            _run(reference, group, text, windows, load, kv_format, report)
    except KeyboardInterrupt:
        for pair in pairs:
            pair.keep()
        if not any(pair.windows for pair in pairs):
            raise
        return False
    except BaseException:
        for pair in pairs:
            pair.keep()
        raise
    return True


def _run(
    reference: Reference,
    pairs: Sequence[Pair],
    text: torch.Tensor,
    windows: Sequence[Window],
    load: Callable[[Source], DbrxForCausalLM],
    kv_format: str,
    report: Callable[[], None],
) -> None:
    models = [load(pair.source) for pair in pairs]
    predicted = sum(window.tokens for window in windows)
    interval = sample_interval(windows, reference.config.n_layers, reference.config.d_model)
    for pair in pairs:
        pair.make_room(predicted)
    first, saved = 0, time.monotonic()
    step = step_tokens([*models, *reference.models])
    for index, batch in batches(windows, step, [pair.windows for pair in pairs]):
        tokens = sum(window.tokens for window in batch)
        behind = [(pair, model) for pair, model in zip(pairs, models, strict=True) if pair.windows <= index]
        if behind:
            report()
            _run_batch(reference, behind, text, batch, index=index, first=first, interval=interval, kv_format=kv_format)
            if time.monotonic() - saved > _SAVE_SECONDS:
                for pair in pairs:
                    pair.keep()
                saved = time.monotonic()
        first += tokens
    for pair in pairs:
        pair.keep()
    report()


def _run_batch(
    reference: Reference,
    pairs: Sequence[tuple[Pair, DbrxForCausalLM]],
    text: torch.Tensor,
    batch: Sequence[Window],
    *,
    index: int,
    first: int,
    interval: int,
    kv_format: str,
) -> None:
    before = [model.expert_store.stats() for _, model in pairs]
    runs = [observe(model, text, batch, first=first, interval=interval, kv_format=kv_format) for _, model in pairs]
    layers = [_LayerSums.none(reference.config.n_layers) for _ in pairs]
    at = first
    for wanted in reference.steps(text, batch, index=index, first=first, interval=interval):
        seen = [next(run) for run in runs]
        for place in chunks(len(seen[0].targets)):
            expected = wanted.distribution(place)
            for (pair, model), one in zip(pairs, seen, strict=True):
                logits = model.lm_head(one.hidden[place])
                pair.put(at + place.start, scores(expected.on(logits.device), Distribution.of(logits, one.targets[place])))
        layers = [sums.plus(_LayerSums.of(wanted, one)) for sums, one in zip(layers, seen, strict=True)]
        at += len(seen[0].targets)
    for (pair, model), sums, earlier in zip(pairs, layers, before, strict=True):
        pair.add(len(batch), at - first, sums, model.expert_store.stats() - earlier)


def _expert_agreement(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """([L] tokens whose experts are the same, [L] sums of |A and B| / |A or B|) of uint8 [L, P, A] each."""
    common = (ours[..., :, None] == theirs[..., None, :]).any(-1).sum(-1)  # [L, P]
    either = ours.shape[-1] + theirs.shape[-1] - common
    return (common == ours.shape[-1]).sum(-1).numpy(), (common.double() / either).sum(-1).numpy()


def check_same_shape(reference: str, config: DbrxConfig, source: Source) -> None:
    """Refuse a checkpoint that is not of the model of the reference, called `reference`, whose configuration is `config`.

    Raises:
        RequestError: with the first difference.
    """
    ours, theirs = _shape(config), _shape(source.config)
    for name, value in ours.items():
        if theirs[name] != value:
            raise RequestError(
                f"{source.name}: a checkpoint must be of the same model as the reference {reference}; "
                f"{name} is {theirs[name]} here and {value} there. Compare checkpoints of one model"
            )


def _shape(config: DbrxConfig) -> dict[str, object]:
    ffn, attention = config.ffn_config, config.attn_config
    return {
        "n_layers": config.n_layers,
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "kv_n_heads": attention.kv_n_heads,
        "vocab_size": config.vocab_size,
        "ffn_hidden_size": ffn.ffn_hidden_size,
        "moe_num_experts": ffn.moe_num_experts,
        "moe_top_k": ffn.moe_top_k,
    }


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
    """The figures of all pairs of which something is done."""
    windows = protocol.windows(len(ids))
    begun = [pair for pair in pairs if pair.windows]
    longest = max(begun, key=lambda pair: pair.tokens).scores
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
        tokens=min(pair.tokens for pair in begun),
        total_tokens=len(positions),
        complete=all(pair.windows == len(windows) for pair in pairs),
        approximation=reference.approximation,
        results=[_result(pair, ids, positions, firsts, tokenizer) for pair in begun],
        provenance=dict(provenance),
    )


def _result(pair: Pair, ids: Sequence[int], positions: np.ndarray, firsts: np.ndarray, tokenizer: DbrxTokenizer) -> QuantResult:
    found = pair.scores
    tokens, layers, sums = len(found.kl), pair.source.config.n_layers, pair.layers
    mean, error = mean_and_stderr(found.nll)
    kl, kl_error = mean_and_stderr(found.kl)
    change, change_error = mean_and_stderr(found.nll - found.nll_reference)
    median, p90, p99, p999 = (float(np.quantile(found.kl, share)) for share in (0.5, 0.9, 0.99, 0.999))
    fallback_share = pair.served.fallback_share
    worst = np.argsort(-np.nan_to_num(found.kl, nan=np.inf), kind="stable")[:_WORST]
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
        max_kl=float(found.kl.max()),
        delta_ln_ppl=change,
        delta_ln_ppl_stderr=change_error,
        top1_agreement=float((found.top == found.reference_top).mean()),
        top5_agreement=float(found.top5.mean(dtype=np.float64)),
        rms_dp=float(np.sqrt(np.square(np.exp(-found.nll) - np.exp(-found.nll_reference)).mean())),
        router_agreement=(sums.same_experts / tokens).tolist(),
        router_jaccard=(sums.jaccard / tokens).tolist(),
        hidden_error=[float(np.sqrt(sums.error[i] / sums.norm[i])) if sums.norm[i] else 0.0 for i in range(layers)],
        hidden_tokens=int(sums.sampled[0]),
        tokens=tokens,
        sha256=pair.source.sha256(),
        worst_tokens=[_worst(found, int(row), ids, int(firsts[row]), int(positions[row]), tokenizer) for row in worst],
        quantize_seconds=pair.source.quantize_seconds,
    )


def _worst(found: TokenScores, row: int, ids: Sequence[int], first: int, position: int, tokenizer: DbrxTokenizer) -> WorstToken:
    def spelled(token: int) -> str:
        return tokenizer.decode([token]) if tokenizer.has_token(token) else f"<{token}>"

    return WorstToken(
        position=position,
        before=tokenizer.decode(ids[max(first, position - _CONTEXT_TOKENS) : position]),
        token=spelled(ids[position]),
        kl=float(found.kl[row]),
        reference_top=spelled(int(found.reference_top[row])),
        quant_top=spelled(int(found.top[row])),
        reference_probability=float(np.exp(-found.nll_reference[row])),
        quant_probability=float(np.exp(-found.nll[row])),
    )
