"""The experts of one card: a cache of them in its memory, host memory under it.

A layer's experts are served in this order: copies of missed ones begin, then of those that the next layer is foreseen to need, so that the
link has work; what lies on the card is computed there; the CPU computes its share of the missed ones where they lie; then what was copied
is computed, first what had been foreseen. Where there is a low-bit copy it takes the place of experts that lie on disk, and is computed and
copied like the others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from .cache import Assignment
from .link import Arrival, Link
from .policies import CachePolicy, Lru
from .slots import ExpertKind, first_slots
from .split import MissPolicy, MissRates, split_misses
from .stats import CacheStats
from .stock import Stock
from .sums import ExpertSum
from .tier import HostTier, Place, fill_order
from .tiered import LowBitCopy

__all__ = ["CardExperts"]


@dataclass(frozen=True)
class _Batch:
    """Experts of a layer that one stock serves: those on the card, those on their way there since they were foreseen, those that the CPU
    computes, and the copies of the others, None for one that has not begun."""

    stock: Stock
    present: list[int]
    coming: dict[int, Arrival]
    on_cpu: list[int]
    copies: dict[int, Arrival | None]

    @property
    def missed(self) -> list[int]:
        """Those that are not on the card, in ascending order."""
        return sorted([*self.on_cpu, *self.copies])

    def all_begun(self, index: int) -> bool:
        """Whether nothing of the layer, `index`, waits for the disk, or for a slot."""
        return None not in self.copies.values() and all(self.stock.tier.has(index, e) for e in self.on_cpu)


class CardExperts:
    """The experts of one card's layers.

    Args:
        device: the card.
        layers: (first, end) of the layers that it computes.
        tier: host memory under it.
        link: the way there; closed with the card.
        name: as the plan calls the card.
        slots, policies: of each kind of its layers' experts.
        miss_policy: how missed experts are served.
        rates: of the CPU and of the link, which the split follows.
        low_bit: answers for what lies on disk.
        low_bit_slots: of each kind of its experts, for copies of them on the card.
    """

    def __init__(
        self,
        device: torch.device,
        layers: tuple[int, int],
        tier: HostTier,
        link: Link,
        *,
        name: str,
        slots: Mapping[ExpertKind, int],
        policies: Mapping[ExpertKind, CachePolicy],
        miss_policy: MissPolicy,
        rates: MissRates,
        low_bit: LowBitCopy | None = None,
        low_bit_slots: Mapping[ExpertKind, int] = MappingProxyType({}),
    ) -> None:
        self.device, self.layers, self.link, self.name = device, layers, link, name
        self._tier, self._miss_policy, self.rates = tier, miss_policy, rates
        self._full = Stock(device, tier, slots, policies)
        self._low_bit: Stock | None = None
        self._upgrade = False
        if low_bit is not None:
            L, E = tier.n_layers, tier.n_experts
            self._low_bit = Stock(device, low_bit.tier, low_bit_slots, {kind: Lru(L, E) for kind in low_bit_slots})
            self._upgrade = low_bit.upgrade
        self._coming: dict[Place, Arrival] = {}  # copies that were begun because they were foreseen, and not used yet
        tier.before_reuse.append(self._let_leave)
        self._seen = 0, 0.0  # bytes and seconds of the link that the rates know
        self.on_cpu = self.degraded = 0
        self.compute_seconds = self.wait_seconds = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(stock.nbytes for stock in self._stocks)

    @property
    def _stocks(self) -> list[Stock]:
        return [self._full] if self._low_bit is None else [self._full, self._low_bit]

    @property
    def stats(self) -> CacheStats:
        """Counters of the slots for experts at their full bits."""
        return sum((cache.stats for _, cache in self._full.pools.values()), CacheStats())

    def holds(self) -> list[Place]:
        """Every (layer, expert) that has a slot."""
        found = np.any([cache.held for _, cache in self._full.pools.values()], axis=0)
        return [divmod(int(key), self._tier.n_experts) for key in np.flatnonzero(found)]

    def keep_what_is_nowhere_else(self) -> None:
        """Evict from now on only what lies in host memory, too."""
        for _, cache in self._full.pools.values():
            cache.kept_elsewhere = self._tier.held

    def choose(self, worth: np.ndarray | None) -> list[tuple[Assignment, ExpertKind]]:
        """Slots for the likeliest experts; the last ones stay free for what is copied first."""
        order = [place for place in fill_order(self._tier.n_layers, self._tier.n_experts, worth) if self._own(place[0])]
        found = []
        for kind, (slots, cache) in self._full.pools.items():
            own = [place for place in order if self._tier.kind(place[0]) == kind]
            found += [(assignment, kind) for assignment in cache.fill(own[: first_slots(slots.count, len(own))])]
        return found

    def put(self, assignment: Assignment, kind: ExpertKind, sources: Sequence[torch.Tensor]) -> Arrival:
        """Copy an expert into its slot."""
        return self._put(self._full, assignment, kind, sources)

    def await_copy(self, arrival: Arrival) -> None:
        """Let what the card computes from now on see a copy."""
        started = time.perf_counter()
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                arrival.wait()
        else:
            arrival.wait()
        self.wait_seconds += time.perf_counter() - started

    def serve(self, index: int, total: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        """Add the experts that layer `index` needs to the sum; copy some of the next layer's, which is this card's, meanwhile."""
        try:
            self._serve(index, total, needed, ahead)
        except BaseException:
            self.forget()
            raise

    def free_slot(self, layer: int) -> int | None:
        """A slot for the experts of a layer that nobody lies in; None where all are taken."""
        return self._full.cache(layer).free_slot

    def slot_views(self, layer: int, slot: int) -> list[torch.Tensor]:
        """The memory of a slot for the experts of a layer."""
        return self._full.slots(layer).views(slot)

    def forget(self) -> None:
        """After an error nothing is believed to lie on the card: it comes again."""
        for arrival in self._coming.values():
            self.link.abandon(arrival)
        self._coming.clear()
        self.link.settle()
        for stock in self._stocks:
            for _, cache in stock.pools.values():
                cache.keep_only(())

    def close(self) -> None:
        """End the link's thread."""
        self.link.close()

    def _serve(self, index: int, total: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        degraded = self._on_disk(index, needed)
        batches = [self._begin(self._full, index, total, [e for e in needed if e not in set(degraded)])]
        if self._low_bit is not None and degraded:
            batches.append(self._begin(self._low_bit, index, total, degraded))
        for batch in batches:
            self._on_card(total, batch.stock, index, batch.present)
        if all(batch.all_begun(index) for batch in batches):
            self._fetch_ahead(index + 1, ahead)
        absent = [e for e in ahead if self._full.cache(index + 1).slot_of(index + 1, e) < 0]
        for batch in batches:
            self._finish(batch, index, total, absent if self._low_bit is None else [])
        if degraded:
            self._full.cache(index).bypass(index, degraded)
            self._tier.pass_over(index, degraded, upgrade=self._upgrade)
            self.degraded += len(degraded)
        self._fetch_ahead(index + 1, ahead)  # what found no slot while this layer's were needed
        sent_bytes, busy = self.link.bytes_copied, self.link.busy_seconds
        self.rates.saw(link_bytes=sent_bytes - self._seen[0], link_seconds=busy - self._seen[1])
        self._seen = sent_bytes, busy

    def _on_disk(self, index: int, needed: Sequence[int]) -> list[int]:
        """Which of these experts the low-bit copy answers for."""
        if self._low_bit is None:
            return []
        cache = self._full.cache(index)
        return [e for e in needed if cache.slot_of(index, e) < 0 and not self._tier.ready(index, e)]

    def _begin(self, stock: Stock, index: int, total: ExpertSum, needed: Sequence[int]) -> _Batch:
        """Decide how a stock serves the experts of a layer, and begin the copies that can begin."""
        kind, cache = stock.tier.kind(index), stock.cache(index)
        missed = {e: total.counts[e] for e in needed if cache.slot_of(index, e) < 0}
        coming = self._not_landed(index, needed) if stock is self._full else {}
        late = {e: total.counts[e] for e in coming if stock.tier.has(index, e)}
        on_cpu, copied = split_misses(missed, kind.nbytes, self.rates, self._miss_policy, late)
        present, _ = cache.visit(index, [e for e in needed if e not in set(on_cpu)])
        cache.bypass(index, on_cpu)
        for e, arrival in coming.items():
            (self.link.defer if e in set(on_cpu) else self.link.hurry)(arrival)
        coming = {e: arrival for e, arrival in coming.items() if e not in set(on_cpu)}
        # Those that host memory does not hold begin when they have come from disk.
        copies = {e: self._copy(stock, index, e) if stock.tier.has(index, e) else None for e in copied}
        return _Batch(stock, [e for e in present if e not in coming], coming, on_cpu, copies)

    def _finish(self, batch: _Batch, index: int, total: ExpertSum, ahead: Sequence[int]) -> None:
        """Add a batch's experts that are not on the card yet; those of `ahead` come from disk into host memory meanwhile."""
        stock, going = batch.stock, dict(batch.coming)
        with closing(stock.tier.serve(index, batch.missed, ahead)) as groups:
            for experts in groups:
                self._on_host(total, stock, index, [e for e in experts if e in set(batch.on_cpu)])
                going |= {e: arrival for e in experts if (arrival := batch.copies.get(e)) is not None}
                for e in [e for e in experts if e in batch.copies and e not in going]:
                    while (arrival := self._copy(stock, index, e)) is None and going:  # a slot is free when another copy was computed
                        self._arrive(total, stock, index, going)
                    if arrival is None:
                        self._on_host(total, stock, index, [e])
                    else:
                        going[e] = arrival
                while going:
                    self._arrive(total, stock, index, going)
        while going:  # where nothing was missed
            self._arrive(total, stock, index, going)

    def _on_host(self, total: ExpertSum, stock: Stock, index: int, experts: Sequence[int]) -> None:
        """Let the CPU compute experts where they lie in host memory."""
        if not experts:
            return
        tier = stock.tier
        started = time.perf_counter()
        total.add_host(tier.slots(index).weights, {e: tier.slot_of(index, e) for e in experts})
        seconds = time.perf_counter() - started
        self.compute_seconds += seconds
        self.on_cpu += len(experts)
        if all(total.counts[e] == 1 for e in experts):
            self.rates.saw(cpu_bytes=len(experts) * tier.kind(index).nbytes, cpu_seconds=seconds)

    def _arrive(self, total: ExpertSum, stock: Stock, index: int, going: dict[int, Arrival]) -> None:
        """Compute the expert whose copy was begun first."""
        expert = next(iter(going))
        self.await_copy(going[expert])
        self._on_card(total, stock, index, [expert])
        del going[expert]
        if stock is self._full:
            self._coming.pop((index, expert), None)

    def _copy(self, stock: Stock, index: int, expert: int) -> Arrival | None:
        """Begin to copy an expert of host memory; None where no slot can be had."""
        assignment = stock.cache(index).assign(index, expert)
        if assignment is None:
            return None
        if stock is self._full:
            self._give_up(assignment.evicted)
        sources = stock.tier.slots(index).views(stock.tier.slot_of(index, expert))
        return self._put(stock, assignment, stock.tier.kind(index), sources)

    def _put(self, stock: Stock, assignment: Assignment, kind: ExpertKind, sources: Sequence[torch.Tensor]) -> Arrival:
        after = stock.used.get((kind, assignment.slot))
        return self.link.copy(sources, stock.pools[kind][0].views(assignment.slot), after=after, urgent=assignment.urgent)

    def _on_card(self, total: ExpertSum, stock: Stock, index: int, experts: Sequence[int]) -> None:
        """Compute experts whose bytes are in their slots, or are certain to be there when the card gets to it."""
        if not experts:
            return
        slots, cache = stock.slots(index), stock.cache(index)
        where = {e: cache.slot_of(index, e) for e in experts}
        started = time.perf_counter()
        total.add_card(slots.weights, where)
        self.compute_seconds += time.perf_counter() - started
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            stock.used |= {(slots.kind, slot): event for slot in where.values()}
        cache.served(index, experts)

    def _fetch_ahead(self, layer: int, experts: list[int]) -> None:
        """Begin to copy what the next layer is foreseen to need and host memory holds."""
        if not experts:
            return
        cache, kind = self._full.cache(layer), self._tier.kind(layer)
        here = [e for e in experts if cache.slot_of(layer, e) < 0 and self._tier.has(layer, e)]
        for assignment in cache.prefetch(layer, here):
            self._give_up(assignment.evicted)
            sources = self._tier.slots(layer).views(self._tier.slot_of(layer, assignment.expert))
            self._coming[layer, assignment.expert] = self.put(assignment, kind, sources)

    def _not_landed(self, layer: int, needed: Sequence[int]) -> dict[int, Arrival]:
        """The copies of these experts that were foreseen and are still on their way; those of others come after them."""
        for (where, e), arrival in self._coming.items():
            if where == layer and e not in set(needed):
                self.link.defer(arrival)
        found = {e: self._coming[layer, e] for e in needed if (layer, e) in self._coming}
        for e in [e for e, arrival in found.items() if arrival.done]:
            self.await_copy(found.pop(e))
            del self._coming[layer, e]
        return found

    def _let_leave(self, place: Place) -> None:
        """Return when no copy of an expert is read from host memory any more."""
        if (arrival := self._coming.get(place)) is not None:
            self.link.hurry(arrival)
            arrival.settle()

    def _give_up(self, place: Place | None) -> None:
        """What was copied ahead and is evicted before it was used must not be on its way when its slot is written again."""
        if place is not None and (arrival := self._coming.pop(place, None)) is not None:
            self.link.abandon(arrival)

    def _own(self, layer: int) -> bool:
        return self.layers[0] <= layer < self.layers[1]
