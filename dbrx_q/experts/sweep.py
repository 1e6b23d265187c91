"""Simulates every cache policy, with several sizes of the cache, on one trace."""

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

__all__ = ["CacheSizePoint", "PolicyResult", "Sweep", "sweep"]

_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
BOUND = "belady"
_POLICIES = (*(name.value for name in CachePolicyName), BOUND)


@dataclass(frozen=True)
class PolicyResult:
    """A policy with the slots of the machine's plan."""

    policy: str
    """Its name."""
    prefetch: bool
    """Whether experts were prefetched."""
    hit_rate: float
    """Share of requests for an expert that hit."""
    misses: int
    """Requests that missed."""
    prefetches: int
    """Experts that were prefetched."""
    loads_per_token: float
    """Experts that were loaded into slots of the devices that compute."""
    cpu_misses_per_token: float
    """Misses of GPUs that the CPU computed."""
    disk_bytes_per_token: float
    """Bytes read from disk."""
    prefetch_accuracy: float
    """Share of requests that had been predicted."""
    tokens_per_second: float
    """What the machine's bandwidths allow (`simulated_seconds`)."""


@dataclass(frozen=True)
class CacheSizePoint:
    """A policy without prefetch, with another number of slots on the devices that compute.

    Host memory under GPUs keeps the slots of the machine's plan.
    """

    policy: str
    """Its name."""
    share: float
    """Share of the experts that have a slot."""
    hit_rate: float
    """Share of requests for an expert that hit."""
    tokens_per_second: float
    """What the machine's bandwidths allow."""


@dataclass(frozen=True)
class Sweep:
    """The results of all simulations."""

    tokens: int
    """How many were simulated."""
    token_by_token: bool
    """Whether each token was a forward pass, as in decoding; otherwise in the steps of the recording."""
    slots: int
    """On the devices that compute."""
    experts: int
    """Of the model."""
    miss_policy: str
    """Of GPUs; empty without one."""
    rows: tuple[PolicyResult, ...]
    """Every policy, with and without prefetch."""
    curve: tuple[CacheSizePoint, ...]
    """Every policy with other sizes of the cache."""
    bound: str = BOUND
    """The name of the policy that knows the future, which no other can beat."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON output has it."""
        return asdict(self)


def sweep(
    trace: Trace,
    machine: Machine,
    request: MemoryRequest,
    *,
    tokens: int | None = None,
    token_by_token: bool = True,
    miss_policy: MissPolicy = MissPolicy.hybrid,
    curve: bool = True,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Sweep:
    """Simulate all policies on a machine, with and without prefetch, and with caches of other sizes.

    "static" pins what the whole trace uses most; with a profile of another text it would hit less often.

    Args:
        trace: the experts that every token chose.
        machine: whose plan says how many slots there are.
        request: what keys and values take.
        tokens: how many, from the start of the trace; None for all.
        token_by_token: whether every token is a forward pass, as in decoding.
        miss_policy: how misses of GPUs are served.
        curve: whether other sizes of the cache are simulated as well.
        on_run: called with (runs done, runs in all).

    Raises:
        RequestError: the machine cannot hold the smallest configuration that works, or `tokens` is less than 1 or than the first step.
    """
    if tokens is not None and tokens < 1:
        raise RequestError(f"a simulation must take at least 1 token; found {tokens}")
    config = DbrxConfig.from_dict(trace.config)
    plan = place(config, tensor_formats(config, "the trace"), machine, request)
    if not plan.fits:
        raise RequestError(
            f"the machine must hold the weights that every token reads, keys and values and an expert; {plan.shortfall:,} bytes are "
            f"missing on {plan.short_device}. Give more"
        )
    passes = [step for step in trace.passes(token_by_token=token_by_token) if tokens is None or step.stop <= tokens]
    if not passes:
        first = trace.passes(token_by_token=False)[0].stop
        raise RequestError(f"a simulation must take a whole step of the recording; the first has {first}")
    kinds = expert_kinds(config, tensor_formats(config, "the trace"), config.dtype)
    runs = _Runs(trace, passes, kinds, machine, miss_policy)
    total = 2 * len(_POLICIES) + (len(_POLICIES) * len(_SHARES) if curve else 0)
    rows: list[PolicyResult] = []
    points: list[CacheSizePoint] = []
    for name in _POLICIES:
        for prefetch in (False, True):
            rows.append(runs.row(name, plan, prefetch=prefetch))
            on_run(len(rows), total)
    for name in _POLICIES if curve else ():
        for share in _SHARES:
            points.append(runs.point(name, plan, share))
            on_run(len(rows) + len(points), total)
    slots = sum(device.n_slots for device in plan.gpus or (plan.host,))
    policy_of_misses = miss_policy.value if plan.gpus else ""
    return Sweep(runs.tokens, token_by_token, slots, plan.experts, policy_of_misses, tuple(rows), tuple(points))


class _Runs:
    """Simulations of one trace on one machine."""

    def __init__(self, trace: Trace, passes: Sequence[slice], kinds: list[ExpertKind], machine: Machine, miss_policy: MissPolicy) -> None:
        self._trace, self._passes, self._kinds, self._machine, self._miss_policy = trace, passes, kinds, machine, miss_policy
        self._profile, self._visits = trace.counts(), visits_of(trace, passes)
        self.tokens = passes[-1].stop

    def row(self, name: str, plan: Placement, *, prefetch: bool) -> PolicyResult:
        """A policy with the slots of a plan."""
        stats = self._run(name, plan, prefetch=prefetch)
        cache = stats.cache
        expert_bytes = plan.expert_bytes / plan.experts
        return PolicyResult(
            policy=name,
            prefetch=prefetch,
            hit_rate=cache.hit_rate,
            misses=cache.misses,
            prefetches=cache.prefetches,
            loads_per_token=(stats.link_bytes / expert_bytes if plan.gpus else cache.misses + cache.prefetches) / self.tokens,
            cpu_misses_per_token=stats.computed_on_cpu / self.tokens,
            disk_bytes_per_token=stats.disk_bytes / self.tokens,
            prefetch_accuracy=stats.prefetch_accuracy,
            tokens_per_second=self._speed(stats, plan),
        )

    def point(self, name: str, plan: Placement, share: float) -> CacheSizePoint:
        """A policy with slots for a share of the experts."""
        resized = _with_share(plan, self._kinds, self._trace.n_experts, share)
        stats = self._run(name, resized, prefetch=False)
        return CacheSizePoint(name, share, stats.cache.hit_rate, self._speed(stats, resized))

    def _run(self, name: str, plan: Placement, *, prefetch: bool) -> ExpertStats:
        return simulate(
            self._trace,
            self._passes,
            self._kinds,
            plan,
            self._machine,
            self._policy(name),
            prefetch=prefetch,
            miss_policy=self._miss_policy,
            priority=self._profile if name == CachePolicyName.static.value else None,
        )

    def _policy(self, name: str) -> Callable[[Sequence[int], bool], CachePolicy]:
        L, E = len(self._kinds), self._trace.n_experts

        def make(layers: Sequence[int], under_gpus: bool) -> CachePolicy:
            if name != BOUND:
                return make_policy(name, L, E, self._profile)
            if under_gpus:  # which experts the GPUs will miss is not known in advance
                return make_policy(DEFAULT_POLICY.value, L, E)
            layers_of_cache = set(layers)
            return Belady(L, E, [visit for visit in self._visits if visit[0] in layers_of_cache])

        return make

    def _speed(self, stats: ExpertStats, plan: Placement) -> float:
        return self.tokens / simulated_seconds(stats, plan, self._machine, tokens=self.tokens)


def _with_share(plan: Placement, kinds: list[ExpertKind], n_experts: int, share: float) -> Placement:
    """The plan with slots for this share of the experts on every device that computes."""

    def scaled(device: DevicePlan) -> DevicePlan:
        layers_of_kind = Counter(kinds[slice(*device.layers)])
        return replace(device, slots={kind: max(1, round(share * count * n_experts)) for kind, count in layers_of_kind.items()})

    if not plan.gpus:
        return replace(plan, host=scaled(plan.host))
    return replace(plan, gpus=tuple(scaled(gpu) for gpu in plan.gpus))
