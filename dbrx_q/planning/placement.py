"""Where a model's bytes lie: a plan from its configuration alone, which the loader follows. No weight is read, none need be downloaded.

Every GPU holds the attention and the experts of a contiguous range of layers, its own keys and values, and a cache of experts; the host
holds as many of the other experts as its budget allows, the disk the rest. Without a GPU the host is the device that computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.config import DbrxConfig

from .expert_kinds import ExpertKind
from .footprint import Footprint, MemoryRequest
from .machine import DevicePlan, Gpu, Machine, Placement
from .offloading import PINNED_BYTES, SCRATCH_SLOTS, first_slots, staging_bytes
from .speed import expected_seconds

__all__ = ["place"]

# What it is worth, in time, that one GPU holds all of its experts and another none.
_SPREAD_WEIGHT = 0.3


def place(config: DbrxConfig, formats: Mapping[str, TensorFormat], machine: Machine, request: MemoryRequest) -> Placement:
    """A plan for a model whose tensors are packed as `formats` says.

    It never fails: a plan that does not fit says by how much.
    """
    model = Footprint.of(config, formats, request)
    if not machine.gpus:
        return _on_host(model, machine)
    layers, count = config.n_layers, len(machine.gpus)
    if layers < count:  # the last GPUs stay empty
        return _on_gpus(model, machine, [min(c + 1, layers) for c in range(count)])
    found: dict[tuple[int, ...], Placement] = {}

    def cost(ends: tuple[int, ...]) -> tuple[float, ...]:
        if ends not in found:
            found[ends] = _on_gpus(model, machine, ends)
        return _cost(model, machine, found[ends])

    return found[_best_split(layers, machine.gpus, cost)]


def _on_host(model: Footprint, machine: Machine) -> Placement:
    layers = len(model.kinds)
    dense = sum(model.dense) + model.embedding + model.head
    kv = layers * model.kv
    wanted = _every(model.kinds, model)
    workspace = model.host_workspace
    fallback: Counter[ExpertKind] = Counter()
    room = None if machine.ram is None else machine.ram - dense - kv - workspace
    slots, short = _slots(wanted, room)
    if slots != wanted and room is not None:
        fallback = _every(model.fallback, model)
        staging = staging_bytes(wanted) + staging_bytes(fallback)  # each is read by threads of its own
        slots, short = _slots(wanted, room - staging - _bytes(fallback))
        workspace += staging
    host = DevicePlan(
        "cpu",
        machine.ram,
        (0, layers),
        dense=dense,
        experts=_bytes(slots),
        fallback=_bytes(fallback),
        kv_cache=kv,
        workspace=workspace,
        slots=slots,
        fallback_slots=fallback,
        dense_read=dense - model.embedding,
    )
    return _placement((), host, wanted, Counter(slots), short, "cpu")


def _on_gpus(model: Footprint, machine: Machine, ends: Sequence[int]) -> Placement:
    """With layers ends[c - 1] .. ends[c] - 1 on GPU c, and a fallback copy where experts are left on disk."""
    plan = _split(model, machine, ends, fallback=False)
    return _split(model, machine, ends, fallback=True) if plan.disk_experts and model.fallback else plan


def _split(model: Footprint, machine: Machine, ends: Sequence[int], *, fallback: bool) -> Placement:
    gpus, short, worst = [], 0, ""
    held: Counter[ExpertKind] = Counter()
    wanted = _every(model.kinds, model)
    for c, (gpu, first, end) in enumerate(zip(machine.gpus, (0, *ends), ends, strict=False)):
        dense = sum(model.dense[first:end])
        dense += model.embedding if c == 0 else 0
        dense += model.head if first < end == len(model.kinds) else 0  # with the last layer, also where GPUs stay empty
        kv = (end - first) * model.kv
        own = _every(model.kinds[first:end], model)
        passing = dict.fromkeys(model.fallback[first:end] if fallback else (), SCRATCH_SLOTS)
        slots, missing = _slots(own, gpu.memory - gpu.reserve - dense - kv - model.gpu_workspace - _bytes(passing))
        if missing > short:
            short, worst = missing, f"cuda:{c}"
        filled = Counter({kind: first_slots(count, own[kind]) for kind, count in slots.items()})
        held += filled
        gpus.append(
            DevicePlan(
                f"cuda:{c}",
                gpu.memory,
                (first, end),
                dense=dense,
                experts=_bytes(slots),
                fallback=_bytes(passing),
                kv_cache=kv,
                workspace=model.gpu_workspace,
                reserve=gpu.reserve,
                slots=slots,
                fallback_slots=passing,
                dense_read=dense - (model.embedding if c == 0 else 0),
                scratch=sum(slots.values()) - sum(filled.values()),
            )
        )
    left = wanted - held
    whole = _every(model.fallback if fallback else (), model)
    workspace = model.helper_workspace if left else 0
    staging = len(gpus) * PINNED_BYTES + staging_bytes(wanted) + staging_bytes(whole) if workspace else 0
    host_slots: dict[ExpertKind, int] = {}
    if left:  # of each kind one at least passes through; with room for more, GPUs may give up what lies here, too
        needed = {kind: max(1, left[kind]) for kind in wanted}
        room = _bytes(needed) if machine.ram is None else machine.ram - workspace - staging - _bytes(whole)
        host_slots, missing = _slots(wanted, room, needed)
        if missing > short:
            short, worst = missing, "cpu"
    host = DevicePlan(
        "cpu",
        machine.ram,
        (0, 0),
        experts=_bytes(host_slots),
        fallback=_bytes(whole),
        workspace=workspace + staging,
        slots=host_slots,
        fallback_slots=whole,
    )
    return _placement(tuple(gpus), host, wanted, held + Counter(host_slots), short, worst)


def _every(kinds: Sequence[ExpertKind], model: Footprint) -> Counter[ExpertKind]:
    """How many experts of each kind the layers have whose experts are of these kinds."""
    return Counter({kind: count * model.n_experts for kind, count in Counter(kinds).items()})


def _placement(
    gpus: tuple[DevicePlan, ...], host: DevicePlan, wanted: Counter[ExpertKind], held: Counter[ExpertKind], short: int, worst: str
) -> Placement:
    on_disk = (wanted - held).total()  # by kind; an expert that lies twice makes no other superfluous
    return Placement(gpus, host, wanted.total(), _bytes(wanted), on_disk, short, worst if short else "")


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


def _best_split(layers: int, gpus: Sequence[Gpu], cost: Callable[[tuple[int, ...]], tuple[float, ...]]) -> tuple[int, ...]:
    """Where the layers of every GPU end: from shares by size, ends are moved as long as that makes it better."""
    count = len(gpus)
    sizes = [max(1, gpu.memory - gpu.reserve) for gpu in gpus]
    ends = [round(layers * sum(sizes[: c + 1]) / sum(sizes)) for c in range(count)]
    first: list[int] = []
    for c, end in enumerate(ends):  # every GPU has a layer, and leaves one to each that follows
        first.append(min(max(end, c + 1, first[-1] + 1 if first else 1), layers - count + c + 1))
    best = tuple(first)
    while True:
        near = [best]
        for low, high in combinations(range(count), 2):  # GPUs low .. high - 1 end one or more layers later or earlier
            for step in (1, -1, 2, -2, 4, -4):
                moved = tuple(at + step if low <= c < high else at for c, at in enumerate(best))
                if all(before < after for before, after in pairwise((0, *moved))):
                    near.append(moved)
        better = min(near, key=cost)
        if cost(better) >= cost(best):
            return best
        best = better


def _cost(model: Footprint, machine: Machine, plan: Placement) -> tuple[float, float]:
    """Of plans that fit the fastest is the best, and of almost equally fast ones the one whose GPUs hold the most equal shares.

    Chance makes hits grow evenly with slots, so that it is all one where they are; on text the first slots of a layer hit more often than
    the last ones.
    """
    shares = [gpu.n_slots / ((gpu.layers[1] - gpu.layers[0]) * model.n_experts) for gpu in plan.gpus]
    seconds = expected_seconds(plan, machine, n_experts=model.n_experts, top_k=model.top_k)
    return plan.shortfall, seconds * (1 + _SPREAD_WEIGHT * (max(shares) - min(shares)))
