"""The names of the cache policies and miss policies: the choices of `--policy`, `--miss-policy`, and `Budget`.

To add a cache policy, add its name to `CachePolicyName` and its class to `experts/policies.py`; the command line, the simulator and the
error messages follow. This module imports nothing heavy, because the command line reads it for every `--help`.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["DEFAULT_POLICY", "CachePolicyName", "MissPolicy"]


class CachePolicyName(str, Enum):
    """Which expert is evicted when a cache is full; the class of each is in `experts/policies.py`."""

    lru = "lru"
    lfu = "lfu"
    least_stale = "least-stale"
    static = "static"


DEFAULT_POLICY = CachePolicyName.least_stale


class MissPolicy(str, Enum):
    """How an expert that is not in its GPU's cache is served; `experts/split.py` decides for each miss."""

    hybrid = "hybrid"
    """Some misses by the CPU and some by a copy, so that both finish at the same time."""
    cpu = "cpu"
    """The CPU computes the expert from host memory."""
    copy = "copy"
    """The expert is copied into the GPU's cache and computed there."""
