"""Cache policies: which expert is evicted when all slots are taken.

To add a policy: write a subclass of `CachePolicy` here, enter it in the table `POLICIES` below, and add its name to `CachePolicyName` in
`planning/policy_names.py`. The command line, `Budget`, the simulator and its plots take it from there.

A policy gives every expert a priority; the cache (`cache.py`) evicts the evictable expert of the lowest priority. Policies number the
experts: expert `e` of layer `l` is `l * E + e`.

Dimension letters: `L` layers, `E` experts of each layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from dbrx_q.errors import RequestError
from dbrx_q.planning.policy_names import CachePolicyName

__all__ = ["POLICIES", "Belady", "CachePolicy", "LeastStale", "LfuDecay", "Lru", "StaticPinning", "make_policy"]


class CachePolicy(ABC):
    """Is told of every use of an expert, and gives every expert's priority on request.

    Args:
        layers: L.
        experts: E.
        profile: how often each expert was used in a recorded trace, [L, E]; None without one. Only some policies read it.
    """

    def __init__(self, layers: int, experts: int, profile: np.ndarray | None = None) -> None:
        self.layers, self.experts = layers, experts

    def enter(self, layer: int) -> None:  # noqa: B027 # most policies ignore it
        """A forward pass reaches a layer. A layer that does not follow the last one begins the next forward pass."""

    @abstractmethod
    def use(self, key: int) -> None:
        """The layer that was entered last uses the expert number `key`."""

    @abstractmethod
    def priority(self) -> np.ndarray:
        """float64 [L * E]: the cached expert of the lowest priority is evicted first; of equal ones, the lowest number."""


class Lru(CachePolicy):
    """Evicts the least recently used expert."""

    def __init__(self, layers: int, experts: int, profile: np.ndarray | None = None) -> None:
        super().__init__(layers, experts)
        self._last = np.zeros(layers * experts)
        self._now = 0

    def use(self, key: int) -> None:
        self._now += 1
        self._last[key] = self._now

    def priority(self) -> np.ndarray:
        return self._last


class LfuDecay(CachePolicy):
    """Evicts the least frequently used expert; the weight of a use halves every `half_life` forward passes."""

    def __init__(self, layers: int, experts: int, profile: np.ndarray | None = None, *, half_life: float = 64.0) -> None:
        super().__init__(layers, experts)
        self._counts = np.zeros(layers * experts)
        self._decay = 0.5 ** (1 / half_life)
        self._layer = -1

    def enter(self, layer: int) -> None:
        if layer <= self._layer:
            self._counts *= self._decay
        self._layer = layer

    def use(self, key: int) -> None:
        self._counts[key] += 1

    def priority(self) -> np.ndarray:
        return self._counts


class LeastStale(CachePolicy):
    """Evicts the expert that has been unused for the most passes of its layer; of equal ones, the one whose layer is reached last.

    After Hoang et al. 2026, SpecMD (arXiv 2602.03921): layers run in a fixed order, so an expert of a layer that has just run cannot be
    used for a whole forward pass, however recent its last use.
    """

    def __init__(self, layers: int, experts: int, profile: np.ndarray | None = None) -> None:
        super().__init__(layers, experts)
        self._entered = np.zeros(layers)  # how often each layer was entered
        self._last_used = np.full((layers, experts), -1.0)  # the value of `_entered` at an expert's last use
        self._layers_ahead: np.ndarray = np.zeros(layers)  # how many layers run until each one is entered again

    def enter(self, layer: int) -> None:
        self._entered[layer] += 1
        self._layers_ahead = (np.arange(self.layers) - layer - 1) % self.layers + 1.0

    def use(self, key: int) -> None:
        layer, expert = divmod(key, self.experts)
        self._last_used[layer, expert] = self._entered[layer]

    def priority(self) -> np.ndarray:
        staleness = self._entered[:, None] - self._last_used  # [L, E]
        return (-staleness * (self.layers + 1) - self._layers_ahead[:, None]).ravel()


class StaticPinning(CachePolicy):
    """Never evicts the most used experts of a profile; all others share the last slot.

    Raises:
        RequestError: without a profile, or if it is not [L, E].
    """

    def __init__(self, layers: int, experts: int, profile: np.ndarray | None = None) -> None:
        super().__init__(layers, experts)
        if profile is None:
            raise RequestError("the policy 'static' pins what a profile used most; found no profile. Record one with `dbrx-q trace`")
        if profile.shape != (layers, experts):
            raise RequestError(f"a profile must count the uses of {layers} x {experts} experts; found {profile.shape}")
        self._profile = profile.astype(np.float64).ravel()

    def use(self, key: int) -> None:
        pass

    def priority(self) -> np.ndarray:
        return self._profile


POLICIES: dict[CachePolicyName, type[CachePolicy]] = {
    CachePolicyName.lru: Lru,
    CachePolicyName.lfu: LfuDecay,
    CachePolicyName.least_stale: LeastStale,
    CachePolicyName.static: StaticPinning,
}
"""The policies that a user can choose."""


def make_policy(name: str, layers: int, experts: int, profile: np.ndarray | None = None) -> CachePolicy:
    """A policy by its name, such as "lru".

    Raises:
        RequestError: an unknown name, or "static" without a profile.
    """
    names = [policy.value for policy in CachePolicyName]
    if name not in names:
        raise RequestError(f"a cache policy must be one of {', '.join(names)}; found {name!r}")
    return POLICIES[CachePolicyName(name)](layers, experts, profile)


class Belady(CachePolicy):
    """Evicts the expert whose next use is farthest away: the optimum, which must know the future (Belady 1966). For simulations only.

    Args:
        layers: L.
        experts: E.
        visits: (layer, the experts that it uses) of all that will run, in order.
    """

    def __init__(self, layers: int, experts: int, visits: Sequence[tuple[int, Sequence[int]]]) -> None:
        super().__init__(layers, experts)
        self._uses: list[list[int]] = [[] for _ in range(layers * experts)]  # for each expert the times of its uses, the next one last
        for time, (layer, used) in reversed(list(enumerate(visits))):
            for expert in used:
                self._uses[layer * experts + expert].append(time)
        self._next = np.array([-float(times[-1]) if times else -np.inf for times in self._uses])
        self._now = -1

    def enter(self, layer: int) -> None:
        self._now += 1

    def use(self, key: int) -> None:
        times = self._uses[key]
        while times and times[-1] <= self._now:
            times.pop()
        self._next[key] = -float(times[-1]) if times else -np.inf

    def priority(self) -> np.ndarray:
        return self._next
