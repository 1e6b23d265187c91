"""Every policy, and every size of the cache, on one trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dbrx_q.checkpoint.layout import tensor_formats
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.planning.expert_kinds import ExpertKind, expert_kinds
from dbrx_q.planning.footprint import MemoryRequest
from dbrx_q.planning.machine import DevicePlan, Machine, Placement
from dbrx_q.planning.placement import place
from dbrx_q.planning.policy_names import DEFAULT_POLICY, CachePolicyName, MissPolicy

from .policies import Belady, CachePolicy, make_policy
from .simulate import simulate, visits_of
from .simulated_speed import simulated_seconds
from .stats import ExpertStats
from .trace import Trace

__all__ = ["Point", "PolicyResult", "Sweep", "sweep"]

_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
BOUND = "belady"


@dataclass(frozen=True)
class PolicyResult:
    """A policy with the machine's slots. hit_rate: of requests for an expert. brought: experts that came into slots where they are
    computed, a
    token; on_cpu: misses of GPUs that the CPU computed, a token; disk_bytes: read, a token. accuracy: share of what was needed that
    was predicted. tokens_per_second: what the machine's bandwidths allow (`speed.simulated_seconds`)."""

    policy: str
    prefetch: bool
    hit_rate: float
    misses: int
    prefetches: int
    brought: float
    on_cpu: float
    disk_bytes: float
    accuracy: float
    tokens_per_second: float


@dataclass(frozen=True)
class Point:
    """A policy with slots for this share of all experts where they are computed, without prefetch; figures as of `PolicyResult`. Under
    GPUs host
    memory stays as the machine's plan has it."""

    policy: str
    share: float
    hit_rate: float
    tokens_per_second: float


@dataclass(frozen=True)
class Sweep:
    """tokens: simulated. one_by_one: whether as decoding takes them, or in the steps of the recording. slots: where experts are computed.
    miss_policy: of GPUs, empty without one. bound: the name of the policy that knows the future."""

    tokens: int
    one_by_one: bool
    slots: int
    experts: int
    miss_policy: str
    rows: tuple[PolicyResult, ...]
    curve: tuple[Point, ...]
    bound: str = BOUND

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def sweep(
    trace: Trace,
    machine: Machine,
    request: MemoryRequest,
    *,
    tokens: int | None = None,
    one_by_one: bool = True,
    miss_policy: MissPolicy = MissPolicy.hybrid,
    curve: bool = True,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Sweep:
    """Simulate all policies, with and without prefetch, on a machine; and each of them with caches of other sizes.

    "static" pins what the whole trace uses most; a profile of another text would do less.

    Args:
        trace: what every token chose.
        machine: whose plan says how many slots there are.
        request: what keys and values take.
        tokens: so many from the start of the trace; None for all.
        one_by_one: whether every token is a forward pass, as in decoding.
        miss_policy: how misses of GPUs are served.
        curve: whether other sizes are simulated as well.
        on_run: called with (runs done, runs in all).

    Raises:
        RequestError: the machine cannot hold the least that works, or a number of tokens that is none.
    """
    if tokens is not None and tokens < 1:
        raise RequestError(f"a simulation must take at least 1 token; found {tokens}")
    config = DbrxConfig.from_dict(trace.config)
    plan = place(config, tensor_formats(config, "the trace"), machine, request)
    if not plan.fits:
        raise RequestError(
            f"the machine must hold the weights that every token reads, keys and values and an expert; "
            f"{plan.shortfall:,} bytes are missing on "
            f"{plan.short_device}. Give more"
        )
    passes = [some for some in trace.passes(one_by_one=one_by_one) if tokens is None or some.stop <= tokens]
    if not passes:
        raise RequestError(f"a simulation must take a whole step of the recording; the first has {trace.passes(one_by_one=False)[0].stop}")
    L, E = config.n_layers, config.ffn_config.moe_num_experts
    kinds = expert_kinds(config, tensor_formats(config, "the trace"), config.dtype)
    profile, visits = trace.counts(), visits_of(trace, passes)
    names = (*(name.value for name in CachePolicyName), BOUND)

    def policy(name: str) -> Callable[[Sequence[int], bool], CachePolicy]:
        def make(layers: Sequence[int], under: bool) -> CachePolicy:
            if name != BOUND:
                return make_policy(name, L, E, profile)
            if under:  # what will be missed above is not known
                return make_policy(DEFAULT_POLICY, L, E)
            own = set(layers)
            return Belady(L, E, [visit for visit in visits if visit[0] in own])

        return make

    def run(name: str, plan: Placement, *, prefetch: bool) -> ExpertStats:
        priority = profile if name == "static" else None
        return simulate(trace, passes, kinds, plan, machine, policy(name), prefetch=prefetch, miss_policy=miss_policy, priority=priority)

    total = 2 * len(names) + (len(names) * len(_SHARES) if curve else 0)
    rows: list[PolicyResult] = []
    points: list[Point] = []
    count = passes[-1].stop
    for name in names:
        for prefetch in (False, True):
            found = run(name, plan, prefetch=prefetch)
            cache = found.cache
            speed = count / simulated_seconds(found, plan, machine, tokens=count)
            each = plan.expert_bytes / plan.experts
            brought = (found.link_bytes / each if plan.gpus else cache.misses + cache.prefetches) / count
            disk = found.disk_bytes / count
            accuracy = found.prefetch_accuracy
            row = PolicyResult(
                name, prefetch, cache.hit_rate, cache.misses, cache.prefetches, brought, found.on_cpu / count, disk, accuracy, speed
            )
            rows.append(row)
            on_run(len(rows), total)
    for name in names if curve else ():
        for share in _SHARES:
            other = _with_share(plan, kinds, E, share)
            found = run(name, other, prefetch=False)
            points.append(Point(name, share, found.cache.hit_rate, count / simulated_seconds(found, other, machine, tokens=count)))
            on_run(len(rows) + len(points), total)
    slots = sum(device.n_slots for device in plan.gpus or (plan.host,))
    return Sweep(count, one_by_one, slots, plan.experts, miss_policy.value if plan.gpus else "", tuple(rows), tuple(points))


def _with_share(plan: Placement, kinds: list[ExpertKind], n_experts: int, share: float) -> Placement:
    """The plan with slots for this share of the experts on every device that computes."""

    def scaled(device: DevicePlan) -> DevicePlan:
        wanted = Counter(kinds[slice(*device.layers)])
        return replace(device, slots={kind: max(1, round(share * count * n_experts)) for kind, count in wanted.items()})

    if not plan.gpus:
        return replace(plan, host=scaled(plan.host))
    return replace(plan, gpus=tuple(scaled(gpu) for gpu in plan.gpus))
