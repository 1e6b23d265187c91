"""The cache of experts against a model of it, and its policies."""

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
    some = st.lists(st.integers(0, E - 1), unique=True, max_size=E)
    return [(layer, sorted(draw(some)), draw(some) if layer + 1 < L else []) for _ in range(draw(st.integers(1, 6))) for layer in range(L)]


def policies(visits: Sequence[Visit]) -> list[CachePolicy]:
    profile = np.arange(L * E).reshape(L, E)[:, ::-1]
    return [Lru(L, E), LfuDecay(L, E), LeastStale(L, E), StaticPinning(L, E, profile), Belady(L, E, [visit[:2] for visit in visits])]


@settings(max_examples=200, deadline=None)
@given(requests(), st.integers(1, L * E), st.booleans())
def test_what_is_computed_lies_in_a_slot_of_its_own(visits: list[Visit], slots: int, prefetch: bool) -> None:
    """Every policy, against a model that knows only what was assigned."""
    for policy in policies(visits):
        cache = ExpertCache(slots, policy)
        lies: dict[int, tuple[int, int]] = {}  # by slot
        hits = misses = fetched = 0
        for layer, needed, predicted in visits:
            there = {place for place in lies.values() if place[0] == layer}
            computed: list[int] = []
            for step in serve(cache, layer, needed, predicted if prefetch else (), cache):
                if isinstance(step, Assignment):
                    assert 0 <= step.slot < slots
                    assert lies.get(step.slot) == step.evicted
                    assert (step.layer, step.expert) not in lies.values()
                    if step.evicted is not None and step.evicted[0] == layer:
                        assert step.evicted[1] not in set(needed) - set(computed), "it is still needed"
                    lies[step.slot] = step.layer, step.expert
                    fetched += not step.urgent
                    assert step.layer == (layer if step.urgent else layer + 1)
                    continue
                for expert in step.experts:
                    assert lies[cache.slot_of(layer, expert)] == (layer, expert)
                computed += step.experts
            assert sorted(computed) == needed
            hits += len(there & {(layer, e) for e in needed})
            misses += len({(layer, e) for e in needed} - there)
        stats = cache.stats
        assert (stats.hits + stats.prefetch_hits, stats.misses, stats.prefetches) == (hits, misses, fetched)
        assert {place: slot for slot, place in lies.items()} == {place: cache.slot_of(*place) for place in lies.values()}


@settings(max_examples=200, deadline=None)
@given(requests(), st.integers(1, L * E))
def test_lru_is_an_ordered_dictionary(visits: list[Visit], slots: int) -> None:
    cache, expected, hits = ExpertCache(slots, Lru(L, E)), OrderedDict[tuple[int, int], None](), 0
    for layer, needed, _ in visits:
        for _step in serve(cache, layer, needed):
            pass
        places = [(layer, e) for e in needed]
        present = [place for place in places if place in expected]
        hits += len(present)
        # What is there is used first; then each of the others comes, and none that is still to be computed goes.
        for place in places:
            if place in expected:
                expected.move_to_end(place)
        waiting, shielded = [place for place in places if place not in present], set(present)
        groups = [present, *[[place] for place in waiting]] if present else [[place] for place in waiting]
        used = {place: i for i, place in enumerate(places)}
        for group in groups:
            while waiting:
                if len(expected) >= slots:
                    order = sorted((p for p in expected if p not in shielded), key=lambda p: _age(p, expected, used))
                    if not order:
                        break
                    del expected[order[0]]
                expected[waiting[0]] = None
                shielded.add(waiting.pop(0))
            shielded -= set(group)
        for place in sorted((p for p in places if p in expected), key=lambda p: used[p]):
            expected.move_to_end(place)
    assert cache.stats.hits == hits
    assert {place for place in ((layer, e) for layer in range(L) for e in range(E)) if cache.slot_of(*place) >= 0} == set(expected)


def _age(place: tuple[int, int], held: OrderedDict[tuple[int, int], None], used: dict[tuple[int, int], int]) -> tuple[int, int]:
    """Used by this layer last, in the order of experts; before that in the order of the dictionary."""
    return (1, used[place]) if place in used else (0, list(held).index(place))


@settings(max_examples=200, deadline=None)
@given(requests(), st.integers(1, L * E))
def test_nothing_beats_belady_where_a_layer_needs_one_expert(visits: list[Visit], slots: int) -> None:
    """With one expert a visit nothing is ever shielded, and Belady's rule is the best that can be."""
    single = [(layer, needed[:1], predicted) for layer, needed, predicted in visits]

    def misses(policy: CachePolicy) -> int:
        cache = ExpertCache(slots, policy)
        for layer, needed, _ in single:
            for _step in serve(cache, layer, needed):
                pass
        return cache.stats.misses

    found = [misses(policy) for policy in policies(single)]
    assert found[-1] == min(found)


def evicted_by(policy: CachePolicy, uses: Sequence[tuple[int, Sequence[int]]], layer: int, expert: int) -> tuple[int, int] | None:
    """What goes when, in a full cache of what was used, `expert` of `layer` is needed."""
    cache = ExpertCache(len({(where, e) for where, experts in uses for e in experts}), policy)
    for where, experts in uses:
        for _ in serve(cache, where, experts):
            pass
    [step] = [step for step in serve(cache, layer, [expert]) if isinstance(step, Assignment)]
    return step.evicted


def test_what_each_policy_evicts() -> None:
    one_pass = [(0, [0]), (1, [1]), (2, [2])]
    assert evicted_by(Lru(L, E), one_pass, 0, 5) == (0, 0)
    # Layer 0 has just begun again: its own expert let this pass go by.
    assert evicted_by(LeastStale(L, E), one_pass, 0, 5) == (0, 0)
    # Of two that let one pass go by: layer 1 has just begun, layer 0 comes before it comes again.
    assert evicted_by(LeastStale(L, E), [*one_pass, (0, [3])], 1, 5) == (1, 1)
    # Older than either is what let two passes go by.
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


def test_a_prefetch_leaves_alone_what_is_needed_and_what_is_predicted() -> None:
    cache = ExpertCache(3, Lru(2, 4))
    for _ in serve(cache, 1, [0]):
        pass
    steps = list(serve(cache, 0, [0, 1], [0, 3, 2], cache))
    loads = [(step.layer, step.expert, step.evicted) for step in steps if isinstance(step, Assignment)]
    assert loads == [(0, 0, None), (0, 1, None)]  # no room for 3 and 2: two are needed now, one is predicted and here
    assert (cache.stats.prefetches, cache.stats.evictions) == (0, 0)


def test_what_is_lent_goes_first_and_what_is_dropped_leaves_its_slot() -> None:
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
    assert evicted == [(0, 2), (0, 3), (0, 0), (0, 1)]  # then the one that was not used for the longest time
    slot = cache.slot_of(1, 2)
    cache.drop(1, 2)
    assert (cache.slot_of(1, 2), cache.free_slot) == (-1, slot)


def test_a_layer_that_needs_nothing_still_looks_ahead() -> None:
    cache = ExpertCache(3, Lru(2, 4))
    steps = list(serve(cache, 0, [], [3, 2], cache))
    assert [(step.layer, step.expert, step.urgent) for step in steps if isinstance(step, Assignment)] == [(1, 3, False), (1, 2, False)]


def test_every_policy_name_has_a_class() -> None:
    assert list(POLICIES) == list(CachePolicyName)
    for name, policy_class in POLICIES.items():
        assert type(make_policy(name.value, L, E, np.zeros((L, E)))) is policy_class


def test_policies_that_cannot_be_made() -> None:
    with pytest.raises(RequestError, match="must be one of lru, lfu, least-stale, static; found 'fifo'"):
        make_policy("fifo", L, E)
    with pytest.raises(RequestError, match="found no profile"):
        make_policy("static", L, E)
    with pytest.raises(RequestError, match="3 x 6 experts"):
        make_policy("static", L, E, np.zeros((2, 6)))
