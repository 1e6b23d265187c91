"""Models whose weights are dequantized while they are loaded: all at once where they fit, else the experts of one layer at a time."""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from weakref import WeakSet

import torch

from dbrx_q.checkpoint.folder import converted
from dbrx_q.checkpoint.layout import DenseTensor, dense_tensors, oriented
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.experts import ExpertStore
from dbrx_q.kernels.formats.expert_weights import ExpertWeights, Routing
from dbrx_q.model.loading import load_plain_model
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.planning.budget import share_note
from dbrx_q.planning.host_memory import available_bytes
from dbrx_q.planning.sizes import format_size

from .base import Source

__all__ = ["DequantizedSource", "Reader", "StreamedExpertStore", "available_memory", "resident_bytes", "streams"]

Reader = Callable[[DenseTensor], torch.Tensor]
"""Returns a tensor of the model, dequantized, in the shape of a plain checkpoint."""

# The share of free memory that weights may take; the rest holds the KV cache, activations and the logits of a chunk.
_SHARE = 0.8


class DequantizedSource(Source):
    """A checkpoint whose weights are dequantized while they are loaded."""

    eos_token_ids: tuple[int, ...]
    """Token ids that end a generation."""
    stored_dtype: torch.dtype
    """The dtype that `load` chooses on a CPU for dtype=None."""

    @abstractmethod
    def reader(self) -> AbstractContextManager[Reader]:
        """Opens the files of the weights for reading."""

    def load(self, *, dtype: torch.dtype | None, device: torch.device, stream: bool | None = None) -> DbrxForCausalLM:
        chosen = dtype or (torch.bfloat16 if device.type == "cuda" and self.stored_dtype == torch.float32 else self.stored_dtype)
        if stream is None:
            shares = None if self.budget is None or self.budget.machine.ram is None else self.budget.shares
            stream = streams(self.config, chosen, self._available(device), source=self.name, shares=shares)
        store = StreamedExpertStore(self.config, self.reader, chosen, device, name=self.name) if stream else None
        with self.reader() as read:
            return load_plain_model(
                self.config,
                read,
                dtype=chosen,
                device=device,
                eos_token_ids=self.eos_token_ids,
                expert_store=store,
                source=self.name,
            )

    def _available(self, device: torch.device) -> int:
        """Bytes that the model may take of a device's memory."""
        if self.budget is None:
            promised = sum(store.promised_bytes(device) for store in _stores)  # by models that were loaded and have not run yet
            return available_memory(device) - promised
        if self.budget.machine.gpus:
            raise RequestError(
                f"{self.name}: weights that are dequantized when they are loaded go to one --device; found --gpu. Leave it out"
            )
        return available_memory(device) if self.budget.machine.ram is None else self.budget.machine.ram


class StreamedExpertStore(ExpertStore):
    """Dequantizes all experts of a layer when the model asks for them, and holds them until it asks for another layer.

    Threads that run the model take turns, so that memory holds the experts of one layer only.

    Args:
        config: the model's configuration.
        reader: opens the files of the weights.
        dtype, device: of the dequantized weights.
        name: the checkpoint in messages.
    """

    reloads_each_step = True

    def __init__(
        self,
        config: DbrxConfig,
        reader: Callable[[], AbstractContextManager[Reader]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        name: str = "",
    ) -> None:
        self._tensors: list[list[DenseTensor]] = [[] for _ in range(config.n_layers)]
        for tensor in dense_tensors(config):
            if tensor.experts:
                self._tensors[tensor.layer].append(tensor)
        self._reader, self._dtype, self._device, self._name = reader, dtype, device, name
        self._held: tuple[int, ExpertWeights] | None = None
        self._layer_bytes = _bytes([tensor for tensors in self._tensors[:1] for tensor in tensors], dtype)
        self._lock = threading.RLock()
        _stores.add(self)

    def forward(self, index: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        with self._lock:
            return super().forward(index, x, routing)

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        with self._lock:
            if self._held is None or self._held[0] != index:
                self._held = None  # before the next layer takes memory
                with self._reader() as read:
                    tensors = self._tensors[index]
                    w1, v1, w2 = (oriented(converted(read(t), self._dtype, t.name, self._name).to(self._device), t) for t in tensors)
                self._held = index, ExpertWeights(w1, v1, w2)
            return self._held[1]

    @property
    def nbytes(self) -> int:
        """Bytes of one layer's experts."""
        return self._layer_bytes

    def promised_bytes(self, device: torch.device) -> int:
        """Bytes of a device's memory that the store will take with the first layer and has not taken yet."""
        return self._layer_bytes if self._held is None and device == self._device else 0


_stores: WeakSet[StreamedExpertStore] = WeakSet()


def streams(config: DbrxConfig, dtype: torch.dtype, available: int, *, source: str, shares: int | None = None) -> bool:
    """Whether experts must be dequantized layer by layer: all weights, in `dtype`, would take over four fifths of `available` bytes.

    Args:
        config: of the model.
        dtype: of the dequantized weights.
        available: bytes that the model may take.
        source: the checkpoint's name in errors.
        shares: models that divide the user's budget equally, if `available` is a share of one; None if it is what is free.

    Raises:
        RequestError: the other weights and the experts of one layer would not fit either.
    """
    room = int(_SHARE * available)
    if resident_bytes(config, dtype, stream=False) <= room:
        return False
    largest = max(math.prod(tensor.shape) for tensor in dense_tensors(config))
    least = resident_bytes(config, dtype, stream=True) + torch.float32.itemsize * largest  # a tensor is dequantized in float32
    if least > room:
        rule = "the dequantized weights without experts, the experts of one layer and a tensor being read must fit in"
        if shares is None:
            found = f"the memory that is free; they take {format_size(least)} and {format_size(available)} are free. Free some"
        else:
            more = shares * math.ceil(least / _SHARE)
            found = (
                f"the budget; they take {format_size(least)} and the budget is {format_size(available)}{share_note(shares)}. "
                f"Give at least {more:,} bytes"
            )
        raise RequestError(f"{source}: {rule} {_SHARE:.0%} of {found}, or choose --dtype bfloat16")
    return True


def resident_bytes(config: DbrxConfig, dtype: torch.dtype, *, stream: bool) -> int:
    """Bytes of the dequantized weights that memory holds together: of all; with `stream`, of all but the other layers' experts."""
    tensors = dense_tensors(config)
    return _bytes(tensors if not stream else [t for t in tensors if not t.experts or t.layer == 0], dtype)


def available_memory(device: torch.device) -> int:
    """Free bytes of a device: a GPU's by its driver; the host's by Linux's MemAvailable, and elsewhere all of its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()


def _bytes(tensors: Sequence[DenseTensor], dtype: torch.dtype) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
