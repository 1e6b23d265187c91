"""Builds the store that a plan describes, for a model and for a simulation alike: a plan's slots become caches and memory here."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch

from dbrx_q.planning.cpu_quota import usable_threads
from dbrx_q.planning.expert_kinds import ExpertKind
from dbrx_q.planning.machine import Machine, Placement
from dbrx_q.planning.offloading import copy_threads
from dbrx_q.planning.policy_names import MissPolicy

from .cpu_store import CpuExpertStore
from .gpu_experts import GpuExperts
from .gpu_store import GpuExpertStore
from .host_tier import HOST, ExpertCatalog, HostTier, Reader
from .link import Link
from .policies import CachePolicy, Lru
from .split import MissRates
from .tiered_store import FallbackCopy, NextRouter

__all__ = ["StoreParts", "build_store"]


@dataclass(frozen=True)
class StoreParts:
    """What a store is made of, which differs between a model and a simulation."""

    catalog: ExpertCatalog
    """Which experts there are."""
    reader: Reader
    """Reads them from disk."""
    devices: Sequence[torch.device]
    """The GPUs."""
    link: Callable[[torch.device, int], Link]
    """Makes the link to a GPU, with so many threads that fill its buffers."""
    policy: Callable[[Sequence[int], bool], CachePolicy]
    """Makes the cache policy of slots that the experts of these layers share; the second argument is True for host memory under GPUs."""
    rates: Callable[[float, float], MissRates] = MissRates
    """Makes the rates of misses from the bandwidths of host memory and of the link, in bytes/s."""
    memory: torch.device = HOST
    """Of host slots; "meta" for a simulation."""
    fallback: tuple[ExpertCatalog, Reader] | None = None
    """Catalog and reader of a fallback copy; None without one."""
    upgrade: bool = True
    """See `FallbackCopy.upgrade`."""


def build_store(
    parts: StoreParts,
    plan: Placement,
    machine: Machine,
    *,
    prefetch: bool,
    miss_policy: MissPolicy,
    routers: Sequence[NextRouter] | None = None,
) -> CpuExpertStore | GpuExpertStore:
    """An empty store with the plan's slots; the caller fills and closes it."""
    tier = _host_tier(parts, plan)
    fallback = _fallback_copy(parts, plan)
    with ExitStack() as on_error:
        links: list[Link] = []
        if not plan.gpus:
            store: CpuExpertStore | GpuExpertStore = CpuExpertStore(tier, prefetch=prefetch, routers=routers, fallback=fallback)
        else:
            cores = usable_threads() // len(machine.gpus)
            for device, gpu in zip(parts.devices, machine.gpus, strict=True):
                links.append(on_error.enter_context(closing(parts.link(device, copy_threads(gpu.link, cores)))))
            gpus = [
                GpuExperts(
                    device,
                    device_plan.layers,
                    tier,
                    link,
                    name=device_plan.device,
                    slots=device_plan.slots,
                    policies=_policies(parts, device_plan.slots, range(*device_plan.layers), under_gpus=False),
                    miss_policy=miss_policy,
                    rates=parts.rates(machine.host_bandwidth, gpu.link),
                    fallback=fallback,
                    fallback_slots=device_plan.fallback_slots,
                )
                for device, link, device_plan, gpu in zip(parts.devices, links, plan.gpus, machine.gpus, strict=True)
                if device_plan.n_slots
            ]
            store = GpuExpertStore(gpus, tier, links=links, prefetch=prefetch, routers=routers, fallback=fallback)
        on_error.pop_all()
    # For a store that is dropped without being closed: its waiting threads have no reference to it, and end once it is collected.
    weakref.finalize(store, _close_all, [*links, parts.reader, *([] if parts.fallback is None else [parts.fallback[1]])]).atexit = False
    return store


def _host_tier(parts: StoreParts, plan: Placement) -> HostTier:
    kinds = parts.catalog.kinds
    # If all experts fit onto GPUs, they still pass through one slot of host memory.
    slots = {kind: max(1, plan.host.slots.get(kind, 0)) for kind in dict.fromkeys(kinds)}
    policies = _policies(parts, slots, range(len(kinds)), under_gpus=bool(plan.gpus))
    return HostTier(parts.catalog, parts.reader, slots=slots, policies=policies, memory=parts.memory)


def _fallback_copy(parts: StoreParts, plan: Placement) -> FallbackCopy | None:
    if parts.fallback is None:
        return None
    catalog, reader = parts.fallback
    slots = plan.host.fallback_slots  # for all of its experts, so the policy never evicts
    policies: dict[ExpertKind, CachePolicy] = {kind: Lru(len(catalog.kinds), catalog.n_experts) for kind in slots}
    return FallbackCopy(HostTier(catalog, reader, slots=slots, policies=policies, memory=parts.memory), parts.upgrade)


def _policies(parts: StoreParts, slots: Mapping[ExpertKind, int], layers: range, *, under_gpus: bool) -> dict[ExpertKind, CachePolicy]:
    """A policy for the slots of each kind."""
    kinds = parts.catalog.kinds
    return {kind: parts.policy([layer for layer in layers if kinds[layer] == kind], under_gpus) for kind in slots}


def _close_all(threads: Sequence[Link | Reader]) -> None:
    """Close links and readers from a new thread: the garbage collector may run where their locks are held."""

    def close() -> None:
        for owner in threads:
            owner.close()

    threading.Thread(target=close, name="expert-end", daemon=True).start()
