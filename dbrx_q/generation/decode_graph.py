"""A decode step for several sequences at once, captured in one CUDA graph for each batch-size bucket, or in one for each layer.

A step of DBRX launches some 330 kernels of a few microseconds each. Replayed from a graph they follow each other without the host.
`capturable` says for which models one graph holds the whole step, `capturable_by_layer` for which it is split (`layer_graphs.py`).

Dimension letters: `S` sequences of a step, padded to a bucket; `V` vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from dbrx_q.errors import RequestError
from dbrx_q.experts import ResidentExpertStore
from dbrx_q.kernels.attention import Sequences
from dbrx_q.model.batch import Batch
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.layers import PackedWeight, hooked
from dbrx_q.model.modeling import DbrxForCausalLM

from .layer_graphs import Captured, LayerGraphs, Piece, capture_on

if TYPE_CHECKING:
    from dbrx_q.kernels.triton.arrival import Graph

__all__ = ["BatchDecoder", "DecodeStep", "capturable", "capturable_by_layer"]

# Tokens that a cache's capacity is rounded up to, so that requests of similar length share one cache and its graphs.
_CAPACITY_STEP = 1024

# Held while a request takes the decoder that a model keeps, or leaves one there.
_borrowing = threading.Lock()


class DecodeStep:
    """One token for each of `size` sequences of `cache`.

    If the model is on a CUDA device and `capturable`, the constructor captures the step in a graph and every call replays it. If only
    its experts are elsewhere, it captures a graph for each layer. Otherwise every call launches the kernels one by one.

    Args:
        model: a loaded model whose attention reads lengths on the device (`DbrxModel.steps_together`).
        cache: holds the sequences; it must not grow while the step is in use, since the graph has its addresses.
        size: S, sequences of every call.
    """

    def __init__(self, model: DbrxForCausalLM, cache: KVCache, size: int) -> None:
        assert model.transformer.steps_together, "attention must read lengths on the device"
        self._model, self._cache, self.size = model, cache, size
        device = model.device
        # Token ids, cache rows, lengths with the new token, positions of it: of the type that kernels read, and from the host in one copy.
        self._on_device = torch.zeros(4, size, dtype=torch.int32, device=device)
        self._on_device[1] = -1  # no row: nothing is stored while the graph is captured
        self._starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._on_host = torch.zeros(4, size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._graph: Graph | None = None
        self._logits: torch.Tensor | None = None
        self._by_layer: LayerGraphs | None = None
        if device.type == "cuda" and capturable(model):
            self._capture()
        elif device.type == "cuda" and capturable_by_layer(model):
            self._capture_layers(capture_on(device))

    @property
    def captured(self) -> bool:
        """Whether the whole step is replayed from one CUDA graph."""
        return self._graph is not None

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int], lengths: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """float32 logits [S, V] of the token that follows; the next call overwrites them.

        Args:
            tokens: the new token of every sequence.
            lengths: tokens of every sequence in the cache, the new one included.
            rows: the row of every sequence in the cache.

        Raises:
            RequestError: a length that exceeds the capacity of the cache.
        """
        if max(lengths) > self._cache.capacity:
            raise RequestError(
                f"a sequence must fit {self._cache.capacity} tokens, the room of its cache; found {max(lengths)}. Shorten it"
            )
        if self._copied is not None:
            self._copied.synchronize()  # the inputs of the last step must have left the host buffer before it is overwritten
        self._on_host.copy_(torch.tensor([tokens, rows, lengths, [length - 1 for length in lengths]], dtype=torch.int32))
        self._on_device.copy_(self._on_host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._model.device))
        watched = self._model.transformer.watched or hooked(self._model.lm_head)  # a replay calls no hook
        if watched or (self._graph is None and self._by_layer is None):
            return self._compute()
        if self._by_layer is not None:
            return self._by_layer()
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        return self._logits

    def _batch(self) -> Batch:
        _, rows, lengths, positions = self._on_device
        ones, ends = (1,) * self.size, (self._cache.capacity,) * self.size
        return Batch(Sequences(self._starts, lengths, ones, ends, rows), positions, rows, self._cache)

    def _compute(self) -> torch.Tensor:
        hidden, _ = self._model.transformer.run(self._on_device[0], self._batch())
        return self._model.lm_head(hidden).float()

    @torch.inference_mode()
    def _capture_layers(self, capture: Callable[[Piece], Captured]) -> None:
        self._by_layer = LayerGraphs(self._model, self._batch(), self._on_device[0], capture)

    @torch.inference_mode()
    def _capture(self) -> None:
        from dbrx_q.kernels.triton.arrival import Graph  # imports Triton, which a CPU does not need

        with torch.cuda.device(self._model.device):
            warm_up_stream = torch.cuda.Stream()
            warm_up_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up_stream):  # compiles kernels and lets libraries allocate their workspaces
                for _ in range(2):
                    self._compute()
            torch.cuda.current_stream().wait_stream(warm_up_stream)
            graph = Graph(self._model.device)
            with graph.capture():
                self._logits = self._compute()
        self._graph = graph


class BatchDecoder:
    """A KV cache of several sequences and its decode steps: one for each bucket of 1, 2, 4, 8 ... sequences, made when first needed.

    Attributes:
        cache: holds the keys and values of all sequences, one row each.
    """

    def __init__(self, model: DbrxForCausalLM, sequences: int, capacity: int, kv_format: str) -> None:
        self._model = model
        self.cache = KVCache(model.config, sequences, capacity, dtype=model.dtype, device=model.transformer.devices, format=kv_format)
        self._steps: dict[int, DecodeStep] = {}

    @classmethod
    @contextmanager
    def borrowed(cls, model: DbrxForCausalLM, sequences: int, capacity: int, kv_format: str) -> Iterator[BatchDecoder]:
        """The decoder that the last request left on the model, if it is large enough and not in use; otherwise a new one.

        Its sequences are empty. On exit it stays on the model for the next request.
        """
        with _borrowing:
            kept, model.decoder = model.decoder, None
        if isinstance(kept, BatchDecoder) and kept._serves(sequences, capacity, kv_format):
            decoder = kept
        else:
            del kept  # its memory is freed before more is allocated
            roomy = min(model.config.max_seq_len, -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP)
            decoder = cls(model, sequences, roomy if model.limits.kv_bytes is None else capacity, kv_format)
        decoder.cache.lengths = [0] * len(decoder.cache.lengths)
        try:
            yield decoder
        finally:
            model.decoder = decoder

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """Append a token to each of `rows` of the cache; float32 logits [rows, V], which the next step overwrites.

        The rest of the bucket repeats the first sequence, which adds no expert to the step.
        """
        size = _power_of_two(len(rows))
        if size not in self._steps:
            self._steps[size] = DecodeStep(self._model, self.cache, size)
        lengths = [self.cache.lengths[row] + 1 for row in rows]
        filled = [[*values, *[values[0]] * (size - len(rows))] for values in (tokens, lengths, rows)]
        logits = self._steps[size](*filled)
        for row, length in zip(rows, lengths, strict=True):
            self.cache.lengths[row] = length
        return logits[: len(rows)]

    def _serves(self, sequences: int, capacity: int, kv_format: str) -> bool:
        cache = self.cache
        return len(cache.lengths) >= sequences and cache.capacity >= capacity and cache.format == kv_format


def capturable(model: DbrxForCausalLM) -> bool:
    """Whether a CUDA graph can hold a decode step of the model: the step must never wait for the host.

    One device must hold the whole model, and the Triton kernels must have code for the format of every packed weight. A weight in another
    format is dequantized by the torch code of its record, and its experts are visited one by one, as the router's choice requires.
    """
    from dbrx_q.kernels.triton.codes import served  # imports Triton, which a CPU does not need

    all_on_one_device = isinstance(model.transformer.expert_store, ResidentExpertStore) and len(set(model.transformer.devices)) == 1
    return all_on_one_device and all(served(module.value) for module in model.modules() if isinstance(module, PackedWeight))


def capturable_by_layer(model: DbrxForCausalLM) -> bool:
    """Whether CUDA graphs can hold what a decode step computes beside the experts: these may be in any memory and any format.

    One device must hold the rest, and the Triton kernels must have code for the format of every packed weight of it.
    """
    from dbrx_q.kernels.triton.codes import served

    transformer = model.transformer
    experts = {id(module) for block in transformer.layers() for module in block.ffn.experts.modules()}
    return len(set(transformer.devices)) == 1 and all(
        served(module.value) for module in model.modules() if isinstance(module, PackedWeight) and id(module) not in experts
    )


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
