"""The expert store of cards: a cache of experts on each, host memory under them, disk under that."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch

from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.expert_weights import ExpertWeights

from .cache import Assignment
from .gpu_experts import CardExperts
from .host_tier import HostTier
from .link import Link
from .stats import CacheStats, ExpertStats, LinkStats
from .sums import ExpertSum
from .tiered_store import LowBitCopy, NextRouter, TieredExpertStore

__all__ = ["CardExpertStore"]


class CardExpertStore(TieredExpertStore):
    """Experts of a model whose layers are split over cards.

    Args:
        cards: in the order of their layers.
        links: all that were made for them; closed with the store.
        tier, prefetch, routers, low_bit: as of `TieredExpertStore`.
    """

    def __init__(
        self,
        cards: Sequence[CardExperts],
        tier: HostTier,
        *,
        links: Sequence[Link],
        prefetch: bool,
        routers: Sequence[NextRouter] | None = None,
        low_bit: LowBitCopy | None = None,
    ) -> None:
        super().__init__(tier, prefetch=prefetch, routers=routers, low_bit=low_bit)
        self.cards, self._links = tuple(cards), tuple(links)

    def fill(self, worth: np.ndarray | None = None) -> None:
        """Bring the likeliest experts onto the cards, then the others into host memory.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        chosen = [(card, assignment) for card in self.cards for assignment in card.choose(worth)]
        held = [(assignment.layer, assignment.expert) for _, assignment in chosen]
        stays = set(self.tier.first(worth, held))
        for card, assignment in chosen:
            place = assignment.layer, assignment.expert
            if place not in stays:  # it passes through
                with closing(self.tier.serve(place[0], [place[1]])) as groups:
                    for _ in groups:
                        self._bring(card, assignment)
        self.tier.forget()
        self.tier.fill(worth, last=held)
        for card, assignment in chosen:
            if (assignment.layer, assignment.expert) in stays:
                self._bring(card, assignment)
        self._fill_low_bit()
        here = self.tier.held()
        if here.all():
            return
        if (here | self._on_cards()).all() or self.low_bit is not None:  # what a card gave up would come from disk, or be degraded
            for card in self.cards:
                card.keep_what_is_nowhere_else()
        else:  # memory for the most experts: what lies on a card need not lie here, too
            self.tier.prefer_to_evict(self._on_cards)

    def _bring(self, card: CardExperts, assignment: Assignment) -> None:
        slot = self.tier.slot_of(assignment.layer, assignment.expert)
        card.bring(assignment, self.tier.slots(assignment.layer).views(slot))

    def _on_cards(self) -> np.ndarray:
        """bool [L * E]: experts that a card holds, but for those that are still wanted here, to be copied."""
        found = np.any([cache.held for card in self.cards for cache in card.caches], axis=0)
        for layer, expert in (place for card in self.cards for place in card.coming):
            found[layer * self.tier.n_experts + expert] = False
        return found

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
            links=tuple(LinkStats(card.name, card.link.bytes_copied, card.link.busy_seconds) for card in self.cards),
            degraded=sum(card.degraded for card in self.cards),
        )

    def close(self) -> None:
        for link in self._links:
            link.close()
        super().close()

    def _serve(self, index: int, total: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        try:
            self._card(index).serve(index, total, needed, ahead)
        except BaseException:
            for card in self.cards:  # host memory that is free now may still be read by another's copies
                card.link.settle()
            raise

    def _follows(self, index: int) -> bool:
        return index + 1 < self._card(index).layers[1]

    def _card(self, layer: int) -> CardExperts:
        return next(card for card in self.cards if card.layers[0] <= layer < card.layers[1])
