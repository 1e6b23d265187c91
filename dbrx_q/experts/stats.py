"""Counters of an expert store."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from dbrx_q.planning.sizes import format_size

__all__ = ["CacheStats", "ExpertStats", "LinkStats"]


@dataclass(frozen=True)
class CacheStats:
    """What a cache of experts was asked for. A request is one expert of one layer in one forward pass, however many tokens chose it.

    hits: requests for an expert that was there. prefetch_hits: for one that was there, or on its way, since it was predicted. misses: all
    others. prefetches: experts brought, or begun to be, because they were predicted. evictions: experts that gave their slot to another.
    """

    hits: int = 0
    prefetch_hits: int = 0
    misses: int = 0
    prefetches: int = 0
    evictions: int = 0

    @property
    def requests(self) -> int:
        """Hits and misses."""
        return self.hits + self.prefetch_hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of requests that needed no load of their own; 1 without requests."""
        return 1 - self.misses / self.requests if self.requests else 1.0

    def __add__(self, other: CacheStats) -> CacheStats:
        return CacheStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: CacheStats) -> CacheStats:
        return CacheStats(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class LinkStats:
    """What travelled from host memory to one GPU, as the plan names it. nbytes: of experts. seconds: in which the link was busy."""

    gpu: str
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ExpertStats:
    """What an expert store did; times in seconds.

    cache: of the memory that computes. predicted, predictable: of the requests for which there were guesses, how many had been guessed,
    followed or not, and how many there were. disk_bytes: read from disk. compute_seconds: in the products of experts. wait_seconds: in
    which products waited for bytes. read_seconds: in which at least one read was under way. fallback_hits: misses that a fallback copy
    answered.

    Of GPUs. host: of the host's memory under them. on_cpu: misses that the CPU computed. links: the way to each GPU that has slots.
    """

    cache: CacheStats = CacheStats()
    predicted: int = 0
    predictable: int = 0
    disk_bytes: int = 0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    read_seconds: float = 0.0
    host: CacheStats = CacheStats()
    on_cpu: int = 0
    links: tuple[LinkStats, ...] = ()
    fallback_hits: int = 0

    @property
    def link_bytes(self) -> int:
        """Bytes that travelled to all GPUs."""
        return sum(link.nbytes for link in self.links)

    @property
    def link_seconds(self) -> float:
        """Seconds in which links were busy, together."""
        return sum(link.seconds for link in self.links)

    @property
    def fallback_share(self) -> float:
        """Share of requests that a fallback copy answered; 0 without requests."""
        return self.fallback_hits / self.cache.requests if self.cache.requests else 0.0

    @property
    def prefetch_accuracy(self) -> float:
        """Share of requests that the router of their layer foresaw from the input of the layer before; 0 without any."""
        return self.predicted / self.predictable if self.predictable else 0.0

    def __add__(self, other: ExpertStats) -> ExpertStats:
        return self._combined(other, operator.add)

    def __sub__(self, other: ExpertStats) -> ExpertStats:
        return self._combined(other, operator.sub)

    def _combined(self, other: ExpertStats, how: Callable[[Any, Any], Any]) -> ExpertStats:
        pairs = [({link.gpu: link for link in stats.links}) for stats in (self, other)]
        links = []
        for gpu in dict.fromkeys([*pairs[0], *pairs[1]]):
            a, b = (pair.get(gpu, LinkStats(gpu)) for pair in pairs)
            links.append(LinkStats(gpu, how(a.nbytes, b.nbytes), how(a.seconds, b.seconds)))
        return ExpertStats(links=tuple(links), **{name: how(getattr(self, name), getattr(other, name)) for name in _ADDED})

    def as_dict(self) -> dict[str, Any]:
        """Every counter and rate by name; `links` is a list of a dictionary for each."""
        rates = {
            "requests": self.cache.requests,
            "hit_rate": self.cache.hit_rate,
            "prefetch_accuracy": self.prefetch_accuracy,
            "fallback_share": self.fallback_share,
        }
        others = {name: value for name, value in asdict(self).items() if name not in ("cache", "host", "links")}
        links = {"link_bytes": self.link_bytes, "link_seconds": self.link_seconds, "links": [asdict(link) for link in self.links]}
        return asdict(self.cache) | rates | others | links | {f"host_{name}": value for name, value in asdict(self.host).items()}

    def lines(self) -> list[str]:
        """The same for people."""
        cache = self.cache
        if not cache.requests:
            return ["experts: all at hand"]
        rate = f", {format_size(self.disk_bytes / self.read_seconds)}/s while reading" if self.read_seconds else ""
        found = []
        if self.fallback_hits:
            found.append(f"fallback copy: answered {self.fallback_hits} misses, {self.fallback_share:.1%} of all requests")
        if self.host.requests:
            found.append(f"misses: {self.on_cpu} computed by the CPU, the others copied")
            for link in self.links:
                speed = f", {format_size(link.nbytes / link.seconds)}/s in {link.seconds:.2f} s of copying" if link.seconds else ""
                found.append(f"link to {link.gpu}: {format_size(link.nbytes)} copied{speed}")
            found += [
                f"host memory: {self.host.requests} requests, {self.host.hit_rate:.1%} hits, {self.host.evictions} evictions",
            ]
        return [
            f"experts: {cache.requests} requests, {cache.hit_rate:.1%} hits ({cache.prefetch_hits} by prefetch), {cache.misses} misses, "
            f"{cache.evictions} evictions",
            f"prefetch: {cache.prefetches} experts fetched early; {self.prefetch_accuracy:.1%} of what was needed was predicted",
            *found,
            f"disk: {format_size(self.disk_bytes)} read{rate}",
            f"time: {self.compute_seconds:.2f} s in products of experts, {self.wait_seconds:.2f} s waiting for them, "
            f"{self.read_seconds:.2f} s in which the disk was read",
        ]


_ADDED = tuple(f.name for f in fields(ExpertStats) if f.name != "links")
