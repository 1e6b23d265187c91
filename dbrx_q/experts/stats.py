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
    """Counters of a cache of experts.

    A request is one expert of one layer in one forward pass, however many tokens chose it.
    """

    hits: int = 0
    """Requests for an expert that had a slot and was not prefetched since its last use."""
    prefetch_hits: int = 0
    """Requests for an expert that was prefetched, whether it had arrived or not."""
    misses: int = 0
    """All other requests."""
    prefetches: int = 0
    """Experts whose load was started because they were predicted."""
    evictions: int = 0
    """Experts that lost their slot to another one."""

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
    """Counters of the link from host memory to one GPU."""

    gpu: str
    """The GPU's name in the plan, such as "cuda:0"."""
    nbytes: int = 0
    """Bytes of experts that were copied."""
    seconds: float = 0.0
    """Time in which the link was busy."""


@dataclass(frozen=True)
class ExpertStats:
    """Counters of an expert store; times in seconds."""

    cache: CacheStats = CacheStats()
    """Of the memory of the devices that compute."""
    predicted: int = 0
    """Requests that had been predicted, whether or not the expert was prefetched."""
    predictable: int = 0
    """Requests of layers for which there was a prediction."""
    disk_bytes: int = 0
    """Bytes read from disk."""
    compute_seconds: float = 0.0
    """Time in products of experts."""
    wait_seconds: float = 0.0
    """Time for which products waited for bytes."""
    read_seconds: float = 0.0
    """Time in which at least one read from disk was under way."""
    host: CacheStats = CacheStats()
    """Of host memory under GPUs; zeros without GPUs."""
    computed_on_cpu: int = 0
    """Misses of GPUs that the CPU computed."""
    links: tuple[LinkStats, ...] = ()
    """Of every GPU that has slots."""
    fallback_hits: int = 0
    """Misses that a fallback copy served."""

    @property
    def link_bytes(self) -> int:
        """Bytes copied to all GPUs."""
        return sum(link.nbytes for link in self.links)

    @property
    def link_seconds(self) -> float:
        """Time in which links were busy, summed over links."""
        return sum(link.seconds for link in self.links)

    @property
    def fallback_share(self) -> float:
        """Share of requests that a fallback copy served; 0 without requests."""
        return self.fallback_hits / self.cache.requests if self.cache.requests else 0.0

    @property
    def prefetch_accuracy(self) -> float:
        """Share of requests that the router of their layer predicted from the input of the layer before; 0 without predictions."""
        return self.predicted / self.predictable if self.predictable else 0.0

    def __add__(self, other: ExpertStats) -> ExpertStats:
        return self._combined(other, operator.add)

    def __sub__(self, other: ExpertStats) -> ExpertStats:
        return self._combined(other, operator.sub)

    def _combined(self, other: ExpertStats, operation: Callable[[Any, Any], Any]) -> ExpertStats:
        by_gpu = [({link.gpu: link for link in stats.links}) for stats in (self, other)]
        links = []
        for gpu in dict.fromkeys([*by_gpu[0], *by_gpu[1]]):
            a, b = (links_of.get(gpu, LinkStats(gpu)) for links_of in by_gpu)
            links.append(LinkStats(gpu, operation(a.nbytes, b.nbytes), operation(a.seconds, b.seconds)))
        return ExpertStats(links=tuple(links), **{name: operation(getattr(self, name), getattr(other, name)) for name in _ADDED})

    def as_dict(self) -> dict[str, Any]:
        """Every counter and rate by name, as JSON output has them; `links` is a list of dictionaries."""
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
        """The same as readable text, one line each."""
        cache = self.cache
        if not cache.requests:
            return ["experts: all in the memory of the device that computes"]
        rate = f", {format_size(self.disk_bytes / self.read_seconds)}/s while reading" if self.read_seconds else ""
        details = []
        if self.fallback_hits:
            details.append(f"fallback copy: served {self.fallback_hits} misses, {self.fallback_share:.1%} of all requests")
        if self.host.requests:
            details.append(f"misses: {self.computed_on_cpu} computed by the CPU, the others copied")
            for link in self.links:
                speed = f", {format_size(link.nbytes / link.seconds)}/s in {link.seconds:.2f} s of copying" if link.seconds else ""
                details.append(f"link to {link.gpu}: {format_size(link.nbytes)} copied{speed}")
            details.append(f"host memory: {self.host.requests} requests, {self.host.hit_rate:.1%} hits, {self.host.evictions} evictions")
        return [
            f"experts: {cache.requests} requests, {cache.hit_rate:.1%} hits ({cache.prefetch_hits} by prefetch), {cache.misses} misses, "
            f"{cache.evictions} evictions",
            f"prefetch: {cache.prefetches} experts prefetched; {self.prefetch_accuracy:.1%} of what was needed was predicted",
            *details,
            f"disk: {format_size(self.disk_bytes)} read{rate}",
            f"time: {self.compute_seconds:.2f} s in products of experts, {self.wait_seconds:.2f} s waiting for experts, "
            f"{self.read_seconds:.2f} s in which the disk was read",
        ]


_ADDED = tuple(f.name for f in fields(ExpertStats) if f.name != "links")
