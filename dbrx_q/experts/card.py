"""The expert store of cards: a cache of experts on each, host memory under them, disk under that.

A layer's experts are served in this order: copies of missed ones begin; what lies on the card is computed there; the CPU computes its
share of the missed ones where they lie; then what was copied. What the next layer is foreseen to need is copied meanwhile. Where there is a
low-bit copy it takes the place of experts that lie on disk, and is computed and copied like the others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from ..errors import RequestError
from ..kernels.moe import ExpertWeights
from .cache import Assignment
from .link import Arrival, Link
from .policies import CachePolicy, Lru
from .slots import ExpertKind, first_slots
from .split import MissPolicy, MissRates, split_misses
from .stats import CacheStats, ExpertStats
from .stock import Stock
from .sums import ExpertSum
from .tier import HostTier, Place, fill_order
from .tiered import LowBitCopy, NextRouter, TieredExpertStore

__all__ = ["CardExpertStore", "CardExperts"]


@dataclass(frozen=True)
class _Batch:
    """Experts of a layer that one stock serves: those on the card, those that the CPU computes, and the copies of the others, None for
    one that has not begun."""

    stock: Stock
    present: list[int]
    on_cpu: list[int]
    copies: dict[int, Arrival | None]

    @property
    def missed(self) -> list[int]:
        """Those that are not on the card, in ascending order."""
        return sorted([*self.on_cpu, *self.copies])


class CardExperts:
    """The experts of one card's layers.

    Args:
        device: the card.
        layers: (first, end) of the layers that it computes.
        tier: host memory under it.
        link: the way there; closed with the card.
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
        slots: Mapping[ExpertKind, int],
        policies: Mapping[ExpertKind, CachePolicy],
        miss_policy: MissPolicy,
        rates: MissRates,
        low_bit: LowBitCopy | None = None,
        low_bit_slots: Mapping[ExpertKind, int] = MappingProxyType({}),
    ) -> None:
        self.device, self.layers, self.link = device, layers, link
        self._tier, self._miss_policy, self.rates = tier, miss_policy, rates
        self._full = Stock(device, tier, slots, policies)
        self._low_bit: Stock | None = None
        self._upgrade = False
        if low_bit is not None:
            L, E = tier.n_layers, tier.n_experts
            self._low_bit = Stock(device, low_bit.tier, low_bit_slots, {kind: Lru(L, E) for kind in low_bit_slots})
            self._upgrade = low_bit.upgrade
        self._coming: dict[Place, Arrival] = {}  # copies of what was foreseen
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
            self._forget()
            raise

    def free_slot(self, layer: int) -> int | None:
        """A slot for the experts of a layer that nobody lies in; None where all are taken."""
        return self._full.cache(layer).free_slot

    def slot_views(self, layer: int, slot: int) -> list[torch.Tensor]:
        """The memory of a slot for the experts of a layer."""
        return self._full.slots(layer).views(slot)

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
        absent = [e for e in ahead if self._full.cache(index + 1).slot_of(index + 1, e) < 0]
        for batch in batches:
            self._finish(batch, index, total, absent if self._low_bit is None else [])
        if degraded:
            self._full.cache(index).bypass(index, degraded)
            self._tier.pass_over(index, degraded, upgrade=self._upgrade)
            self.degraded += len(degraded)
        self._fetch_ahead(index + 1, absent)
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
        on_cpu, copied = split_misses(missed, kind.nbytes, self.rates, self._miss_policy)
        present, _ = cache.visit(index, [e for e in needed if e not in set(on_cpu)])
        cache.bypass(index, on_cpu)
        if stock is self._full:
            self._land(index)
        # Those that host memory does not hold begin when they have come from disk.
        copies = {e: self._copy(stock, index, e) if stock.tier.has(index, e) else None for e in copied}
        return _Batch(stock, present, on_cpu, copies)

    def _finish(self, batch: _Batch, index: int, total: ExpertSum, ahead: Sequence[int]) -> None:
        """Add a batch's experts that are not on the card yet; those of `ahead` come from disk into host memory meanwhile."""
        stock = batch.stock
        with closing(stock.tier.serve(index, batch.missed, ahead)) as groups:
            for experts in groups:
                self._on_host(total, stock, index, [e for e in experts if e in set(batch.on_cpu)])
                going = {e: arrival for e in experts if (arrival := batch.copies.get(e)) is not None}
                for e in [e for e in experts if e in batch.copies and e not in going]:
                    while (arrival := self._copy(stock, index, e)) is None and going:  # a slot is free when another copy was computed
                        self._arrive(total, stock, index, going)
                    if arrival is None:
                        self._on_host(total, stock, index, [e])
                    else:
                        going[e] = arrival
                while going:
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

    def _copy(self, stock: Stock, index: int, expert: int) -> Arrival | None:
        """Begin to copy an expert of host memory; None where no slot can be had."""
        assignment = stock.cache(index).assign(index, expert)
        if assignment is None:
            return None
        if stock is self._full:
            self._drop_coming(assignment)
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
        """Copy what the next layer is foreseen to need and host memory holds; it stays there until it has left."""
        here = [e for e in experts if self._tier.has(layer, e)]
        if not here:
            return
        kind = self._tier.kind(layer)
        for assignment in self._full.cache(layer).prefetch(layer, here):
            self._drop_coming(assignment)
            self._tier.pin(layer, assignment.expert, pinned=True)
            sources = self._tier.slots(layer).views(self._tier.slot_of(layer, assignment.expert))
            self._coming[layer, assignment.expert] = self.put(assignment, kind, sources)

    def _land(self, layer: int) -> None:
        """Let the layer see what was copied ahead for it, needed or not."""
        for place in [place for place in self._coming if place[0] == layer]:
            arrival = self._coming.pop(place)
            self.link.hurry(arrival)
            self.await_copy(arrival)
            self._tier.pin(*place, pinned=False)

    def _drop_coming(self, assignment: Assignment) -> None:
        """What was copied ahead and is evicted before it was used must have landed before its slot is written again."""
        if assignment.evicted is not None and assignment.evicted in self._coming:
            self._coming.pop(assignment.evicted).settle()
            self._tier.pin(*assignment.evicted, pinned=False)

    def _forget(self) -> None:
        """After an error nothing is believed to lie on the card: it comes again."""
        for place, arrival in self._coming.items():
            arrival.settle()
            self._tier.pin(*place, pinned=False)
        self._coming.clear()
        self.link.settle()
        for stock in self._stocks:
            for _, cache in stock.pools.values():
                cache.keep_only(())

    def _own(self, layer: int) -> bool:
        return self.layers[0] <= layer < self.layers[1]


class CardExpertStore(TieredExpertStore):
    """Experts of a model whose layers are split over cards.

    Args:
        cards: in the order of their layers; closed with the store.
        tier, prefetch, routers, low_bit: as of `TieredExpertStore`.
    """

    def __init__(
        self,
        cards: Sequence[CardExperts],
        tier: HostTier,
        *,
        prefetch: bool,
        routers: Sequence[NextRouter] | None = None,
        low_bit: LowBitCopy | None = None,
    ) -> None:
        super().__init__(tier, prefetch=prefetch, routers=routers, low_bit=low_bit)
        self.cards = tuple(cards)

    def fill(self, worth: np.ndarray | None = None) -> None:
        """Bring the likeliest experts onto the cards, then the others into host memory.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        held = []
        for card in self.cards:
            arrivals = []
            for assignment, kind in card.choose(worth):
                place = assignment.layer, assignment.expert
                with closing(self.tier.serve(assignment.layer, [assignment.expert])) as groups:
                    for _ in groups:
                        sources = self.tier.slots(place[0]).views(self.tier.slot_of(*place))
                        arrival = card.put(assignment, kind, sources)
                        arrival.settle()
                        arrivals.append(arrival)
                held.append(place)
            for arrival in arrivals:
                card.await_copy(arrival)
        self.tier.forget()  # what passed through on its way to a card
        self.tier.fill(worth, last=held)
        self._fill_low_bit()
        here = self.tier.held()
        every = [(layer, e) for layer in range(self.tier.n_layers) for e in range(self.tier.n_experts)]
        once = all(here[layer * self.tier.n_experts + e] or (layer, e) in set(held) for layer, e in every)
        if once or self.low_bit is not None:  # what a card gave up would come from disk, or be degraded from then on
            for card in self.cards:
                card.keep_what_is_nowhere_else()

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        raise RequestError("this needs the experts of a layer in one memory; they lie on cards and in host memory. Leave --gpu out")

    def stats(self) -> ExpertStats:
        reader = self.tier.reader
        foreseen, foreseeable = self._guessed()
        return ExpertStats(
            cache=sum((card.stats for card in self.cards), CacheStats()),
            foreseen=foreseen,
            foreseeable=foreseeable,
            disk_bytes=reader.bytes_read,
            compute_seconds=sum(card.compute_seconds for card in self.cards),
            wait_seconds=sum(card.wait_seconds for card in self.cards) + self.tier.wait_seconds,
            read_seconds=reader.busy_seconds,
            host=self.tier.stats,
            on_cpu=sum(card.on_cpu for card in self.cards),
            link_bytes=sum(card.link.bytes_copied for card in self.cards),
            link_seconds=sum(card.link.busy_seconds for card in self.cards),
            degraded=sum(card.degraded for card in self.cards),
        )

    def close(self) -> None:
        for card in self.cards:
            card.close()
        super().close()

    def _serve(self, index: int, total: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        self._card(index).serve(index, total, needed, ahead)

    def _follows(self, index: int) -> bool:
        return index + 1 < self._card(index).layers[1]

    def _card(self, layer: int) -> CardExperts:
        return next(card for card in self.cards if card.layers[0] <= layer < card.layers[1])
