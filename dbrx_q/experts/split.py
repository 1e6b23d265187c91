"""Which missed experts the CPU computes from host memory, and which are copied to the GPU.

With m missed experts of b bytes, k of them computed by the CPU, CPU and link together take max(k b / cpu, (m - k) b / link) seconds; the
split uses the k of the shortest time. For few tokens the CPU's time is that of reading the expert once; for more it grows with the
products, while a copy takes the same time for any number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dbrx_q.planning.policy_names import MissPolicy

__all__ = ["MissRates", "split_misses"]

# Tokens that the CPU multiplies while it reads an expert once: from 5 on, another way is faster on a chip with a matrix unit (see
# `kernels/cpu/linear.py`).
_TOKENS_PER_READ = 4
_NEWEST_WEIGHT = 0.1  # of the last measurement in the running mean


@dataclass
class MissRates:
    """How fast missed experts are served, in bytes of experts per second.

    Both rates hold while the CPU and the link are busy at once, since both read host memory.
    """

    cpu: float
    """Experts that the CPU computes."""
    link: float
    """Experts that are copied to the GPU."""

    def observe(self, *, cpu_bytes: float = 0, cpu_seconds: float = 0, link_bytes: float = 0, link_seconds: float = 0) -> None:
        """Correct the rates by the measured time of some work; zeros are ignored."""
        if cpu_bytes and cpu_seconds:
            self.cpu += _NEWEST_WEIGHT * (cpu_bytes / cpu_seconds - self.cpu)
        if link_bytes and link_seconds:
            self.link += _NEWEST_WEIGHT * (link_bytes / link_seconds - self.link)

    def cpu_seconds(self, nbytes: int, tokens: int) -> float:
        """Seconds that the CPU takes for an expert of `nbytes` with so many tokens."""
        return nbytes / self.cpu * reads(tokens)


def reads(tokens: int) -> int:
    """How many times the CPU could read an expert in the time of its products with so many tokens."""
    return max(1, -(-tokens // _TOKENS_PER_READ))


def split_misses(
    missed: Mapping[int, int],
    nbytes: int,
    rates: MissRates,
    policy: MissPolicy,
    under_way: Mapping[int, tuple[int, int]] = MappingProxyType({}),
    queued_bytes: int = 0,
) -> tuple[list[int], list[int]]:
    """(experts that the CPU computes, experts whose copy is to be started), each in ascending order.

    Args:
        missed: number of tokens of every missed expert.
        nbytes: of one expert.
        rates: of the CPU and of the link.
        policy: the CPU or copies for all, or the fastest split. Among equally fast splits, the one with the most copies, because copied
            experts stay in the cache.
        under_way: (number of tokens, bytes not sent yet) of needed experts whose copy was started already, the next to arrive first.
            "hybrid" lets the CPU compute those, too, that it finishes before their copies would.
        queued_bytes: that the link sends before all these copies.
    """
    if policy is MissPolicy.cpu:
        return sorted(missed), []
    if policy is MissPolicy.copy:
        return [], sorted(missed)
    # The CPU takes experts with the fewest tokens first, and those whose copy was started last, the latest to arrive first.
    order = [*sorted(missed, key=lambda e: (missed[e], e)), *list(under_way)[::-1]]
    work = {e: (tokens, nbytes) for e, tokens in missed.items()} | dict(under_way)
    bytes_to_send, cpu_seconds = sum(unsent for _, unsent in work.values()), 0.0
    best_count, least_seconds = 0, (queued_bytes + bytes_to_send) / rates.link
    for count, expert in enumerate(order, 1):
        tokens, unsent = work[expert]
        cpu_seconds, bytes_to_send = cpu_seconds + rates.cpu_seconds(nbytes, tokens), bytes_to_send - unsent
        seconds = max(cpu_seconds, (queued_bytes + bytes_to_send) / rates.link if bytes_to_send else 0.0)
        if seconds < least_seconds:
            best_count, least_seconds = count, seconds
    return sorted(order[:best_count]), sorted(e for e in order[best_count:] if e in missed)
