"""A decode step of a model whose experts move between memories: one CUDA graph per layer, from the norm before attention to the router.

The host must know which experts a layer's router chose before the layer's experts can be computed, so that no graph can hold a whole step.
Between the experts of two layers nothing waits for the host: one replay takes the place of six launches.

    graph 0        embedding, rotation, layer 0 up to its router
    expert store   experts of layer 0, whose output is copied to where the next graph reads it
    graph i        adds the experts' output, layer i up to its router
    expert store   experts of layer i
    last graph     adds the experts' output, last norm, head

Dimension letters: `S` sequences of a step, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from dbrx_q.kernels.formats.expert_weights import Routing
from dbrx_q.model.batch import Batch, ForwardPass
from dbrx_q.model.layers import DbrxBlock
from dbrx_q.model.modeling import DbrxForCausalLM

__all__ = ["Captured", "LayerGraphs", "Piece", "capture_on"]

Piece = Callable[[], tuple[torch.Tensor, ...]]
"""Work on a GPU that never waits for the host; returns new tensors."""


@dataclass(frozen=True)
class Captured:
    """A piece that can be repeated without launching its kernels one by one."""

    outputs: tuple[torch.Tensor, ...]
    """What the piece returned; every replay writes them again."""
    replay: Callable[[], None]
    """Repeats the piece on the same memory."""


class LayerGraphs:
    """A decode step in pieces, each of which is replayed, with the experts computed between them.

    Args:
        model: a loaded model with all layers on one device; its expert store computes the experts.
        batch: of the step, one token for each of S sequences. Its tensors and its cache must keep their memory.
        tokens: int32 [S], the token ids, whose memory stays too.
        capture: makes a piece repeatable. Pieces are captured in the order in which they are replayed.
    """

    def __init__(self, model: DbrxForCausalLM, batch: Batch, tokens: torch.Tensor, capture: Callable[[Piece], Captured]) -> None:
        self._model, self._batch, self._tokens = model, batch, tokens
        self._store = model.transformer.store
        self._delta = torch.zeros(len(tokens), model.config.d_model, dtype=model.dtype, device=tokens.device)
        first, *others = model.transformer.layers()
        captured = capture(partial(self._first, first))
        x, h, logits, experts, weights, cos, sin = captured.outputs
        layers = [(captured.replay, h, Routing(logits, experts, weights))]
        shared = ForwardPass(batch, (cos, sin), self._store, routes_in_norm=True)
        for block in others:
            captured = capture(partial(self._further, block, x, shared))
            x, h, logits, experts, weights = captured.outputs
            layers.append((captured.replay, h, Routing(logits, experts, weights)))
        self._layers = tuple(layers)
        self._head = capture(partial(self._last, x))

    def __call__(self) -> torch.Tensor:
        """float32 logits [S, V] for the tokens and lengths that the memory holds now; the next call overwrites them."""
        for index, (replay, h, routing) in enumerate(self._layers):
            replay()
            self._delta.copy_(self._store.forward(index, h, routing))
        self._head.replay()
        return self._head.outputs[0]

    def _first(self, block: DbrxBlock) -> tuple[torch.Tensor, ...]:
        shared = ForwardPass.of(self._batch, self._model.config, self._store)
        x, h, routing = block.route(self._model.transformer.embedded(self._tokens), None, shared)
        return x, h, routing.logits, routing.experts, routing.weights, *shared.rotation

    def _further(self, block: DbrxBlock, x: torch.Tensor, shared: ForwardPass) -> tuple[torch.Tensor, ...]:
        x, h, routing = block.route(x, self._delta, shared)
        return x, h, routing.logits, routing.experts, routing.weights

    def _last(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self._model.lm_head(self._model.transformer.norm_f.run(x, self._delta)[1]).float(),)


def capture_on(device: torch.device) -> Callable[[Piece], Captured]:
    """Captures pieces in CUDA graphs, which share counters and memory, as they are only replayed one after the other.

    Args:
        device: a CUDA device.
    """
    from dbrx_q.kernels.triton.arrival import Graph, new_counters  # imports Triton, which a CPU does not need

    shared_counters = new_counters(device)
    pool = None

    def capture(piece: Piece) -> Captured:
        nonlocal pool
        with torch.cuda.device(device):
            warm_up_stream = torch.cuda.Stream()
            warm_up_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up_stream):  # compiles kernels and lets libraries allocate their workspaces
                piece()
            torch.cuda.current_stream().wait_stream(warm_up_stream)
            graph = Graph(device, shared_counters)
            with graph.capture(pool):
                outputs = piece()
            pool = graph.pool
        return Captured(outputs, graph.replay)

    return capture
