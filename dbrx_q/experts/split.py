"""Which of the missed experts the CPU computes where they lie, and which travel to the GPU.

With m experts of b bytes missed, k of them on the CPU, both ends take max(k b / cpu, (m - k) b / link) seconds; the k for which that is
least is taken. Few tokens cost the CPU one read of an expert; more cost it products, while the link carries the same bytes for any number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dbrx_q.planning.policy_names import MissPolicy

__all__ = ["MissRates", "split_misses"]

# Tokens of an expert that the CPU multiplies in one read of it: from 5 on a chip with a matrix unit is faster
# another way (see `kernels/cpu/linear.py`).
_TOKENS_A_READ = 4
_NEWEST = 0.1  # weight of the last measurement


@dataclass
class MissRates:
    """Bytes/s of experts: cpu, that the CPU computes with; link, that travel to the GPU; both while the other is busy, since both read
    the same memory."""

    cpu: float
    link: float

    def saw(self, *, cpu_bytes: float = 0, cpu_seconds: float = 0, link_bytes: float = 0, link_seconds: float = 0) -> None:
        """Correct the rates by what a piece of work took; zeros say nothing."""
        if cpu_bytes and cpu_seconds:
            self.cpu += _NEWEST * (cpu_bytes / cpu_seconds - self.cpu)
        if link_bytes and link_seconds:
            self.link += _NEWEST * (link_bytes / link_seconds - self.link)

    def cpu_seconds(self, nbytes: int, tokens: int) -> float:
        """That the CPU takes for an expert with so many tokens."""
        return nbytes / self.cpu * reads(tokens)


def reads(tokens: int) -> int:
    """How many reads of an expert the CPU's products with so many tokens are worth."""
    return max(1, -(-tokens // _TOKENS_A_READ))


def split_misses(
    missed: Mapping[int, int],
    nbytes: int,
    rates: MissRates,
    policy: MissPolicy,
    coming: Mapping[int, tuple[int, int]] = MappingProxyType({}),
    first: int = 0,
) -> tuple[list[int], list[int]]:
    """(experts that the CPU computes, experts whose copy is to begin).

    Args:
        missed: tokens of every missed expert.
        nbytes: of one expert.
        rates: of both ways.
        policy: one way for all, or the split whose slower half ends first; the copy of a few more among equals, since what is copied stays.
        coming: (tokens, bytes that have not left yet) of experts that are on their way already, the next to arrive first. "hybrid" lets the
            CPU compute those of them, too, that it has done before they come.
        first: bytes that the link sends before all that.
    """
    if policy is MissPolicy.cpu:
        return sorted(missed), []
    if policy is MissPolicy.copy:
        return [], sorted(missed)
    # The CPU takes those with the fewest tokens, and what is on its way last of all, from behind.
    order = [*sorted(missed, key=lambda e: (missed[e], e)), *list(coming)[::-1]]
    work = {e: (tokens, nbytes) for e, tokens in missed.items()} | dict(coming)
    sent, computed = sum(left for _, left in work.values()), 0.0
    best, least = 0, (first + sent) / rates.link
    for k, expert in enumerate(order, 1):
        tokens, left = work[expert]
        computed, sent = computed + rates.cpu_seconds(nbytes, tokens), sent - left
        slower = max(computed, (first + sent) / rates.link if sent else 0.0)
        if slower < least:
            best, least = k, slower
    return sorted(order[:best]), sorted(e for e in order[best:] if e in missed)
