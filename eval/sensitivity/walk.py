"""Runs a model block by block, and from any block on with quantized weights.

Dimension letters: `T` tokens of a batch, `P` predicted tokens among them, `E` experts, `D` d_model, `V` vocabulary, `N` rows of a
matrix, `K` its reduction axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from dbrx_q.checkpoint.layout import EMBEDDING, HEAD, DenseTensor, TensorFormat, dense_tensors, kind_of, layer_of, role_of
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import FormatError
from dbrx_q.eval.divergence import Distribution, TokenScores, scores
from dbrx_q.eval.observe import LOGIT_TOKENS, batches
from dbrx_q.eval.windows import Window
from dbrx_q.experts import ExpertStore, ResidentExpertStore
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.linear import linear
from dbrx_q.model.batch import Batch, ForwardPass, batch_of
from dbrx_q.model.block import Rotation, rotation_of
from dbrx_q.model.modeling import DbrxForCausalLM

from .rounding import Rounding, rounded

__all__ = ["Outcome", "Walk", "packable"]

_PACKED_KINDS = ("embedding", "attention", "experts", "head")
_TOGETHER = 8  # 2 D numbers per token each: 3.2 GB for 16 windows of 512 tokens, float32; half of a layer's experts in bfloat16


def packable(config: DbrxConfig) -> list[DenseTensor]:
    """The matrices that can have a packed format, in the model's order: all except routers and norms."""
    return [tensor for tensor in dense_tensors(config) if kind_of(tensor.name) in _PACKED_KINDS]


@dataclass(frozen=True)
class _Step:
    """The inputs of windows that run together."""

    ids: torch.Tensor
    """int64 [T], token ids."""
    batch: Batch
    """How the tokens are divided into windows."""
    rotation: Rotation
    """Rotary embedding of their positions."""
    rows: torch.Tensor
    """int64 [P], indices of the tokens whose last hidden state predicts."""
    targets: torch.Tensor
    """int64 [P], the actual tokens."""


_Stream = tuple[torch.Tensor, torch.Tensor | None]
"""A block's input: the residual stream [T, D], and the preceding block's output [T, D], which is added to it."""


@dataclass(frozen=True)
class Outcome:
    """The measurement of a model with some tensors quantized."""

    scores: TokenScores
    """Its predictions compared with the unquantized model's."""
    roundings: list[Rounding]
    """The quantization error of each tensor."""


@dataclass
class _PartialRun:
    """A part whose run through the model is in progress."""

    tensors: Sequence[str]
    """Names of the tensors that are quantized."""
    fmt: TensorFormat
    """The format that they are quantized to."""
    streams: list[_Stream]
    """Input of the next block, for every step."""
    roundings: list[Rounding] = field(default_factory=list)
    """The quantization error of each tensor so far."""
    error: str | None = None
    """Why the run ended early, if it did."""


class Walk:
    """Runs all windows through the model once, place by place; from its current place it runs the rest with other weights.

    Places are 0 for the embedding, 1 .. n_layers for the blocks, n_layers + 1 for the norm and the head.

    Attributes:
        together: how many parts to measure together: several if experts are dequantized again each time a block runs.
    """

    def __init__(self, model: DbrxForCausalLM, text: torch.Tensor, windows: Sequence[Window]) -> None:
        self._model = model
        self._store = model.transformer.expert_store or ResidentExpertStore(
            [block.ffn.experts.mlp.weights() for block in model.transformer.layers()]
        )
        self._tensors = {tensor.name: tensor for tensor in packable(model.config)}
        self._steps = [_step(model, text, batch) for _, batch in batches(windows)]
        self._end = model.config.n_layers + 1
        self._place = 0
        self._streams: list[_Stream] = []
        streams: list[_Stream] = []
        for place in range(self._end):
            self._pass(place, streams, {})
        self._reference = self._hidden(streams)  # [P, D] of every step
        self.together = _TOGETHER if self._store.reloads_each_step else 1

    def place_of(self, name: str) -> int:
        """The place of a tensor."""
        return {EMBEDDING: 0, HEAD: self._end}.get(name, self._tensors[name].layer + 1)

    def go_to(self, place: int) -> None:
        """Advance to a later place. An interruption here leaves the walk unusable."""
        for passed in range(self._place, place):
            self._pass(passed, self._streams, {})
        self._place = place

    def reference_nll(self) -> float:
        """Mean negative log-likelihood of the unquantized model, in nats."""
        losses = [
            Distribution.of(self._logits(hidden[chunk], None), step.targets[chunk]).nll.cpu().numpy()
            for step, hidden in zip(self._steps, self._reference, strict=True)
            for chunk in _chunks(step)
        ]
        return float(np.concatenate(losses).mean())

    def measure(self, parts: Sequence[tuple[Sequence[str], TensorFormat]]) -> Iterator[Outcome | FormatError]:
        """Measure the model with each part, tensors at the current place or later, quantized to the part's format.

        Parts run through the model together, block by block, with 2 D numbers per token each. A part with a tensor that its format cannot
        represent yields a FormatError that names the tensor.
        """
        runs = [_PartialRun(tensors, fmt, [*self._streams]) for tensors, fmt in parts]
        for place in range(self._place, self._end):
            for run in runs:
                self._advance(run, place)
        for run in runs:
            yield self._outcome(run)

    def _advance(self, run: _PartialRun, place: int) -> None:
        if run.error is None:
            try:
                self._pass(place, run.streams, self._quantized(run, place))
            except FormatError as error:
                run.error = str(error)
                run.streams.clear()

    def _outcome(self, run: _PartialRun) -> Outcome | FormatError:
        if run.error is None:
            try:
                head = self._quantized(run, self._end).get(HEAD)
                return Outcome(self._scores(self._hidden(run.streams), head), run.roundings)
            except FormatError as error:
                run.error = str(error)
        return FormatError(run.error)

    def _quantized(self, run: _PartialRun, place: int) -> dict[str, torch.Tensor]:
        """The run's tensors of a place, quantized and dequantized again."""
        weights = {}
        for name in run.tensors:
            if self.place_of(name) == place:
                try:
                    weights[name], rounding = rounded(self._weight(name), run.fmt)
                except FormatError as error:
                    raise FormatError(f"{name} in {run.fmt.format}: {error}") from None
                run.roundings.append(rounding)
        return weights

    def _weight(self, name: str) -> torch.Tensor:
        """[N, K], or [E, N, K] of all experts."""
        tensor = self._tensors[name]
        if not tensor.experts:
            return self._model.get_parameter(name).data
        weight = getattr(self._store.layer(tensor.layer, torch.arange(tensor.experts)[None]), tensor.role)
        assert isinstance(weight, torch.Tensor)
        return weight

    def _pass(self, place: int, streams: list[_Stream], weights: Mapping[str, torch.Tensor]) -> None:
        """Run one place, with some of its weights replaced; `streams` is its input and becomes its output.

        Each step's input is replaced by its output at once, so that not all inputs and outputs are in memory together.
        """
        experts = {name: weight for name, weight in weights.items() if self._tensors[name].experts}
        with _replaced(self._model, {name: weight for name, weight in weights.items() if name not in experts}):
            if place == 0:
                streams[:] = [(self._model.transformer.wte(step.ids, self._model.dtype), None) for step in self._steps]
                return
            block = self._model.transformer.layers()[place - 1]
            store = _ReplacedExperts(self._store, experts)
            for index, step in enumerate(self._steps):
                streams[index] = block.run(*streams[index], ForwardPass(step.batch, step.rotation, store))

    def _hidden(self, streams: list[_Stream]) -> list[torch.Tensor]:
        """The last hidden states that predict, [P, D] of every step; `streams` is empty afterwards."""
        norm = self._model.transformer.norm_f
        return [norm.run(*streams.pop(0))[1][step.rows] for step in self._steps]

    def _scores(self, hidden: list[torch.Tensor], head: torch.Tensor | None) -> TokenScores:
        scored, start = TokenScores.zeros(sum(len(step.targets) for step in self._steps)), 0
        for step, reference, quantized in zip(self._steps, self._reference, hidden, strict=True):
            for chunk in _chunks(step):
                targets = step.targets[chunk]
                expected = Distribution.of(self._logits(reference[chunk], None), targets)
                scored.put(start, scores(expected, Distribution.of(self._logits(quantized[chunk], head), targets)))
                start += len(targets)
        return scored

    def _logits(self, hidden: torch.Tensor, head: torch.Tensor | None) -> torch.Tensor:
        """Logits [P, V] of hidden states [P, D]; `head` replaces the weight of the model's head."""
        return linear(hidden, self._model.get_parameter(HEAD).data if head is None else head)


class _ReplacedExperts(ExpertStore):
    """A store with some matrices replaced: weights [E, N, K] by their names in a plain checkpoint."""

    def __init__(self, store: ExpertStore, weights: Mapping[str, torch.Tensor]) -> None:
        self._store, self._weights = store, weights

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        others = {role_of(name): weight for name, weight in self._weights.items() if layer_of(name) == index and kind_of(name) == "experts"}
        return replace(self._store.layer(index, experts), **others)


@contextmanager
def _replaced(model: DbrxForCausalLM, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replaces parameters of the model, by their names in a plain checkpoint, within the context.

    The model's own parameters are set aside and restored, never written to.
    """
    originals = {name: model.get_parameter(name) for name in weights}
    try:
        for name, weight in weights.items():
            _put(model, name, nn.Parameter(weight, requires_grad=False))
        yield
    finally:
        for name, parameter in originals.items():
            _put(model, name, parameter)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, leaf = name.rsplit(".", 1)
    setattr(model.get_submodule(path), leaf, parameter)


def _step(model: DbrxForCausalLM, text: torch.Tensor, windows: Sequence[Window]) -> _Step:
    starts = np.cumsum([0] + [window.end - window.first for window in windows])
    rows = [torch.arange(window.scored, window.end) - 1 - window.first + int(start) for window, start in zip(windows, starts, strict=False)]
    batch = batch_of([window.end - window.first for window in windows], [0] * len(windows), None, model.device)
    return _Step(
        ids=torch.cat([text[window.first : window.end] for window in windows]).to(model.device),
        batch=batch,
        rotation=rotation_of(batch.positions, model.config),
        rows=torch.cat(rows).to(model.device),
        targets=torch.cat([text[window.scored : window.end] for window in windows]),
    )


def _chunks(step: _Step) -> Iterator[slice]:
    """Slices of a step's predicted tokens, at most `LOGIT_TOKENS` long."""
    for first in range(0, len(step.targets), LOGIT_TOKENS):
        yield slice(first, first + LOGIT_TOKENS)
