"""A model run part by part, and from any part on with rounded weights.

Dimension letters: `T` tokens of a batch, `P` predicted ones of them, `E` experts, `D` d_model, `V` vocabulary, `N` rows of a matrix, `K`
its reduction axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import FormatError
from dbrx_q.experts import ExpertStore, ResidentExpertStore
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.moe import ExpertWeights
from dbrx_q.layers import Batch, Rotation, rotation_of
from dbrx_q.layout import DenseTensor, TensorFormat, dense_tensors, kind_of
from dbrx_q.model import DbrxForCausalLM, batch_of

from .divergence import Distribution, TokenScores, scores
from .observe import LOGIT_TOKENS, batches
from .rounding import Rounding, rounded
from .windows import Window

__all__ = ["Walk", "packable"]

_PACKED_KINDS = ("embedding", "attention", "experts", "head")
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


class Walk:
    """Goes through the model once with all windows, and from where it stands runs what comes after with other weights.

    Places are 0 for the embedding, 1 .. n_layers for the blocks, n_layers + 1 for the norm and the head.
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
        self._reference = self._hidden(self._run([], 0, self._end, lambda place: {}))  # [P, D] of every step

    def place_of(self, name: str) -> int:
        """The place that a tensor belongs to."""
        return {_EMBEDDING: 0, _HEAD: self._end}.get(name, self._tensors[name].layer + 1)

    def go_to(self, place: int) -> None:
        """Stand before a place that was not passed yet."""
        self._streams = self._run(self._streams, self._place, place, lambda place: {})
        self._place = place

    def reference_nll(self) -> float:
        """Mean negative log-likelihood of the model as it is, in nats."""
        losses = [
            Distribution.of(self._logits(hidden[chunk], None), step.targets[chunk]).nll.cpu().numpy()
            for step, hidden in zip(self._steps, self._reference, strict=True)
            for chunk in _chunks(step)
        ]
        return float(np.concatenate(losses).mean())

    def measure(self, tensors: Sequence[str], fmt: TensorFormat) -> tuple[TokenScores, list[Rounding]]:
        """Of the model with some tensors rounded, none of which was passed.

        Raises:
            FormatError: a tensor that the format cannot hold, with its name.
        """
        roundings = []

        def weights_at(place: int) -> dict[str, torch.Tensor]:
            weights = {}
            for name in tensors:
                if self.place_of(name) == place:
                    try:
                        weights[name], rounding = rounded(self._weight(name), fmt)
                    except FormatError as error:
                        raise FormatError(f"{name} in {fmt.format}: {error}") from None
                    roundings.append(rounding)
            return weights

        hidden = self._hidden(self._run(self._streams, self._place, self._end, weights_at))
        return self._scores(hidden, weights_at(self._end).get(_HEAD)), roundings

    def _weight(self, name: str) -> torch.Tensor:
        """[N, K], or [E, N, K] of all experts."""
        tensor = self._tensors[name]
        if not tensor.experts:
            return self._model.get_parameter(name).data
        weight = getattr(self._store.layer(tensor.layer, torch.arange(tensor.experts)[None]), name.rsplit(".", 1)[1])
        assert isinstance(weight, torch.Tensor)
        return weight

    def _run(self, streams: list[_Stream], first: int, end: int, weights_at: Callable[[int], Mapping[str, torch.Tensor]]) -> list[_Stream]:
        """What comes out of places first .. end-1, each with some weights replaced."""
        for place in range(first, end):
            weights = weights_at(place)
            experts = {name: weight for name, weight in weights.items() if self._tensors[name].experts}
            with _replaced(self._model, {name: weight for name, weight in weights.items() if name not in experts}):
                if place == 0:
                    streams = [(self._model.transformer.wte(step.ids, self._model.dtype), None) for step in self._steps]
                else:
                    block = self._model.transformer.layers()[place - 1]
                    store = _OtherExperts(self._store, experts)
                    streams = [
                        block(x, delta, step.batch, step.rotation, store)[:2] for step, (x, delta) in zip(self._steps, streams, strict=True)
                    ]
        return streams

    def _hidden(self, streams: list[_Stream]) -> list[torch.Tensor]:
        """The last hidden states that predict, [P, D] of every step."""
        norm = self._model.transformer.norm_f
        return [norm(x, delta)[1][step.rows] for step, (x, delta) in zip(self._steps, streams, strict=True)]

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
