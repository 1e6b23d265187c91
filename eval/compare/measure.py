"""Measures how far the predictions, routers and hidden states of checkpoints are from a reference's, on the same tokens.

The statistics of predictions are those of llama.cpp's `llama-perplexity --kl-divergence`, computed in float64.

Dimension letters: `P` predicted tokens of a step, `S` sampled tokens among them, `L` layers, `A` active experts, `D` d_model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.eval.divergence import Distribution, TokenScores, scores
from dbrx_q.eval.observe import Observation, batches, check_ids, chunks, observe, sample_interval, step_tokens
from dbrx_q.eval.resume import RunState, restored_requests, saved_requests
from dbrx_q.eval.windows import Protocol, Window
from dbrx_q.experts.stats import ExpertStats
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.model.overflow import finite_logits
from dbrx_q.sources.base import Source

from .reference import Reference, ReferenceStep

__all__ = ["Pair", "check_same_shape", "compare"]

_SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class _LayerSums:
    """Sums over tokens per layer, numpy arrays [L]."""

    same_experts: np.ndarray
    """int64, tokens for which both models choose the same set of experts."""
    jaccard: np.ndarray
    """float64, sum of |A and B| / |A or B| of both models' sets of experts."""
    error: np.ndarray
    """float64, sum of squares of h - h_ref over the sampled tokens."""
    norm: np.ndarray
    """float64, sum of squares of h_ref over the sampled tokens."""
    sampled: np.ndarray
    """int64, how many tokens are sampled."""

    @classmethod
    def zeros(cls, layers: int) -> _LayerSums:
        """Sums over no tokens."""
        return cls(np.zeros(layers, np.int64), np.zeros(layers), np.zeros(layers), np.zeros(layers), np.zeros(layers, np.int64))

    @classmethod
    def of(cls, reference: ReferenceStep, step: Observation) -> _LayerSums:
        """Sums over the tokens of one step."""
        expected = reference.states.double()  # [S, L, D]
        error = (step.states.double() - expected).square().sum((0, 2)).numpy()
        sampled = np.full(expected.shape[1], len(expected))
        return cls(*_expert_agreement(reference.experts, step.experts), error, expected.square().sum((0, 2)).numpy(), sampled)

    def plus(self, other: _LayerSums) -> _LayerSums:
        """Sums over the tokens of both."""
        return _LayerSums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class _Progress:
    """What a run has measured so far. It is replaced as a whole, so that an interruption leaves a consistent state."""

    windows: int
    """Windows measured."""
    tokens: int
    """Tokens predicted in these windows."""
    layers: _LayerSums
    """Sums over these tokens."""
    requests: ExpertStats
    """Requests for experts that these windows made."""


class Pair:
    """A checkpoint paired with the reference, and what has been measured of the two so far.

    Args:
        source: the checkpoint.
        state: where partial results are saved, and read from when the run is resumed; None to save none.
    """

    def __init__(self, source: Source, state: RunState | None = None) -> None:
        self.source = source
        self._state = state
        self._scores = TokenScores.zeros(0)
        self._progress = _Progress(0, 0, _LayerSums.zeros(source.config.n_layers), ExpertStats())
        saved = None if state is None else state.load()
        if saved is not None:
            self._scores = TokenScores(*(saved[field.name] for field in fields(TokenScores)))
            layers = _LayerSums(*(saved[field.name] for field in fields(_LayerSums)))
            self._progress = _Progress(int(saved["windows"]), len(self._scores.kl), layers, restored_requests(saved))

    @property
    def windows(self) -> int:
        """Windows measured so far."""
        return self._progress.windows

    @property
    def tokens(self) -> int:
        """Tokens predicted in these windows."""
        return self._progress.tokens

    @property
    def layers(self) -> _LayerSums:
        """Sums per layer over these tokens."""
        return self._progress.layers

    @property
    def scores(self) -> TokenScores:
        """Scores of these tokens."""
        return self._scores.first(self.tokens)

    def reserve(self, tokens: int) -> None:
        """Allocate the scores of a whole run.

        Small arrays allocated on the way, between large ones, would keep the allocator from returning those to the system.
        """
        scores = TokenScores.zeros(tokens)
        scores.put(0, self.scores)
        self._scores = scores  # in one step: Ctrl-C may interrupt anywhere

    def put(self, start: int, part: TokenScores) -> None:
        """Write the scores of the tokens from index `start` on. They count once `add` is called."""
        self._scores.put(start, part)

    @property
    def requests(self) -> ExpertStats:
        """Requests for experts of the windows measured so far."""
        return self._progress.requests

    def add(self, windows: int, tokens: int, layers: _LayerSums, requests: ExpertStats) -> None:
        """Count one more batch of windows, whose scores `put` has written, and its requests for experts."""
        self._progress = _Progress(self.windows + windows, self.tokens + tokens, self.layers.plus(layers), self.requests + requests)

    def save(self) -> None:
        """Save the partial results, if there is a place for them."""
        if self._state is not None and self.windows:
            progress = self._progress
            arrays = {field.name: getattr(self._scores.first(progress.tokens), field.name) for field in fields(TokenScores)}
            layers = {field.name: getattr(progress.layers, field.name) for field in fields(_LayerSums)}
            self._state.save(arrays | layers | {"windows": np.array(progress.windows)} | saved_requests(progress.requests))

    def forget(self) -> None:
        """Delete the saved partial results."""
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
    """Measure all `pairs` on a text.

    The reference runs, or is read, batch by batch along with the checkpoints, so that the logits of one chunk at most are in memory. Ctrl-C
    ends the run with the figures of the windows done so far, if there are any.

    Args:
        reference: predictions to measure against.
        pairs: the checkpoints; windows that they have measured already are skipped.
        ids: the text's token ids.
        protocol: how the text is cut into windows, and which of their tokens are predicted.
        load: loads a source's model.
        together: groups pairs whose models are in memory at the same time.
        kv_format: of the checkpoints' keys and values; the reference's are not quantized.
        on_window: called with (windows done, total windows), over all pairs.

    Returns:
        Whether every pair is complete.

    Raises:
        RequestError: the text is shorter than one window, or a checkpoint's shape differs from the reference's.
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
            pair.save()
        if not any(pair.windows for pair in pairs):
            raise
        return False
    except BaseException:
        for pair in pairs:
            pair.save()
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
        pair.reserve(predicted)
    first, last_save = 0, time.monotonic()
    step = step_tokens([*models, *reference.models])
    for index, batch in batches(windows, step, [pair.windows for pair in pairs]):
        tokens = sum(window.tokens for window in batch)
        behind = [(pair, model) for pair, model in zip(pairs, models, strict=True) if pair.windows <= index]
        if behind:
            report()
            _run_batch(reference, behind, text, batch, index=index, first=first, interval=interval, kv_format=kv_format)
            if time.monotonic() - last_save > _SAVE_SECONDS:
                for pair in pairs:
                    pair.save()
                last_save = time.monotonic()
        first += tokens
    for pair in pairs:
        pair.save()
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
    earlier_requests = [model.expert_store.stats() for _, model in pairs]
    runs = [observe(model, text, batch, first=first, interval=interval, kv_format=kv_format) for _, model in pairs]
    layers = [_LayerSums.zeros(reference.config.n_layers) for _ in pairs]
    end = first
    for reference_step in reference.steps(text, batch, index=index, first=first, interval=interval):
        steps = [next(run) for run in runs]
        for chunk in chunks(len(steps[0].targets)):
            expected = reference_step.distribution(chunk)
            for (pair, model), step in zip(pairs, steps, strict=True):
                logits = finite_logits(model, step.hidden[chunk])
                pair.put(end + chunk.start, scores(expected.on(logits.device), Distribution.of(logits, step.targets[chunk])))
        layers = [sums.plus(_LayerSums.of(reference_step, step)) for sums, step in zip(layers, steps, strict=True)]
        end += len(steps[0].targets)
    for (pair, model), sums, earlier in zip(pairs, layers, earlier_requests, strict=True):
        pair.add(len(batch), end - first, sums, model.expert_store.stats() - earlier)


def _expert_agreement(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(tokens with equal sets of experts [L], sums of |A and B| / |A or B| [L]); ours, theirs: uint8 [L, P, A]."""
    common = (ours[..., :, None] == theirs[..., None, :]).any(-1).sum(-1)  # [L, P]
    either = ours.shape[-1] + theirs.shape[-1] - common
    return (common == ours.shape[-1]).sum(-1).numpy(), (common.double() / either).sum(-1).numpy()


def check_same_shape(reference: str, config: DbrxConfig, source: Source) -> None:
    """Refuse a checkpoint of another model than the reference's.

    Args:
        reference: name of the reference, for the error.
        config: of the reference.
        source: the checkpoint.

    Raises:
        RequestError: naming the first difference.
    """
    ours, theirs = _shape(config), _shape(source.config)
    for name, value in ours.items():
        if theirs[name] != value:
            raise RequestError(
                f"{source.name}: a checkpoint must be of the same model as the reference {reference}; "
                f"its {name} is {theirs[name]}, the reference's {value}. Compare checkpoints of one model"
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
