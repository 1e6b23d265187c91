"""Every policy, and every size of the cache, on one trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import DbrxConfig
from ..errors import RequestError
from ..layout import tensor_formats
from ..placement import Placement, Request, Rig, place
from ..speed import tokens_per_second
from .policies import POLICIES, Belady, CachePolicy, make_policy
from .simulate import simulate, visits_of
from .trace import Trace

__all__ = ["Point", "Row", "Sweep", "sweep"]

_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
BOUND = "belady"


@dataclass(frozen=True)
class Row:
    """A policy with the rig's slots. hit_rate: of requests for an expert. loads: experts brought, a token. accuracy: share of what was
    needed that was foreseen. tokens_per_second: what the rig's bandwidths allow, one path after the other."""

    policy: str
    prefetch: bool
    hit_rate: float
    misses: int
    prefetches: int
    loads: float
    accuracy: float
    tokens_per_second: float


@dataclass(frozen=True)
class Point:
    """A policy with slots for this share of all experts, without prefetch."""

    policy: str
    share: float
    hit_rate: float


@dataclass(frozen=True)
class Sweep:
    """tokens: simulated. one_by_one: whether as decoding takes them, or in the steps of the recording. slots: on the rig. bound: the name
    of the policy that knows the future."""

    tokens: int
    one_by_one: bool
    slots: int
    experts: int
    rows: tuple[Row, ...]
    curve: tuple[Point, ...]
    bound: str = BOUND

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def sweep(
    trace: Trace,
    rig: Rig,
    request: Request,
    *,
    tokens: int | None = None,
    one_by_one: bool = True,
    curve: bool = True,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Sweep:
    """Simulate all policies, with and without prefetch, on a rig; and each of them with caches of other sizes.

    "static" pins what the whole trace uses most; a profile of another text would do less.

    Args:
        trace: what every token chose.
        rig: whose plan says how many slots there are.
        request: what keys and values take.
        tokens: so many from the start of the trace; None for all.
        one_by_one: whether every token is a forward pass, as in decoding.
        curve: whether other sizes are simulated as well.
        on_run: called with (runs done, runs in all).

    Raises:
        RequestError: the rig cannot hold the least that works, or a number of tokens that is none.
    """
    if tokens is not None and tokens < 1:
        raise RequestError(f"a simulation must take at least 1 token; found {tokens}")
    config = DbrxConfig.from_dict(trace.config)
    plan = place(config, tensor_formats(config, "the trace"), rig, request)
    if not plan.fits:
        raise RequestError(
            f"the rig must hold the weights that every token reads, keys and values and an expert; {plan.shortfall:,} bytes are missing on "
            f"{plan.short_of}. Give more"
        )
    passes = [some for some in trace.passes(one_by_one=one_by_one) if tokens is None or some.stop <= tokens]
    if not passes:
        raise RequestError(f"a simulation must take a whole step of the recording; the first has {trace.passes(one_by_one=False)[0].stop}")
    pool_of, slots, sizes = _pools(plan, config)
    L, E, A = config.n_layers, config.ffn_config.moe_num_experts, config.ffn_config.moe_top_k
    profile, visits = trace.counts(), visits_of(trace, passes)
    names = (*POLICIES, BOUND)

    def policy(name: str) -> Callable[[int], CachePolicy]:
        return lambda _: Belady(L, E, visits) if name == BOUND else make_policy(name, L, E, profile)

    total = 2 * len(names) + (len(names) * len(_SHARES) if curve else 0)
    rows: list[Row] = []
    points: list[Point] = []
    count = passes[-1].stop
    for name in names:
        for prefetch in (False, True):
            fill = profile if name == "static" else None
            found = simulate(trace, passes, pool_of, slots, policy(name), prefetch=prefetch, fill=fill)
            cache, loads = found.cache, found.cache.misses + found.cache.prefetches
            accuracy = found.foreseen / found.foreseeable if found.foreseeable else 0.0
            speed = tokens_per_second(plan, rig, loads / max(1, cache.requests), requests=cache.requests / count / L, top_k=A)
            rows.append(Row(name, prefetch, cache.hit_rate, cache.misses, cache.prefetches, loads / count, accuracy, speed))
            on_run(len(rows), total)
    for name in names if curve else ():
        for share in _SHARES:
            some = [max(1, round(share * size)) for size in sizes]
            found = simulate(trace, passes, pool_of, some, policy(name), prefetch=False, fill=profile if name == "static" else None)
            points.append(Point(name, share, found.cache.hit_rate))
            on_run(len(rows) + len(points), total)
    return Sweep(count, one_by_one, sum(slots), plan.experts, tuple(rows), tuple(points))


def _pools(plan: Placement, config: DbrxConfig) -> tuple[list[int], list[int], Sequence[int]]:
    """(by layer the cache that its experts share, slots of each cache, experts that share each cache)."""
    from .slots import expert_kinds

    kinds = expert_kinds(config, tensor_formats(config, "the trace"), getattr(torch, config.torch_dtype or "bfloat16"))
    devices = plan.cards or (plan.host,)
    index: dict[tuple[str, object], int] = {}
    pool_of: list[int] = []
    slots: list[int] = []
    for device in devices:
        for layer in range(*device.layers):
            key = device.device, kinds[layer]
            if key not in index:
                index[key] = len(index)
                slots.append(device.slots[kinds[layer]])
            pool_of.append(index[key])
    sizes = [pool_of.count(i) * config.ffn_config.moe_num_experts for i in range(len(slots))]
    return pool_of, slots, sizes
