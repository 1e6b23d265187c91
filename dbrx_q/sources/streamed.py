"""Models of other programs' weights: those that a format of ours holds exactly stay packed, the others are dequantized.

All are loaded at once where they fit, else the experts of one layer at a time.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakSet

import torch

from dbrx_q.checkpoint.folder import converted
from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, dense_tensors, expert_weights, parts_of
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.experts import ExpertStore
from dbrx_q.kernels.formats.expert_weights import ExpertWeights, Routing
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.model.loading import model_of_weights
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.planning.budget import share_note
from dbrx_q.planning.host_memory import available_bytes
from dbrx_q.planning.sizes import format_size

from .base import Source

__all__ = ["ConvertedSource", "Reader", "StreamedExpertStore", "available_memory", "resident_bytes", "streams"]

Reader = Callable[[DenseTensor], Weight]
"""Returns a tensor of the model: plain in the shape of a plain checkpoint, or packed with its reduction axis last."""

# The share of free memory that weights may take; the rest holds the KV cache, activations and the logits of a chunk.
_SHARE = 0.8


class ConvertedSource(Source):
    """A checkpoint of another program, whose weights are repacked or dequantized while they are loaded."""

    eos_token_ids: tuple[int, ...]
    """Token ids that end a generation."""
    stored_dtype: torch.dtype
    """The dtype that `load` chooses on a CPU for dtype=None."""
    formats: Mapping[str, TensorFormat]
    """The formats of the tensors that stay packed, by name."""
    is_quantized: bool = True
    """Whether the program stored some weights in fewer bits."""

    @abstractmethod
    def open_weights(self) -> StoredWeights:
        """Opens the files of the weights."""

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Opens the files of the weights for reading."""
        with self.open_weights() as weights:
            yield lambda tensor: _packed(weights, tensor) if tensor.name in self.formats else weights.read(tensor.name)

    def load(self, *, dtype: torch.dtype | None, device: torch.device, stream: bool | None = None) -> DbrxForCausalLM:
        chosen = dtype or (torch.bfloat16 if device.type == "cuda" and self.stored_dtype == torch.float32 else self.stored_dtype)
        if stream is None:
            shares = None if self.budget is None or self.budget.machine.ram is None else self.budget.shares
            stream = streams(self.config, chosen, self._available(device), formats=self.formats, source=self.name, shares=shares)
        store = StreamedExpertStore(self.config, self.reader, chosen, device, formats=self.formats, name=self.name) if stream else None
        with self.reader() as read:
            return model_of_weights(
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
            raise RequestError(f"{self.name}: weights of other programs go to one --device; found --gpu. Leave it out, or quantize a copy")
        return available_memory(device) if self.budget.machine.ram is None else self.budget.machine.ram


class StreamedExpertStore(ExpertStore):
    """Reads all experts of a layer when the model asks for them, and holds them until it asks for another layer.

    Threads that run the model take turns, so that memory holds the experts of one layer only.

    Args:
        config: the model's configuration.
        reader: opens the files of the weights.
        dtype, device: of the weights that are dequantized.
        formats: of the tensors that stay packed, by name.
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
        formats: Mapping[str, TensorFormat] | None = None,
        name: str = "",
    ) -> None:
        self._tensors: list[list[DenseTensor]] = [[] for _ in range(config.n_layers)]
        for tensor in dense_tensors(config):
            if tensor.experts:
                self._tensors[tensor.layer].append(tensor)
        self._reader, self._dtype, self._device, self._name = reader, dtype, device, name
        self._held: tuple[int, ExpertWeights] | None = None
        self._layer_bytes = max(_bytes(tensors, dtype, formats or {}) for tensors in self._tensors)
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
                    stacks = {tensor.role: self._stack(tensor, read(tensor)) for tensor in self._tensors[index]}
                self._held = index, expert_weights(stacks)
            return self._held[1]

    def _stack(self, tensor: DenseTensor, weight: Weight) -> Weight:
        """The matrices of all experts: [E, F, D] as stored, or packed with the reduction axis last."""
        if isinstance(weight, QuantizedWeight):
            return weight.to(self._device)
        values = converted(weight, self._dtype, tensor.name, self._name).to(self._device)
        return values.view(tensor.experts, -1, values.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of one layer's experts."""
        return self._layer_bytes

    def promised_bytes(self, device: torch.device) -> int:
        """Bytes of a device's memory that the store will take with the first layer and has not taken yet."""
        return self._layer_bytes if self._held is None and device == self._device else 0


_stores: WeakSet[StreamedExpertStore] = WeakSet()


def streams(
    config: DbrxConfig,
    dtype: torch.dtype,
    available: int,
    *,
    source: str,
    formats: Mapping[str, TensorFormat] | None = None,
    shares: int | None = None,
) -> bool:
    """Whether experts must be read layer by layer: all weights together would take over four fifths of `available` bytes.

    Args:
        config: of the model.
        dtype: of the weights that are dequantized.
        available: bytes that the model may take.
        source: the checkpoint's name in errors.
        formats: of the tensors that stay packed, by name.
        shares: models that divide the user's budget equally, if `available` is a share of one; None if it is what is free.

    Raises:
        RequestError: the other weights and the experts of one layer would not fit either.
    """
    room, kept = int(_SHARE * available), formats or {}
    if resident_bytes(config, dtype, formats=kept, stream=False) <= room:
        return False
    largest = max((math.prod(tensor.shape) for tensor in dense_tensors(config) if tensor.name not in kept), default=0)
    least = resident_bytes(config, dtype, formats=kept, stream=True) + torch.float32.itemsize * largest  # dequantized in float32
    if least > room:
        rule = "the weights without experts, the experts of one layer and a tensor being read must fit in"
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


def resident_bytes(config: DbrxConfig, dtype: torch.dtype, *, stream: bool, formats: Mapping[str, TensorFormat] | None = None) -> int:
    """Bytes of the weights that memory holds together: of all; with `stream`, of all but the other layers' experts."""
    tensors = dense_tensors(config)
    return _bytes(tensors if not stream else [t for t in tensors if not t.experts or t.layer == 0], dtype, formats or {})


def available_memory(device: torch.device) -> int:
    """Free bytes of a device: a GPU's by its driver; the host's by Linux's MemAvailable, and elsewhere all of its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()


def _bytes(tensors: Sequence[DenseTensor], dtype: torch.dtype, formats: Mapping[str, TensorFormat]) -> int:
    total = 0
    for tensor in tensors:
        fmt = formats.get(tensor.name)
        if fmt is None:
            total += math.prod(tensor.shape) * dtype.itemsize
        else:
            total += sum(part.nbytes for part in parts_of(tensor, fmt.in_memory))
    return total


def _packed(weights: StoredWeights, tensor: DenseTensor) -> QuantizedWeight:
    """A tensor in its exact format; the matrices of all experts in one stack, filled one after the other."""
    if not tensor.experts:
        return weights.packed(tensor.name)
    first = weights.packed(tensor.name, 0)
    stack = {name: torch.empty((tensor.experts, *part.shape), dtype=part.dtype) for name, part in first.parts.items()}
    for expert in range(tensor.experts):
        weight = first if expert == 0 else weights.packed(tensor.name, expert)
        for name, part in weight.parts.items():
            stack[name][expert] = part
    return type(first).of(stack, first.group_size)
