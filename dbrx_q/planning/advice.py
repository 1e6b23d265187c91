"""What would speed up a placement most, or, where it does not fit, what would."""

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
_NEW_GPU = Gpu(24 << 30)
_NOTICEABLE_SPEEDUP = 1.02
_SHORTEST_CONTEXT = 128


def advice(config: DbrxConfig, formats: Mapping[str, TensorFormat], machine: Machine, request: MemoryRequest) -> str:
    """One sentence that names the change that makes the model fit, or run faster: memory, KV cache, context, or another GPU."""
    plan = place(config, formats, machine, request)
    changes = [(change, place(config, formats, *changed), changed[0]) for change, changed in _changes(machine, request)]
    if not plan.fits:
        fitting = [change for change, changed_plan, _ in changes if changed_plan.fits]
        fitting += [change for change in _shorter_contexts(config, formats, machine, request) if change not in fitting]
        least = [f"{device.total:,} bytes for {device.device}" for device in plan.over_budget]
        alternatives = (
            f"fits instead: {', or '.join(fitting)}" if fitting else "no smaller KV cache, shorter context or other GPU makes it fit"
        )
        return f"The least that works is {' and '.join(least)}; {alternatives}."
    now = 1 / _seconds(plan, config, machine)
    speeds = [
        (1 / _seconds(changed_plan, config, changed_machine), change)
        for change, changed_plan, changed_machine in changes
        if changed_plan.fits
    ]
    if not speeds or max(speeds)[0] < _NOTICEABLE_SPEEDUP * now:
        return "Neither more memory, nor a smaller KV cache, nor another GPU would make it noticeably faster."
    best, change = max(speeds)
    return f"What would help most: {change} ({best:.1f} tokens/s expected instead of {now:.1f})."


def _seconds(plan: Placement, config: DbrxConfig, machine: Machine) -> float:
    return expected_seconds(plan, machine, n_experts=config.ffn_config.moe_num_experts, top_k=config.ffn_config.moe_top_k)


def _shorter_contexts(config: DbrxConfig, formats: Mapping[str, TensorFormat], machine: Machine, request: MemoryRequest) -> Iterator[str]:
    """For the requested KV format and each smaller one, the longest context that fits among halves of the requested one."""
    for kv_format in (request.kv_format, *_smaller_kv_formats(request.kv_format)):
        context = request.context // 2
        while context >= _SHORTEST_CONTEXT:
            if place(config, formats, machine, replace(request, kv_format=kv_format, context=context)).fits:
                yield f"--context {context}" + ("" if kv_format == request.kv_format else f" --kv {kv_format}")
                break
            context //= 2


def _smaller_kv_formats(kv_format: str) -> tuple[str, ...]:
    return {"plain": ("int8", "int4"), "int8": ("int4",)}.get(kv_format, ())


def _changes(machine: Machine, request: MemoryRequest) -> Iterator[tuple[str, tuple[Machine, MemoryRequest]]]:
    """(what a user would change, the machine and the request after it)."""
    for kv_format in _smaller_kv_formats(request.kv_format):
        yield f"--kv {kv_format}", (machine, replace(request, kv_format=kv_format))
    if request.fallback:
        yield "no --fallback", (machine, replace(request, fallback=None))
    if request.context >= 2:
        yield f"--context {request.context // 2}", (machine, replace(request, context=request.context // 2))
    if machine.ram is not None:
        yield f"{format_size(_MORE_RAM)} more of RAM", (replace(machine, ram=machine.ram + _MORE_RAM), request)
    another = replace(machine.gpus[-1], desktop=False) if machine.gpus else _NEW_GPU
    yield (
        f"{'another' if machine.gpus else 'a'} GPU of {format_size(another.memory)}",
        (replace(machine, gpus=(*machine.gpus, another)), request),
    )
