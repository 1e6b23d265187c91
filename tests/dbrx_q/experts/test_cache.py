"""The cache of experts, compared with simple models of it, and its policies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_q.errors import RequestError
from dbrx_q.experts.cache import Assignment, ExpertCache, serve
from dbrx_q.experts.policies import POLICIES, Belady, CachePolicy, LeastStale, LfuDecay, Lru, StaticPinning, make_policy
from dbrx_q.planning.policy_names import CachePolicyName

L, E = 3, 6

Visit = tuple[int, list[int], list[int]]
"""A layer, the experts that it needs, and those that the next is predicted to need."""


@st.composite
def requests(draw: st.DrawFn) -> list[Visit]:
    """Forward passes over all layers, with any number of experts in each."""
    expert_lists = st.lists(st.integers(0, E - 1), unique=True, max_size=E)
    return [
        (layer, sorted(draw(expert_lists)), draw(expert_lists) if layer + 1 < L else [])
        for _ in range(draw(st.integers(1, 6)))
        for layer in range(L)
    ]


def policies(visits: Sequence[Visit]) -> list[CachePolicy]:
    profile = np.arange(L * E).reshape(L, E)[:, ::-1]
    return [Lru(L, E), LfuDecay(L, E), LeastStale(L, E), StaticPinning(L, E, profile), Belady(L, E, [visit[:2] for visit in visits])]


@settings(max_examples=200, deadline=None)
@given(requests(), st.integers(1, L * E), st.booleans())
def test_every_computed_expert_has_a_slot_of_its_own(visits: list[Visit], slots: int, prefetch: bool) -> None:
    """With every policy, compared with a dictionary that is updated by assignments only."""
    for policy in policies(visits):
        cache = ExpertCache(slots, policy)
        contents: dict[int, tuple[int, int]] = {}  # by slot
        hits = misses = fetched = 0
        for layer, needed, predicted in visits:
            in_cache = {expert_id for expert_id in contents.values() if expert_id[0] == layer}
            computed: list[int] = []
            for step in serve(cache, layer, needed, predicted if prefetch else (), cache):
                if isinstance(step, Assignment):
                    assert 0 <= step.slot < slots
                    assert contents.get(step.slot) == step.evicted
                    assert (step.layer, step.expert) not in contents.values()
                    if step.evicted is not None and step.evicted[0] == layer:
                        assert step.evicted[1] not in set(needed) - set(computed), "it is still needed"
                    contents[step.slot] = step.layer, step.expert
                    fetched += not step.urgent
                    assert step.layer == (layer if step.urgent else layer + 1)
                    continue
                for expert in step.experts:
                    assert contents[cache.slot_of(layer, expert)] == (layer, expert)
                computed += step.experts
            assert sorted(computed) == needed
            hits += len(in_cache & {(layer, e) for e in needed})
            misses += len({(layer, e) for e in needed} - in_cache)
        stats = cache.stats
        assert (stats.hits + stats.prefetch_hits, stats.misses, stats.prefetches) == (hits, misses, fetched)
        assert {expert_id: slot for slot, expert_id in contents.items()} == {
            expert_id: cache.slot_of(*expert_id) for expert_id in contents.values()
        }


@settings(max_examples=200, deadline=None)
@given(requests(), st.integers(1, L * E))
def test_lru_is_an_ordered_dictionary(visits: list[Visit], slots: int) -> None:
    cache, expected, hits = ExpertCache(slots, Lru(L, E)), OrderedDict[tuple[int, int], None](), 0
    for layer, needed, _ in visits:
        for _step in serve(cache, layer, needed):
            pass
        expert_ids = [(layer, e) for e in needed]
        present = [expert_id for expert_id in expert_ids if expert_id in expected]
        hits += len(present)
        # Hits are used first; then each missed expert is loaded, and none that is still to be computed is evicted.
        for expert_id in expert_ids:
            if expert_id in expected:
                expected.move_to_end(expert_id)
        waiting, protected = [expert_id for expert_id in expert_ids if expert_id not in present], set(present)
        groups = [present, *[[expert_id] for expert_id in waiting]] if present else [[expert_id] for expert_id in waiting]
        used = {expert_id: i for i, expert_id in enumerate(expert_ids)}
        for group in groups:
            while waiting:
                if len(expected) >= slots:
                    order = sorted((p for p in expected if p not in protected), key=lambda p: _age(p, expected, used))
                    if not order:
                        break
                    del expected[order[0]]
                expected[waiting[0]] = None
                protected.add(waiting.pop(0))
            protected -= set(group)
        for expert_id in sorted((p for p in expert_ids if p in expected), key=lambda p: used[p]):
            expected.move_to_end(expert_id)
    assert cache.stats.hits == hits
    assert {expert_id for expert_id in ((layer, e) for layer in range(L) for e in range(E)) if cache.slot_of(*expert_id) >= 0} == set(
        expected
    )


def _age(place: tuple[int, int], held: OrderedDict[tuple[int, int], None], used: dict[tuple[int, int], int]) -> tuple[int, int]:
    """Experts that this layer uses are the youngest, in their own order; the others are in the order of the dictionary."""
    return (1, used[place]) if place in used else (0, list(held).index(place))


@settings(max_examples=200, deadline=None)
@given(requests(), st.integers(1, L * E))
def test_nothing_beats_belady_where_a_layer_needs_one_expert(visits: list[Visit], slots: int) -> None:
    """With one expert in each layer nothing is ever protected from eviction, and Belady's rule is optimal."""
    single = [(layer, needed[:1], predicted) for layer, needed, predicted in visits]

    def misses(policy: CachePolicy) -> int:
        cache = ExpertCache(slots, policy)
        for layer, needed, _ in single:
            for _step in serve(cache, layer, needed):
                pass
        return cache.stats.misses

    misses_by_policy = [misses(policy) for policy in policies(single)]
    assert misses_by_policy[-1] == min(misses_by_policy)


def evicted_by(policy: CachePolicy, uses: Sequence[tuple[int, Sequence[int]]], layer: int, expert: int) -> tuple[int, int] | None:
    """What a cache filled by `uses` evicts for `expert` of `layer`."""
    cache = ExpertCache(len({(used_layer, e) for used_layer, experts in uses for e in experts}), policy)
    for used_layer, experts in uses:
        for _ in serve(cache, used_layer, experts):
            pass
    [step] = [step for step in serve(cache, layer, [expert]) if isinstance(step, Assignment)]
    return step.evicted


def test_each_policy_evicts_by_its_rule() -> None:
    one_pass = [(0, [0]), (1, [1]), (2, [2])]
    assert evicted_by(Lru(L, E), one_pass, 0, 5) == (0, 0)
    # Layer 0 has just been entered again, and its own expert was not used.
    assert evicted_by(LeastStale(L, E), one_pass, 0, 5) == (0, 0)
    # Both were unused for one pass; layer 1 has just been entered, so layer 0 is reached before it.
    assert evicted_by(LeastStale(L, E), [*one_pass, (0, [3])], 1, 5) == (1, 1)
    # An expert that was unused for two passes is staler than either.
    assert evicted_by(LeastStale(L, E), [*one_pass, (0, [0]), (1, [3]), (2, [2]), (0, [0])], 1, 5) == (1, 1)
    assert evicted_by(LfuDecay(L, E), [*one_pass, (0, [0]), (1, [1])], 2, 5) == (2, 2)
    profile = np.zeros((L, E))
    profile[1, 1], profile[0, 0] = 3, 2
    assert evicted_by(StaticPinning(L, E, profile), one_pass, 0, 5) == (2, 2)


def test_a_use_counts_half_after_its_half_life() -> None:
    policy = LfuDecay(1, 2, half_life=1.0)
    for experts in ([0], [0], [1], [1]):
        policy.enter(0)
        for expert in experts:
            policy.use(expert)
    assert policy.priority().tolist() == [0.25 + 0.125, 1.5]


def test_a_prefetch_evicts_neither_needed_nor_predicted_experts() -> None:
    cache = ExpertCache(3, Lru(2, 4))
    for _ in serve(cache, 1, [0]):
        pass
    steps = list(serve(cache, 0, [0, 1], [0, 3, 2], cache))
    loads = [(step.layer, step.expert, step.evicted) for step in steps if isinstance(step, Assignment)]
    assert loads == [(0, 0, None), (0, 1, None)]  # no slot for 3 and 2: two are needed now, one is predicted and in the cache
    assert (cache.stats.prefetches, cache.stats.evictions) == (0, 0)


def test_evict_first_comes_before_the_policy_and_drop_frees_a_slot() -> None:
    cache = ExpertCache(4, Lru(2, 4))
    for e in range(4):
        for _ in serve(cache, 0, [e]):
            pass
    evict_first = np.zeros(8, bool)
    evict_first[[2, 3]] = True
    cache.evict_first = lambda: evict_first
    evicted = []
    for e in range(4):
        [step] = [step for step in serve(cache, 1, [e]) if isinstance(step, Assignment)]
        evicted.append(step.evicted)
    assert evicted == [(0, 2), (0, 3), (0, 0), (0, 1)]  # then the least recently used
    slot = cache.slot_of(1, 2)
    cache.drop(1, 2)
    assert (cache.slot_of(1, 2), cache.free_slot) == (-1, slot)


def test_a_layer_that_needs_no_expert_still_prefetches() -> None:
    cache = ExpertCache(3, Lru(2, 4))
    steps = list(serve(cache, 0, [], [3, 2], cache))
    assert [(step.layer, step.expert, step.urgent) for step in steps if isinstance(step, Assignment)] == [(1, 3, False), (1, 2, False)]


def test_every_policy_name_has_a_class() -> None:
    assert list(POLICIES) == list(CachePolicyName)
    for name, policy_class in POLICIES.items():
        assert type(make_policy(name.value, L, E, np.zeros((L, E)))) is policy_class


def test_unknown_policies_and_missing_profiles_are_refused() -> None:
    with pytest.raises(RequestError, match="must be one of lru, lfu, least-stale, static; found 'fifo'"):
        make_policy("fifo", L, E)
    with pytest.raises(RequestError, match="found no profile"):
        make_policy("static", L, E)
    with pytest.raises(RequestError, match="3 x 6 experts"):
        make_policy("static", L, E, np.zeros((2, 6)))
