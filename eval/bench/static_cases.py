"""The calls that the static roofline is computed for: launches of DBRX's ops, recorded as a chip would get them.

Dimension letters as in `kernel_shapes.py`; `B` sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.kv import KVLayer, allocate_kv
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.norm import add_norm
from dbrx_q.kernels.qkv import store_qkv
from dbrx_q.kernels.router import norm_route, route
from dbrx_q.kernels.triton.launch import CHIPS, Launch, recording

from .kernel_shapes import DBRX, empty_weight

__all__ = ["STEP", "StaticCase", "record", "static_cases"]

STEP = "step"
_LAYERS = 40
_STEP_CONTEXT = 1024
_STEP_OPERATORS = 12  # of the embedding and the rotation of positions, which are torch's
_DTYPE = torch.bfloat16
_LINEAR = {"Wqkv": DBRX.qkv, "out_proj": DBRX.width, "lm_head": DBRX.vocabulary}

Call = Callable[[], object]


@dataclass(frozen=True)
class StaticCase:
    """A row of the table, or several with their sum."""

    op: str
    """What it calls: "moe", "linear", "attention", "small" or STEP, a whole decode step."""
    name: str
    """With format and sizes, such as "MoE int4:64, 1 token"."""
    calls: tuple[tuple[Call, int], ...]
    """Calls of ops on tensors without memory, and how often each is made."""
    decode: bool = True
    """Whether copy bandwidth is the ceiling; the matmul rate otherwise."""
    new_tokens: int = 1
    """Of a sequence in prefill of attention, whose cache they fill."""
    torch_operators: int = 0
    """Small operators of torch beside the calls, each of which takes the fixed time of a launch."""


def static_cases(*, everything: bool = False) -> list[StaticCase]:
    """The usual cases; `everything` adds formats, tokens and sizes of batches."""
    return [*_moe(everything), *_linears(everything), *_attentions(everything), *_small(everything), _step()]


def record(case: StaticCase, chip: str) -> list[tuple[Launch, int]]:
    """The launches of a case on a chip, and how often each is made."""
    launches: list[tuple[Launch, int]] = []
    for call, times in case.calls:
        with recording(CHIPS[chip]) as recorded:
            call()
        launches += [(launch, times) for launch in recorded]
    return launches


def _moe(everything: bool) -> Iterator[StaticCase]:
    sizes = [("int4:64", T) for T in (1, 8, 4096)] + [(f"trellis{bits}", 1) for bits in (2, 3, 4)]
    if everything:
        sizes += [("int4:64", T) for T in (2, 4, 16, 64, 512)]
        sizes += [(name, T) for name in ("int8:64", "nf4:64") for T in (1, 8, 4096)] + [(f"trellis{bits}", 8) for bits in (2, 3, 4)]
    for name, T in sizes:
        yield StaticCase("moe", f"MoE {name}, {_tokens(T)}", ((_experts(name, T), 1),), decode=T <= 512)


def _linears(everything: bool) -> Iterator[StaticCase]:
    sizes = [(place, name, 1) for name in ("int4:64", "int8:64") for place in ("Wqkv", "out_proj")] + [("lm_head", "int8:64", 1)]
    if everything:
        sizes += [("lm_head", "int4:64", 1), ("Wqkv", "nf4:64", 1)]
        sizes += [("Wqkv", name, T) for name in ("int4:64", "int8:64") for T in (8, 4096)]
        sizes += [("Wqkv", f"trellis{bits}", 1) for bits in (2, 3, 4)]
    for place, name, T in sizes:
        yield StaticCase("linear", f"{place} {name}, {_tokens(T)}", ((_linear(place, name, T), 1),), decode=T <= 512)


def _attentions(everything: bool) -> Iterator[StaticCase]:
    sizes = [("int8", B) for B in (1, 8)] + ([(name, B) for name in ("int4", "plain") for B in (1, 8)] if everything else [])
    for name, B in sizes:
        call = partial(_decode_attention, name, B, DBRX.context)
        yield StaticCase("attention", f"attention decode {name} KV, {DBRX.context:,} tokens, batch {B}", ((call, 1),))
    for name in ("int8", "int4", "plain") if everything else ("int8",):
        T = 2048
        call = partial(_prefill_attention, name, T, DBRX.context)
        case = f"attention prefill {name} KV, {T:,} tokens after {DBRX.context - T:,}"
        yield StaticCase("attention", case, ((call, 1),), decode=False, new_tokens=T)


def _small(everything: bool) -> Iterator[StaticCase]:
    for T in (1, 8) if everything else (1,):
        for name, call in (
            ("add and norm", _norm(T, adds=True)),
            ("router", _route(T)),
            ("norm and router", _norm_route(T)),
            ("store int8", partial(_store, T, 1024)),
        ):
            yield StaticCase("small", f"{name}, {_tokens(T)}", ((call, 1),))


def _step() -> StaticCase:
    """One token of one sequence: experts in int4, everything else in int8, as `quantize` has them by default.

    From the embedding to the logits, as one CUDA graph has it. What happens between two graphs is not part of it: choosing the token,
    copies, and the host's time.
    """
    layer: list[Call] = [
        _norm(1, adds=True),
        _linear("Wqkv", "int8:64", 1),
        partial(_store, 1, _STEP_CONTEXT),
        partial(_decode_attention, "int8", 1, _STEP_CONTEXT),
        _linear("out_proj", "int8:64", 1),
        _norm_route(1),
        _experts("int4:64", 1),
    ]
    head: list[Call] = [_norm(1, adds=True), _linear("lm_head", "int8:64", 1)]
    calls = [(call, _LAYERS) for call in layer] + [(call, 1) for call in head]
    name = f"decode step, {_LAYERS} layers, int4 experts, int8 KV of {_STEP_CONTEXT:,} tokens"
    return StaticCase(STEP, name, tuple(calls), torch_operators=_STEP_OPERATORS)


def _experts(name: str, T: int) -> Call:
    E, A, D, F = DBRX.experts, DBRX.active, DBRX.width, DBRX.hidden
    fmt = TensorFormat.parse(name)
    layer = ExpertWeights(empty_weight(fmt, E, F, D), empty_weight(fmt, E, F, D), empty_weight(fmt, E, D, F))
    x, experts, weights = _meta(T, D), _meta(T, A, dtype=torch.int64), _meta(T, A, dtype=torch.float32)
    return partial(moe_experts, x, experts, weights, layer, backend=Backend.TRITON)


def _linear(place: str, name: str, T: int) -> Call:
    N, D = _LINEAR[place], DBRX.width
    clip = DBRX.clip if place == "Wqkv" else None
    residual = _meta(T, N) if place == "out_proj" else None
    weight = empty_weight(TensorFormat.parse(name), N, D)
    return partial(linear, _meta(T, D), weight, clip=clip, residual=residual, backend=Backend.TRITON)


def _norm(T: int, *, adds: bool) -> Call:
    x = _meta(T, DBRX.width)
    return partial(add_norm, x, _meta(T, DBRX.width) if adds else None, _meta(DBRX.width), DBRX.epsilon, backend=Backend.TRITON)


def _route(T: int) -> Call:
    return partial(route, _meta(T, DBRX.width), _meta(DBRX.experts, DBRX.width), DBRX.active, 1, backend=Backend.TRITON)


def _norm_route(T: int) -> Call:
    x, router = _meta(T, DBRX.width), _meta(DBRX.experts, DBRX.width)
    return partial(norm_route, x, _meta(DBRX.width), DBRX.epsilon, router, DBRX.active, 1, backend=Backend.TRITON)


def _store(T: int, capacity: int) -> object:
    cache, places = _cache("int8", T, capacity), _meta(T, dtype=torch.int32)
    angles = _meta(T, DBRX.channels // 2, dtype=torch.float32)
    qkv = _meta(T, DBRX.qkv)
    return store_qkv(qkv, cache, places, places, angles, angles, heads=DBRX.heads, clip=DBRX.clip, backend=Backend.TRITON)


def _decode_attention(name: str, B: int, capacity: int) -> object:
    from dbrx_q.kernels.triton import attention_decode

    q, lengths = _meta(B, DBRX.heads, DBRX.channels), _meta(B, dtype=torch.int32)
    return attention_decode.decode(q, _cache(name, B, capacity), lengths, None)


def _prefill_attention(name: str, T: int, capacity: int) -> object:
    from dbrx_q.kernels.triton import attention_prefill

    q, lengths, starts = _meta(T, DBRX.heads, DBRX.channels), _meta(1, dtype=torch.int32), _meta(2, dtype=torch.int32)
    return attention_prefill.prefill(q, _cache(name, 1, capacity), starts, lengths, None, T)


def _cache(name: str, B: int, capacity: int) -> KVLayer:
    return allocate_kv(name, B, DBRX.kv_heads, capacity, DBRX.channels, _DTYPE, torch.device("meta"))


def _meta(*shape: int, dtype: torch.dtype = _DTYPE) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _tokens(T: int) -> str:
    return f"{T:,} token{'s' * (T > 1)}"
