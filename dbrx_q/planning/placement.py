"""Where a model's bytes lie: a plan from its configuration alone, which the loader follows. No weight is read, none need be downloaded.

Every card holds the attention and the experts of a contiguous range of layers, its own keys and values, and a cache of experts; the host
holds as many of the other experts as its budget allows, the disk the rest. Without a card the host is the device that computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.config import DbrxConfig

from .expert_kinds import ExpertKind
from .footprint import Footprint, Request
from .machine import Card, DevicePlan, Placement, Rig
from .offloading import PINNED_BYTES, SCRATCH_SLOTS, first_slots, staging_bytes
from .speed import expected_seconds

__all__ = ["place"]

# What it is worth, in time, that one card holds all of its experts and another none.
_SPREAD_WEIGHT = 0.3


def place(config: DbrxConfig, formats: Mapping[str, TensorFormat], rig: Rig, request: Request) -> Placement:
    """A plan for a model whose tensors are packed as `formats` says.

    It never fails: a plan that does not fit says by how much.
    """
    model = Footprint.of(config, formats, request)
    if not rig.cards:
        return _on_host(model, rig)
    layers, count = config.n_layers, len(rig.cards)
    if layers < count:  # the last cards stay empty
        return _on_cards(model, rig, [min(c + 1, layers) for c in range(count)])
    found: dict[tuple[int, ...], Placement] = {}

    def badness(ends: tuple[int, ...]) -> tuple[float, ...]:
        if ends not in found:
            found[ends] = _on_cards(model, rig, ends)
        return _badness(model, rig, found[ends])

    return found[_best_split(layers, rig.cards, badness)]


def _on_host(model: Footprint, rig: Rig) -> Placement:
    layers = len(model.kinds)
    dense = sum(model.dense) + model.embedding + model.head
    kv = layers * model.kv
    wanted = _every(model.kinds, model)
    workspace = model.host_workspace
    low_bit: Counter[ExpertKind] = Counter()
    room = None if rig.ram is None else rig.ram - dense - kv - workspace
    slots, short = _slots(wanted, room)
    if slots != wanted and room is not None:
        low_bit = _every(model.low_bit, model)
        staging = staging_bytes(wanted) + staging_bytes(low_bit)  # each is read by threads of its own
        slots, short = _slots(wanted, room - staging - _bytes(low_bit))
        workspace += staging
    host = DevicePlan(
        "cpu",
        rig.ram,
        (0, layers),
        dense=dense,
        experts=_bytes(slots),
        low_bit=_bytes(low_bit),
        kv_cache=kv,
        workspace=workspace,
        slots=slots,
        low_bit_slots=low_bit,
        dense_read=dense - model.embedding,
    )
    return _placement((), host, wanted, Counter(slots), short, "cpu")


def _on_cards(model: Footprint, rig: Rig, ends: Sequence[int]) -> Placement:
    """With layers ends[c - 1] .. ends[c] - 1 on card c, and a low-bit copy where experts are left on disk."""
    plan = _split(model, rig, ends, low_bit=False)
    return _split(model, rig, ends, low_bit=True) if plan.disk_experts and model.low_bit else plan


def _split(model: Footprint, rig: Rig, ends: Sequence[int], *, low_bit: bool) -> Placement:
    cards, short, worst = [], 0, ""
    held: Counter[ExpertKind] = Counter()
    wanted = _every(model.kinds, model)
    for c, (card, first, end) in enumerate(zip(rig.cards, (0, *ends), ends, strict=False)):
        dense = sum(model.dense[first:end])
        dense += model.embedding if c == 0 else 0
        dense += model.head if first < end == len(model.kinds) else 0  # with the last layer, also where cards stay empty
        kv = (end - first) * model.kv
        own = _every(model.kinds[first:end], model)
        passing = dict.fromkeys(model.low_bit[first:end] if low_bit else (), SCRATCH_SLOTS)
        slots, missing = _slots(own, card.memory - card.reserve - dense - kv - model.card_workspace - _bytes(passing))
        if missing > short:
            short, worst = missing, f"cuda:{c}"
        filled = Counter({kind: first_slots(count, own[kind]) for kind, count in slots.items()})
        held += filled
        cards.append(
            DevicePlan(
                f"cuda:{c}",
                card.memory,
                (first, end),
                dense=dense,
                experts=_bytes(slots),
                low_bit=_bytes(passing),
                kv_cache=kv,
                workspace=model.card_workspace,
                reserve=card.reserve,
                slots=slots,
                low_bit_slots=passing,
                dense_read=dense - (model.embedding if c == 0 else 0),
                scratch=sum(slots.values()) - sum(filled.values()),
            )
        )
    left = wanted - held
    whole = _every(model.low_bit if low_bit else (), model)
    workspace = model.helper_workspace if left else 0
    staging = len(cards) * PINNED_BYTES + staging_bytes(wanted) + staging_bytes(whole) if workspace else 0
    host_slots: dict[ExpertKind, int] = {}
    if left:  # of each kind one at least passes through; with room for more, cards may give up what lies here, too
        needed = {kind: max(1, left[kind]) for kind in wanted}
        room = _bytes(needed) if rig.ram is None else rig.ram - workspace - staging - _bytes(whole)
        host_slots, missing = _slots(wanted, room, needed)
        if missing > short:
            short, worst = missing, "cpu"
    host = DevicePlan(
        "cpu",
        rig.ram,
        (0, 0),
        experts=_bytes(host_slots),
        low_bit=_bytes(whole),
        workspace=workspace + staging,
        slots=host_slots,
        low_bit_slots=whole,
    )
    return _placement(tuple(cards), host, wanted, held + Counter(host_slots), short, worst)


def _every(kinds: Sequence[ExpertKind], model: Footprint) -> Counter[ExpertKind]:
    """How many experts of each kind the layers have whose experts are of these kinds."""
    return Counter({kind: count * model.n_experts for kind, count in Counter(kinds).items()})


def _placement(
    cards: tuple[DevicePlan, ...], host: DevicePlan, wanted: Counter[ExpertKind], held: Counter[ExpertKind], short: int, worst: str
) -> Placement:
    on_disk = (wanted - held).total()  # by kind; an expert that lies twice makes no other superfluous
    return Placement(cards, host, wanted.total(), _bytes(wanted), on_disk, short, worst if short else "")


def _slots(
    wanted: Mapping[ExpertKind, int], room: int | None, first: Mapping[ExpertKind, int] | None = None
) -> tuple[dict[ExpertKind, int], int]:
    """(slots of each kind, bytes that are missing for one of each): in each kind the same share of what is wanted; of `first`, where that
    is given and does not fit, and at least all of that where it does."""
    if room is None or _bytes(wanted) <= room:
        return dict(wanted), 0
    if first is not None and _bytes(first) > room:
        return _slots(first, room)
    least = dict.fromkeys(wanted, 1) if first is None else dict(first)
    if _bytes(least) > room:
        return least, _bytes(least) - room
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        slots = {kind: max(least[kind], int(share * count)) for kind, count in wanted.items()}
        low, high = (share, high) if _bytes(slots) <= room else (low, share)
    slots = {kind: max(least[kind], int(low * count)) for kind, count in wanted.items()}
    for kind in sorted(wanted, key=lambda kind: -kind.nbytes):  # what rounding left over
        slots[kind] = min(wanted[kind], slots[kind] + (room - _bytes(slots)) // kind.nbytes)
    return slots, 0


def _bytes(slots: Mapping[ExpertKind, int]) -> int:
    return sum(kind.nbytes * count for kind, count in slots.items())


def _best_split(layers: int, cards: Sequence[Card], badness: Callable[[tuple[int, ...]], tuple[float, ...]]) -> tuple[int, ...]:
    """Where the layers of every card end: from shares by size, ends are moved as long as that makes it better."""
    count = len(cards)
    sizes = [max(1, card.memory - card.reserve) for card in cards]
    ends = [round(layers * sum(sizes[: c + 1]) / sum(sizes)) for c in range(count)]
    first: list[int] = []
    for c, end in enumerate(ends):  # every card has a layer, and leaves one to each that follows
        first.append(min(max(end, c + 1, first[-1] + 1 if first else 1), layers - count + c + 1))
    best = tuple(first)
    while True:
        near = [best]
        for low, high in combinations(range(count), 2):  # cards low .. high - 1 end one or more layers later or earlier
            for step in (1, -1, 2, -2, 4, -4):
                moved = tuple(at + step if low <= c < high else at for c, at in enumerate(best))
                if all(before < after for before, after in pairwise((0, *moved))):
                    near.append(moved)
        better = min(near, key=badness)
        if badness(better) >= badness(best):
            return best
        best = better


def _badness(model: Footprint, rig: Rig, plan: Placement) -> tuple[float, float]:
    """Of plans that fit the fastest is the best, and of almost equally fast ones the one whose cards hold the most equal shares.

    Chance makes hits grow evenly with slots, so that it is all one where they are; on text the first slots of a layer hit more often than
    the last ones.
    """
    shares = [card.n_slots / ((card.layers[1] - card.layers[0]) * model.n_experts) for card in plan.cards]
    seconds = expected_seconds(plan, rig, n_experts=model.n_experts, top_k=model.top_k)
    return plan.shortfall, seconds * (1 + _SPREAD_WEIGHT * (max(shares) - min(shares)))
