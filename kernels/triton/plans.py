"""Repeats the launches of an op on other tensors of the same shapes, without computing tiles, constants and pointers again.

An op on packed weights computes the same launches for every call with inputs of the same shapes: what differs are the addresses of inputs,
outputs and scratch memory. The second such call is watched; from the third on its launches are repeated with other addresses, which takes
the host a tenth of the time. Eager decode steps need it: where experts are offloaded, no CUDA graph can hold them.

A call is not repeated, and goes the usual way, if it does more than to allocate memory and to launch kernels, while launches are recorded
or watched by a profiler, and on AMD.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbrx_q.kernels.formats.weights import Weight

from .arrival import MOST_COUNTERS, counters
from .launch import Observed, chip_of, current_stream, is_recording, observing
from .repeated_launch import Key, Repeatable, profiled, repeatable
from .tiles import changes

__all__ = ["planned"]

Inputs = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class _Step:
    """One launch."""

    kernel: Repeatable
    """What is launched."""
    grid: tuple[int, ...]
    """Programs along each axis."""
    arguments: tuple[Any, ...]
    """As they were when the call was watched; None where another tensor takes the place."""
    places: tuple[tuple[int, int], ...]
    """(index of an argument, index of the input or new tensor that it is)."""


@dataclass(frozen=True)
class _Plan:
    """The launches of a call."""

    aligned: tuple[bool, ...]
    """Whether the address of each input is divisible by 16."""
    new: tuple[tuple[torch.Size, torch.dtype] | None, ...]
    """Tensors to allocate; None for arrival counters."""
    programs: int
    """The most programs of a launch, which take no more counters than there are programs."""
    steps: tuple[_Step, ...]
    """The launches in order."""
    result: int
    """Index of the input or new tensor that is returned."""

    def run(self, inputs: Inputs, device: torch.device) -> torch.Tensor:
        """Launch on the current stream of `device`, which is the current device."""
        tensors = list(inputs)
        for form in self.new:
            tensors.append(counters(device, self.programs) if form is None else torch.empty(form[0], dtype=form[1], device=device))
        stream = current_stream(device.index or 0)
        for step in self.steps:
            arguments = list(step.arguments)
            for place, source in step.places:
                arguments[place] = tensors[source]
            step.kernel(step.grid, stream, arguments)
        result = tensors[self.result]
        assert result is not None
        return result


_SEEN: dict[Key, _Plan | None] = {}
"""By what a call depends on: its plan; None after one call, or where there can be no plan."""
_REFUSED: set[Key] = set()


def planned(op: Hashable, weights: tuple[Weight, ...], inputs: Inputs, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of `call`, which launches kernels, or of the same launches with these inputs.

    Args:
        op: its name, and what else its launches depend on.
        weights: that the op reads. Plain ones are not planned for: a plan would keep them alive.
        inputs: the other tensors that it reads or adds to; the first is on the device of all.
        call: calls the op.
    """
    x = inputs[0]
    assert x is not None
    device = x.device
    if is_recording() or chip_of(device).vendor != "cuda" or profiled() or any(isinstance(weight, torch.Tensor) for weight in weights):
        return call()
    # Inputs that are not contiguous are copied first, which a plan does not do: such calls have a key of their own.
    forms = tuple([None if tensor is None else (tensor.shape, tensor.dtype, tensor.is_contiguous()) for tensor in inputs])
    key = (op, device, changes(), forms, *map(id, weights))
    if key not in _SEEN:  # the first call compiles kernels and fills caches
        _SEEN[key] = None
        for weight in weights:
            weakref.finalize(weight, _forget, key)  # its identity may be that of another weight later
        return call()
    plan = _SEEN[key]
    if plan is not None:
        current = device.type != "cuda" or torch.cuda.current_device() == device.index
        return plan.run(inputs, device) if current and plan.aligned == _aligned(inputs) else call()
    if key in _REFUSED or _any_twice(inputs):
        return call()
    with _Watch() as watch, observing() as launches:
        result = call()
    plan = _plan_of(inputs, watch, launches, result)
    if plan is None:
        _REFUSED.add(key)
    else:
        _SEEN[key] = plan
    return result


class _Watch(TorchDispatchMode):
    """Keeps the new tensors of all operators of torch: uninitialized ones, and others. A view of an operand, or the operand, is not new."""

    def __init__(self) -> None:
        super().__init__()
        self.empty: list[torch.Tensor] = []
        self.computed: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.empty.append(result)
        elif isinstance(result, torch.Tensor) and _storage(result) not in [_storage(arg) for arg in args if isinstance(arg, torch.Tensor)]:
            self.computed.append(result)
        return result


def _plan_of(inputs: Inputs, watch: _Watch, launches: list[Observed], result: torch.Tensor) -> _Plan | None:
    """The plan of a call; None if it launched nothing, or reads or returns a tensor that it computed otherwise than by launches."""
    device = result.device
    arrived = counters(device, 1)
    sources: list[torch.Tensor | None] = [*inputs, *watch.empty, arrived]
    of_call = {_storage(tensor) for tensor in [*sources, *watch.computed] if tensor is not None}
    steps = []
    for key, grid, arguments in launches:
        kernel = None if key is None else repeatable(key)
        if kernel is None:
            return None
        template, places = list(arguments), []
        for place, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor):
                continue
            source = _index(argument, sources)
            if source is not None:
                template[place] = None
                places.append((place, source))
            elif _storage(argument) in of_call:
                return None
        steps.append(_Step(kernel, grid, tuple(template), tuple(places)))
    returned = _index(result, sources)
    if returned is None:
        return None
    new = (*((tensor.shape, tensor.dtype) for tensor in watch.empty), None)
    programs = min(MOST_COUNTERS, max((math.prod(step.grid) for step in steps), default=1))
    return _Plan(_aligned(inputs), new, programs, tuple(steps), returned) if steps else None


def _index(tensor: torch.Tensor, sources: list[torch.Tensor | None]) -> int | None:
    """Which of `sources` is the tensor. Not by identity: a dispatch mode may hand out another object for the same tensor."""
    for index, source in enumerate(sources):
        if source is not None and _form(source) == _form(tensor):
            return index
    return None


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _aligned(inputs: Inputs) -> tuple[bool, ...]:
    return tuple([tensor is None or tensor.data_ptr() & 15 == 0 for tensor in inputs])


def _any_twice(inputs: Inputs) -> bool:
    """Whether two inputs are the same tensor, so that a launch does not say which of them it takes."""
    forms = [_form(tensor) for tensor in inputs if tensor is not None]
    return len(set(forms)) < len(forms)


def _forget(key: Key) -> None:
    _SEEN.pop(key, None)
    _REFUSED.discard(key)
