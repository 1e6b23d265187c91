"""Which expert gives its slot to another: one small interface, a policy each.

A policy gives every expert a worth, and of those that may go the least worthy does. Experts are numbered layer * E + expert.

Dimension letters: `L` layers, `E` experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from dbrx_q.errors import RequestError
from dbrx_q.planning.offloading import POLICIES

__all__ = ["Belady", "CachePolicy", "LeastStale", "LfuDecay", "Lru", "StaticPinning", "make_policy"]


class CachePolicy(ABC):
    """Told of every use; asked what each expert is worth.

    Args:
        layers: L.
        experts: E of each layer.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.experts = layers, experts

    def enter(self, layer: int) -> None:  # noqa: B027 # most policies don't look at it
        """A layer is reached by a forward pass; one that is not after the last begins the next pass."""

    @abstractmethod
    def use(self, key: int) -> None:
        """The layer that was entered last uses this expert."""

    @abstractmethod
    def priority(self) -> np.ndarray:
        """float64 [L * E]; of those that are held the one with the least is evicted first, the lower number among equals."""


class Lru(CachePolicy):
    """The one that was not used for the longest time goes."""

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._last = np.zeros(layers * experts)
        self._now = 0

    def use(self, key: int) -> None:
        self._now += 1
        self._last[key] = self._now

    def priority(self) -> np.ndarray:
        return self._last


class LfuDecay(CachePolicy):
    """The one that was used least often goes; a use counts half after `half_life` passes."""

    def __init__(self, layers: int, experts: int, half_life: float = 64.0) -> None:
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
    """The one that let the most passes of its layer go by unused goes; among equals the one whose layer comes last.

    After Hoang et al. 2026, SpecMD (arXiv 2602.03921): layers come in a fixed order, so an expert of a layer that has just gone by cannot
    be used for a whole pass, however recent its last use.
    """

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._chances = np.zeros(layers)  # how often a layer was entered
        self._last = np.full((layers, experts), -1.0)  # which of these an expert was used in
        self._ahead: np.ndarray = np.zeros(layers)  # how many layers until each is entered again

    def enter(self, layer: int) -> None:
        self._chances[layer] += 1
        self._ahead = (np.arange(self.layers) - layer - 1) % self.layers + 1.0

    def use(self, key: int) -> None:
        layer, expert = divmod(key, self.experts)
        self._last[layer, expert] = self._chances[layer]

    def priority(self) -> np.ndarray:
        stale = self._chances[:, None] - self._last  # [L, E]
        return (-stale * (self.layers + 1) - self._ahead[:, None]).ravel()


class StaticPinning(CachePolicy):
    """The experts that a profile used most never go; the others pass through the last slot.

    Args:
        layers, experts: L and E.
        profile: how often each expert was used, [L, E]; a larger number is worth more.
    """

    def __init__(self, layers: int, experts: int, profile: np.ndarray) -> None:
        super().__init__(layers, experts)
        if profile.shape != (layers, experts):
            raise RequestError(f"a profile must count the uses of {layers} x {experts} experts; found {profile.shape}")
        self._profile = profile.astype(np.float64).ravel()

    def use(self, key: int) -> None:
        pass

    def priority(self) -> np.ndarray:
        return self._profile


class Belady(CachePolicy):
    """The one whose next use is farthest goes: the best that any policy could do, which must know the future (Belady 1966).

    Args:
        layers, experts: L and E.
        visits: (layer, the experts that it uses) of everything that will come.
    """

    def __init__(self, layers: int, experts: int, visits: Sequence[tuple[int, Sequence[int]]]) -> None:
        super().__init__(layers, experts)
        self._uses: list[list[int]] = [[] for _ in range(layers * experts)]
        for at, (layer, used) in reversed(list(enumerate(visits))):
            for expert in used:
                self._uses[layer * experts + expert].append(at)
        self._next = np.array([-float(uses[-1]) if uses else -np.inf for uses in self._uses])
        self._now = -1

    def enter(self, layer: int) -> None:
        self._now += 1

    def use(self, key: int) -> None:
        uses = self._uses[key]
        while uses and uses[-1] <= self._now:
            uses.pop()
        self._next[key] = -float(uses[-1]) if uses else -np.inf

    def priority(self) -> np.ndarray:
        return self._next


def make_policy(name: str, layers: int, experts: int, profile: np.ndarray | None = None) -> CachePolicy:
    """A policy by its name.

    Raises:
        RequestError: an unknown name, or "static" without a profile.
    """
    if name == "static":
        if profile is None:
            raise RequestError("the policy 'static' pins what a profile used most; found no profile. Record one with `dbrx-q trace`")
        return StaticPinning(layers, experts, profile)
    plain: dict[str, type[CachePolicy]] = {"lru": Lru, "lfu": LfuDecay, "least-stale": LeastStale}
    if name not in plain:
        raise RequestError(f"a cache policy must be one of {', '.join(POLICIES)}; found {name!r}")
    return plain[name](layers, experts)
