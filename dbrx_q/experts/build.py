"""The store that a plan calls for: made here for a model and for a simulation alike."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch

from dbrx_q.planning.expert_kinds import ExpertKind
from dbrx_q.planning.machine import Machine, Placement
from dbrx_q.planning.policy_names import MissPolicy

from .cpu_store import CpuExpertStore
from .gpu_experts import GpuExperts
from .gpu_store import GpuExpertStore
from .host_tier import HOST, ExpertPlaces, HostTier, Reader
from .link import Link
from .policies import CachePolicy, Lru
from .split import MissRates
from .tiered_store import FallbackCopy, NextRouter

__all__ = ["Parts", "build_store"]


@dataclass(frozen=True)
class Parts:
    """What a store is made of.

    places: of all experts. reader: brings them from disk. devices: of the GPUs. link: makes the way to one. memory: where host slots lie.
    policy: gives one for the slots that the experts of these layers share, under GPUs or not. rates: of misses, by the link's bandwidth.
    fallback: places and reader of a fallback copy, where the plan has one. upgrade: as of `FallbackCopy`.
    """

    places: ExpertPlaces
    reader: Reader
    devices: Sequence[torch.device]
    link: Callable[[torch.device], Link]
    policy: Callable[[Sequence[int], bool], CachePolicy]
    rates: Callable[[float, float], MissRates] = MissRates
    memory: torch.device = HOST
    fallback: tuple[ExpertPlaces, Reader] | None = None
    upgrade: bool = True


def build_store(
    parts: Parts,
    plan: Placement,
    machine: Machine,
    *,
    prefetch: bool,
    miss_policy: MissPolicy,
    routers: Sequence[NextRouter] | None = None,
) -> CpuExpertStore | GpuExpertStore:
    """An empty store with the plan's slots; the caller fills and closes it."""
    kinds = parts.places.kinds

    def policies(slots: Mapping[ExpertKind, int], layers: range, *, under: bool) -> dict[ExpertKind, CachePolicy]:
        return {kind: parts.policy([layer for layer in layers if kinds[layer] == kind], under) for kind in slots}

    # Where all experts fit onto GPUs, one at a time passes through host memory all the same.
    room = {kind: max(1, plan.host.slots.get(kind, 0)) for kind in dict.fromkeys(kinds)}
    every = policies(room, range(len(kinds)), under=bool(plan.gpus))
    tier = HostTier(parts.places, parts.reader, slots=room, policies=every, memory=parts.memory)
    fallback = None
    if parts.fallback is not None:
        places, reader = parts.fallback
        L, E = len(kinds), places.n_experts
        whole = HostTier(
            places,
            reader,
            slots=plan.host.fallback_slots,
            policies={kind: Lru(L, E) for kind in plan.host.fallback_slots},
            memory=parts.memory,
        )
        fallback = FallbackCopy(whole, parts.upgrade)
    with ExitStack() as failed:
        if not plan.gpus:
            store: CpuExpertStore | GpuExpertStore = CpuExpertStore(tier, prefetch=prefetch, routers=routers, fallback=fallback)
            links: list[Link] = []
        else:
            links = [failed.enter_context(closing(parts.link(device))) for device in parts.devices]
            gpus = [
                GpuExperts(
                    device,
                    there.layers,
                    tier,
                    link,
                    name=there.device,
                    slots=there.slots,
                    policies=policies(there.slots, range(*there.layers), under=False),
                    miss_policy=miss_policy,
                    rates=parts.rates(machine.host_bandwidth, spec.link),
                    fallback=fallback,
                    fallback_slots=there.fallback_slots,
                )
                for device, link, there, spec in zip(parts.devices, links, plan.gpus, machine.gpus, strict=True)
                if there.n_slots
            ]
            store = GpuExpertStore(gpus, tier, links=links, prefetch=prefetch, routers=routers, fallback=fallback)
        failed.pop_all()
    # A store that nobody closed: threads that wait hold no memory of it, and end when it is gone.
    weakref.finalize(store, _end, [*links, parts.reader, *([] if parts.fallback is None else [parts.fallback[1]])]).atexit = False
    return store


def _end(threads: Sequence[Link | Reader]) -> None:
    """End them from a thread of its own: the garbage collector comes anywhere, also where their locks are held."""

    def close() -> None:
        for one in threads:
            one.close()

    threading.Thread(target=close, name="expert-end", daemon=True).start()
