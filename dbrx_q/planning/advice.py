"""What would help a placement most, and what fits where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.config import DbrxConfig

from .footprint import MemoryRequest
from .machine import Gpu, Machine, Placement
from .placement import place
from .sizes import format_size
from .speed import expected_seconds

__all__ = ["advice"]

_MORE_RAM = 32 << 30
_NEW_CARD = Gpu(24 << 30)
_NOTICEABLE = 1.02
_LEAST_CONTEXT = 128


def advice(config: DbrxConfig, formats: Mapping[str, TensorFormat], machine: Machine, request: MemoryRequest) -> str:
    """One sentence: of more memory, a smaller KV cache, a shorter context or another GPU, what makes it fit, or faster."""
    plan = place(config, formats, machine, request)
    found = [(what, place(config, formats, *change), change[0]) for what, change in _changes(machine, request)]
    if not plan.fits:
        fitting = [what for what, other, _ in found if other.fits]
        fitting += [what for what in _shorter(config, formats, machine, request) if what not in fitting]
        least = [f"{short.total:,} bytes for {short.device}" for short in plan.short]
        also = f"fits instead: {', or '.join(fitting)}" if fitting else "no smaller KV cache, shorter context or other GPU makes it fit"
        return f"The least that works is {' and '.join(least)}; {also}."
    now = 1 / _seconds(plan, config, machine)
    rated = sorted(((1 / _seconds(other, config, its), what) for what, other, its in found if other.fits), reverse=True)
    if not rated or rated[0][0] < _NOTICEABLE * now:
        return "Neither more memory, nor a smaller KV cache, nor another GPU would make it noticeably faster."
    best, what = rated[0]
    return f"What would help most: {what} ({best:.1f} tokens/s expected instead of {now:.1f})."


def _seconds(plan: Placement, config: DbrxConfig, machine: Machine) -> float:
    return expected_seconds(plan, machine, n_experts=config.ffn_config.moe_num_experts, top_k=config.ffn_config.moe_top_k)


def _shorter(config: DbrxConfig, formats: Mapping[str, TensorFormat], machine: Machine, request: MemoryRequest) -> Iterator[str]:
    """The longest context, in halves of the one that was asked for, that fits with each format of keys and values."""
    for kv_format in (request.kv_format, *_smaller(request.kv_format)):
        context = request.context // 2
        while context >= _LEAST_CONTEXT:
            if place(config, formats, machine, replace(request, kv_format=kv_format, context=context)).fits:
                yield f"--context {context}" + ("" if kv_format == request.kv_format else f" --kv {kv_format}")
                break
            context //= 2


def _smaller(kv_format: str) -> tuple[str, ...]:
    return {"plain": ("int8", "int4"), "int8": ("int4",)}.get(kv_format, ())


def _changes(machine: Machine, request: MemoryRequest) -> Iterator[tuple[str, tuple[Machine, MemoryRequest]]]:
    for kv_format in _smaller(request.kv_format):
        yield f"--kv {kv_format}", (machine, replace(request, kv_format=kv_format))
    if request.fallback:
        yield "no --fallback", (machine, replace(request, fallback=None))
    if request.context >= 2:
        yield f"--context {request.context // 2}", (machine, replace(request, context=request.context // 2))
    if machine.ram is not None:
        yield f"{format_size(_MORE_RAM)} more of RAM", (replace(machine, ram=machine.ram + _MORE_RAM), request)
    another = replace(machine.gpus[-1], desktop=False) if machine.gpus else _NEW_CARD
    yield f"another GPU of {format_size(another.memory)}", (replace(machine, gpus=(*machine.gpus, another)), request)
