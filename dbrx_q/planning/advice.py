"""What would help a placement most, and what fits where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.config import DbrxConfig

from .footprint import Request
from .machine import Card, Placement, Rig
from .placement import place
from .sizes import format_size
from .speed import expected_seconds

__all__ = ["advice"]

_MORE_RAM = 32 << 30
_NEW_CARD = Card(24 << 30)
_NOTICEABLE = 1.02
_LEAST_CONTEXT = 128


def advice(config: DbrxConfig, formats: Mapping[str, TensorFormat], rig: Rig, request: Request) -> str:
    """One sentence: of more memory, a smaller KV cache, a shorter context or another card, what makes it fit, or faster."""
    plan = place(config, formats, rig, request)
    found = [(what, place(config, formats, *change), change[0]) for what, change in _changes(rig, request)]
    if not plan.fits:
        fitting = [what for what, other, _ in found if other.fits]
        fitting += [what for what in _shorter(config, formats, rig, request) if what not in fitting]
        least = [f"{short.total:,} bytes for {short.device}" for short in plan.short]
        also = f"fits instead: {', or '.join(fitting)}" if fitting else "no smaller KV cache, shorter context or other card makes it fit"
        return f"The least that works is {' and '.join(least)}; {also}."
    now = 1 / _seconds(plan, config, rig)
    rated = sorted(((1 / _seconds(other, config, its), what) for what, other, its in found if other.fits), reverse=True)
    if not rated or rated[0][0] < _NOTICEABLE * now:
        return "Neither more memory, nor a smaller KV cache, nor another card would make it noticeably faster."
    best, what = rated[0]
    return f"What would help most: {what} ({best:.1f} tokens/s expected instead of {now:.1f})."


def _seconds(plan: Placement, config: DbrxConfig, rig: Rig) -> float:
    return expected_seconds(plan, rig, n_experts=config.ffn_config.moe_num_experts, top_k=config.ffn_config.moe_top_k)


def _shorter(config: DbrxConfig, formats: Mapping[str, TensorFormat], rig: Rig, request: Request) -> Iterator[str]:
    """The longest context, in halves of the one that was asked for, that fits with each format of keys and values."""
    for kv_format in (request.kv_format, *_smaller(request.kv_format)):
        context = request.context // 2
        while context >= _LEAST_CONTEXT:
            if place(config, formats, rig, replace(request, kv_format=kv_format, context=context)).fits:
                yield f"--context {context}" + ("" if kv_format == request.kv_format else f" --kv {kv_format}")
                break
            context //= 2


def _smaller(kv_format: str) -> tuple[str, ...]:
    return {"plain": ("int8", "int4"), "int8": ("int4",)}.get(kv_format, ())


def _changes(rig: Rig, request: Request) -> Iterator[tuple[str, tuple[Rig, Request]]]:
    for kv_format in _smaller(request.kv_format):
        yield f"--kv {kv_format}", (rig, replace(request, kv_format=kv_format))
    if request.low_bit:
        yield "no --degraded", (rig, replace(request, low_bit=None))
    if request.context >= 2:
        yield f"--context {request.context // 2}", (rig, replace(request, context=request.context // 2))
    if rig.ram is not None:
        yield f"{format_size(_MORE_RAM)} more of RAM", (replace(rig, ram=rig.ram + _MORE_RAM), request)
    another = replace(rig.cards[-1], desktop=False) if rig.cards else _NEW_CARD
    yield f"another card of {format_size(another.memory)}", (replace(rig, cards=(*rig.cards, another)), request)
