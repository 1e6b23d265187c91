"""The store that a plan calls for: made here for a model and for a simulation alike."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch

from dbrx_q.planning.expert_kinds import ExpertKind
from dbrx_q.planning.machine import Placement, Rig
from dbrx_q.planning.offloading import MissPolicy

from .cpu_store import HostExpertStore
from .gpu_experts import CardExperts
from .gpu_store import CardExpertStore
from .host_tier import HOST, ExpertPlaces, HostTier, Reader
from .link import Link
from .policies import CachePolicy, Lru
from .split import MissRates
from .tiered_store import LowBitCopy, NextRouter

__all__ = ["Parts", "build_store"]


@dataclass(frozen=True)
class Parts:
    """What a store is made of.

    places: of all experts. reader: brings them from disk. devices: of the cards. link: makes the way to one. memory: where host slots lie.
    policy: gives one for the slots that the experts of these layers share, under cards or not. rates: of misses, by the link's bandwidth.
    low_bit: places and reader of a low-bit copy, where the plan has one. upgrade: as of `LowBitCopy`.
    """

    places: ExpertPlaces
    reader: Reader
    devices: Sequence[torch.device]
    link: Callable[[torch.device], Link]
    policy: Callable[[Sequence[int], bool], CachePolicy]
    rates: Callable[[float, float], MissRates] = MissRates
    memory: torch.device = HOST
    low_bit: tuple[ExpertPlaces, Reader] | None = None
    upgrade: bool = True


def build_store(
    parts: Parts,
    plan: Placement,
    rig: Rig,
    *,
    prefetch: bool,
    miss_policy: MissPolicy,
    routers: Sequence[NextRouter] | None = None,
) -> HostExpertStore | CardExpertStore:
    """An empty store with the plan's slots; the caller fills and closes it."""
    kinds = parts.places.kinds

    def policies(slots: Mapping[ExpertKind, int], layers: range, *, under: bool) -> dict[ExpertKind, CachePolicy]:
        return {kind: parts.policy([layer for layer in layers if kinds[layer] == kind], under) for kind in slots}

    # Where all experts fit onto cards, one at a time passes through host memory all the same.
    room = {kind: max(1, plan.host.slots.get(kind, 0)) for kind in dict.fromkeys(kinds)}
    every = policies(room, range(len(kinds)), under=bool(plan.cards))
    tier = HostTier(parts.places, parts.reader, slots=room, policies=every, memory=parts.memory)
    low_bit = None
    if parts.low_bit is not None:
        places, reader = parts.low_bit
        L, E = len(kinds), places.n_experts
        whole = HostTier(
            places,
            reader,
            slots=plan.host.low_bit_slots,
            policies={kind: Lru(L, E) for kind in plan.host.low_bit_slots},
            memory=parts.memory,
        )
        low_bit = LowBitCopy(whole, parts.upgrade)
    with ExitStack() as failed:
        if not plan.cards:
            store: HostExpertStore | CardExpertStore = HostExpertStore(tier, prefetch=prefetch, routers=routers, low_bit=low_bit)
            links: list[Link] = []
        else:
            links = [failed.enter_context(closing(parts.link(device))) for device in parts.devices]
            cards = [
                CardExperts(
                    device,
                    there.layers,
                    tier,
                    link,
                    name=there.device,
                    slots=there.slots,
                    policies=policies(there.slots, range(*there.layers), under=False),
                    miss_policy=miss_policy,
                    rates=parts.rates(rig.host_bandwidth, spec.link),
                    low_bit=low_bit,
                    low_bit_slots=there.low_bit_slots,
                )
                for device, link, there, spec in zip(parts.devices, links, plan.cards, rig.cards, strict=True)
                if there.n_slots
            ]
            store = CardExpertStore(cards, tier, links=links, prefetch=prefetch, routers=routers, low_bit=low_bit)
        failed.pop_all()
    # A store that nobody closed: threads that wait hold no memory of it, and end when it is gone.
    weakref.finalize(store, _end, [*links, parts.reader, *([] if parts.low_bit is None else [parts.low_bit[1]])]).atexit = False
    return store


def _end(threads: Sequence[Link | Reader]) -> None:
    """End them from a thread of its own: the garbage collector comes anywhere, also where their locks are held."""

    def close() -> None:
        for one in threads:
            one.close()

    threading.Thread(target=close, name="expert-end", daemon=True).start()
