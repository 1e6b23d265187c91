"""Records which experts a text uses."""

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
    """Run a text through a model, and record which experts every router chose and which ones it would have chosen one layer earlier.

    The earlier choice applies the router of a layer to the input of the layer before: the prediction that prefetching follows.

    Args:
        model: a loaded model.
        ids: the tokens of the text; they are cut into windows that do not see each other.
        context: tokens of a window.
        step: most tokens of a forward pass; 1 to record what decoding does.
        on_tokens: called with (tokens done, all tokens) after each pass.

    Raises:
        RequestError: an empty text, or a `context` or `step` out of range.
    """
    config = model.config
    if not ids:
        raise RequestError("a trace needs at least one token; the text is empty")
    if not 1 <= context <= config.max_seq_len:
        raise RequestError(f"the context of a trace must be from 1 to the model's {config.max_seq_len} tokens; found {context}")
    if step < 1:
        raise RequestError(f"a step must be at least 1 token; found {step}")
    original_store = model.transformer.expert_store
    recorder = _Recorder(model.transformer.store, model)
    model.transformer.expert_store = recorder
    pass_tokens = []
    try:
        for first in range(0, len(ids), context):
            window = ids[first : first + context]
            cache = KVCache(config, 1, len(window), dtype=model.dtype, device=model.transformer.devices)
            for start in range(0, len(window), step):
                tokens = window[start : start + step]
                model.transformer(torch.tensor([tokens]), past_key_values=cache, output_router_logits=False)
                pass_tokens.append(len(tokens))
                on_tokens(first + start + len(tokens), len(ids))
    finally:
        model.transformer.expert_store = original_store
    return Trace(recorder.joined(recorder.chosen), recorder.joined(recorder.predicted), np.array(pass_tokens), config.to_dict())


class _Recorder(ExpertStore):
    """Passes everything on to another store, and records the experts that were asked for."""

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
            router = self._routers[index + 1].to(x.device)  # the next layer may be on another GPU
            predicted = route(x, router, routing.experts.shape[1], None).experts
            self.predicted[index + 1].append(predicted.cpu().numpy().astype(np.uint8))
        return self._store.forward(index, x, routing)

    @staticmethod
    def joined(layers: list[list[np.ndarray]]) -> np.ndarray:
        """uint8 [N, L, A] from the [T, A] of every pass, for each layer."""
        return np.stack([np.concatenate(layer) for layer in layers], axis=1)
