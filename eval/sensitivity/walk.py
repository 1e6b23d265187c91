"""A model run part by part, and from any part on with rounded weights.

Dimension letters: `T` tokens of a batch, `P` predicted ones of them, `E` experts, `D` d_model, `V` vocabulary, `N` rows of a matrix, `K`
its reduction axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, dense_tensors, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import FormatError
from dbrx_q.eval.divergence import Distribution, TokenScores, scores
from dbrx_q.eval.observe import LOGIT_TOKENS, batches
from dbrx_q.eval.windows import Window
from dbrx_q.experts import ExpertStore, ResidentExpertStore
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.linear import linear
from dbrx_q.model.block import Rotation, rotation_of
from dbrx_q.model.layers import Batch
from dbrx_q.model.modeling import DbrxForCausalLM, batch_of

from .rounding import Rounding, rounded

__all__ = ["Seen", "Walk", "packable"]

_PACKED_KINDS = ("embedding", "attention", "experts", "head")
_TOGETHER = 8  # 2 D numbers a token each: of 16 windows of 512 tokens of DBRX in float32 3.2 GB, half of one layer's experts in bfloat16
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"


def packable(config: DbrxConfig) -> list[DenseTensor]:
    """The matrices that a packed format can hold, in the model's order: all but routers and norms."""
    return [tensor for tensor in dense_tensors(config) if kind_of(tensor.name) in _PACKED_KINDS]


@dataclass(frozen=True)
class _Step:
    """Windows that run together. ids: int64 [T]. rows: int64 [P], places among them that predict. targets: int64 [P], what came."""

    ids: torch.Tensor
    batch: Batch
    rotation: Rotation
    rows: torch.Tensor
    targets: torch.Tensor


_Stream = tuple[torch.Tensor, torch.Tensor | None]
"""What enters a block: the residual stream [T, D] and what the block before adds to it [T, D]."""


@dataclass(frozen=True)
class Seen:
    """What a model with rounded weights predicts, beside the model as it is, and what rounding did to each of its tensors."""

    scores: TokenScores
    roundings: list[Rounding]


@dataclass
class _PartialRun:
    """A part on its way. error: why it cannot go on."""

    tensors: Sequence[str]
    fmt: TensorFormat
    streams: list[_Stream]
    roundings: list[Rounding] = field(default_factory=list)
    error: str | None = None


class Walk:
    """Goes through the model once with all windows, and from where it stands runs what comes after with other weights.

    Places are 0 for the embedding, 1 .. n_layers for the blocks, n_layers + 1 for the norm and the head.

    Attributes:
        together: parts that are to be measured together: several where experts are decoded again whenever a block is reached.
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
        """The place that a tensor belongs to."""
        return {_EMBEDDING: 0, _HEAD: self._end}.get(name, self._tensors[name].layer + 1)

    def go_to(self, place: int) -> None:
        """Stand before a place that was not passed yet. What is interrupted here leaves a walk that stands nowhere."""
        for passed in range(self._place, place):
            self._pass(passed, self._streams, {})
        self._place = place

    def reference_nll(self) -> float:
        """Mean negative log-likelihood of the model as it is, in nats."""
        losses = [
            Distribution.of(self._logits(hidden[chunk], None), step.targets[chunk]).nll.cpu().numpy()
            for step, hidden in zip(self._steps, self._reference, strict=True)
            for chunk in _chunks(step)
        ]
        return float(np.concatenate(losses).mean())

    def measure(self, parts: Sequence[tuple[Sequence[str], TensorFormat]]) -> Iterator[Seen | FormatError]:
        """What every part gives: the model with these tensors, none of which was passed, rounded to this format.

        Parts go through the model together, block by block; each takes 2 D numbers a token. FormatError, with the tensor's name, stands for
        a part of which the format cannot hold a tensor.
        """
        runs = [_PartialRun(tensors, fmt, [*self._streams]) for tensors, fmt in parts]
        for place in range(self._place, self._end):
            for run in runs:
                self._advance(run, place)
        for run in runs:
            yield self._seen(run)

    def _advance(self, run: _PartialRun, place: int) -> None:
        if run.error is None:
            try:
                self._pass(place, run.streams, self._rounded(run, place))
            except FormatError as error:
                run.error = str(error)
                run.streams.clear()

    def _seen(self, run: _PartialRun) -> Seen | FormatError:
        if run.error is None:
            try:
                head = self._rounded(run, self._end).get(_HEAD)
                return Seen(self._scores(self._hidden(run.streams), head), run.roundings)
            except FormatError as error:
                run.error = str(error)
        return FormatError(run.error)

    def _rounded(self, run: _PartialRun, place: int) -> dict[str, torch.Tensor]:
        """A run's own weights of a place."""
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
        weight = getattr(self._store.layer(tensor.layer, torch.arange(tensor.experts)[None]), name.rsplit(".", 1)[1])
        assert isinstance(weight, torch.Tensor)
        return weight

    def _pass(self, place: int, streams: list[_Stream], weights: Mapping[str, torch.Tensor]) -> None:
        """Make of what enters a place what leaves it, with some of its weights replaced.

        Step by step in place, so that what entered is not held beside all that leaves.
        """
        experts = {name: weight for name, weight in weights.items() if self._tensors[name].experts}
        with _replaced(self._model, {name: weight for name, weight in weights.items() if name not in experts}):
            if place == 0:
                streams[:] = [(self._model.transformer.wte(step.ids, self._model.dtype), None) for step in self._steps]
                return
            block = self._model.transformer.layers()[place - 1]
            store = _OtherExperts(self._store, experts)
            for index, step in enumerate(self._steps):
                streams[index] = block(*streams[index], step.batch, step.rotation, store)[:2]

    def _hidden(self, streams: list[_Stream]) -> list[torch.Tensor]:
        """The last hidden states that predict, [P, D] of every step; `streams` is empty afterwards."""
        norm = self._model.transformer.norm_f
        return [norm(*streams.pop(0))[1][step.rows] for step in self._steps]

    def _scores(self, hidden: list[torch.Tensor], head: torch.Tensor | None) -> TokenScores:
        found, at = TokenScores.room(sum(len(step.targets) for step in self._steps)), 0
        for step, reference, own in zip(self._steps, self._reference, hidden, strict=True):
            for chunk in _chunks(step):
                targets = step.targets[chunk]
                before = Distribution.of(self._logits(reference[chunk], None), targets)
                found.put(at, scores(before, Distribution.of(self._logits(own[chunk], head), targets)))
                at += len(targets)
        return found

    def _logits(self, hidden: torch.Tensor, head: torch.Tensor | None) -> torch.Tensor:
        """[P, V] of [P, D], with another head's weight where one is given."""
        return linear(hidden, self._model.get_parameter(_HEAD).data if head is None else head)


class _OtherExperts(ExpertStore):
    """A store of which some matrices are others: [E, N, K] by their names in a plain checkpoint."""

    def __init__(self, store: ExpertStore, weights: Mapping[str, torch.Tensor]) -> None:
        self._store, self._weights = store, weights

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        prefix = f"transformer.blocks.{index}.ffn.experts.mlp."
        own = {name.removeprefix(prefix): weight for name, weight in self._weights.items() if name.startswith(prefix)}
        return replace(self._store.layer(index, experts), **own)


@contextmanager
def _replaced(model: DbrxForCausalLM, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model with other parameters, by their names in a plain checkpoint, as long as the context lasts.

    Its own are set aside and put back, never written to.
    """
    own = {name: model.get_parameter(name) for name in weights}
    try:
        for name, weight in weights.items():
            _put(model, name, nn.Parameter(weight, requires_grad=False))
        yield
    finally:
        for name, parameter in own.items():
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
    """Predicted tokens whose logits are held at once."""
    for first in range(0, len(step.targets), LOGIT_TOKENS):
        yield slice(first, first + LOGIT_TOKENS)
