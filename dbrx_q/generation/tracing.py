"""Recording which experts a text uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dbrx_q.errors import RequestError
from dbrx_q.experts import ExpertStore
from dbrx_q.experts.trace import Trace
from dbrx_q.kernels.formats.expert_weights import ExpertWeights, Routing
from dbrx_q.kernels.router import route
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM

__all__ = ["record"]


def record(
    model: DbrxForCausalLM,
    ids: Sequence[int],
    *,
    context: int,
    step: int,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Run a text through a model and note what every router chose, and what it would have chosen from the input of the layer before.

    Args:
        model: a loaded model.
        ids: the text's tokens; they are cut into windows that don't see each other.
        context: tokens of a window.
        step: tokens of a forward pass at most; 1 for what decoding does.
        on_tokens: called with (tokens done, tokens in all).

    Raises:
        RequestError: no token, or a window or a step that is none.
    """
    config = model.config
    if not ids:
        raise RequestError("a trace must be of at least one token; the text is empty")
    if not 1 <= context <= config.max_seq_len:
        raise RequestError(f"the context of a trace must be from 1 to the model's {config.max_seq_len} tokens; found {context}")
    if step < 1:
        raise RequestError(f"a step must be at least 1 token; found {step}")
    own = model.transformer.expert_store
    recorder = _Recorder(model.transformer.store, model)
    model.transformer.expert_store = recorder
    steps = []
    try:
        for first in range(0, len(ids), context):
            window = ids[first : first + context]
            cache = KVCache(config, 1, len(window), dtype=model.dtype, device=model.transformer.devices)
            for at in range(0, len(window), step):
                some = window[at : at + step]
                model.transformer(torch.tensor([some]), None, cache, True, False)
                steps.append(len(some))
                on_tokens(first + at + len(some), len(ids))
    finally:
        model.transformer.expert_store = own
    return Trace(recorder.joined(recorder.chosen), recorder.joined(recorder.predicted), np.array(steps), config.to_dict())


class _Recorder(ExpertStore):
    """Another store, and what it was asked for."""

    def __init__(self, store: ExpertStore, model: DbrxForCausalLM) -> None:
        self._store = store
        self._routers = [block.ffn.router.layer.weight for block in model.transformer.layers()]
        self.chosen: list[list[np.ndarray]] = [[] for _ in self._routers]
        self.predicted: list[list[np.ndarray]] = [[] for _ in self._routers]

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        return self._store.layer(index, experts)

    def forward(self, index: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        best_first = routing.experts.cpu().numpy().astype(np.uint8)  # [T, A]
        self.chosen[index].append(np.sort(best_first, axis=1))
        if index == 0:
            self.predicted[0].append(best_first)
        if index + 1 < len(self._routers):
            router = self._routers[index + 1].to(x.device)  # which may be another GPU's
            ahead = route(x, router, routing.experts.shape[1], None).experts
            self.predicted[index + 1].append(ahead.cpu().numpy().astype(np.uint8))
        return self._store.forward(index, x, routing)

    @staticmethod
    def joined(layers: list[list[np.ndarray]]) -> np.ndarray:
        """uint8 [N, L, A]."""
        return np.stack([np.concatenate(layer) for layer in layers], axis=1)
